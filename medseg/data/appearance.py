"""Radiographs of different sources made to look alike: padding left out, grey values and sharpness standardised.

Pure functions of (row, column) images. What they are matched to is measured on the training cases and stands in the
plan, so that training and prediction do the same.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from medseg.plan import Appearance
from medseg.volume import Volume

Image = NDArray[np.float32]

PERCENTILES = (1, *range(10, 100, 10), 99)
"""The landmarks of a histogram, as in Nyúl & Udupa 1999 (Magn Reson Med 42:1072)."""

_SAME_GREY = 0.02  # of the image's range: so far apart, a border's grey values still count as one
_SAME_SHARE = 0.95  # of a line's pixels; the others may be a marker
_LEAST_LEFT = 0.5  # of an axis; where padding would take more, it is no padding
_OCTAVES = 5  # of detail, the finest 1/256 of the shorter side
_GAINS = (0.25, 4.0)
_BINS = 256


def content_box(image: NDArray[np.generic]) -> tuple[slice, slice]:
    """Rows and columns without the constant lines at the border: black padding, collimation, a white frame.

    Lines of one grey value throughout are no part of a body, however many. Of what is left, a line counts as constant
    when nearly all of it has the grey value of the outermost line; at least half of each axis is kept, else all of it.
    """
    grey = image.astype(np.float32)
    tolerance = _SAME_GREY * float(grey.max() - grey.min())
    box = _without_flat(grey)
    grey, whole = grey[box], box
    box = (slice(0, grey.shape[0]), slice(0, grey.shape[1]))
    for _ in range(4):  # without padded columns a row that a marker has broken may turn out to be padding
        rows = _without_padding(grey[:, box[1]], box[0], tolerance)
        columns = _without_padding(grey[rows].T, box[1], tolerance)
        if (rows, columns) == box:
            break
        box = (rows, columns)
    rows, columns = (slice(a.start + b.start, a.start + b.stop) for a, b in zip(whole, box, strict=True))
    return rows, columns


def crop_to(volume: Volume, box: tuple[slice, ...]) -> Volume:
    """The part of a radiograph in `box`, each pixel at its place; all of it where the box is empty."""
    if not box:
        return volume
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :2] @ np.array([part.start for part in box])
    return Volume(volume.array[box], affine)


def standardise(image: Image, appearance: Appearance) -> Image:
    """Grey values, then sharpness, as the plan says; a constant image stays as it is."""
    if appearance == Appearance() or image.max() <= image.min():
        return image
    if appearance.histogram == "percentile":
        image = np.clip(image, *np.percentile(image, (PERCENTILES[0], PERCENTILES[-1])))
    elif appearance.histogram == "landmarks":
        image = _to_landmarks(image, appearance.landmarks)
    elif appearance.histogram == "clahe":
        image = equalise_locally(image, appearance.clahe_tiles, appearance.clahe_limit)
    return _to_detail(image, appearance.detail_sd) if appearance.detail_sd else image


def landmarks_of(image: Image) -> NDArray[np.float64]:
    """The percentiles of `PERCENTILES`, on a scale where the first is 0 and the last 1."""
    found = np.percentile(image, PERCENTILES)
    return np.asarray((found - found[0]) / max(found[-1] - found[0], 1e-6))


def detail_of(image: Image) -> NDArray[np.float64]:
    """Standard deviation of each octave of detail, the finest first, over that of the image."""
    bands, _ = _octaves(image)
    return np.array([float(band.std()) for band in bands]) / max(float(image.std()), 1e-6)


def equalise_locally(image: Image, tiles: int, limit: float) -> Image:
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994, Graphics Gems IV), to values of 0 to 1.

    Each tile has its own cumulative histogram; in between, the mappings of the four nearest tiles are interpolated.

    Args:
        tiles: along each axis. limit: how many times the mean a bin may hold; the excess is spread over all bins.
    """
    low, high = float(image.min()), float(image.max())
    level = np.round((image - low) / (high - low) * (_BINS - 1)).astype(np.int64)
    edges = [np.linspace(0, n, tiles + 1).round().astype(int) for n in image.shape]
    mapping = np.empty((tiles, tiles, _BINS))
    for row in range(tiles):
        for column in range(tiles):
            tile = level[edges[0][row] : edges[0][row + 1], edges[1][column] : edges[1][column + 1]]
            counts = np.bincount(tile.ravel(), minlength=_BINS).astype(np.float64)
            cap = limit * tile.size / _BINS
            counts = np.minimum(counts, cap) + np.maximum(counts - cap, 0).sum() / _BINS
            mapping[row, column] = counts.cumsum() / tile.size
    (r0, r1, down), (c0, c1, right) = (_between_tiles(edge) for edge in edges)
    upper = _blend(mapping[r0[:, None], c0, level], mapping[r0[:, None], c1, level], right)
    lower = _blend(mapping[r1[:, None], c0, level], mapping[r1[:, None], c1, level], right)
    return _blend(upper, lower, down[:, None]).astype(np.float32)


