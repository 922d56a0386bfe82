"""Where windows lie, how they are weighted, and what a network says about one; shared by validation and prediction."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from monai.data.utils import compute_importance_map
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn
from torch.nn import functional

_SMALL_WINDOW = 2**17  # voxels: two such windows take little memory


@torch.inference_mode()
def window_logits(
    net: nn.Module | Sequence[nn.Module],
    image_BCDHW: Tensor,
    patch_size: Sequence[int],
    overlap: float,
    window_batch: int = 1,
    mirror_axes: Sequence[int] = (),
) -> Tensor:
    """Slide a window over the image and blend the logits with Gaussian weights; holds the logits of all classes.

    Args:
        net: x_BCDHW -> logits_BKDHW of the same spatial size; in the mode the caller has set. Of several networks
            the logits are averaged.
        image_BCDHW: or image_BCHW; axes shorter than the window are padded with 0, and the logits cut back.
        patch_size: the window, one number per spatial axis.
        overlap: share of a window that its neighbour sees too, 0 ≤ overlap < 1.
        window_batch: windows per call of the network, at least; see `fast_batch`.
        mirror_axes: see `averaged`.

    Returns:
        logits_BKDHW, in the image's dtype.

    Raises:
        ValueError: the window does not fit the image's axes, or the network returns no logits of the window's size.
    """
    logits: Tensor = sliding_window_inference(
        image_BCDHW,
        tuple(patch_size),
        max(window_batch, fast_batch(patch_size, image_BCDHW.device)),
        averaged([net] if isinstance(net, nn.Module) else net, mirror_axes),
        overlap,
        mode="gaussian",
    )
    return logits


def fast_batch(patch_size: Sequence[int], device: torch.device) -> int:
    """Windows that the network should see at least at a time: two where a window is small, and the device a CPU.

    torch has a single image of few rows convolved by kernels of its own, and gives two of them to oneDNN: a third of
    the network's time on windows of 32×48×32. The logits differ by rounding.
    """
    return 2 if device.type == "cpu" and math.prod(patch_size) <= _SMALL_WINDOW else 1


def averaged(nets: Sequence[nn.Module], mirror_axes: Sequence[int] = ()) -> Callable[[Tensor], Tensor]:
    """A function from a window to logits averaged over networks and over all combinations of flips.

    Args:
        nets: each x_BCDHW -> logits_BKDHW of the same spatial size.
        mirror_axes: spatial axes (0 = D) along which the window is flipped, and the logits flipped back.

    Returns:
        A function window_BCDHW -> logits_BKDHW; it raises ValueError when a network returns anything else: a list of
        heads or a smaller map would be blended without a word.
    """
    flips = mirrored_dims(mirror_axes)

    def logits_of(window: Tensor) -> Tensor:
        total: Tensor | None = None
        for net in nets:
            for dims in flips:
                logits = _checked(net, window.flip(dims) if dims else window)
                logits = logits.to(window.dtype)  # bf16 is no type to add in
                logits = logits.flip(dims) if dims else logits
                total = logits if total is None else total + logits
        assert total is not None
        return total if len(nets) * len(flips) == 1 else total.div_(len(nets) * len(flips))

    return logits_of


def class_logits(net: nn.Module, x_BCDHW: Tensor, mirror_axes: Sequence[int] = ()) -> Tensor:
    """A classifier's logits_BK as float32, averaged over all combinations of flips along the axes (0 = D, or rows)."""
    flips = mirrored_dims(mirror_axes)
    first, *others = (net(x_BCDHW.flip(dims) if dims else x_BCDHW).float() for dims in flips)
    logits: Tensor = sum(others, first)
    return logits / len(flips) if others else logits


def mirrored_dims(mirror_axes: Sequence[int]) -> list[list[int]]:
    """The dimensions of a window_BCDHW to flip, for each pass over it in order; of the first none."""
    axes = sorted(set(mirror_axes))
    return [[axis + 2 for axis in some] for count in range(len(axes) + 1) for some in combinations(axes, count)]


def window_starts(size: int, patch: int, overlap: float) -> tuple[int, ...]:
    """First voxel of each window along one axis, as MONAI places them.

    Windows lie `patch * (1 - overlap)` apart, rounded down; the last one ends with the axis. An axis shorter than the
    window has one window, half of whose excess (rounded down) lies before voxel 0.
    """
    if size <= patch:
        return (-((patch - size) // 2),)
    stride = max(int(patch * (1 - overlap)), 1)
    return (*range(0, size - patch, stride), size - patch)


def cut_window(image_CDHW: Tensor, starts: Sequence[int], patch_size: Sequence[int], device: torch.device) -> Tensor:
    """The window whose first voxel is `starts`, as float32 on a device; what lies outside the image is 0."""
    inside, padding = [slice(None)], list[int]()
    for start, patch, size in zip(starts, patch_size, image_CDHW.shape[1:], strict=True):
        inside.append(slice(max(start, 0), start + patch))
        padding = [max(-start, 0), max(start + patch - size, 0), *padding]
    window = image_CDHW[tuple(inside)].to(device, torch.float32)
    return functional.pad(window, padding) if any(padding) else window


@dataclass(frozen=True)
class EvenWindows:
    """Windows that need no look of their own: the network answers like to like.

    Attributes:
        values: index of each window (one number per axis) to the value of each channel.
        air: how many of them are not even, but hold nothing above the limit of air, and are taken to be.
    """

    values: Mapping[tuple[int, ...], tuple[float, ...]]
    air: int = 0


def even_windows(
    image_CDHW: Tensor,
    starts: Sequence[Sequence[int]],
    patch_size: Sequence[int],
    air_below: float | None = None,
) -> EvenWindows:
    """Find windows of one value throughout in every channel, padding included.

    Args:
        starts: of the windows along each axis, see `window_starts`.
        air_below: windows whose every voxel lies below it, in every channel, are taken to have the image's lowest value
            throughout, which changes what the network says of them.
    """
    low, high = image_CDHW, image_CDHW
    for axis, (firsts, patch) in enumerate(zip(starts, patch_size, strict=True), start=1):
        size = image_CDHW.shape[axis]
        ranges = [(max(first, 0), min(first + patch, size)) for first in firsts]
        low = torch.stack([low.narrow(axis, a, b - a).amin(axis) for a, b in ranges], axis)
        high = torch.stack([high.narrow(axis, a, b - a).amax(axis) for a, b in ranges], axis)
        if size < patch:
            low, high = low.clamp(max=0), high.clamp(min=0)
    even = (low == high).all(0)
    values = {tuple(index): tuple(low[(slice(None), *index)].tolist()) for index in even.nonzero().tolist()}
    if air_below is None:
        return EvenWindows(values)
    air = (high < air_below).all(0) & ~even
    lowest = tuple(image_CDHW.flatten(1).amin(1).tolist())
    found = {tuple(index): lowest for index in air.nonzero().tolist()}
    return EvenWindows({**values, **found}, len(found))


def window_weights(patch_size: Sequence[int], device: torch.device) -> Tensor:
    """Gaussian weight of each voxel of a window, sigma 1/8 of its side, at least 0.001; float32."""
    weights: Tensor = compute_importance_map(tuple(patch_size), mode="gaussian", device=device)
    return weights


def _checked(net: nn.Module, window: Tensor) -> Tensor:
    logits = net(window)
    if not isinstance(logits, Tensor) or logits.ndim != window.ndim or logits.shape[2:] != window.shape[2:]:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the network returned {got} for a window {tuple(window.shape)}; logits must match it")
    return logits
