"""Lung fields as geometry: parts, growth, hulls, what is left of an image inside or outside them, and whether they can
be the lungs of a frontal radiograph.

Masks are (row, column) bool. Pure functions of arrays.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from medseg.cohort import Finding
from medseg.config import LungsConfig

Mask = NDArray[np.bool_]

_MIN_PART = 0.02  # of the mask; smaller parts are crumbs


def lung_fields(mask: Mask) -> Mask:
    """The two largest parts of a mask, holes filled."""
    parts, kept = _parts(mask)
    return np.asarray(ndimage.binary_fill_holes(np.isin(parts, kept[:2])), dtype=bool)


def check(mask: Mask, limits: LungsConfig) -> Iterator[Finding]:
    """Why a mask, as it was found, cannot be the lung fields of a frontal radiograph; see `LungsConfig`.

    Yields:
        `lungs_area` (share of the image), `lungs_parts` (how many, crumbs not counted), `lungs_asymmetry` (smaller over
        larger area), `lungs_askew` (distance of the centres downwards over that sideways), `lungs_at_border` (share of
        the outline).
    """
    parts, kept = _parts(mask)
    fields = lung_fields(mask)
    share = float(fields.mean())
    low, high = limits.area
    if not low <= share <= high:
        message = f"The lung fields cover {share:.0%} of the image, which is not between {low:.0%} and {high:.0%}."
        yield Finding("lungs_area", "warning", message, round(share, 4), low if share < low else high)
    if len(kept) != 2:
        message = f"The lung mask has {len(kept)} part{'' if len(kept) == 1 else 's'}, not one for each lung."
        yield Finding("lungs_parts", "warning", message, len(kept), 2)
    if len(kept) > 1:
        yield from _check_pair(parts == kept[0], parts == kept[1], limits)
    if fields.any() and (at_border := _share_at_border(fields)) > limits.max_at_border:
        message = f"{at_border:.0%} of the outline of the lung fields lie on the border of the image; they are cut off."
        yield Finding("lungs_at_border", "warning", message, round(at_border, 4), limits.max_at_border)


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


def box(mask: Mask) -> Mask:
    """The smallest rectangle of rows and columns round the mask."""
    filled = np.zeros_like(mask)
    for place in ndimage.find_objects(mask.astype(np.uint8)):
        filled[place] = True
    return filled


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


def _parts(mask: Mask) -> tuple[NDArray[np.int32], list[int]]:
    """Connected parts as integers from 1 on, and which of them are no crumbs, the largest first."""
    parts, count = ndimage.label(mask)
    sizes = np.bincount(parts.reshape(-1), minlength=count + 1)[1:]
    kept = [int(k) + 1 for k in np.argsort(-sizes, kind="stable") if sizes[k] >= _MIN_PART * sizes.sum()]
    return parts, kept


def _check_pair(larger: Mask, smaller: Mask, limits: LungsConfig) -> Iterator[Finding]:
    ratio = float(smaller.sum() / larger.sum())
    if ratio < limits.min_ratio:
        message = f"One lung field has {ratio:.0%} of the area of the other, less than {limits.min_ratio:.0%}."
        yield Finding("lungs_asymmetry", "warning", message, round(ratio, 4), limits.min_ratio)
    (row, column), (other_row, other_column) = (np.argwhere(field).mean(axis=0) for field in (larger, smaller))
    askew = float(abs(row - other_row) / max(abs(column - other_column), 1.0))
    if askew > limits.max_askew:
        message = "The lung fields do not lie side by side."
        yield Finding("lungs_askew", "warning", message, round(askew, 3), limits.max_askew)


def _share_at_border(mask: Mask) -> float:
    """Share of the outline of a mask, which is not empty, that lies in the outermost rows and columns."""
    outline = mask & ~ndimage.binary_erosion(mask)
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = True
    return float((outline & ~inner).sum() / outline.sum())
