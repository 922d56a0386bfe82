"""Windows in order: which voxels each one touches first, finishes, and leaves for later. Whole numbers, no logits.

Windows are visited in lexicographic order of their indices along the axes of `Sweep.order`. A voxel is final after the
last window that touches it, and can be forgotten after the last window that completes an output voxel interpolated from
it. Both moments are products of moments along single axes, so that an axis is cut into cells of voxels that share
them, and what is held between two windows can be counted without visiting any.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, permutations, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from medseg.models.sliding import window_starts

Ints = NDArray[np.int64]
Range = tuple[int, int]


@dataclass(frozen=True)
class Cell:
    """Voxels `start` … `stop` - 1 of one axis, touched by windows `first` … `last`, needed through window `until`."""

    start: int
    stop: int
    first: int
    last: int
    until: int


class Axis:
    """Windows, cells and output voxels along one axis.

    Args:
        size, out: voxels of the image and of the output along the axis, which cover the same extent.
        patch, overlap: see `medseg.models.sliding.window_starts`.

    Attributes:
        starts: first voxel of each window; negative where the window is longer than the axis.
        taps, tap_weights: (3, out) voxels that each output voxel is interpolated from, and their weights.
        lowest, highest: (out) first and last of them that weighs anything.
        cells: the axis, cut.
        ready: for each window the range of output voxels that it completes.
    """

    def __init__(self, size: int, patch: int, overlap: float, out: int) -> None:
        self.size, self.patch, self.out = size, patch, out
        self.starts = window_starts(size, patch, overlap)
        self.taps, self.tap_weights = _linear_taps(size, out)
        weighs = self.tap_weights != 0
        self.lowest: Ints = np.where(weighs, self.taps, size).min(0)
        self.highest: Ints = np.where(weighs, self.taps, -1).max(0)
        voxels = np.arange(size)
        first = np.searchsorted(np.asarray(self.starts) + patch, voxels, side="right")
        last = np.searchsorted(self.starts, voxels, side="right") - 1
        completes = last[self.highest]
        ends = np.searchsorted(completes, np.arange(len(self.starts)), side="right")
        self.ready: list[Range] = [(int(low), int(high)) for low, high in zip([0, *ends], ends, strict=False)]
        kept_from = [int(self.lowest[end]) if end < out else size for end in ends]
        until = np.maximum(np.searchsorted(kept_from, voxels, side="right"), last)
        self.cells = _cells(np.stack([first, last, until]))

    @cached_property
    def touched(self) -> list[list[int]]:
        """For each window the cells it covers."""
        return [[n for n, c in enumerate(self.cells) if c.first <= j <= c.last] for j in range(len(self.starts))]

    @cached_property
    def dropped(self) -> list[list[int]]:
        """For each window the cells that nothing after it needs."""
        return [[n for n, c in enumerate(self.cells) if c.until == j] for j in range(len(self.starts))]

    def support(self, outputs: Range) -> Range:
        """Range of voxels that a range of output voxels is interpolated from."""
        return int(self.lowest[outputs[0]]), int(self.highest[outputs[1] - 1]) + 1

    def matrix(self, outputs: Range) -> NDArray[np.float32]:
        """(outputs, support) linear interpolation from the range's support."""
        low, high = self.support(outputs)
        matrix = np.zeros((outputs[1] - outputs[0], high - low), dtype=np.float32)
        rows = np.arange(len(matrix))
        columns, weights = self.taps[:, slice(*outputs)] - low, self.tap_weights[:, slice(*outputs)]
        for column, weight in zip(columns, weights, strict=True):
            used = weight != 0
            matrix[rows[used], column[used]] = weight[used]
        return matrix


class Sweep:
    """All windows of an image, in the order that holds the fewest voxels.

    Args:
        shape, out_shape: of the image and of the output, two or three axes.
        patch_size, overlap: of the windows.

    Attributes:
        axes: one per spatial axis. order: the same by number, the slowest first.
        held_voxels: the most voxels whose logits are held between two windows.
    """

    def __init__(
        self, shape: Sequence[int], patch_size: Sequence[int], overlap: float, out_shape: Sequence[int]
    ) -> None:
        sizes = zip(shape, patch_size, out_shape, strict=True)
        self.axes = [Axis(size, patch, overlap, out) for size, patch, out in sizes]
        orders = list(permutations(range(len(shape))))
        held = [self._count_held(order) for order in orders]
        self.held_voxels = min(held)
        self.order = orders[held.index(self.held_voxels)]  # of equal ones that of the array

    def windows(self) -> Iterator[tuple[int, ...]]:
        """Index of each window along the array's axes."""
        back = np.argsort(self.order)
        for index in product(*[range(len(self.axes[axis].starts)) for axis in self.order]):
            yield tuple(index[axis] for axis in back)

    def windows_over(self, box: Sequence[Range]) -> list[tuple[int, ...]]:
        """Windows that touch any voxel of a box, in the sweep's order."""
        near = [
            [n for n, start in enumerate(axis.starts) if start < high and start + axis.patch > low]
            for axis, (low, high) in zip(self.axes, box, strict=True)
        ]
        return sorted(product(*near), key=lambda index: [index[axis] for axis in self.order])

    def _count_held(self, order: Sequence[int]) -> int:
        touched, dropped = np.ones(1, dtype=np.int64), np.ones(1, dtype=np.int64)
        inner = 1
        for axis in [self.axes[n] for n in reversed(order)]:
            touched = _count_up_to(axis, [cell.first for cell in axis.cells], touched, inner)
            dropped = _count_up_to(axis, [cell.until for cell in axis.cells], dropped, inner)
            inner *= axis.size
        return int((touched - dropped).max())


def _count_up_to(axis: Axis, moments: Sequence[int], inner: Ints, inner_size: int) -> Ints:
    """Voxels whose moment has come, after each window; `inner` is the same for the faster axes."""
    at = np.zeros(len(axis.starts), dtype=np.int64)
    for cell, moment in zip(axis.cells, moments, strict=True):
        at[moment] += cell.stop - cell.start
    before = np.cumsum(at) - at
    return (before[:, None] * inner_size + at[:, None] * inner[None]).ravel()


def _cells(moments: Ints) -> list[Cell]:
    """Runs of equal columns of (first, last, until)."""
    changes = np.flatnonzero((np.diff(moments) != 0).any(0)) + 1
    edges = [0, *changes.tolist(), moments.shape[1]]
    return [Cell(low, high, *moments[:, low].tolist()) for low, high in pairwise(edges)]


def _linear_taps(size: int, out: int) -> tuple[Ints, NDArray[np.float32]]:
    """What `functional.interpolate(mode="linear", align_corners=False)` weighs, read off itself to the last bit.

    Voxel i lies in channel i mod 3 of a one-hot signal; of three neighbours no two share a channel.
    """
    if size == out:
        return np.arange(size)[None], np.ones((1, size), dtype=np.float32)
    signal = functional.one_hot(torch.arange(size) % 3, 3).T.to(torch.float32)
    seen = functional.interpolate(signal[None], out, mode="linear", align_corners=False)[0].numpy()
    centres = np.rint((np.arange(out) + 0.5) * (size / out) - 0.5).astype(np.int64)
    taps = centres + np.array([[-1], [0], [1]])
    weights = np.take_along_axis(seen, taps % 3, axis=0)
    inside = (taps >= 0) & (taps < size)
    return np.where(inside, taps, 0), np.where(inside, weights, np.float32(0))
