"""How far a scan lies from those that a network was trained on, measured in the network's own features.

The Mahalanobis distance (Lee et al. 2018, arXiv:1807.03888; of segmentation networks González et al. 2022,
arXiv:2208.03217) from one normal distribution over all training cases, whatever their class. Each feature is divided
by its standard deviation, and the covariance is shrunk (Ledoit and Wolf 2004, Journal of Multivariate Analysis 88:365):
there are often fewer cases than features. Training cases lie nearer than new ones, so that the limit comes from cases
which the network has not seen.

It travels in the bundle as `distance.safetensors`. Which features they are is in `medseg.models.features`.

Shape legend: N cases, F features, R directions in which the training cases differ.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from medseg.files import UserError, replacing

RATE = 0.01
"""Share of new cases like the training cases that lie beyond the limit."""
MIN_CASES = 5
"""Fewer training cases give no distance, and fewer unseen ones no limit."""
_LEAST_SCALE = 0.01  # of the mean one: a feature that no training case shows is not divided by nothing
_FIELDS = ("mean_F", "scale_F", "axes_RF", "variances_R", "rest", "cases", "held_out")


@dataclass(frozen=True, eq=False)
class FeatureDistance:
    """The distribution of one network's features over its training cases.

    Attributes:
        mean_F, scale_F: float32; what is taken off the features, and what they are divided by then.
        axes_RF: float32, orthonormal. variances_R: float32, along them. rest: the variance in every other direction.
        cases: how many it was fitted on.
        held_out: distances of cases that the network has not seen.
    """

    mean_F: NDArray[np.float32]
    scale_F: NDArray[np.float32]
    axes_RF: NDArray[np.float32]
    variances_R: NDArray[np.float32]
    rest: float
    cases: int
    held_out: tuple[float, ...] = ()

    def __call__(self, features_F: ArrayLike) -> float:
        """Distance of one case, as root mean square over the features: about 1 for a training case."""
        x = (np.asarray(features_F, dtype=np.float64) - self.mean_F) / self.scale_F
        along = self.axes_RF.astype(np.float64) @ x
        beside = max(float(x @ x - along @ along), 0.0)
        return math.sqrt((float((along**2 / self.variances_R).sum()) + beside / self.rest) / len(x))


@dataclass(frozen=True)
class CohortDistance:
    """The distances of all networks of a bundle: one, or one of each joined fold."""

    members: tuple[FeatureDistance, ...]

    @cached_property
    def limit(self) -> float | None:
        """The distance that so few new cases exceed as `RATE` says; None where too few were unseen by a network.

        Of joined folds all out-of-fold cases count, each at its distance from the one network that had not seen it. A
        mean over networks spreads less than such a distance, so fewer cases than that lie beyond.
        """
        return distance_limit([distance for member in self.members for distance in member.held_out])

    def __call__(self, features_by_member: Sequence[ArrayLike]) -> float:
        """Mean over the networks of the distance of one case, from its features (F) in each."""
        found = [member(features) for member, features in zip(self.members, features_by_member, strict=True)]
        return sum(found) / len(found)

    def facts(self) -> dict[str, Any]:
        """What `bundle.json` says of it."""
        held_out = [distance for member in self.members for distance in member.held_out]
        return {
            "limit": self.limit,
            "rate": RATE,
            "cases": [member.cases for member in self.members],
            "held_out": len(held_out),
            "largest_held_out": max(held_out, default=None),
            "features": len(self.members[0].mean_F),
        }


def fit_distance(features_NF: ArrayLike, held_out_NF: ArrayLike = ()) -> FeatureDistance | None:
    """Fit on training cases, and measure cases that the network has not seen.

    Returns:
        None with fewer than `MIN_CASES` training cases, or where they do not differ.
    """
    x = np.asarray(features_NF, dtype=np.float64)
    if len(x) < MIN_CASES:
        return None
    count, features = x.shape
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.maximum(scale, _LEAST_SCALE * float(scale.mean()))
    if not scale.all():
        return None
    z = (x - mean) / scale
    _, singular, axes = np.linalg.svd(z, full_matrices=False)
    variances = singular**2 / count
    target = float(variances.sum()) / features
    shrinkage = _shrinkage(z, variances)
    fitted = FeatureDistance(
        mean.astype(np.float32),
        scale.astype(np.float32),
        axes.astype(np.float32, order="C"),
        ((1 - shrinkage) * variances + shrinkage * target).astype(np.float32),
        shrinkage * target,
        count,
    )
    unseen = np.asarray(held_out_NF, dtype=np.float64).reshape(-1, features)
    return replace(fitted, held_out=tuple(fitted(row) for row in unseen))


def distance_limit(held_out: Sequence[float], rate: float = RATE) -> float | None:
    """The upper prediction bound of one further case, with normally distributed logarithms of the distances.

    Args:
        held_out: distances of cases that the network has not seen.
        rate: the probability that a further case like them lies beyond.

    Returns:
        None with fewer than `MIN_CASES`.
    """
    if len(held_out) < MIN_CASES:
        return None
    logs, n = np.log(held_out), len(held_out)
    reach = float(stats.t.ppf(1 - rate, n - 1)) * math.sqrt(1 + 1 / n)
    return math.exp(float(logs.mean()) + reach * float(logs.std(ddof=1)))


def join_distances(folds: Sequence[CohortDistance | None]) -> CohortDistance | None:
    """The distances of joined folds together; None where a fold has none."""
    known = [fold for fold in folds if fold is not None]
    if len(known) < len(folds):
        return None
    return CohortDistance(tuple(member for fold in known for member in fold.members))


def write_distance(path: Path, distance: CohortDistance) -> Path:
    """Write as safetensors, atomically: the fields of each network under `<number>.<field>`."""
    from safetensors.numpy import save_file

    arrays = {
        f"{number}.{field}": np.asarray(getattr(member, field))
        for number, member in enumerate(distance.members)
        for field in _FIELDS
    }
    with replacing(path) as temporary:
        save_file(arrays, temporary)
    return path


def read_distance(path: Path) -> CohortDistance:
    """Read `distance.safetensors`. Raises UserError naming the file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
        count = len({name.split(".")[0] for name in arrays})
        return CohortDistance(tuple(_member(arrays, number) for number in range(count)))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} holds no feature distance ({error}); copy the bundle again.") from error


def _member(arrays: Mapping[str, NDArray[Any]], number: int) -> FeatureDistance:
    mean, scale, axes, variances, rest, cases, held_out = (arrays[f"{number}.{field}"] for field in _FIELDS)
    if axes.shape != (len(variances), len(mean)) or scale.shape != mean.shape:
        raise ValueError(f"axes {axes.shape} for {len(mean)} features and {len(variances)} variances")
    return FeatureDistance(mean, scale, axes, variances, float(rest), int(cases), tuple(held_out.tolist()))


def _shrinkage(centred_NF: NDArray[np.float64], variances: NDArray[np.float64]) -> float:
    """Share of the identity in the covariance, 0 to 1 (Ledoit and Wolf 2004, section 3.2); never 0, for the inverse.

    Args:
        variances: the eigenvalues of the sample covariance that are not 0 by construction.
    """
    count, features = centred_NF.shape
    squared = float((variances**2).sum())
    spread = squared - float(variances.sum()) ** 2 / features
    error = (float(((centred_NF**2).sum(axis=1) ** 2).sum()) / count - squared) / count
    return min(max(error / spread, 1e-6), 1.0) if spread > 0 else 1.0
