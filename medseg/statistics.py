"""Uncertainty of figures of many cases. The patient is the unit: images of one patient are not independent."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000
_Z95 = 1.959963984540054  # 97.5 % point of the normal distribution

Statistic = Callable[[NDArray[np.float64]], float]
Rows = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; NaN bounds mean that there are too few cases for one. `n`: cases counted."""

    value: float
    ci_low: float
    ci_high: float
    n: int


@dataclass(frozen=True)
class Summary:
    """Distribution over cases with the 95 % interval of the mean; `n`: cases for which the figure is defined."""

    mean: float
    sd: float
    median: float
    ci_low: float
    ci_high: float
    n: int


def summarise(values: Sequence[float], patients: Sequence[str], *, seed: int = 0) -> Summary:
    """Mean, sample standard deviation, median and interval over the values that are defined (not NaN)."""
    array = np.asarray(values, dtype=np.float64)
    kept = ~np.isnan(array)
    array, owners = array[kept], [p for p, keep in zip(patients, kept, strict=True) if keep]
    if not len(array):
        return Summary(math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    draws = _draw_weights(owners, seed)
    low, high = _percentiles(draws @ array / draws.sum(axis=1)) if len(draws) else (math.nan, math.nan)
    deviation = float(array.std(ddof=1)) if len(array) > 1 else math.nan
    return Summary(float(array.mean()), deviation, float(np.median(array)), low, high, len(array))


def bootstrap(statistic: Statistic, patients: Sequence[str], *, centred: bool = False, seed: int = 0) -> Estimate:
    """Percentile bootstrap over patients (Efron 1979), 2000 draws.

    Args:
        statistic: figure of the cases under non-negative weights (n,): how often each case was drawn. A draw for
            which it raises ValueError (a class is missing from it) or returns NaN is left out.
        patients: (n,) to whom each case belongs; all cases of a patient are drawn together.
        centred: moves the draws so that their mean is the figure, and the lower bound up to 0: for one that is never
            negative and grows with the noise of a draw, whose interval could lie above the figure itself.
        seed: of the draws; the same seed gives the same interval.
    """
    value = _tried(statistic, np.ones(len(patients)))
    found = np.array([_tried(statistic, weights) for weights in _draw_weights(patients, seed)])
    low, high = _percentiles(found)
    if centred and not math.isnan(low):
        noise = float(np.nanmean(found)) - value
        low, high = max(0.0, low - noise), high - noise
    return Estimate(value, low, high, len(patients))


def bootstrap_auc(truth: ArrayLike, score: ArrayLike, patients: Sequence[str], *, seed: int = 0) -> Estimate:
    """Area under the ROC curve with its interval: the figure of `bootstrap` with `roc_auc`, for all draws at once."""
    return bootstrap_rows(lambda weights: aucs(truth, score, weights), patients, seed=seed)


def bootstrap_rows(statistic: Rows, patients: Sequence[str], *, seed: int = 0) -> Estimate:
    """`bootstrap` for a statistic of all draws at once: weights (draws, n) to figures (draws,), NaN where undefined."""
    found = statistic(np.vstack([np.ones(len(patients)), _draw_weights(patients, seed)]))
    return Estimate(float(found[0]), *_percentiles(found[1:]), len(patients))


def aucs(truth: ArrayLike, score: ArrayLike, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area under the ROC curve for each row of weights (draws, n); NaN where a class has no weight."""
    scores = np.asarray(score, dtype=np.float64)
    order = np.argsort(-scores, kind="stable")
    positive = np.asarray(truth).astype(bool)[order]
    drawn = weights[:, order]
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True)) if len(order) else np.empty(0, np.int64)
    hits = np.cumsum(drawn * positive, axis=1)[:, ends]
    alarms = np.cumsum(drawn * ~positive, axis=1)[:, ends]
    before = np.pad(hits, ((0, 0), (1, 0)))[:, :-1]
    area = (np.diff(alarms, prepend=0.0, axis=1) * (hits + before) / 2).sum(axis=1)
    pairs = hits[:, -1] * alarms[:, -1] if len(ends) else np.zeros(len(weights))
    return np.asarray(np.divide(area, pairs, out=np.full(len(weights), math.nan), where=pairs > 0))


def shares(hits: NDArray[np.bool_], among: NDArray[np.bool_], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of hits among some cases for each row of weights (draws, n); NaN where none of them was drawn."""
    size = weights @ among.astype(np.float64)
    found = weights @ (hits & among).astype(np.float64)
    return np.asarray(np.divide(found, size, out=np.full(len(weights), math.nan), where=size > 0))


def mean_of(statistics: Sequence[Rows]) -> Rows:
    """The mean of several statistics, such as one per class; NaN where one of them is, or there is none."""

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        found = [figure(weights) for figure in statistics]
        return np.asarray(np.mean(found, axis=0)) if found else np.full(len(weights), math.nan)

    return statistic


def proportion(hits: ArrayLike, patients: Sequence[str], *, seed: int = 0) -> Estimate:
    """Share of hits with its interval: Wilson's where each patient has one case, else bootstrapped over patients."""
    array = np.asarray(hits, dtype=np.float64)
    if len(set(patients)) == len(patients):
        return wilson(int(array.sum()), len(array))
    return bootstrap(lambda weights: float(weights @ array / weights.sum()), patients, seed=seed)


def wilson(hits: int, n: int) -> Estimate:
    """Score interval of a proportion (Wilson 1927), right for small n and near 0 and 1. NaN throughout for n = 0."""
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    share, z2 = hits / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), n)


def _draw_weights(patients: Sequence[str], seed: int) -> NDArray[np.float64]:
    """(draws, n): how often each case counts in each draw; no draws with fewer than two patients."""
    _, owner = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    count = int(owner.max()) + 1 if len(owner) else 0
    if count < 2:
        return np.empty((0, len(owner)))
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    return drawn[:, owner].astype(np.float64)


def _percentiles(found: NDArray[np.float64]) -> tuple[float, float]:
    defined = found[~np.isnan(found)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def _tried(statistic: Statistic, weights: NDArray[np.float64]) -> float:
    try:
        return statistic(weights)
    except ValueError:
        return math.nan
