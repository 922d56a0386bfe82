"""Runs, models and their history in MLflow; the only room that imports mlflow, and only when it is used."""

from medseg.tracking.lifecycle import close_dead_run, close_dead_runs, run_url, track
from medseg.tracking.registry import (
    ModelVersion,
    fetch_model,
    find_version,
    list_models,
    record_audit,
    record_override,
    set_alias,
    show_model,
)
from medseg.tracking.tracker import Tracker

__all__ = [
    "ModelVersion",
    "Tracker",
    "close_dead_run",
    "close_dead_runs",
    "fetch_model",
    "find_version",
    "list_models",
    "record_audit",
    "record_override",
    "run_url",
    "set_alias",
    "show_model",
    "track",
]
