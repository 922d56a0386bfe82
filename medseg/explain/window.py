"""Which part of a large image is explained at once, and how its map returns into the whole."""

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Window = tuple[tuple[int, int], ...]
T = TypeVar("T", bound=np.generic)


def choose_window(region: NDArray[np.bool_], patch_size: tuple[int, ...], max_voxels: int) -> Window:
    """First and last + 1 voxel along each axis of the network's grid.

    The whole image where it has at most `max_voxels`, else one patch around the centre of the region. Sides are
    at least the patch and multiples of the powers of two in it, which the network's strides divide; a window may
    therefore reach beyond the image.

    Args:
        region: what is explained, bool, (*space).
    """
    steps = [n & -n for n in patch_size]
    sides = [max(p, math.ceil(n / s) * s) for n, p, s in zip(region.shape, patch_size, steps, strict=True)]
    if math.prod(sides) <= max_voxels:
        return tuple((0, side) for side in sides)
    inside = np.argwhere(region)
    centre = inside.mean(axis=0) if len(inside) else np.asarray(region.shape) / 2
    firsts = [
        int(np.clip(round(middle - patch / 2), 0, max(0, n - patch)))
        for middle, patch, n in zip(centre, patch_size, region.shape, strict=True)
    ]
    return tuple((first, first + patch) for first, patch in zip(firsts, patch_size, strict=True))


def cut(array: NDArray[T], window: Window) -> NDArray[T]:
    """The window of (channel, *space); 0 where it reaches beyond the image."""
    space = array.shape[1:]
    part = array[(slice(None), *_inside(window, space))]
    missing = [(last - first) - n for (first, last), n in zip(window, part.shape[1:], strict=True)]
    return np.pad(part, [(0, 0), *((0, n) for n in missing)])


def paste(part: NDArray[T], window: Window, shape: tuple[int, ...]) -> NDArray[T]:
    """(*space) array of `shape` with `part` in its window and 0 elsewhere; what lies beyond the image is dropped."""
    whole = np.zeros(shape, dtype=part.dtype)
    inside = _inside(window, shape)
    whole[inside] = part[tuple(slice(0, side.stop - side.start) for side in inside)]
    return whole


def _inside(window: Window, shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(first, min(last, n)) for (first, last), n in zip(window, shape, strict=True))
