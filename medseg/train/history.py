"""The figures of a training's epochs, on disk and in MLflow."""

from pathlib import Path

from medseg.files import write_rows
from medseg.tracking import Tracker
from medseg.train.loop import Training


def log_epoch(training: Training, history: Path, tracker: Tracker, figures: dict[str, float]) -> None:
    """Write the whole history as a table, and log the figures of the epoch that has ended."""
    columns: dict[str, None] = {}
    for row in training.history:
        columns.update(dict.fromkeys(row))
    write_rows(history, list(columns), training.history)
    tracker.log_metrics({name: value for name, value in figures.items() if name != "step"}, step=int(figures["step"]))
