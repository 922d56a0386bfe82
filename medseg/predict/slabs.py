"""Window by window from logits to labels: blended logits are kept only where a later window still adds to them.

What a window completes is brought to the output grid and reduced to labels at once, in slabs thin enough for the
processor's cache. Interpolation is linear and separable, so a slab is multiplied with one small matrix per axis.
"""

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.models.sliding import window_weights
from medseg.predict.heads import WindowLogits
from medseg.predict.sweep import Axis, Range, Sweep

LabelMap = NDArray[np.unsignedinteger[Any]]
_OWN_PAGES = 1 << 20
ADD_VALUES = 1_000_000  # added at a time, so that the product with the weights stays in the cache


def label_type(classes: int) -> type[np.uint8] | type[np.uint16]:
    """Smallest type of a label map. Raises ValueError for fewer than 2 classes, or more than 65,536."""
    if not 2 <= classes <= 65536:
        raise ValueError(
            f"the network has {classes} output channel{'s' * (classes != 1)}; background and one label at least are "
            "needed, and 65,535 labels at most can be stored"
        )
    return np.uint8 if classes <= 256 else np.uint16


@dataclass(frozen=True)
class SlabSize:
    """How much of the output is reduced at once.

    Attributes:
        thickness: slices along the first axis.
        rows: of each slice, for volumes.
        values: float32 numbers that this takes at most, all intermediate results together.
    """

    thickness: int
    rows: int
    values: int


def slab_size(sweep: Sweep, classes: int, max_values: float) -> SlabSize:
    """The thickest slab that takes at most `max_values` numbers; one row of one slice, if even that takes more."""
    outs = [max(high - low for low, high in axis.ready) for axis in sweep.axes]

    def values(thickness: int, rows: int) -> int:
        ranges = [thickness, rows, *outs[2:]]
        shape = [_largest_support(axis, count) for axis, count in zip(sweep.axes, ranges, strict=True)]
        total = before = int(np.prod(shape))
        for n, count in enumerate(ranges):
            shape[n] = count
            after = int(np.prod(shape))
            if sweep.axes[n].size != sweep.axes[n].out:
                total = max(total, before + after)
            before = after
        return classes * total + 4 * before

    thickness, rows = outs[0], outs[1]
    while values(thickness, rows) > max_values and thickness > 1:
        thickness = (thickness + 1) // 2
    while values(thickness, rows) > max_values and rows > 1 and len(outs) == 3:
        rows = (rows + 1) // 2
    return SlabSize(thickness, rows, values(thickness, rows))


class Room:
    """Memory for held logits. What one cell gives back the next takes, so that little is asked of the system.

    Args:
        values: numbers that tensors in use and spare ones may have together.
    """

    def __init__(self, values: int, dtype: torch.dtype, device: torch.device) -> None:
        self._free, self._dtype, self._device = values, dtype, device
        self._spare: dict[int, list[Tensor]] = {}

    def take(self, shape: Sequence[int]) -> Tensor:
        """A tensor of any content."""
        size = math.prod(shape)
        if spare := self._spare.get(size):
            return spare.pop().view(shape)
        while self._free < size:
            assert any(self._spare.values()), "more is held than was announced"
            kept = self._spare[max(n for n, tensors in self._spare.items() if tensors)]
            self._free += kept.pop().numel()
        self._free -= size
        if self._device.type == "cpu" and size * self._dtype.itemsize >= _OWN_PAGES:
            # Pages of its own: among the short-lived tensors of the heap it would leave holes that nothing fills.
            pages = mmap.mmap(-1, size * self._dtype.itemsize)
            return torch.frombuffer(pages, dtype=self._dtype).view(shape)
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def give_back(self, tensor: Tensor) -> None:
        """Keep a tensor for the next that wants one of its size."""
        self._spare.setdefault(tensor.numel(), []).append(tensor)


