"""Probabilities of labels that are not exclusive against the labels that are present."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Case
from medseg.evaluate.classification import read_probs
from medseg.evaluate.outcomes import Outcome, reason_of
from medseg.files import UserError
from medseg.label_sets import THRESHOLD, call_labels, read_set, write_set
from medseg.statistics import Rows, aucs, bootstrap_auc, bootstrap_rows, mean_of, proportion, shares

Array = NDArray[np.float64]
Truth = NDArray[np.bool_]


def measure(cases: Sequence[Case], predictions: Path, labels: Mapping[str, int]) -> list[Outcome]:
    """Compare each case's probabilities with its labels; a label is called from 0.5 on.

    Returns:
        One outcome per case: figures `p_<label>`, and as score the lowest probability given to the truth about any
        label (of an absent one 1 - p): below 0.5 at least one label is called wrongly.
    """
    names = sorted(labels, key=lambda name: labels[name])
    return [_compare(case, predictions, names, labels) for case in cases]


def total(outcomes: Sequence[Outcome], labels: Mapping[str, int], *, seed: int = 0) -> dict[str, object]:
    """AUC, sensitivity and specificity of each label (`per_label`, with the number of cases that have it), their means
    over the labels, all with 95 % intervals, and the means by site.

    A label that no case or every case of the group has is left out of a mean for which it has no figure. The interval
    of a mean leaves out the draws that have no case with, or none without, one of its labels.
    """
    names = sorted(labels, key=lambda name: labels[name])
    measured = [outcome for outcome in outcomes if outcome.measured]
    sites = {}
    for site in sorted({outcome.case.site for outcome in measured if outcome.case.site}):
        sites[site] = _means([outcome for outcome in measured if outcome.case.site == site], names, seed)
    per_label = _per_label(measured, names, seed)
    return {"threshold": THRESHOLD, "per_label": per_label, **_means(measured, names, seed), "sites": sites}


def _compare(case: Case, predictions: Path, names: Sequence[str], labels: Mapping[str, int]) -> Outcome:
    present = set(read_set(case.target))
    try:
        if not present <= labels.keys():
            reason = f"the cohort gives no labels among {', '.join(names)} for this case; ingest with --labels."
            raise UserError(reason)
        probs = read_probs(predictions, case.case_id, names)
    except UserError as error:
        return Outcome(case, reason=reason_of(error, predictions), target=case.target)
    return Outcome(
        case,
        score=min(p if name in present else 1 - p for name, p in probs.items()),
        figures={f"p_{name}": p for name, p in probs.items()},
        target=write_set(present, labels),
        predicted=write_set(call_labels(probs), labels),
        probs=probs,
    )


def _arrays(outcomes: Sequence[Outcome], names: Sequence[str]) -> tuple[Truth, Array]:
    """Whether each label is present, and its probability, both (n, labels)."""
    present = [read_set(outcome.target) for outcome in outcomes]
    truth = np.array([[name in found for name in names] for found in present], dtype=bool)
    probs = np.array([[outcome.probs[name] for name in names] for outcome in outcomes], dtype=np.float64)
    return truth.reshape(len(outcomes), len(names)), probs.reshape(len(outcomes), len(names))


def _per_label(outcomes: Sequence[Outcome], names: Sequence[str], seed: int) -> dict[str, object]:
    truth, probs = _arrays(outcomes, names)
    patients = [outcome.case.patient_id for outcome in outcomes]
    rows: dict[str, object] = {}
    for k, name in enumerate(names):
        ones, called = truth[:, k], probs[:, k] >= THRESHOLD
        owners = np.array(patients, dtype=object)
        rows[name] = {
            "n_positive": int(ones.sum()),
            "auc": asdict(bootstrap_auc(ones, probs[:, k], patients, seed=seed)),
            "sensitivity": asdict(proportion(called[ones], list(owners[ones]), seed=seed)),
            "specificity": asdict(proportion(~called[~ones], list(owners[~ones]), seed=seed)),
        }
    return rows


def _means(outcomes: Sequence[Outcome], names: Sequence[str], seed: int) -> dict[str, object]:
    truth, probs = _arrays(outcomes, names)
    patients = [outcome.case.patient_id for outcome in outcomes]
    called = probs >= THRESHOLD
    with_it, without_it = truth.any(axis=0), ~truth.all(axis=0)
    figures: dict[str, list[Rows]] = {
        "auc": [partial(aucs, truth[:, k], probs[:, k]) for k in np.flatnonzero(with_it & without_it)],
        "sensitivity": [partial(shares, called[:, k], truth[:, k]) for k in np.flatnonzero(with_it)],
        "specificity": [partial(shares, ~called[:, k], ~truth[:, k]) for k in np.flatnonzero(without_it)],
    }
    means = {
        name: asdict(bootstrap_rows(mean_of(of_labels), patients, seed=seed)) for name, of_labels in figures.items()
    }
    return {"n": len(outcomes), **means}
