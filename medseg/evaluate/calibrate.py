"""From logits and known classes to a verdict: which mapping, which threshold, and how sure both are."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from medseg.cohort import Case, Cohort
from medseg.config import VerdictConfig
from medseg.data.lung_view import LungView
from medseg.evaluate.calibration import (
    cases_to_halve,
    choose_threshold,
    expected_threshold,
    fit_isotonic,
    fit_platt,
    fit_temperature,
    quality,
    rates,
    reliability,
    yield_at,
)
from medseg.evaluate.outcomes import Outcome
from medseg.evaluate.scoring import Scorer
from medseg.evaluate.subgroups import auc, read_groups, tabulate
from medseg.files import UserError
from medseg.plan import Plan
from medseg.statistics import Estimate
from medseg.verdict import Method, Verdict, margins, sigmoid

ISOTONIC_FROM = 500
"""Cases from which `auto` takes isotonic regression, which needs many to do better than one parameter."""

PLATT_BELOW = 100
"""Cases of a new site below which isotonic regression is refused."""

_SEED = 0
_QUANTILES = 100
Array = NDArray[np.float64]


class CannotCalibrate(UserError):
    """The cases at hand allow no calibration: too few, one class only, or scores that run against the classes."""


def positive_class(config: VerdictConfig, labels: Mapping[str, int]) -> str | None:
    """The class to refer: the configured one, else class 1 of two, else none."""
    if config.positive is not None or len(labels) != 2:
        return config.positive
    return next(name for name, value in labels.items() if value == 1)


def _class_to_refer(config: VerdictConfig, labels: Mapping[str, int]) -> str:
    positive = positive_class(config, labels)
    if positive is None:
        raise CannotCalibrate(
            f"verdict.positive is not set and there are {len(labels)} classes; name the class to refer."
        )
    return positive


def calibrate(
    net: nn.Module,
    plan: Plan,
    labels: Mapping[str, int],
    cohort: Cohort,
    cases: Sequence[Case],
    config: VerdictConfig,
    *,
    split: str,
    trained_sites: Sequence[str] | None = None,
    new_site: bool = False,
    earlier: Verdict | None = None,
    lungs: LungView | None = None,
    mirror_axes: Sequence[int] = (),
) -> Verdict:
    """Fit the verdict of a network on labelled cases that it was not trained on.

    Args:
        split: named in the result; empty for a whole cohort.
        trained_sites: where the training cases come from, if known; kept for the audit.
        new_site: the cases come from elsewhere than the training cases, so that the prevalence and with it the shift
            differ: `auto` fits slope and shift below 500 cases, and isotonic regression is refused below 100.
        earlier: what the model had before; the spread of its positive cases helps to find the threshold at a new site.
        lungs: what the network sees of a radiograph; by default all.
        mirror_axes: logits are averaged over flips along them.

    Raises:
        CannotCalibrate: no positive class is known, too few cases, one class only, or scores against the classes.
        UserError: an image is missing or damaged.
    """
    positive = _class_to_refer(config, labels)
    known = [case for case in cases if case.target in labels]
    truth = np.array([case.target == positive for case in known], dtype=bool)
    check_cases(truth, config, cohort.folder)
    scorer = Scorer(net, plan, lungs, mirror_axes)
    margin = margins(scorer.score(cohort, known, what="Calibrating"), labels[positive])
    facts: dict[str, Any] = {"cohort_sha256": cohort.sha256, "split": split, "new_site": new_site}
    facts["trained_sites"] = trained_sites
    patients = [case.patient_id for case in known]
    method = choose_method(config.method, len(known), new_site)
    lent = earlier if new_site and earlier is not None and earlier.positive == positive else None
    groups = read_groups(cohort, known)
    return fit(margin, truth, patients, positive, method, config, groups=groups, facts=facts, earlier=lent)


def calibrate_out_of_fold(
    outcomes: Sequence[Outcome], labels: Mapping[str, int], config: VerdictConfig, *, cohort_sha256: str
) -> Verdict:
    """Fit the verdict of joined folds on what single networks say of cases that they have not seen.

    The joined networks err less than each of them, so that sensitivity and specificity are rather too low than too
    high. Their margins spread less, too: a mapping with one parameter is taken where none is named.

    Args:
        outcomes: with probabilities that are the softmax of logits.

    Raises:
        CannotCalibrate: no positive class is known, too few cases, one class only, or scores against the classes.
    """
    positive = _class_to_refer(config, labels)
    known = [outcome for outcome in outcomes if outcome.measured and outcome.target in labels]
    truth = np.array([outcome.target == positive for outcome in known], dtype=bool)
    check_cases(truth, config, "the cross-validation")
    smallest = np.finfo(np.float64).tiny
    logs = [[np.log(max(outcome.probs[name], smallest)) for name in labels] for outcome in known]
    sites = [outcome.case.site for outcome in known]
    facts = {"cohort_sha256": cohort_sha256, "split": "train and val, out of fold", "new_site": False}
    return fit(
        margins(logs, list(labels).index(positive)),
        truth,
        [outcome.case.patient_id for outcome in known],
        positive,
        "temperature" if config.method == "auto" else config.method,
        config,
        groups={"site": sites} if len(set(sites)) > 1 else {},
        facts={**facts, "trained_sites": sorted(set(sites))},
    )


def check_cases(truth: NDArray[np.bool_], config: VerdictConfig, where: object) -> None:
    """Enough labelled cases, and enough of each class. Raises CannotCalibrate saying what is missing."""
    ones, zeros = int(truth.sum()), int((~truth).sum())
    if len(truth) < config.min_cases or min(ones, zeros) < config.min_per_class:
        raise CannotCalibrate(
            f"{where} has {ones} positive and {zeros} negative labelled cases; label more: a calibration needs "
            f"{config.min_cases} (verdict.min_cases), {config.min_per_class} of each (verdict.min_per_class)."
        )


def choose_method(method: str, cases: int, new_site: bool) -> Method:
    """The mapping for a number of cases. Raises CannotCalibrate for isotonic regression on few of a new site."""
    if method == "isotonic" and new_site and cases < PLATT_BELOW:
        reason = f"verdict.method isotonic needs {PLATT_BELOW} cases of a new site, not {cases}"
        raise CannotCalibrate(f"{reason}; take platt.")
    if method == "auto":
        return "isotonic" if cases >= ISOTONIC_FROM else "platt" if new_site else "temperature"
    return "temperature" if method == "temperature" else "platt" if method == "platt" else "isotonic"


def fit(
    margin: Array,
    truth: NDArray[np.bool_],
    patients: Sequence[str],
    positive: str,
    method: Method,
    config: VerdictConfig,
    *,
    groups: Mapping[str, Sequence[str]],
    facts: Mapping[str, Any],
    earlier: Verdict | None = None,
) -> Verdict:
    """The verdict from margins (n,), known classes (n,), patients (n,), groups, and what the model had before.

    Raises:
        UserError: the scores run against the known classes.
    """
    scale, shift = 1.0, 0.0
    knots: tuple[tuple[float, float], ...] = ()
    try:
        if method == "temperature":
            scale = 1 / fit_temperature(margin, truth)
        elif method == "platt":
            scale, shift = fit_platt(margin, truth)
        else:
            knots = fit_isotonic(margin, truth)
    except ValueError as error:
        raise CannotCalibrate(f"the model cannot be calibrated on these cases: {error}.") from error
    mapped = Verdict(positive, method, 0.5, scale, shift, knots)
    probs = mapped.probability(margin)
    threshold = choose_threshold(probs, truth, config.target_sensitivity)
    positives = _quantiles(margin[truth])
    if earlier is not None and earlier.positives and config.borrowed_cases and method != "isotonic":
        positives = earlier.positives
        at = expected_threshold(margin, truth, positives, config.target_sensitivity, config.borrowed_cases)
        threshold = float(mapped.probability([at])[0])
        facts = {**facts, "borrowed": {"cases": config.borrowed_cases, "calibration": earlier.id}}
    return Verdict(
        positive,
        method,
        threshold,
        scale,
        shift,
        knots,
        withhold=config.withhold,
        point=operating_point(probs, truth, threshold, config),
        quality={
            "before": quality(sigmoid(margin), truth, patients),
            "after": quality(probs, truth, patients),
            "auc": asdict(auc(margin, truth, patients, seed=_SEED)),
            "reliability": reliability(probs, truth),
        },
        subgroups=tuple(tabulate(probs, truth, threshold, groups, patients, seed=_SEED)),
        fitted={**facts, "n": len(truth), "n_positive": int(truth.sum())},
        positives=positives,
    )


def _quantiles(margin: Array) -> tuple[float, ...]:
    """At most 100 margins that stand for all: the middles of as many parts of equal size."""
    count = min(len(margin), _QUANTILES)
    return tuple(round(float(z), 6) for z in np.quantile(margin, (np.arange(count) + 0.5) / count, method="hazen"))


def operating_point(probs: Array, truth: NDArray[np.bool_], threshold: float, config: VerdictConfig) -> dict[str, Any]:
    """Sensitivity and specificity with exact intervals, and what they mean at the stated prevalence.

    The bounds of the yield are those at the worse and at the better ends of both intervals together: wide, and never
    narrower than the truth.
    """
    sensitivity, specificity = rates(probs, truth, threshold)
    middle = yield_at(sensitivity.value, specificity.value, config.prevalence)
    worse = yield_at(sensitivity.ci_low, specificity.ci_low, config.prevalence)
    better = yield_at(sensitivity.ci_high, specificity.ci_high, config.prevalence)
    fewest = yield_at(sensitivity.ci_low, specificity.ci_high, config.prevalence)
    most = yield_at(sensitivity.ci_high, specificity.ci_low, config.prevalence)
    n = len(truth)
    return {
        "target_sensitivity": config.target_sensitivity,
        "threshold": threshold,
        "sensitivity": asdict(sensitivity),
        "specificity": asdict(specificity),
        "more_to_halve": {
            "positive": cases_to_halve(round(sensitivity.value * sensitivity.n), sensitivity.n),
            "negative": cases_to_halve(round(specificity.value * specificity.n), specificity.n),
        },
        "prevalence": config.prevalence,
        "referral_rate": asdict(Estimate(middle.referral_rate, fewest.referral_rate, most.referral_rate, n)),
        "ppv": asdict(Estimate(middle.ppv, worse.ppv, better.ppv, n)),
        "npv": asdict(Estimate(middle.npv, worse.npv, better.npv, n)),
    }
