"""Pure figures of activation maps: order of removal, area under a curve, similarity, energy in a region."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats

from medseg.metrics import energy_in_mask

Map = NDArray[np.floating]

MAX_VALUES = 50_000
"""Values of a map that are ranked for a correlation; of a larger one that many are drawn."""
CELLS = 16
"""Parts along each axis on which two methods are compared."""


def removal_rank(values: Map, seed: int = 0) -> NDArray[np.int64]:
    """Place of each position in the order "most relevant first", from 0, of the shape of the map.

    Equal values, such as the zeros that a ReLU leaves, are put in an order drawn from `seed`: any share of the
    positions can then be removed exactly.
    """
    flat = np.asarray(values, dtype=np.float64).ravel()
    order = np.lexsort((np.random.default_rng(seed).random(flat.size), -flat))
    rank = np.empty(flat.size, dtype=np.int64)
    rank[order] = np.arange(flat.size)
    return rank.reshape(values.shape)


def area(curve: NDArray[np.floating]) -> float:
    """Area under equally spaced values from 0 to 1, by the trapezoid rule; a mean, in the unit of the values."""
    return float(np.trapezoid(curve, dx=1 / (len(curve) - 1)))


def rank_correlation(first: Map, second: Map) -> float:
    """Spearman's correlation of two maps of one shape, -1 to 1.

    0 where one of them is constant (it says nothing of the other), NaN where both are.
    """
    pair = [np.asarray(values, dtype=np.float64).ravel() for values in (first, second)]
    if pair[0].size > MAX_VALUES:
        some = np.random.default_rng(0).integers(pair[0].size, size=MAX_VALUES)
        pair = [values[some] for values in pair]
    ranks = [stats.rankdata(values) for values in pair]
    spread = [float(np.ptp(rank)) for rank in ranks]
    if not all(spread):
        return float("nan") if not any(spread) else 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def method_agreement(first: Map, second: Map) -> float:
    """Spearman's correlation of the positive parts of two maps, averaged over at most 16 parts along each axis.

    On the coarse grid a map of pixels and one of a deep layer can be compared.
    """
    return rank_correlation(*(_coarse(np.maximum(values, 0)) for values in (first, second)))


def energy_in_region(values: Map, mask: NDArray[np.generic], dilate_px: int = 0) -> float:
    """Share, 0 to 1, of a map's positive values inside a mask that is dilated by steps to face neighbours."""
    inside = np.asarray(mask) > 0
    if dilate_px and inside.any():
        inside = ndimage.binary_dilation(inside, iterations=dilate_px)
    return energy_in_mask(values, inside)


def overlap_of_shifted(values: Map, shifted: Map, shift: tuple[int, ...]) -> tuple[Map, Map]:
    """The part that two maps share when the second is of an image moved by `shift` voxels towards higher indices."""
    here = tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(shift, values.shape, strict=True))
    there = tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(shift, values.shape, strict=True))
    return values[here], shifted[there]


def _coarse(values: Map) -> Map:
    for axis, n in enumerate(values.shape):
        cells = min(n, CELLS)
        edges = np.linspace(0, n, cells + 1).round().astype(int)
        sizes = np.diff(edges).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
        values = np.add.reduceat(values, edges[:-1], axis=axis) / sizes
    return values
