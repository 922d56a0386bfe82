"""Masks against label maps, on the scan's own grid."""

import math
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from medseg.cohort import Case, Cohort
from medseg.evaluate.outcomes import Outcome, read_result, reason_of
from medseg.files import UserError
from medseg.images import read_image
from medseg.metrics import compare_masks
from medseg.progress import progress
from medseg.statistics import summarise
from medseg.volume import Volume

FIGURES = ("dice", "hd95_mm", "surface_dice", "volume_error_ml")
_GRID_TOLERANCE_MM = 1e-3
_VOXELS_IN_ONE_PROCESS = 250e6  # voxels times classes; about ten seconds, below which starting processes costs more


def measure(
    cohort: Cohort,
    cases: Sequence[Case],
    predictions: Path,
    labels: Mapping[str, int],
    *,
    tolerance_mm: float = 1.0,
    workers: int | None = None,
) -> list[Outcome]:
    """Compare each case's `mask.nii.gz` (or `mask.png`) with its label map.

    Args:
        workers: processes; by default one per core when there is enough to do, else none beside this one.

    Returns:
        One outcome per case: figures `<figure>_<label>`, NaN for labels that the case does not annotate, and as score
        the mean Dice over the others that the case or its prediction has.
    """
    jobs = [
        (case, cohort.folder, predictions, dict(labels), _unknown(cohort, case, labels), tolerance_mm) for case in cases
    ]
    if workers is None:
        work = sum(math.prod(case.shape) for case in cases) * len(labels)
        workers = min(os.cpu_count() or 1, len(cases)) if work > _VOXELS_IN_ONE_PROCESS else 1
    with progress("Comparing with the labels", len(cases)) as shown:
        outcomes = []
        for outcome in _map(jobs, workers):
            outcomes.append(outcome)
            shown.advance()
    return outcomes


def total(outcomes: Sequence[Outcome], labels: Mapping[str, int], *, seed: int = 0) -> dict[str, object]:
    """Figures per class with intervals, `mean_dice` (mean over classes), and Dice by site where sites are known.

    Where a case does not annotate all labels, `annotated` has the number of cases measured that annotate each.
    """
    measured = [outcome for outcome in outcomes if outcome.measured]
    patients = [outcome.case.patient_id for outcome in measured]
    classes = {
        label: {
            figure: asdict(summarise([o.figures[f"{figure}_{label}"] for o in measured], patients, seed=seed))
            for figure in FIGURES
        }
        for label in labels
    }
    means = [figures["dice"]["mean"] for figures in classes.values() if not math.isnan(figures["dice"]["mean"])]
    sites = {}
    for site in sorted({outcome.case.site for outcome in measured if outcome.case.site}):
        here = [outcome for outcome in measured if outcome.case.site == site]
        owners = [outcome.case.patient_id for outcome in here]
        sites[site] = {"n": len(here)} | {
            f"dice_{label}": asdict(summarise([o.figures[f"dice_{label}"] for o in here], owners, seed=seed))
            for label in labels
        }
    found = {"classes": classes, "mean_dice": float(np.mean(means)) if means else math.nan, "sites": sites}
    if any(outcome.not_annotated for outcome in measured):
        found["annotated"] = {label: sum(label not in o.not_annotated for o in measured) for label in labels}
    return found


_Job = tuple[Case, Path, Path, dict[str, int], tuple[str, ...], float]


def _unknown(cohort: Cohort, case: Case, labels: Mapping[str, int]) -> tuple[str, ...]:
    """The labels that the case does not annotate."""
    known = cohort.annotated(case) if case.annotated else labels.values()
    return tuple(name for name, value in labels.items() if value not in known)


def _map(jobs: Sequence[_Job], workers: int) -> Iterator[Outcome]:
    if workers <= 1:
        yield from map(_compare, jobs)
        return
    # spawn: forking a process that runs the threads of a network or of a flow engine can deadlock
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compare, jobs)


def _compare(job: _Job) -> Outcome:
    case, cohort_dir, predictions, labels, unknown, tolerance_mm = job
    mask_path = predictions / case.case_id / ("mask.png" if case.kind == "radiograph" else "mask.nii.gz")
    try:
        if not case.label:
            raise UserError("the cohort has no label for this case; ingest it with --labels.")
        read_result(predictions, case.case_id)
        ref, pred = read_image(cohort_dir / case.label), read_image(mask_path)
        _check_grids(ref, pred)
    except UserError as error:
        return Outcome(case, reason=reason_of(error, cohort_dir, predictions))
    figures: dict[str, float] = {}
    for name, value in labels.items():
        if name in unknown:
            figures |= {f"{figure}_{name}": math.nan for figure in FIGURES}
        else:
            figures |= _figures(name, pred.array == value, ref.array == value, case, ref, tolerance_mm)
    dice = [figures[f"dice_{name}"] for name in labels if not math.isnan(figures[f"dice_{name}"])]
    score = float(np.mean(dice)) if dice else 1.0
    return Outcome(case, score=score, figures=figures, pred=mask_path, not_annotated=unknown)


def _figures(
    name: str, pred: np.ndarray, ref: np.ndarray, case: Case, grid: Volume, tolerance_mm: float
) -> dict[str, float]:
    """A radiograph has no volume, and distances in mm only where its pixel spacing is known."""
    spacing = grid.spacing_mm if pred.ndim == 3 else case.spacing_mm
    found = asdict(compare_masks(pred, ref, spacing or (1.0, 1.0), tolerance_mm))
    if pred.ndim == 2:
        found["volume_error_ml"] = math.nan
        if not spacing:
            found |= {"hd95_mm": math.nan, "surface_dice": math.nan}
    return {f"{figure}_{name}": found[figure] for figure in FIGURES}


def _check_grids(ref: Volume, pred: Volume) -> None:
    if ref.array.shape != pred.array.shape:
        raise UserError(f"the mask has shape {pred.array.shape}, the label {ref.array.shape}; predict the case again.")
    shift = float(np.abs(ref.affine - pred.affine).max())
    if shift > _GRID_TOLERANCE_MM:
        raise UserError(f"the mask's affine differs from the label's by {shift:.4g}; predict the case again.")
