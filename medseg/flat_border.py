"""Two structures whose border is a plane by the protocol of those who drew them, such as the parts of a hippocampus.

Where one structure ends and the next begins is often not to be seen, and is drawn as one slice of the scan. A network
finds the border voxel by voxel; the slice that most of its voxels speak for is nearer to what was drawn.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.volume import Affine, closest_axes

Labels = NDArray[Any]  # uint8 or uint16

AXES = ("LR", "AP", "IS")
"""What a border lies across: the direction from one structure to the other."""


@dataclass(frozen=True)
class Border:
    """The plane before slice `start` of an array axis.

    Attributes:
        first_below: the first structure is below the plane, the second above it.
        misplaced: share of the voxels of both that lie on the wrong side of it, 0 to 1.
    """

    start: int
    first_below: bool
    misplaced: float


def array_axis(affine: Affine, direction: str) -> int:
    """The axis of an array that runs along one of `AXES`; that of an oblique scan which runs closest to it."""
    return int(closest_axes(affine)[0][AXES.index(direction)])


def slice_counts(labels: Labels, axis: int) -> NDArray[np.int64]:
    """Voxels of each label in each slice across an axis: (slices, highest label + 1)."""
    highest = int(labels.max(initial=0))
    slices = np.moveaxis(labels, axis, 0)
    return np.array([np.bincount(part.reshape(-1), minlength=highest + 1) for part in slices])


def find_border(counts: NDArray[np.int64], first: int, second: int) -> Border | None:
    """The plane that leaves the fewest voxels of two labels on the wrong side; None where one is missing.

    Args:
        counts: of `slice_counts`.
    """
    if max(first, second) >= counts.shape[1] or not counts[:, first].any() or not counts[:, second].any():
        return None
    # voxels of each below every possible start
    below, other = (np.concatenate([[0], np.cumsum(counts[:, value])]) for value in (first, second))
    total = below[-1] + other[-1]
    wrong = below[-1] - below + other  # with the first structure below
    upright, reverse = int(np.argmin(wrong)), int(np.argmax(wrong))
    if wrong[upright] <= total - wrong[reverse]:
        return Border(upright, True, float(wrong[upright] / total))
    return Border(reverse, False, float(1 - wrong[reverse] / total))


def flatten_border(labels: Labels, first: int, second: int, axis: int) -> Labels:
    """Part two labels by the plane of `find_border`: each of their voxels takes the label of its side.

    Returns:
        A map of the same shape and dtype; the same one where a label is missing.
    """
    border = find_border(slice_counts(labels, axis), first, second)
    if border is None or border.misplaced == 0:
        return labels
    changed = np.moveaxis(labels.copy(), axis, 0)
    below, above = (first, second) if border.first_below else (second, first)
    for part, value in ((changed[: border.start], below), (changed[border.start :], above)):
        part[(part == first) | (part == second)] = value
    return np.moveaxis(changed, 0, axis)
