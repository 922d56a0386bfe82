"""The step `evaluate`: predictions and the cohort's labels in, figures out."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from medseg.cohort import Cohort
from medseg.evaluate import classification, localisation, multi_label, segmentation, trust
from medseg.evaluate.outcomes import Outcome, write_outcomes
from medseg.files import UserError, write_json
from medseg.result import Result

_SEED = 0  # of the bootstrap; fixed, so that the same predictions always give the same intervals


def run(
    cohort: Cohort,
    predictions: Path,
    out: Path,
    *,
    split: str,
    bundle_facts: Mapping[str, Any],
    labels: Mapping[str, int],
    kind: Literal["segmentation", "classification", "multi_label"],
    lesions: Path | None = None,
    tolerance_mm: float = 1.0,
    workers: int | None = None,
) -> Result:
    """Compare a prediction folder with the labels of one split of the cohort.

    Args:
        predictions: folder that `predict` wrote: `<case_id>/result.json` and the masks.
        out: where `metrics.json`, `cases.csv`, `cases.json` and `evaluate.json` go.
        bundle_facts: what names the model in `metrics.json`; `operating_point` in it, a mapping with `target` (a
            class) and `threshold` (a probability), says which class is called from where on, as in `predict`.
        labels: name to value of label maps, or class name to index.
        kind: `multi_label` is a classification whose labels are not exclusive; no operating point applies to it.
        lesions: folder of `<case_id>.png` or `.nii.gz` masks against which the activation maps are held.
        tolerance_mm: of the surface Dice.
        workers: processes for masks; by default as many as pay.

    Returns:
        Status `partial` when a case of the split could not be measured: it is listed in `failed` and in `cases.csv`
        with its reason, and enters no mean.

    Raises:
        UserError: the split is empty or has no case that could be measured.
    """
    started = time.monotonic()
    cases = cohort.split(split)
    if lesions is not None and not lesions.is_dir():
        raise UserError(f"{lesions} is not a folder; give the folder of lesion masks.")
    point = _operating_point(bundle_facts)
    if kind == "segmentation":
        outcomes = segmentation.measure(cohort, cases, predictions, labels, tolerance_mm=tolerance_mm, workers=workers)
    elif kind == "multi_label":
        outcomes = multi_label.measure(cases, predictions, labels)
    else:
        outcomes = classification.measure(cases, predictions, labels, point=point)
    failed = _failed(outcomes, split)
    if lesions is not None:
        outcomes = [_located(outcome, predictions, lesions) for outcome in outcomes]
    if kind == "segmentation":
        figures = {"surface_dice_tolerance_mm": tolerance_mm, **segmentation.total(outcomes, labels, seed=_SEED)}
        figures["expected_dice"] = trust.measure(outcomes, labels)
    elif kind == "multi_label":
        figures = multi_label.total(outcomes, labels, seed=_SEED)
    else:
        figures = classification.total(outcomes, labels, point=point, seed=_SEED)
    if lesions is not None:
        figures["localisation"] = localisation.total(outcomes, seed=_SEED)
    about: dict[str, Any] = {"task": kind, "split": split, "cohort_sha256": cohort.sha256, "bundle": dict(bundle_facts)}
    about |= {"n_cases": len(outcomes), "n_measured": len(outcomes) - len(failed), "failed": failed}
    paths = write_outcomes(cohort, outcomes, predictions, out)
    paths["metrics"] = write_json(out / "metrics.json", about | figures)
    headline = {"cases": len(outcomes), "failed": len(failed), **_headline(figures)}
    headline["seconds"] = round(time.monotonic() - started, 2)
    return Result("evaluate", "partial" if failed else "done", paths, headline).write(out)


def _failed(outcomes: Sequence[Outcome], split: str) -> list[dict[str, str]]:
    failed = [{"case_id": o.case.case_id, "reason": o.reason} for o in outcomes if not o.measured]
    if len(failed) == len(outcomes):
        raise UserError(
            f"none of the {len(failed)} cases in split {split!r} could be measured; "
            f"{failed[0]['case_id']}: {failed[0]['reason']}"
        )
    return failed


def _located(outcome: Outcome, predictions: Path, lesions: Path) -> Outcome:
    if not outcome.measured:
        return outcome
    return replace(outcome, figures={**outcome.figures, **localisation.locate(outcome, predictions, lesions)})


def _operating_point(bundle_facts: Mapping[str, Any]) -> classification.Point | None:
    point = bundle_facts.get("operating_point")
    if point is None:
        return None
    try:
        target, threshold = str(point["target"]), float(point["threshold"])
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"operating_point {point!r} lacks target or threshold; calibrate the model again.") from error
    if not 0 <= threshold <= 1:
        raise UserError(f"operating_point.threshold {threshold} is not a probability; calibrate the model again.")
    return target, threshold


def _headline(figures: Mapping[str, Any]) -> dict[str, object]:
    """The numbers that matter, flat: for the run's metrics and the last line of the command line."""
    if "mean_dice" not in figures:
        names = ("auc", "accuracy", "sensitivity", "specificity", "precision", "f1")
        flat = {name: figures[name]["value"] for name in names if name in figures}
        flat |= {f"auc_{label}": found["auc"]["value"] for label, found in figures.get("per_label", {}).items()}
        for label, found in figures.get("per_class", {}).items():
            flat |= {f"{name}_{label}": found[name]["value"] for name in ("auc", "sensitivity", "specificity")}
    else:
        flat = {"mean_dice": figures["mean_dice"]}
        for label, found in figures["classes"].items():
            flat |= {f"{figure}_{label}": found[figure]["mean"] for figure in segmentation.FIGURES}
        for label, found in figures["expected_dice"].items():
            flat |= {f"expected_dice_{name}_{label}": found[name] for name in ("spearman", "absolute_error")}
    if "localisation" in figures:
        flat["map_energy_in_lesion"] = figures["localisation"]["energy_in_mask"]["mean"]
    return {name: round(value, 5) for name, value in flat.items() if math.isfinite(value)}
