"""Bring maps and masks from a layer's grid to the image's, cell centres aligned."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def enlarged(x_BCDHW: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Linear interpolation to `shape`; a layer larger than the image is averaged down instead, so none is skipped."""
    space = tuple(x_BCDHW.shape[2:])
    if space == shape:
        return x_BCDHW
    with torch.no_grad():
        if all(n >= m for n, m in zip(space, shape, strict=True)):
            return pooled(x_BCDHW, shape)
        return functional.interpolate(x_BCDHW, size=shape, mode=_MODES[len(shape)], align_corners=False)


def pooled(x_BCDHW: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Mean over `shape` equal parts of the image."""
    pool: dict[int, Any] = {
        1: functional.adaptive_avg_pool1d,
        2: functional.adaptive_avg_pool2d,
        3: functional.adaptive_avg_pool3d,
    }
    found: Tensor = pool[len(shape)](x_BCDHW, shape)
    return found
