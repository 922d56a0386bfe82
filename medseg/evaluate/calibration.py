"""Calibration and operating points as pure functions on margins (log odds), probabilities and known classes.

Throughout, `truth` is (n,) 0 or 1, `margin` (n,) log odds as the network gives them, `probs` (n,) in [0, 1], and
`weights` (n,) how often each case counts, 1 by default.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from medseg.statistics import Estimate, bootstrap
from medseg.verdict import sigmoid

Array = NDArray[np.float64]

ECE_BINS = 10
_MIN_PROBABILITY = 1e-7
_LOG_TEMPERATURE = (-5.0, 5.0)


@dataclass(frozen=True)
class Yield:
    """What an operating point means for the people examined: shares from 0 to 1, at a stated prevalence."""

    referral_rate: float
    ppv: float
    npv: float


def fit_temperature(margin: ArrayLike, truth: ArrayLike) -> float:
    """The temperature T > 0 that minimises the negative log-likelihood of sigmoid(margin / T) with smoothed targets.

    Guo et al. 2017 (arXiv:1706.04599), section 4.2; for two classes their softmax of two logits is this sigmoid of
    their difference. The targets are those of `fit_platt`: with the classes themselves a few separable cases would make
    every probability 0 or 1. T is kept within e^-5 to e^5.
    """
    z, y = _pair(margin, truth)
    target = _smoothed(y)
    found = optimize.minimize_scalar(
        lambda log_t: nll(sigmoid(z * math.exp(-log_t)), target), bounds=_LOG_TEMPERATURE, method="bounded",
        options={"xatol": 1e-6},
    )  # fmt: skip
    return math.exp(float(found.x))


def fit_platt(margin: ArrayLike, truth: ArrayLike) -> tuple[float, float]:
    """Slope and shift of sigmoid(slope * margin + shift) by maximum likelihood with smoothed targets.

    Platt 1999; the targets (n1 + 1) / (n1 + 2) and 1 / (n0 + 2) keep the fit finite for separable cases.

    Raises:
        ValueError: the slope is not positive: the scores run against the known classes.
    """
    z, y = _pair(margin, truth)
    target, positives = _smoothed(y), y.sum()
    unit = float(z.std()) or 1.0

    def loss(parameters: Array) -> tuple[float, Array]:
        a = parameters[0] * z / unit + parameters[1]
        error = sigmoid(a) - target
        return float((np.logaddexp(0, a) - target * a).sum()), np.array([(error * z).sum() / unit, error.sum()])

    prior = math.log(positives / (len(y) - positives))
    found = optimize.minimize(loss, np.array([0.0, prior]), jac=True, method="L-BFGS-B")
    slope, shift = float(found.x[0]) / unit, float(found.x[1])
    if slope <= 0:
        raise ValueError(f"the slope is {slope:.3g}: higher scores go with the negative class")
    return slope, shift


def _smoothed(truth: Array) -> Array:
    """Targets in place of 0 and 1 (Platt 1999)."""
    positives = float(truth.sum())
    target: Array = np.where(truth > 0, (positives + 1) / (positives + 2), 1 / (len(truth) - positives + 2))
    return target


def fit_isotonic(margin: ArrayLike, truth: ArrayLike) -> tuple[tuple[float, float], ...]:
    """Knots (margin, probability) of the non-decreasing least-squares fit, by pooling adjacent violators.

    Zadrozny and Elkan 2002. A knot lies at the mean margin of its pool; pools of one class alone, which would give
    probabilities of 0 or 1, are drawn in by one case in n + 2.
    """
    z, y = _pair(margin, truth)
    order = np.argsort(z, kind="stable")
    pools: list[list[float]] = []  # sum of margins, sum of classes, cases
    for at, value in zip(z[order].tolist(), y[order].tolist(), strict=True):
        pools.append([at, value, 1.0])
        while len(pools) > 1 and pools[-2][1] * pools[-1][2] >= pools[-1][1] * pools[-2][2]:
            last = pools.pop()
            pools[-1] = [first + second for first, second in zip(pools[-1], last, strict=True)]
    low = 1 / (len(y) + 2)
    knots = [(total / count, min(max(ones / count, low), 1 - low)) for total, ones, count in pools]
    return tuple(knots) if len(knots) > 1 else (knots[0], (knots[0][0] + 1e-9, knots[0][1]))


def ece(probs: ArrayLike, truth: ArrayLike, weights: ArrayLike | None = None, bins: int = ECE_BINS) -> float:
    """Expected calibration error over bins of equal width (Guo et al. 2017, equation 3); too high for few cases."""
    p, y, w = _weighted(probs, truth, weights)
    place = np.minimum((p * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(place, w * (p - y), minlength=bins)
    return float(np.abs(gaps).sum() / w.sum())


def brier(probs: ArrayLike, truth: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean squared difference between probability and class (Brier 1950)."""
    p, y, w = _weighted(probs, truth, weights)
    return float((w * (p - y) ** 2).sum() / w.sum())