class Reduction:
    """Takes the logits of each window in the sweep's order and fills a label map.

    Args:
        sweep: order and geometry.
        classes: of the logits.
        dtype: of held logits. With float16 each voxel's largest logit is subtracted from all before rounding, which
            changes no argmax: close to a tie, where rounding could decide, the numbers to round are small.
        slab: see `slab_size`.
        device: where logits are held and reduced.

    Attributes:
        labels: the label map; complete after the last window.
    """

    def __init__(self, sweep: Sweep, classes: int, dtype: torch.dtype, slab: SlabSize, device: torch.device) -> None:
        self.labels: LabelMap = np.zeros([axis.out for axis in sweep.axes], dtype=label_type(classes))
        self._sweep, self._classes, self._dtype, self._slab, self._device = sweep, classes, dtype, slab, device
        self._weights = window_weights([axis.patch for axis in sweep.axes], device)
        self._cells: dict[tuple[int, ...], Tensor] = {}
        self._room = Room(sweep.held_voxels * classes, dtype, device)

    @torch.inference_mode()
    def add(self, index: tuple[int, ...], window: WindowLogits) -> None:
        """Blend the logits of one window in, and reduce what is final now.

        Raises:
            ValueError: a logit that decides is not finite.
        """
        axes = self._sweep.axes
        fresh: dict[tuple[int, ...], tuple[WindowLogits, Tensor]] = {}
        for key in product(*[axis.touched[j] for axis, j in zip(axes, index, strict=True)]):
            inside = [
                slice(axis.cells[n].start - axis.starts[j], axis.cells[n].stop - axis.starts[j])
                for axis, j, n in zip(axes, index, key, strict=True)
            ]
            part, weights = window.part(inside), self._weights[tuple(inside)]
            if key in self._cells:
                self._blend(self._cells[key], part, weights)
            else:
                fresh[key] = (part, weights)
        for ranges in self._slabs([axis.ready[j] for axis, j in zip(axes, index, strict=True)]):
            self._reduce(ranges, fresh)
        for key in product(*[axis.dropped[j] for axis, j in zip(axes, index, strict=True)]):
            fresh.pop(key, None)
            if key in self._cells:
                self._room.give_back(self._cells.pop(key))
        for key, (part, weights) in fresh.items():
            self._cells[key] = self._room.take((self._classes, *weights.shape))
            self._blend(self._cells[key], part, weights, onto_nothing=True)

    def _blend(self, cell: Tensor, part: WindowLogits, weights: Tensor, onto_nothing: bool = False) -> None:
        """Add weighted logits; product and sum are rounded one after the other, as on a full buffer."""
        if self._dtype == torch.float32 and part.head is None:
            logits = part.made()
            if onto_nothing:
                torch.mul(logits, weights, out=cell)
                return
            step = max(ADD_VALUES // weights.numel(), 1)
            for at in range(0, len(cell), step):
                cell[at : at + step].add_(logits[at : at + step] * weights)
            return
        step = max(ADD_VALUES // (len(cell) * weights[0].numel()), 1)
        for at in range(0, len(weights), step):
            rows = slice(at, at + step)
            total = part.part([rows]).made() * weights[rows]
            if not onto_nothing:
                total.add_(cell[:, rows])
            if self._dtype != torch.float32:
                total.sub_(total.amax(0)).clamp_(min=torch.finfo(self._dtype).min)
            cell[:, rows].copy_(total)

    def _slabs(self, ranges: Sequence[Range]) -> Iterator[list[Range]]:
        """Cut output ranges into slabs; nothing where one of them is empty."""
        if any(low == high for low, high in ranges):
            return
        steps = [self._slab.thickness, self._slab.rows]
        parts = [
            [(at, min(at + step, high)) for at in range(low, high, step)]
            for (low, high), step in zip(ranges[:2], steps, strict=True)
        ]
        for some in product(*parts):
            yield [*some, *ranges[2:]]

    def _reduce(self, ranges: Sequence[Range], fresh: dict[tuple[int, ...], tuple[WindowLogits, Tensor]]) -> None:
        axes = self._sweep.axes
        box = [axis.support(outputs) for axis, outputs in zip(axes, ranges, strict=True)]
        logits = torch.empty((self._classes, *[high - low for low, high in box]), device=self._device)
        for key, source, target in self._pieces(box):
            if key in fresh:
                part, weights = fresh[key]
                torch.mul(part.part(source).made(), weights[source], out=logits[(slice(None), *target)])
            else:
                logits[(slice(None), *target)].copy_(self._cells[key][(slice(None), *source)])
        logits.div_(self._total_weights(box))
        for n, (axis, outputs) in enumerate(zip(axes, ranges, strict=True), start=1):
            if axis.size != axis.out:
                logits = _along(logits, n, torch.from_numpy(axis.matrix(outputs)).to(self._device))
        where = tuple(slice(*outputs) for outputs in ranges)
        self.labels[where] = largest(logits).cpu().numpy()

    def _pieces(self, box: Sequence[Range]) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...], tuple[slice, ...]]]:
        """The cells that a box consists of, with the place of each piece in its cell and in the box."""
        found = [
            [
                (n, slice(max(low, c.start) - c.start, min(high, c.stop) - c.start),
                 slice(max(low, c.start) - low, min(high, c.stop) - low))
                for n, c in enumerate(axis.cells)
                if c.start < high and c.stop > low
            ]
            for axis, (low, high) in zip(self._sweep.axes, box, strict=True)
        ]  # fmt: skip
        for parts in product(*found):
            yield tuple(p[0] for p in parts), tuple(p[1] for p in parts), tuple(p[2] for p in parts)

    def _total_weights(self, box: Sequence[Range]) -> Tensor:
        """Sum of all windows' weights in a box, added in the sweep's order."""
        total = torch.zeros([high - low for low, high in box], device=self._device)
        for index in self._sweep.windows_over(box):
            inside, target = [], []
            for axis, j, (low, high) in zip(self._sweep.axes, index, box, strict=True):
                start = axis.starts[j]
                first, stop = max(low, start), min(high, start + axis.patch)
                inside.append(slice(first - start, stop - start))
                target.append(slice(first - low, stop - low))
            total[tuple(target)] += self._weights[tuple(inside)]
        return total