def _without_flat(image: Image) -> tuple[slice, slice]:
    """The image without the outermost rows and columns in which nothing changes; all of an image without contrast."""
    bounds = []
    for axis in (1, 0):
        lively = np.flatnonzero(image.max(axis) > image.min(axis))
        if not len(lively):
            return slice(0, image.shape[0]), slice(0, image.shape[1])
        bounds.append(slice(int(lively[0]), int(lively[-1]) + 1))
    return bounds[0], bounds[1]


def _without_padding(lines: Image, span: slice, tolerance: float) -> slice:
    """The part of `span` without the lines at its ends that are as constant, and as grey, as the outermost one."""
    start, stop = span.start, span.stop
    for first, ordered in ((True, lines[span]), (False, lines[span][::-1])):
        same = (np.abs(ordered - np.median(ordered[0])) <= tolerance).mean(axis=1) >= _SAME_SHARE
        count = int(np.argmin(same)) if not same.all() else 0
        start, stop = (start + count, stop) if first else (start, stop - count)
    return slice(start, stop) if stop - start >= _LEAST_LEFT * len(lines) else span


def _to_landmarks(image: Image, reference: tuple[float, ...]) -> Image:
    own = np.percentile(image, PERCENTILES)
    own = own + np.arange(len(own)) * 1e-6 * max(own[-1] - own[0], 1e-6)  # strictly rising where grey values are few
    return np.interp(image, own, reference).astype(np.float32)


def _to_detail(image: Image, reference: tuple[float, ...]) -> Image:
    """Each octave scaled to the reference's share, in the manner of Philipsen et al. 2015 (IEEE TMI 34:1965)."""
    bands, rest = _octaves(image)
    spread = max(float(image.std()), 1e-6)
    for band, wanted in zip(bands, reference, strict=True):
        own = float(band.std()) / spread
        rest = rest + (float(np.clip(wanted / own, *_GAINS)) if own > 1e-4 else 1.0) * band
    return rest.astype(np.float32)


def _octaves(image: Image) -> tuple[list[Image], Image]:
    """Differences of Gaussians, the finest first, and what is left; their sum is the image."""
    from scipy import ndimage

    finest = min(image.shape) / 256
    smooth = [image, *(ndimage.gaussian_filter(image, finest * 2**k, mode="nearest") for k in range(_OCTAVES))]
    return [fine - coarse for fine, coarse in pairwise(smooth)], smooth[-1]


def _between_tiles(edges: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Of each pixel along an axis the tiles before and after it, by their centres, and the share of the second."""
    centres = (edges[:-1] + edges[1:] - 1) / 2
    place = np.interp(np.arange(edges[-1]), centres, np.arange(len(centres)))
    before = np.floor(place).astype(np.int64)
    return before, np.minimum(before + 1, len(centres) - 1), place - before


def _blend(a: NDArray[np.float64], b: NDArray[np.float64], share: NDArray[np.float64]) -> NDArray[np.float64]:
    return (1 - share) * a + share * b
