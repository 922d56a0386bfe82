"""The table of a cross-validation: every case once, as the network of its fold predicts it, which has not seen it."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from medseg.evaluate import classification, multi_label, segmentation
from medseg.evaluate.outcomes import Outcome

ByFold = Mapping[int, Sequence[Outcome]]
_RATES = ("auc", "accuracy", "sensitivity", "specificity")


def total(
    by_fold: ByFold,
    labels: Mapping[str, int],
    kind: Literal["segmentation", "classification", "multi_label"],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures over all cases with intervals (bootstrap over patients), and `by_fold` the means of each fold.

    `fold_means`, of segmentation: per label the mean and the sample standard deviation of the folds' mean Dice.
    """
    outcomes = [outcome for fold in sorted(by_fold) for outcome in by_fold[fold]]
    measured = [outcome for outcome in outcomes if outcome.measured]
    counts = {"n_cases": len(outcomes), "n_measured": len(measured)}
    if kind != "segmentation":
        measure = multi_label.total if kind == "multi_label" else classification.total
        folds = {str(fold): _rates(measure(found, labels, seed=seed)) for fold, found in by_fold.items()}
        return {**counts, **measure(outcomes, labels, seed=seed), "by_fold": folds}
    means = {
        str(fold): {label: _mean([o.figures[f"dice_{label}"] for o in found if o.measured]) for label in labels}
        for fold, found in sorted(by_fold.items())
    }
    folds_of = {label: [mean[label] for mean in means.values() if not math.isnan(mean[label])] for label in labels}
    spread = {
        label: {"mean": _mean(found), "sd": float(np.std(found, ddof=1)) if len(found) > 1 else math.nan}
        for label, found in folds_of.items()
    }
    return {**counts, **segmentation.total(outcomes, labels, seed=seed), "by_fold": means, "fold_means": spread}


def headline(figures: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that matter, flat."""
    if "mean_dice" not in figures:
        return {f"oof_{name}": value for name, value in _rates(figures).items()}
    flat = {"oof_mean_dice": float(figures["mean_dice"])}
    return flat | {f"oof_dice_{label}": float(found["dice"]["mean"]) for label, found in figures["classes"].items()}


def rows(evidence: Mapping[str, Any]) -> list[dict[str, object]]:
    """The table for the screen: a line per label, or per figure of a classifier."""
    figures = evidence["cross_validation"]
    if "mean_dice" not in figures:
        bounds = ("value", "ci_low", "ci_high")
        return [{"figure": name, **{k: figures[name][k] for k in bounds}} for name in _rates(figures)]
    lines = []
    for label, found in figures["classes"].items():
        dice = found["dice"]
        line: dict[str, object] = {"label": label, "dice": dice["mean"], "ci_low": dice["ci_low"]}
        line |= {"ci_high": dice["ci_high"], "hd95_mm": found["hd95_mm"]["mean"]}
        line |= {"surface_dice": found["surface_dice"]["mean"], "cases": dice["n"]}
        lines.append(line)
    return lines


def table(by_fold: ByFold) -> str:
    """All cases as CSV: fold, case_id, why it was not measured, figures."""
    names = list(dict.fromkeys(name for found in by_fold.values() for outcome in found for name in outcome.figures))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["fold", "case_id", "reason", *names])
    for fold, found in sorted(by_fold.items()):
        for outcome in sorted(found, key=lambda o: o.case.case_id):
            figures = (outcome.figures.get(name, math.nan) for name in names)
            cells = ["" if math.isnan(figure) else f"{figure:.6g}" for figure in figures]
            writer.writerow([fold, outcome.case.case_id, outcome.reason, *cells])
    return buffer.getvalue()


def _rates(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(found[name]["value"]) for name in _RATES if name in found}  # labels have no joint accuracy


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan
