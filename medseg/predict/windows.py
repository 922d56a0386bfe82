"""From an image array to a label map on any grid of the same field of view, in memory that is known beforehand."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medseg.files import UserError
from medseg.models.sliding import even_windows
from medseg.predict.answers import Answers, Watch, batches
from medseg.predict.slabs import ADD_VALUES, Reduction, SlabSize, label_type, slab_size
from medseg.predict.sweep import Sweep

_SLAB_VALUES = {"cpu": 4e6, "cuda": 64e6}  # of a slab: a CPU's cache is small, a GPU wants few large kernels


@dataclass(frozen=True)
class WorkingSet:
    """What segmenting takes beside the image and the label map, in GB (1e9 bytes) at its peak.

    Attributes:
        held_gb: blended logits between two windows.
        slab_gb: interpolation and argmax of one slab and blending, three times: heaps of threads keep what was freed.
        network_gb: the network while it sees one batch of windows, and the kept answer to even windows; its logits
            included, unless they are made in parts of its features (`Answers`).
        dtype: of the held logits. slab: how much is reduced at once.
        windows: of the sweep; 0 before there is an image. even: those of one value throughout, such as padding, whose
            answer is taken from the first of them. air: of these, how many are only taken to be even (`air_below`).
    """

    held_gb: float
    slab_gb: float
    network_gb: float
    dtype: torch.dtype
    slab: SlabSize
    windows: int = 0
    even: int = 0
    air: int = 0

    @property
    def total_gb(self) -> float:
        """All of it: the network runs and slabs are reduced while logits are held."""
        return self.held_gb + self.slab_gb + self.network_gb

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        text = f"{self.total_gb:.2f} GB at most ({self.held_gb:.2f} held as {kind}, {self.network_gb:.2f} network)"
        return f"{text}, {self.even} of {self.windows} windows even" if self.even else text


def segment_array(
    net: nn.Module | Sequence[nn.Module],
    image_CDHW: NDArray[Any] | Tensor,
    patch_size: Sequence[int],
    overlap: float = 0.5,
    out_shape: Sequence[int] | None = None,
    memory_gb: float = 2.0,
    *,
    window_batch: int = 1,
    mirror_axes: Sequence[int] = (),
    air_below: float | None = None,
    announce: Callable[[WorkingSet], None] | None = None,
    watch: Watch | None = None,
) -> NDArray[np.unsignedinteger[Any]]:
    """Segment an image: sliding window, logits to the wanted grid, argmax, in one sweep of windows.

    Logits are held only where a later window still adds to them; what is final is interpolated and reduced to labels
    at once. So the logits of all classes never exist for the whole image. Interpolated logits place a boundary between
    voxels where interpolated labels cannot.

    Args:
        net: x_BCDHW -> logits_BKDHW with K ≥ 2 classes; evaluated on the device its parameters are on. Several
            networks on one device: their logits are averaged, window by window.
        image_CDHW: or image_CHW; prepared as the network wants it. Axes shorter than the window are padded with 0.
        patch_size: the window, one number per spatial axis.
        overlap: share of a window that its neighbour sees too, 0 ≤ overlap < 1.
        out_shape: spatial shape of the result, over the same field of view edge to edge; by default the image's.
        memory_gb: what held logits and a slab may take together, on the network's device. Logits are held as float32;
            where that does not fit as float16, which changes a few labels in 100,000 next to a tie (an untrained
            network's on smooth noise: 7 of 262,144).
        window_batch: windows per call of the network.
        mirror_axes: spatial axes (0 = D); the logits of each window are averaged over all flips along them.
        air_below: in the unit of the image; windows with no voxel from it on are answered as if they were even, at the
            lowest value of the image, so that the network sees one of them. That may change labels. Windows of one
            value throughout are answered once in any case, which changes none.
        announce: is told the working set after the first batch of windows, before anything is held.
        watch: see `Answers`.

    Returns:
        (D, H, W) class of each voxel: uint8 for at most 256 classes, else uint16. Of equal logits the lower class
        wins. Linear interpolation, edges repeated.

    Raises:
        UserError: `memory_gb` is too little even for the thinnest slab; it says what would do.
        ValueError: the image is no number array, the window does not fit, or the network gives no usable logits.
    """
    image = torch.as_tensor(image_CDHW)
    if image.ndim not in (3, 4) or image.ndim - 1 != len(patch_size):
        raise ValueError(f"image {tuple(image.shape)} needs a channel axis and one axis per entry of {patch_size}")
    nets = [net] if isinstance(net, nn.Module) else list(net)
    parameters = (parameter for one in nets for parameter in one.parameters())
    device = next((parameter.device for parameter in parameters), torch.device("cpu"))
    sweep = Sweep(image.shape[1:], patch_size, overlap, out_shape if out_shape is not None else image.shape[1:])
    modes = [(one, one.training) for one in nets]
    try:
        for one in nets:
            one.eval()
        even = even_windows(image, [axis.starts for axis in sweep.axes], patch_size, air_below)
        answers = Answers(nets, mirror_axes, image, sweep, even, device, watch)
        return _sweep_windows(sweep, answers, window_batch, memory_gb, announce)
    finally:
        for one, was_training in modes:
            one.train(was_training)


def working_set(
    sweep: Sweep,
    classes: int,
    memory_gb: float,
    network_gb: float = 0.0,
    device_type: str = "cpu",
) -> WorkingSet:
    """The working set of a sweep, with the most exact held logits that fit.

    Args:
        network_gb: see `WorkingSet`; as measured on one batch of windows.

    Raises:
        UserError: `memory_gb` is too little.
    """
    limit = 1e9 * memory_gb / 4
    most = _SLAB_VALUES.get(device_type, _SLAB_VALUES["cuda"])
    needed = math.inf
    for dtype in (torch.float32, torch.float16):
        held = sweep.held_voxels * classes * dtype.itemsize / 4
        slab = slab_size(sweep, classes, min(most, limit - held))
        if held + slab.values <= limit:
            return WorkingSet(held * 4 / 1e9, 12e-9 * (slab.values + ADD_VALUES), network_gb, dtype, slab)
        needed = (held + slab.values) * 4 / 1e9
    raise UserError(
        f"memory_gb {memory_gb:g}: {classes} classes on a grid of {tuple(axis.size for axis in sweep.axes)} need "
        f"{_round_up(needed):g}; allow that much, or choose a smaller overlap or window."
    )


def working_set_gb(
    classes: int,
    image_shape: Sequence[int],
    patch_size: Sequence[int],
    overlap: float = 0.5,
    out_shape: Sequence[int] | None = None,
    memory_gb: float = 2.0,
    *,
    window_batch: int = 1,
    network_gb: float = 0.0,
) -> float:
    """What `segment_array` takes beside the image and the label map, in GB (1e9 bytes), without running anything.

    Args:
        image_shape: without channels. network_gb: see `WorkingSet`; not less than the logits of a batch of windows.

    Raises:
        UserError: `memory_gb` is too little.
    """
    sweep = Sweep(image_shape, patch_size, overlap, out_shape if out_shape is not None else image_shape)
    logits_gb = 4e-9 * window_batch * classes * math.prod(patch_size)
    return working_set(sweep, classes, memory_gb, max(network_gb, logits_gb)).total_gb


@torch.inference_mode()
def _sweep_windows(
    sweep: Sweep,
    answers: Answers,
    window_batch: int,
    memory_gb: float,
    announce: Callable[[WorkingSet], None] | None,
) -> NDArray[np.unsignedinteger[Any]]:
    reduction: Reduction | None = None
    device, even = answers.device, answers.even
    for batch in batches(sweep.windows(), even, window_batch):
        if reduction is None:
            with peak_over_start(device) as peak:
                logits = answers.first(batch, peak.look)
            label_type(answers.classes)
            count = math.prod(len(axis.starts) for axis in sweep.axes)
            largest = max(min(window_batch, count - len(even.values)), 1)
            window_gb = logits[0].values_CDHW.nbytes / 1e9
            kept_gb = window_gb if even.values else 0.0  # the answer to even windows
            network_gb = max(answers.taken_gb / len(batch), window_gb) * largest + kept_gb
            plan = working_set(sweep, answers.classes, memory_gb, network_gb, device.type)
            if announce is not None:
                announce(replace(plan, windows=count, even=len(even.values), air=even.air))
            reduction = Reduction(sweep, answers.classes, plan.dtype, plan.slab, device)
        else:
            logits = answers.of(batch)
        with torch.autocast(device.type, enabled=False):
            for index, window in zip(batch, logits, strict=True):
                reduction.add(index, window)
        del logits, window  # before the network needs the memory again
    assert reduction is not None
    return reduction.labels


@dataclass
class _Peak:
    taken_gb: Callable[[], float]
    gb: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)

    def look(self) -> float:
        """The peak so far."""
        self.gb = max(self.gb, self.taken_gb())
        return self.gb

    def watch(self) -> None:
        while not self._stop.wait(0.001):
            self.look()


@contextmanager
def peak_over_start(device: torch.device) -> Iterator[_Peak]:
    """Memory that the block takes at its peak beyond what there was before: allocated on a GPU, resident on a CPU.

    What other threads take in the meantime counts too.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        peak = _Peak(lambda: (torch.cuda.max_memory_allocated(device) - allocated) / 1e9)
        yield peak
        peak.look()
        return
    import psutil

    process = psutil.Process()
    before = process.memory_info().rss
    peak = _Peak(lambda: (process.memory_info().rss - before) / 1e9)
    watcher = threading.Thread(target=peak.watch, name="memory", daemon=True)
    watcher.start()
    try:
        yield peak
        peak.look()
    finally:
        peak._stop.set()
        watcher.join()


def _round_up(gb: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(gb)) - 2)
    return math.ceil(gb / unit) * unit