def nll(probs: ArrayLike, truth: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean negative log-likelihood in nats; probabilities are kept 1e-7 off 0 and 1."""
    p, y, w = _weighted(probs, truth, weights)
    p = np.clip(p, _MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
    return float(-(w * (y * np.log(p) + (1 - y) * np.log1p(-p))).sum() / w.sum())


def reliability(probs: ArrayLike, truth: ArrayLike, bins: int = ECE_BINS) -> list[dict[str, float]]:
    """Mean probability, share of the positive class and cases of each bin that holds any."""
    p, y, _ = _weighted(probs, truth, None)
    place = np.minimum((p * bins).astype(np.int64), bins - 1)
    found = []
    for k in np.unique(place):
        inside = place == k
        found.append({"probability": float(p[inside].mean()), "share": float(y[inside].mean()), "n": int(inside.sum())})
    return found


def choose_threshold(probs: ArrayLike, truth: ArrayLike, target_sensitivity: float) -> float:
    """The highest threshold at which the wanted share of the positive cases lies at or above it.

    Half-way to the next lower probability, so that rounding moves no case across; all such thresholds make the same
    calls here. Chosen on the same cases, the sensitivity seen here is optimistic: the one on other cases counts.

    Raises:
        ValueError: there is no positive case.
    """
    p, y, _ = _weighted(probs, truth, None)
    ones = np.sort(p[y > 0])[::-1]
    if not len(ones):
        raise ValueError("no positive case: a sensitivity needs at least one.")
    lowest = float(ones[max(1, math.ceil(target_sensitivity * len(ones) - 1e-9)) - 1])
    below = p[p < lowest]
    return (lowest + (float(below.max()) if len(below) else 0.0)) / 2


def expected_threshold(
    margin: ArrayLike, truth: ArrayLike, earlier: ArrayLike, target_sensitivity: float, borrowed_cases: float
) -> float:
    """The margin that the wanted share of other positive cases of the same place is expected to reach.

    The lowest tenth of ten positive cases is one case, and a threshold there is one of chance. What moves most from one
    place to another is where the margins lie, less how they spread: the mean is that of the cases at hand alone, and to
    their residuals about it those of `earlier` are added with the weight of `borrowed_cases` cases. Both are widened by
    what the mean of n cases is unsure of, sqrt(1 + 1/n). With more cases their own spread decides.

    Args:
        margin: (n,) of all cases at hand. earlier: (m,) of positive cases on which the model was calibrated before.

    Raises:
        ValueError: fewer than two positive cases.
    """
    z, y = _pair(margin, truth)
    ones, before = z[y > 0], np.asarray(earlier, dtype=np.float64)
    n = len(ones)
    if n < 2:
        raise ValueError("fewer than two positive cases: their margins have no spread.")
    own = (ones - ones.mean()) * math.sqrt((n + 1) / (n - 1))
    lent = (before - before.mean()) * math.sqrt(1 + 1 / n)
    residuals = np.concatenate([own, lent])
    weights = np.concatenate([np.ones(n), np.full(len(lent), borrowed_cases / len(lent))])
    order = np.argsort(residuals, kind="stable")
    middle = np.cumsum(weights[order]) - weights[order] / 2
    return float(ones.mean() + np.interp((1 - target_sensitivity) * weights.sum(), middle, residuals[order]))


def clopper_pearson(hits: int, n: int) -> Estimate:
    """Exact 95 % interval of a proportion (Clopper and Pearson 1934); NaN throughout for n = 0."""
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    low = float(stats.beta.ppf(0.025, hits, n - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(0.975, hits + 1, n - hits)) if hits < n else 1.0
    return Estimate(hits / n, low, high, n)


def rates(probs: ArrayLike, truth: ArrayLike, threshold: float) -> tuple[Estimate, Estimate]:
    """Sensitivity and specificity at a threshold, with exact intervals.

    Cases count as independent; with several of one patient the intervals are too narrow.
    """
    p, y, _ = _weighted(probs, truth, None)
    called = p >= threshold
    ones, zeros = int(y.sum()), int((1 - y).sum())
    return clopper_pearson(int((called & (y > 0)).sum()), ones), clopper_pearson(int((~called & (y == 0)).sum()), zeros)


def yield_at(sensitivity: float, specificity: float, prevalence: float) -> Yield:
    """Referral rate and predictive values by Bayes' rule; a predictive value is NaN when nobody is (not) referred."""
    found, alarms = prevalence * sensitivity, (1 - prevalence) * (1 - specificity)
    missed, cleared = prevalence * (1 - sensitivity), (1 - prevalence) * specificity
    referred, sent_home = found + alarms, missed + cleared
    return Yield(referred, found / referred if referred else math.nan, cleared / sent_home if sent_home else math.nan)


def cases_to_halve(hits: int, n: int) -> int:
    """How many more cases, with the same share of hits, would halve the width of the exact interval."""
    now = clopper_pearson(hits, n)
    half = (now.ci_high - now.ci_low) / 2
    low, high = n, 16 * n + 64
    while low < high:
        middle = (low + high) // 2
        then = clopper_pearson(round(hits / n * middle), middle)
        if then.ci_high - then.ci_low <= half:
            high = middle
        else:
            low = middle + 1
    return low - n


def _pair(margin: ArrayLike, truth: ArrayLike) -> tuple[Array, Array]:
    z, y = np.asarray(margin, dtype=np.float64), np.asarray(truth).astype(np.float64)
    if not 0 < y.sum() < len(y):
        raise ValueError("truth holds one class only; a calibration needs cases of both.")
    return z, y


def _weighted(probs: ArrayLike, truth: ArrayLike, weights: ArrayLike | None) -> tuple[Array, Array, Array]:
    p, y = np.asarray(probs, dtype=np.float64), np.asarray(truth).astype(np.float64)
    return p, y, np.ones(len(p)) if weights is None else np.asarray(weights, dtype=np.float64)


def quality(
    probs: ArrayLike, truth: ArrayLike, patients: Sequence[str], *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Calibration error, Brier score and negative log-likelihood with intervals over patients."""
    return {
        "ece": asdict(bootstrap(partial(ece, probs, truth), patients, centred=True, seed=seed)),
        "brier": asdict(bootstrap(partial(brier, probs, truth), patients, seed=seed)),
        "nll": asdict(bootstrap(partial(nll, probs, truth), patients, seed=seed)),
    }
