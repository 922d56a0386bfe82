"""Lung masks as geometry: parts, growth, hulls, and what is left of an image inside or outside them.

Masks are (row, column) bool. Pure functions of arrays.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

Mask = NDArray[np.bool_]

AREA_SHARE = (0.06, 0.75)
"""Shares of the image between which lung fields of a frontal radiograph lie."""

MIN_LOBE_RATIO = 0.25
"""Area of the smaller lung field over that of the larger."""

_MIN_PART = 0.02  # of the mask; smaller parts are crumbs


def lung_fields(array: NDArray[Any]) -> Mask:
    """The two largest parts of a mask, holes filled. A grey mask is inside where above half of its brightest value."""
    top = float(array.max()) if array.size else 0.0
    parts, count = ndimage.label(array > top / 2) if top > 0 else (np.zeros(array.shape, np.int32), 0)
    sizes = np.bincount(parts.reshape(-1), minlength=count + 1)[1:]
    kept = [k + 1 for k in np.argsort(-sizes, kind="stable")[:2] if sizes[k] >= _MIN_PART * sizes.sum()]
    return np.asarray(ndimage.binary_fill_holes(np.isin(parts, kept)), dtype=bool)


def implausible(mask: Mask) -> str:
    """Why a mask cannot be the lung fields of a frontal radiograph; empty when it can."""
    share = float(mask.mean())
    if not AREA_SHARE[0] <= share <= AREA_SHARE[1]:
        return f"covers {share:.0%} of the image"
    parts, count = ndimage.label(mask)
    if count != 2:
        return f"has {count} part{'' if count == 1 else 's'}"
    small, large = sorted(np.bincount(parts.reshape(-1))[1:].tolist())
    return "" if small >= MIN_LOBE_RATIO * large else f"one lung field is {large / small:.1f} times the other"


def dilate(mask: Mask, radius_px: float) -> Mask:
    """All within a Euclidean distance of the mask."""
    if radius_px <= 0 or not mask.any():
        return mask
    return np.asarray(ndimage.distance_transform_edt(~mask) <= radius_px)


def convex(mask: Mask) -> Mask:
    """The convex hull of the whole mask, pixel centres on its border included; what is between the lungs is inside."""
    points = np.argwhere(mask ^ ndimage.binary_erosion(mask))
    if len(points) < 3:
        return mask
    try:
        hull = ConvexHull(points)
    except QhullError:  # all on one line
        return mask
    rows, columns = (np.arange(n, dtype=np.float64) for n in mask.shape)
    inside = np.ones(mask.shape, dtype=bool)
    for down, right, offset in hull.equations:
        inside &= (down * rows[:, None] + right * columns[None, :] + offset) <= 1e-9
    return inside


def fit(mask: Mask, shape: tuple[int, ...]) -> Mask:
    """The mask on a grid of another size over the same field of view; nearest neighbour."""
    if mask.shape == tuple(shape):
        return mask
    index = [
        np.minimum(((np.arange(n) + 0.5) * m / n).astype(np.int64), m - 1)
        for n, m in zip(shape, mask.shape, strict=True)
    ]
    return mask[np.ix_(*index)]


def inside_only(image: NDArray[Any], mask: Mask) -> NDArray[Any]:
    """The image with all outside the mask at its darkest value."""
    return np.where(mask, image, image.min())


def outside_only(image: NDArray[Any], mask: Mask) -> NDArray[Any]:
    """The image with all inside the mask at its darkest value."""
    return np.where(mask, image.min(), image)