def largest(logits_KDHW: Tensor) -> Tensor:
    """Class of the largest logit, of equal ones the lowest.

    Returns:
        Integers of a type that NumPy casts to labels without loss.

    Raises:
        ValueError: the largest logit of a voxel is not finite.
    """
    if logits_KDHW.device.type != "cpu":  # one kernel; on a CPU it is slower than a pass per class
        best, labels = logits_KDHW.max(0)
    else:
        best = logits_KDHW[0].clone()
        labels = torch.zeros(best.shape, dtype=torch.uint8 if len(logits_KDHW) <= 256 else torch.int32)
        above = torch.empty(best.shape, dtype=torch.bool)
        for value in range(1, len(logits_KDHW)):
            torch.gt(logits_KDHW[value], best, out=above)
            labels.masked_fill_(above, value)
            torch.maximum(best, logits_KDHW[value], out=best)  # carries NaN along: one look at the end is enough
    if not torch.isfinite(best).all():
        raise ValueError("the network's logits are not finite; its weights or the image are damaged")
    return labels


def _along(values: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """Multiply one dimension of a contiguous tensor with a matrix."""
    shape = values.shape
    if dim == values.ndim - 1:
        return torch.matmul(values, matrix.T)
    flat = values.reshape(-1, shape[dim], int(np.prod(shape[dim + 1 :])))
    return torch.matmul(matrix, flat).reshape(*shape[:dim], len(matrix), *shape[dim + 1 :])


def _largest_support(axis: Axis, count: int) -> int:
    """The most voxels that `count` neighbouring output voxels of one axis are interpolated from."""
    count = min(count, axis.out)
    return int((axis.highest[count - 1 :] - axis.lowest[: axis.out - count + 1]).max()) + 1
