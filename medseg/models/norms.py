"""Group and instance norm that stay fast on a CPU for tensors whose channels are innermost.

torch's group norm is fast there in the forward pass; its backward pass takes several times what a copy to the other
layout and back costs (bf16), and for one channel per group it is slower still. The same figures come from what is
fast: batch norm of one image is its instance norm, and the backward pass of a group norm may run in the other layout.

Shape legend: B batch, C channels, G groups, D H W the spatial axes in array order (H W for 2D).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.models.layout import ONEDNN, fast_on_cpu


class Norm(nn.GroupNorm):
    """Group norm (Wu and He 2018, arXiv:1803.08494), computed by `group_norm`; one group per channel: instance norm."""

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Of the shape of x."""
        return group_norm(x_BCDHW, self.num_groups, self.weight, self.bias, self.eps)


def group_norm(x_BCDHW: Tensor, groups: int, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """`torch.nn.functional.group_norm` by the kernels that are fast where x lies; equal up to rounding."""
    elsewhere = x_BCDHW.device.type != "cpu" or x_BCDHW.dtype not in ONEDNN or x_BCDHW.is_contiguous()
    if elsewhere or torch.compiler.is_compiling():  # or exported, for a machine that is not known
        return functional.group_norm(x_BCDHW, groups, weight_C, bias_C, eps)
    if groups == x_BCDHW.shape[1]:
        images = [
            functional.batch_norm(x, None, None, weight_C, bias_C, True, eps=eps) for x in torch.split(x_BCDHW, 1)
        ]
        return images[0] if len(images) == 1 else torch.cat(images)
    if x_BCDHW.dtype == torch.bfloat16:
        return cast(Tensor, _GroupNorm.apply(x_BCDHW, groups, weight_C, bias_C, eps))  # type: ignore[no-untyped-call]
    return functional.group_norm(x_BCDHW, groups, weight_C, bias_C, eps)


class _GroupNorm(torch.autograd.Function):
    """torch's group norm, whose backward pass runs with the channels outermost."""

    @staticmethod
    def forward(ctx: Any, x_BCDHW: Tensor, groups: int, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
        B, C = x_BCDHW.shape[:2]
        y, mean_BG, rstd_BG = torch.native_group_norm(
            x_BCDHW, weight_C, bias_C, B, C, x_BCDHW[0, 0].numel(), groups, eps
        )
        ctx.save_for_backward(x_BCDHW, weight_C, mean_BG, rstd_BG)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx: Any, dy_BCDHW: Tensor) -> tuple[Tensor | None, ...]:
        x_BCDHW, weight_C, mean_BG, rstd_BG = ctx.saved_tensors
        B, C = x_BCDHW.shape[:2]
        wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        n, dy, x = x_BCDHW[0, 0].numel(), dy_BCDHW.contiguous(), x_BCDHW.contiguous()
        dx, dweight_C, dbias_C = torch.ops.aten.native_group_norm_backward(
            dy, x, mean_BG, rstd_BG, weight_C, B, C, n, ctx.groups, wanted
        )
        return None if dx is None else fast_on_cpu(dx), None, dweight_C, dbias_C, None
