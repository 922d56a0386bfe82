"""Whether a picture looks like a frontal chest radiograph, from its pixels alone.

The likeness is the largest weighted correlation between the picture at 32×32 pixels and drawings of a chest: two dark
lungs, narrower at the top, in a bright body with a bright mediastinum. The drawings differ in centre, width, top and
bottom of the lungs; below them there is always some belly, and what lies outside the body does not count. A drawing
counts half where the picture lacks what encloses the lungs: the bright mediastinum, or the wall of the chest on either
side, without which dark air beside a neck or a leg would be taken for lungs.
`benchmarks/frontal_chest.py` measures how often this is right, also with limits that were set at another site.
"""

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Finding

NO_CHEST_LIKENESS = 0.25  # of 598 chest radiographs of two hospitals, the least likely has 0.29
DOUBTFUL_LIKENESS = 0.4  # below it, 3 of the 598 and nearly all else
TURN_MARGIN = 0.06  # by which a turned picture must be likelier; the worst of the 598, which are upright, has -0.02
_MIDDLE, _WALL = 0.6, 0.15  # least brightness of mediastinum and wall, as shares of the range of grey values
_SIDE = 32
_COARSE = 128
_DARK = 0.06  # of the range of grey values: a margin as dark as this is cut off
_CENTRES, _HALF_WIDTHS = (0.42, 0.46, 0.5, 0.54, 0.58), (0.22, 0.28, 0.34, 0.40, 0.46)
_TOPS, _BOTTOMS = (0.0, 0.07, 0.14, 0.21), (0.62, 0.72, 0.82, 0.92)


def check_frontal(image: NDArray[Any]) -> Iterator[Finding]:
    """Findings about a radiograph (row, column), bright where dense.

    Yields:
        `not_frontal_chest` when it looks like one that was turned by a quarter or half turn, with the difference of
        the likenesses; else `no_chest` when it looks like none at all, or `chest_doubtful` when it hardly looks like
        one, with its likeness.
    """
    upright, *turned = likenesses(image)
    best = int(np.argmax(turned))
    if turned[best] >= DOUBTFUL_LIKENESS and turned[best] - upright > TURN_MARGIN:
        message = (
            f"The picture looks like a frontal chest radiograph that was turned by {90 * (best + 1)} degrees "
            f"clockwise (likeness {turned[best]:.2f} upright, {upright:.2f} as it is)."
        )
        yield Finding("not_frontal_chest", "warning", message, round(turned[best] - upright, 3), TURN_MARGIN)
    elif upright < NO_CHEST_LIKENESS:
        message = f"The picture looks like no frontal chest radiograph (likeness {upright:.2f})."
        yield Finding("no_chest", "warning", message, round(upright, 3), NO_CHEST_LIKENESS)
    elif upright < DOUBTFUL_LIKENESS:
        message = f"The picture hardly looks like a frontal chest radiograph (likeness {upright:.2f})."
        yield Finding("chest_doubtful", "warning", message, round(upright, 3), DOUBTFUL_LIKENESS)


def likenesses(image: NDArray[Any]) -> tuple[float, ...]:
    """`likeness` of a picture (row, column) as it is, and turned back by 90, 180 and 270 degrees counter-clockwise."""
    coarse = _resized(image[:: max(1, image.shape[0] // 512), :: max(1, image.shape[1] // 512)], _COARSE)
    return tuple(likeness(np.rot90(coarse, turns)) for turns in range(4))


def likeness(image: NDArray[Any]) -> float:
    """The largest correlation, -1 to 1, of a picture (row, column) with a drawing of a chest; dark margins are cut."""
    templates, weights, middles, walls = _drawings()
    small = _resized(_without_margin(image), _SIDE).ravel()
    low, high = np.percentile(small, [2, 98])
    values = np.clip((small - low) / max(high - low, 1e-9), 0, 1)
    total = weights.sum(axis=1)
    variance = weights @ values**2 / total - (weights @ values / total) ** 2
    found = templates @ values / np.sqrt(np.maximum(variance, 1e-3) * total)
    open_ = (middles @ values < _MIDDLE) | (walls @ values < _WALL).any(axis=0)  # never where a part is off the picture
    return float(np.where(open_, found / 2, found).max())


def _without_margin(image: NDArray[Any]) -> NDArray[Any]:
    """Less the dark rows and columns at the edges: black bars, collimation."""
    low, high = np.percentile(image, [1, 99])
    dark = low + _DARK * (high - low)
    rows, columns = (np.flatnonzero(np.percentile(image, 95, axis=axis) > dark) for axis in (1, 0))
    if rows.size < image.shape[0] // 3 or columns.size < image.shape[1] // 3:
        return image
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _resized(image: NDArray[Any], side: int) -> NDArray[np.float32]:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.float32))
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX))


@cache
def _drawings() -> tuple[NDArray[np.float64], ...]:
    """All drawings, each as (drawing, pixel) but for the last.

    Returns:
        Drawings with weighted mean 0 and norm 1; their weights; what gives the mean over the mediastinum, NaN where
        that is off the picture; likewise, as (side, drawing, pixel), over the two walls of the chest.
    """
    made = [_drawing(*shape) for shape in product(_CENTRES, _HALF_WIDTHS, _TOPS, _BOTTOMS)]
    templates, weights, middles, walls = (np.array(part) for part in zip(*made, strict=True))
    return templates, weights, middles, walls.transpose(1, 0, 2)


def _drawing(
    centre: float, half_width: float, top: float, bottom: float
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """One chest; all lengths are shares of the picture's sides."""
    at = (np.arange(_SIDE) + 0.5) / _SIDE
    down = ((at - top) / (bottom - top))[:, None]  # 0 at the top of the lungs, 1 at the diaphragm
    side = (at - centre)[None, :]
    aside = np.abs(side)
    apex = np.where(down < 0.65, np.sqrt(np.clip(1 - np.abs(down / 0.65 - 1), 0, 1)), 1.0)
    mediastinum = 0.05 + 0.05 * np.clip(down, 0, 1)
    inside = (down > 0) & (down < 1)
    lung = inside & (aside > mediastinum) & (aside < mediastinum + (half_width - mediastinum) * apex)
    body = (aside < half_width + 0.05) & ((at > top - 0.04) & (at < bottom + 0.12))[:, None]
    weight = (body & ~((down < 0.12) & (aside > 0.8 * half_width))).astype(float)
    drawing = np.where(lung, -1.0, 1.0)
    drawing = (drawing - (drawing * weight).sum() / weight.sum()) * weight
    middle = (down > 0.1) & (down < 1) & (aside <= mediastinum)
    wall = (down > 0.3) & (down < 0.75) & (aside > half_width + 0.01) & (aside < half_width + 0.1)
    walls = np.array([_mean_over(wall & (side * sign > 0)) for sign in (-1, 1)])
    return (drawing / np.linalg.norm(drawing)).ravel(), weight.ravel(), _mean_over(middle), walls


def _mean_over(part: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Weights of pixels by which their values become the mean over a part; NaN where it has fewer than 2 pixels."""
    return part.ravel() / part.sum() if part.sum() > 1 else np.full(part.size, np.nan)
