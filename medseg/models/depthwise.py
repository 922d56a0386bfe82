"""Depthwise convolution whose backward pass is as fast as its forward pass on a CPU.

torch hands a depthwise 3D convolution to oneDNN, which has a fast kernel for the forward pass in the channels-last
layout only: in the usual layout the forward pass takes several times as long, and the two backward passes ten to a
hundred times (benchmarks/memory.py depthwise). Both can be said in operations that are fast, exactly:

    dL/dx = dL/dy convolved with the kernel flipped along every axis        a forward pass
    dL/dw[k] = Σ over planes d of the 2D weight gradient of (dL/dy[d], x[d + k - 1])

Shape legend: B batch, C channels, D H W the spatial axes in array order (H W for 2D).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.models.layout import ONEDNN, fast_on_cpu

_CONV = {2: functional.conv2d, 3: functional.conv3d}


class DepthwiseConv(nn.Module):
    """3x3(x3) convolution of every channel by itself: stride 1, zero padding 1, no bias.

    Args:
        spatial_dims: 2 or 3.
    """

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, *[3] * spatial_dims))

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Of the shape and dtype of x."""
        return depthwise(x_BCDHW, self.weight)

    def extra_repr(self) -> str:
        """Channels and kernel, as torch's convolutions print them."""
        return f"{self.weight.shape[0]}, kernel_size={tuple(self.weight.shape[2:])}"


def depthwise(x_BCDHW: Tensor, weight_C1333: Tensor) -> Tensor:
    """x convolved channel by channel with `weight_C1333` (C, 1, 3, 3, 3; C133 for 2D), in the dtype of x."""
    weight = weight_C1333.to(x_BCDHW.dtype)
    if x_BCDHW.device.type == "cpu" and x_BCDHW.dtype in ONEDNN:
        return cast(Tensor, _Depthwise.apply(x_BCDHW, weight))  # type: ignore[no-untyped-call]
    return _convolved(x_BCDHW, weight)


class _Depthwise(torch.autograd.Function):
    """The formulas of the module's docstring."""

    @staticmethod
    def forward(ctx: Any, x_BCDHW: Tensor, weight_C1333: Tensor) -> Tensor:
        ctx.save_for_backward(x_BCDHW, weight_C1333)
        return _convolved(fast_on_cpu(x_BCDHW), weight_C1333)

    @staticmethod
    def backward(ctx: Any, dy_BCDHW: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_BCDHW, weight_C1333 = ctx.saved_tensors
        dy_BCDHW, dx, dw = fast_on_cpu(dy_BCDHW), None, None
        if ctx.needs_input_grad[1]:
            dw = _weight_gradient(fast_on_cpu(x_BCDHW), dy_BCDHW, weight_C1333)
        if ctx.needs_input_grad[0]:
            dx = _convolved(dy_BCDHW, weight_C1333.flip(tuple(range(2, weight_C1333.ndim))))
        return dx, dw


def _convolved(x_BCDHW: Tensor, weight_C1333: Tensor) -> Tensor:
    return _CONV[x_BCDHW.ndim - 2](x_BCDHW, weight_C1333, padding=1, groups=x_BCDHW.shape[1])


def _weight_gradient(x_BCDHW: Tensor, dy_BCDHW: Tensor, weight_C1333: Tensor) -> Tensor:
    if x_BCDHW.ndim == 4:
        return _weight_gradient_2d(x_BCDHW, dy_BCDHW, weight_C1333)
    depth, weight_C133 = x_BCDHW.shape[2], weight_C1333[:, :, 0]
    by_plane = []
    for shift in (-1, 0, 1):
        first, last = max(0, -shift), depth - max(0, shift)
        if first >= last:
            by_plane.append(torch.zeros_like(weight_C133))
            continue
        planes = _planes(x_BCDHW[:, :, first + shift : last + shift]), _planes(dy_BCDHW[:, :, first:last])
        by_plane.append(_weight_gradient_2d(*planes, weight_C133))
    return torch.stack(by_plane, 2)


def _planes(x_BCDHW: Tensor) -> Tensor:
    """x as a batch of planes (B·D, C, H, W); for one image in channels last no copy is made."""
    return x_BCDHW.transpose(1, 2).flatten(0, 1)


def _weight_gradient_2d(x_BCHW: Tensor, dy_BCHW: Tensor, weight_C133: Tensor) -> Tensor:
    return cast(
        Tensor,
        torch.ops.aten.convolution_backward(
            dy_BCHW, x_BCHW, weight_C133, None, [1, 1], [1, 1], [1, 1], False, [0, 0], x_BCHW.shape[1],
            [False, True, False],
        )[1],
    )  # fmt: skip
