"""The road: each verb as one function, called alike by the command line and by the Prefect flows.

A function here resolves names (configs, runs, models), opens the run in MLflow and calls the steps; it computes
nothing itself. Heavy rooms are imported where they are used, so that a verb loads only what it needs.
"""

from medseg.config import load_config as load
from medseg.road.judging import audit, evaluate, report
from medseg.road.learning import ingest, plan, pretrain, train
from medseg.road.using import explain, predict, store

__all__ = ["audit", "evaluate", "explain", "ingest", "load", "plan", "predict", "pretrain", "report", "store", "train"]
