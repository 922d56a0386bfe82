"""How far a segmentation can be trusted, as pure functions: features of a structure, the Dice that they make one
expect, and temperatures of probabilities.

The features come from probabilities of networks that have not seen the case. Agreement between the folds of a
cross-validation cannot be calibrated on the cases that the folds were trained on: all but one have seen each, and so
agree with its label. It enters as a bound that needs no calibration, see `agreement_bound`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Array = NDArray[np.float64]

LEVEL = 0.9
"""Share of cases whose Dice shall lie inside the interval."""
MIN_CASES = 8
_PRIOR, _PRIOR_WEIGHT = (0.0, 1.0, 0.0, 0.0), 0.02
_CLIP = 1e-4


@dataclass(frozen=True)
class Features:
    """What the networks say of one predicted structure; means over the networks that find it.

    Attributes:
        soft_dice: 2 Σ p·y / (Σ p + Σ y), with the probability p and the predicted mask y: the Dice that the
            probabilities promise (Borges et al. 2024, arXiv:2402.10665); 0 to 1.
        entropy: mean inside the predicted mask, as a share of its maximum; 0 to 1.
        agreement: mean Dice between the masks of two networks; NaN with one network.
        bound: `agreement_bound` of them; 1 with one network.
        mirrored: mean Dice between a network's mask and those that it calls when it sees the image flipped; NaN where
            it does not (`predict.mirror_axes`).
    """

    soft_dice: float
    entropy: float
    agreement: float = math.nan
    bound: float = 1.0
    mirrored: float = math.nan

    @property
    def columns(self) -> tuple[float, ...]:
        """What the Dice to expect follows from: soft Dice, entropy and, where it is known, 1 − `mirrored`."""
        plain = (self.soft_dice, self.entropy)
        return plain if math.isnan(self.mirrored) else (*plain, 1 - self.mirrored)


@dataclass(frozen=True)
class ExpectedDice:
    """Maps features to the Dice to expect: sigmoid(a + b · logit(soft_dice) − c · entropy − d · (1 − mirrored)) with b,
    c, d ≥ 0; without mirroring there is no d.

    Attributes:
        coefficients: a, b, c and, with mirroring, d.
        low, high: what is added to the expected Dice for the ends of its interval.
        n: cases it was fitted on.
    """

    coefficients: tuple[float, ...]
    low: float
    high: float
    n: int

    def __call__(self, features: Features) -> tuple[float, float, float]:
        """Expected Dice and the ends of its interval, 0 to 1, none above the bound of the agreement."""
        x = np.array([features.columns[: len(self.coefficients) - 1]])
        value = min(float(_curve(np.asarray(self.coefficients), x)[0]), features.bound)
        return value, max(0.0, value + self.low), min(1.0, value + self.high, features.bound)


def fit_expected_dice(features: ArrayLike, dice: ArrayLike, groups: ArrayLike) -> tuple[ExpectedDice, Array] | None:
    """Fit on out-of-fold cases by least squares on the Dice, drawn slightly towards the identity.

    Args:
        features: (n, 2 or 3), see `Features.columns`. dice: (n,) what was reached, 0 to 1.
        groups: (n,) cases of one group (fold) are left out together for the errors.

    Returns:
        The map, whose interval is that of the errors on left-out groups, widened for few cases as split conformal
        prediction does; and the expected Dice of every case from the other groups. None with fewer than 8 cases or
        two groups.
    """
    x, y, group = np.asarray(features, float), np.asarray(dice, float), np.asarray(groups)
    if len(y) < MIN_CASES or len(set(group.tolist())) < 2:
        return None
    held_out = np.empty(len(y))
    for one in np.unique(group):
        out = group == one
        held_out[out] = _curve(_fit(x[~out], y[~out]), x[out])
    errors = np.sort(y - held_out)
    tail = math.floor((1 - LEVEL) / 2 * (len(y) + 1))  # so many errors may lie outside on either side
    low, high = errors[max(tail - 1, 0)], errors[min(len(y) - tail, len(y) - 1)]
    coefficients = tuple(float(value) for value in _fit(x, y))
    return ExpectedDice(coefficients, min(float(low), 0.0), max(float(high), 0.0), len(y)), held_out


def from_facts(facts: Mapping[str, Any]) -> ExpectedDice:
    """The map as a bundle keeps it."""
    coefficients = tuple(float(value) for value in facts["coefficients"])
    return ExpectedDice(coefficients, float(facts["low"]), float(facts["high"]), int(facts["n"]))


def agreement_bound(dice_of_pairs: Sequence[float]) -> float:
    """The largest mean Dice with the truth that networks can have which agree as badly as this with each other.

    The Jaccard distance obeys the triangle inequality, so the mean distance of two masks to any truth is at least half
    of the distance between them.

    Args:
        dice_of_pairs: Dice of each two networks' masks.
    """
    if not len(dice_of_pairs):
        return 1.0
    jaccard = [dice / (2 - dice) for dice in dice_of_pairs]
    best = 1 - (1 - float(np.mean(jaccard))) / 2
    return 2 * best / (1 + best)


def compare(expected: ArrayLike, reached: ArrayLike, bins: int = 5) -> dict[str, float]:
    """How well expected Dice fit the Dice that was reached; NaN in `reached` is left out.

    Returns:
        `n`, `spearman`, `pearson`, `mean_error` (expected minus reached), `absolute_error` (mean), and
        `calibration_error`: mean difference of expected and reached in `bins` equally large groups by expectation.
    """
    x, y = np.asarray(expected, float), np.asarray(reached, float)
    kept = ~(np.isnan(x) | np.isnan(y))
    x, y = x[kept], y[kept]
    if not len(x):
        return {"n": 0}
    parts = np.array_split(np.argsort(x, kind="stable"), min(bins, len(x)))
    gaps = [abs(float(x[part].mean() - y[part].mean())) * len(part) / len(x) for part in parts]
    return {
        "n": len(x),
        "spearman": _correlation(stats.rankdata(x), stats.rankdata(y)),
        "pearson": _correlation(x, y),
        "mean_error": float((x - y).mean()),
        "absolute_error": float(np.abs(x - y).mean()),
        "calibration_error": float(sum(gaps)),
    }


def fit_temperature(logits: ArrayLike, labels: ArrayLike, annotated: ArrayLike | None = None) -> float:
    """The divisor of the logits, 0.05 to 20, that minimises the negative log-likelihood (Guo et al. 2017).

    Args:
        logits: (n, classes). labels: (n,) class of each.
        annotated: (n, classes) whether the label tells of the class, background first; by default of all. The
            probabilities of the others count as background.
    """
    z, y = np.asarray(logits, float), np.asarray(labels, int)

    def loss(log_temperature: float) -> float:
        scaled = _marginal(z / math.exp(log_temperature), annotated)
        return float((np.logaddexp.reduce(scaled, axis=1) - scaled[np.arange(len(y)), y]).mean())

    bounds = (math.log(0.05), math.log(20.0))
    return math.exp(float(optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x))


def calibration_error(
    logits: ArrayLike,
    labels: ArrayLike,
    temperature: float = 1.0,
    bins: int = 15,
    annotated: ArrayLike | None = None,
) -> float:
    """Expected calibration error of the called class, 0 to 1, in bins of equal width (Guo et al. 2017, equation 3).

    Other arguments as in `fit_temperature`.
    """
    z, y = _marginal(np.asarray(logits, float) / temperature, annotated), np.asarray(labels, int)
    probs = np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True))
    sure, right = probs.max(axis=1), probs.argmax(axis=1) == y
    place = np.minimum((sure * bins).astype(int), bins - 1)
    total = 0.0
    for one in np.unique(place):
        here = place == one
        total += abs(float(sure[here].mean() - right[here].mean())) * float(here.mean())
    return total


def _marginal(logits: Array, annotated: ArrayLike | None) -> Array:
    """Logits (n, classes) with the probabilities of the classes not annotated added to the background."""
    if annotated is None:
        return logits
    known = np.asarray(annotated, bool)
    merged = ~known
    merged[:, 0] = True
    background = np.logaddexp.reduce(np.where(merged, logits, -np.inf), axis=1, keepdims=True)
    return np.concatenate([background, np.where(known, logits, -np.inf)[:, 1:]], axis=1)


def _curve(coefficients: Array, x: Array) -> Array:
    soft = np.clip(x[:, 0], _CLIP, 1 - _CLIP)
    height = coefficients[0] + coefficients[1] * np.log(soft / (1 - soft)) - x[:, 1:] @ coefficients[2:]
    value: Array = 1 / (1 + np.exp(-height))
    return value


def _fit(x: Array, y: Array) -> Array:
    size = x.shape[1] + 1
    prior, lowest = np.array(_PRIOR[:size]), [-np.inf, *[0.0] * (size - 1)]

    def residual(coefficients: Array) -> Array:
        return np.concatenate([_curve(coefficients, x) - y, _PRIOR_WEIGHT * (coefficients - prior)])

    start = np.array([0.0, 1.0, 0.1, 0.1])[:size]
    found: Array = optimize.least_squares(residual, start, bounds=(lowest, np.inf)).x
    return found


def _correlation(x: Array, y: Array) -> float:
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])
