"""Class probabilities against known classes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Case
from medseg.evaluate.calibration import quality, reliability
from medseg.evaluate.outcomes import Outcome, read_result, reason_of
from medseg.files import UserError
from medseg.metrics import confusion, roc_curve
from medseg.statistics import Estimate, aucs, bootstrap, bootstrap_auc, bootstrap_rows, proportion

Array = NDArray[np.float64]
Point = tuple[str, float]  # that class is called when its probability reaches the threshold


def measure(
    cases: Sequence[Case], predictions: Path, labels: Mapping[str, int], *, point: Point | None = None
) -> list[Outcome]:
    """Compare each case's probabilities with its class.

    Args:
        point: the operating point; a case below it is given the most probable other class. By default class 1 from
            0.5 on with two classes, the most probable class with more.

    Returns:
        One outcome per case: figures `p_<class>`, and as score the probability of the true class.
    """
    names = sorted(labels, key=lambda name: labels[name])
    return [_compare(case, predictions, names, _point(names, point)) for case in cases]


def total(
    outcomes: Sequence[Outcome], labels: Mapping[str, int], *, point: Point | None = None, seed: int = 0
) -> dict[str, object]:
    """AUC, accuracy, sensitivity and specificity with 95 % intervals, the confusion matrix, and the same by site.

    With two classes the figures are those of the positive one, that of the operating point. With more, AUC, sensitivity
    and specificity are means over the classes, and `per_class` has the figures of each against the rest. Of the class
    of the operating point, where there is one, `roc` holds the curve, and `calibration` says how far its probabilities
    are from the shares that they promise.
    """
    names = sorted(labels, key=lambda name: labels[name])
    used = _point(names, point)
    marked = names.index(used[0]) if used else None
    positive = marked if len(names) == 2 else None
    measured = [outcome for outcome in outcomes if outcome.measured]
    figures = _figures(measured, names, positive, seed)
    sites = {}
    for site in sorted({outcome.case.site for outcome in measured if outcome.case.site}):
        sites[site] = _figures([outcome for outcome in measured if outcome.case.site == site], names, positive, seed)
    truth, probs, called = _arrays(measured, names)
    more: dict[str, object] = {"classes": names, "threshold": used[1] if used else None}
    more["confusion"] = confusion(truth, called, len(names))
    more["positive"] = used[0] if used else None
    if marked is not None:
        more["roc"] = _roc(truth == marked, probs[:, marked])
        more["calibration"] = _calibration(truth == marked, probs[:, marked], measured, seed)
    if positive is None:
        patients = [outcome.case.patient_id for outcome in measured]
        more["per_class"] = {
            name: {"n": int((truth == k).sum())}
            | _against_the_rest(truth == k, called == k, probs[:, k], patients, seed)
            for k, name in enumerate(names)
        }
    return {**more, **figures, "sites": sites}


def _compare(case: Case, predictions: Path, names: Sequence[str], point: Point | None) -> Outcome:
    try:
        if case.target not in names:
            raise UserError(f"the cohort gives no class among {', '.join(names)} for this case; ingest with --labels.")
        probs = read_probs(predictions, case.case_id, names)
    except UserError as error:
        return Outcome(case, reason=reason_of(error, predictions), target=case.target)
    rest = probs
    if point is not None:
        rest = {name: p for name, p in probs.items() if (name == point[0]) == (probs[point[0]] >= point[1])}
    predicted = max(rest, key=lambda name: rest[name])
    return Outcome(
        case,
        score=probs[case.target],
        figures={f"p_{name}": p for name, p in probs.items()},
        target=case.target,
        predicted=predicted,
        probs=probs,
    )


def read_probs(predictions: Path, case_id: str, names: Sequence[str]) -> dict[str, float]:
    """The probability of each name in the prediction's `result.json`. Raises UserError where there is none."""
    found = read_result(predictions, case_id).get("probs") or {}
    if missing := [name for name in names if not isinstance(found.get(name), int | float)]:
        raise UserError(f"its result.json has no probability of {missing[0]!r}; predict the case again.")
    return {name: float(found[name]) for name in names}


def _point(names: Sequence[str], given: Point | None) -> Point | None:
    if given is not None and given[0] not in names:
        raise UserError(f"operating_point names class {given[0]!r}, which is none of {', '.join(names)}.")
    return given or ((names[1], 0.5) if len(names) == 2 else None)


