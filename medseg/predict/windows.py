"""From an image array to a label map on any grid of the same field of view."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from medseg.models.sliding import window_logits

_INTERPOLATION = {2: "bilinear", 3: "trilinear"}


def segment_array(
    net: nn.Module,
    image_CDHW: NDArray[Any] | Tensor,
    patch_size: Sequence[int],
    overlap: float = 0.5,
    out_shape: Sequence[int] | None = None,
    memory_gb: float = 2.0,
    *,
    window_batch: int = 1,
    mirror_axes: Sequence[int] = (),
) -> NDArray[np.unsignedinteger[Any]]:
    """Segment an image: sliding window, logits to the wanted grid, argmax.

    The logits of one class at a time are brought to `out_shape` and compared with the best so far, so that not more
    than three maps of that size exist whatever the number of classes. Interpolated logits place a boundary between
    voxels where interpolated labels cannot.

    Args:
        net: x_BCDHW -> logits_BKDHW with K ≥ 2 classes; evaluated on the device its parameters are on.
        image_CDHW: or image_CHW; prepared as the network wants it.
        patch_size, overlap, window_batch, mirror_axes: see `medseg.models.sliding.window_logits`.
        out_shape: spatial shape of the result, over the same field of view edge to edge; by default the image's.
        memory_gb: what the blended logits may take on an accelerator; larger ones are blended in main memory.

    Returns:
        (D, H, W) class of each voxel: uint8 for at most 256 classes, else uint16.

    Raises:
        ValueError: the image is no number array, the window does not fit, or the network gives no usable logits.
    """
    image = torch.as_tensor(image_CDHW, dtype=torch.float32)
    if image.ndim - 1 not in _INTERPOLATION or image.ndim - 1 != len(patch_size):
        raise ValueError(f"image {tuple(image.shape)} needs a channel axis and one axis per entry of {patch_size}")
    first = next(net.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")
    was_training = net.training
    net.eval()
    try:
        batch = image[None].to(device)
        stitch_on = _stitch_device(net, batch, patch_size, memory_gb)
        logits = window_logits(net, batch, patch_size, overlap, window_batch, mirror_axes, stitch_on)
    finally:
        net.train(was_training)
    return label_map(logits[0], tuple(out_shape) if out_shape is not None else tuple(image.shape[1:]))


@torch.inference_mode()
def label_map(logits_KDHW: Tensor, out_shape: Sequence[int]) -> NDArray[np.unsignedinteger[Any]]:
    """Class with the largest logit at each voxel of a grid of `out_shape` over the same field of view.

    Linear interpolation, edges repeated; of equal logits the lower class wins.

    Raises:
        ValueError: fewer than two classes, or a logit that is not finite.
    """
    classes = len(logits_KDHW)
    if classes < 2:
        raise ValueError(f"the network has {classes} output channel; background and one label at least are needed")
    best = _on_grid(logits_KDHW[0], out_shape).clone()
    labels = torch.zeros(best.shape, dtype=torch.uint8 if classes <= 256 else torch.int32, device=best.device)
    for value in range(1, classes):
        logit = _on_grid(logits_KDHW[value], out_shape)
        labels.masked_fill_(logit > best, value)
        torch.maximum(best, logit, out=best)  # carries NaN along, so that one look at the end is enough
    if not torch.isfinite(best).all():
        raise ValueError("the network's logits are not finite; its weights or the image are damaged")
    return labels.cpu().numpy().astype(np.uint8 if classes <= 256 else np.uint16, copy=False)


def _on_grid(logit_DHW: Tensor, shape: Sequence[int]) -> Tensor:
    if tuple(logit_DHW.shape) == tuple(shape):
        return logit_DHW
    mode = _INTERPOLATION[logit_DHW.ndim]
    # align_corners=False maps voxel edges to voxel edges, which is what medseg.volume.resampled_grid does.
    return functional.interpolate(logit_DHW[None, None], tuple(shape), mode=mode, align_corners=False)[0, 0]


@torch.inference_mode()
def _stitch_device(net: nn.Module, batch: Tensor, patch_size: Sequence[int], memory_gb: float) -> torch.device:
    if batch.device.type == "cpu":
        return batch.device
    classes = net(batch.new_zeros((1, batch.shape[1], *patch_size))).shape[1]
    needed_gb = classes * math.prod(batch.shape[2:]) * batch.element_size() / 1e9
    return batch.device if needed_gb <= memory_gb else torch.device("cpu")
