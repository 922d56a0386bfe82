"""How far two models differ on the same cases.

Intervals that overlap do not say that two models are alike, since hard cases are hard for both. Here each draw of the
bootstrap holds the same patients for both, so what they share cancels out.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.evaluate.outcomes import Outcome
from medseg.label_sets import read_set
from medseg.statistics import Rows, aucs, bootstrap_rows, mean_of, shares

Array = NDArray[np.float64]
Truth = NDArray[np.bool_]


def differences(
    first: Sequence[Outcome], other: Sequence[Outcome], *, positive: str | None = None, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Each figure of `other` less that of `first`, with its 95 % interval (paired bootstrap over patients).

    Args:
        first, other: of two models; cases that one of them lacks, or could not be measured with, are left out.
        positive: the class whose AUC, sensitivity and specificity are meant; without it their means over the classes.
        seed: of the draws.

    Returns:
        By name: of a classifier `auc`, `accuracy`, `sensitivity` and `specificity`; of a segmentation `dice_<label>`,
        `iou_<label>`, and `mean_dice`, the mean over the labels. Each with value, ci_low, ci_high, n; empty where no
        case is in both.
    """
    others = {outcome.case.case_id: outcome for outcome in other if outcome.measured}
    mine = [o for o in first if o.measured and o.case.case_id in others]
    theirs = [others[o.case.case_id] for o in mine]
    if not mine:
        return {}
    figures = _rates(mine, theirs, positive) if mine[0].probs else _overlaps(mine, theirs)
    patients = [outcome.case.patient_id for outcome in mine]
    return {
        name: asdict(replace(bootstrap_rows(partial(_less, of_other, of_first), patients, seed=seed), n=n))
        for name, (of_first, of_other, n) in figures.items()
    }


_Figures = dict[str, tuple[Rows, Rows, int]]
"""By name the statistic of the first, that of the other, and the number of cases on which both are defined."""


def _less(one: Rows, other: Rows, weights: Array) -> Array:
    return one(weights) - other(weights)


def _overlaps(first: Sequence[Outcome], other: Sequence[Outcome]) -> _Figures:
    figures: _Figures = {}
    for name in first[0].figures:
        a, b = (np.array([o.figures.get(name, math.nan) for o in found]) for found in (first, other))
        kept = ~np.isnan(a) & ~np.isnan(b)
        if name.startswith(("dice_", "iou_")) and kept.any():
            figures[name] = partial(_mean, a, kept), partial(_mean, b, kept), int(kept.sum())
    dice = [found for name, found in figures.items() if name.startswith("dice_")]
    of_first, of_other = mean_of([a for a, _, _ in dice]), mean_of([b for _, b, _ in dice])
    return {"mean_dice": (of_first, of_other, len(first)), **figures} if dice else {}


def _rates(first: Sequence[Outcome], other: Sequence[Outcome], positive: str | None) -> _Figures:
    names = list(first[0].probs) if positive is None else [positive]
    a, b = (_statistics(found, names) for found in (first, other))
    return {name: (a[name], b[name], len(first)) for name in a}


def _statistics(outcomes: Sequence[Outcome], names: Sequence[str]) -> dict[str, Rows]:
    """Figures of classes or labels against the rest, as means over those of which there are cases."""
    truth, called = (
        np.array([[name in read_set(cell) for name in names] for cell in cells])
        for cells in ([o.target for o in outcomes], [o.predicted for o in outcomes])
    )
    probs = np.array([[o.probs[name] for name in names] for o in outcomes])
    right = np.array([o.target == o.predicted for o in outcomes], dtype=np.float64)
    with_it, without_it = truth.any(axis=0), ~truth.all(axis=0)
    return {
        "auc": mean_of([partial(aucs, truth[:, k], probs[:, k]) for k in np.flatnonzero(with_it & without_it)]),
        "accuracy": partial(_mean, right, np.ones(len(right), dtype=bool)),
        "sensitivity": mean_of([partial(shares, called[:, k], truth[:, k]) for k in np.flatnonzero(with_it)]),
        "specificity": mean_of([partial(shares, ~called[:, k], ~truth[:, k]) for k in np.flatnonzero(without_it)]),
    }


def _mean(values: Array, kept: Truth, weights: Array) -> Array:
    """Of the cases that are kept, for each row of weights (draws, n); NaN where none of them was drawn."""
    size = weights @ kept.astype(np.float64)
    found = weights @ np.where(kept, values, 0.0)
    return np.asarray(np.divide(found, size, out=np.full(len(weights), math.nan), where=size > 0))