def _arrays(outcomes: Sequence[Outcome], names: Sequence[str]) -> tuple[NDArray[np.int64], Array, NDArray[np.int64]]:
    """True class (n,), probabilities (n, classes), called class (n,)."""
    truth = np.array([names.index(o.target) for o in outcomes], dtype=np.int64)
    called = np.array([names.index(o.predicted) for o in outcomes], dtype=np.int64)
    probs = np.array([[o.probs[name] for name in names] for o in outcomes], dtype=np.float64)
    return truth, probs.reshape(len(outcomes), len(names)), called


def _figures(outcomes: Sequence[Outcome], names: Sequence[str], positive: int | None, seed: int) -> dict[str, object]:
    truth, probs, called = _arrays(outcomes, names)
    patients = [outcome.case.patient_id for outcome in outcomes]
    accuracy = asdict(proportion(called == truth, patients, seed=seed))
    if positive is not None:
        found = _against_the_rest(truth == positive, called == positive, probs[:, positive], patients, seed)
        return {"n": len(outcomes), "auc": found["auc"], "accuracy": accuracy, **found}
    present = sorted(set(truth.tolist()))
    return {
        "n": len(outcomes),
        "auc": asdict(bootstrap_rows(partial(_mean_auc, truth, probs, present), patients, seed=seed)),
        "accuracy": accuracy,
        **{
            name: asdict(bootstrap(partial(_mean_share, called, truth, present, of_class), patients, seed=seed))
            for name, of_class in (("sensitivity", True), ("specificity", False))
        },
    }


def _against_the_rest(
    ones: NDArray[np.bool_], picked: NDArray[np.bool_], score: Array, patients: Sequence[str], seed: int
) -> dict[str, object]:
    """Figures of one class (`ones` are of it, `picked` called so) against all others."""
    return {
        "auc": asdict(bootstrap_auc(ones, score, patients, seed=seed)),
        "sensitivity": asdict(_share(picked, ones, patients, seed)),
        "specificity": asdict(_share(~picked, ~ones, patients, seed)),
        "precision": asdict(_share(ones, picked, patients, seed)),
        "f1": asdict(bootstrap(lambda w: _f1(ones, picked, w), patients, seed=seed)),
    }


def _f1(ones: NDArray[np.bool_], picked: NDArray[np.bool_], weights: Array) -> float:
    """2 TP / (2 TP + FP + FN); NaN when nothing is positive and nothing is called so."""
    size = float(weights[ones].sum() + weights[picked].sum())
    return 2 * float(weights[ones & picked].sum()) / size if size > 0 else math.nan


def _calibration(
    truth: NDArray[np.bool_], probs: Array, outcomes: Sequence[Outcome], seed: int
) -> dict[str, object] | None:
    """Calibration error, Brier score and negative log-likelihood with intervals over patients; the curve behind."""
    if not len(outcomes):
        return None
    patients = [outcome.case.patient_id for outcome in outcomes]
    return {"reliability": reliability(probs, truth), **quality(probs, truth, patients, seed=seed)}


def _share(hits: NDArray[np.bool_], among: NDArray[np.bool_], patients: Sequence[str], seed: int) -> Estimate:
    return proportion(hits[among], [p for p, counts in zip(patients, among, strict=True) if counts], seed=seed)


def _mean_share(
    called: NDArray[np.int64], truth: NDArray[np.int64], present: Sequence[int], of_class: bool, weights: Array
) -> float:
    """Mean over classes of the sensitivity (`of_class`) or the specificity of each against the rest."""
    shares = []
    for k in present:
        among = (truth == k) == of_class
        if (weight := float(weights[among].sum())) <= 0:
            raise ValueError(f"no case of class {k} was drawn.")
        shares.append(float(weights[among & ((called == k) == of_class)].sum()) / weight)
    return float(np.mean(shares)) if shares else math.nan


def _mean_auc(truth: NDArray[np.int64], probs: Array, present: Sequence[int], weights: Array) -> Array:
    """(draws,) mean over classes for each row of weights (draws, n)."""
    areas = [aucs(truth == k, probs[:, k], weights) for k in present]
    return np.mean(areas, axis=0) if areas else np.full(len(weights), math.nan)


def _roc(truth: NDArray[np.bool_], score: Array) -> dict[str, object] | None:
    if len(set(truth.tolist())) < 2:
        return None
    fpr, tpr, _ = roc_curve(truth, score)
    return {"fpr": fpr, "tpr": tpr}
