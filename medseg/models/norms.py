"""Group and instance norm that stay fast on a CPU for tensors whose channels are innermost.

torch's group norm is fast there in the forward pass; its backward pass takes several times what a copy to the other
layout and back costs (bf16), and for one channel per group it is slower still. The same figures come from what is
fast: batch norm of one image is its instance norm, and the backward pass of a group norm may run in the other layout.
torch sums a channel's values one after the other there, which costs an instance norm of 64³ voxels in fp32 up to 2e-4,
of 128³ 4e-3; where no gradient is wanted the sums are made by parts, and nothing is lost.

Shape legend: B batch, C channels, G groups, D H W the spatial axes in array order (H W for 2D).
"""

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.models.layout import ONEDNN, fast_on_cpu

_Net = TypeVar("_Net", bound=nn.Module)
_AT_ONCE = 8192  # positions whose sums torch's kernel makes one after the other in fp32, so that they stay exact


class Norm(nn.GroupNorm):
    """Group norm (Wu and He 2018, arXiv:1803.08494), computed by `group_norm`; one group per channel: instance norm."""

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Of the shape of x."""
        return group_norm(x_BCDHW, self.num_groups, self.weight, self.bias, self.eps)


def with_norms(net: _Net) -> _Net:
    """`net` with a `Norm` in the place of each instance norm that keeps no statistics; parameters and names stay.

    torch's instance norm puts out the other layout, and takes up to five times as long.
    """
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.InstanceNorm2d | nn.InstanceNorm3d) and not child.track_running_stats:
                norm = Norm(child.num_features, child.num_features, child.eps, affine=False)
                norm.weight, norm.bias = child.weight, child.bias
                setattr(module, name, norm.train(child.training))
    return net


def group_norm(x_BCDHW: Tensor, groups: int, weight_C: Tensor | None, bias_C: Tensor | None, eps: float) -> Tensor:
    """`torch.nn.functional.group_norm` by the kernels that are fast where x lies; equal up to rounding."""
    elsewhere = x_BCDHW.device.type != "cpu" or x_BCDHW.dtype not in ONEDNN or x_BCDHW.is_contiguous()
    if elsewhere or torch.compiler.is_compiling():  # or exported, for a machine that is not known
        return functional.group_norm(x_BCDHW, groups, weight_C, bias_C, eps)
    if groups == x_BCDHW.shape[1]:
        if x_BCDHW.dtype == torch.float32 and not _has_gradient(x_BCDHW, weight_C, bias_C):
            return _instance_norm(x_BCDHW, weight_C, bias_C, eps)
        images = [
            functional.batch_norm(x, None, None, weight_C, bias_C, True, eps=eps) for x in torch.split(x_BCDHW, 1)
        ]
        return images[0] if len(images) == 1 else torch.cat(images)
    if x_BCDHW.dtype == torch.bfloat16:
        return cast(Tensor, _GroupNorm.apply(x_BCDHW, groups, weight_C, bias_C, eps))  # type: ignore[no-untyped-call]
    return functional.group_norm(x_BCDHW, groups, weight_C, bias_C, eps)


def _instance_norm(x_BCDHW: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float) -> Tensor:
    """Statistics of each image by parts of it, then one pass; in fp32 exact to some 1e-6, however large the image."""
    y_BCDHW, unused = torch.empty_like(x_BCDHW), x_BCDHW.new_empty(0)
    for x, y in zip(torch.split(x_BCDHW, 1), torch.split(y_BCDHW, 1), strict=True):
        mean_C, variance_C = _moments(x)
        out = (y, unused, unused.clone())
        torch.native_batch_norm(x, weight_C, bias_C, mean_C, variance_C, False, 0.0, eps, out=out)
    return y_BCDHW


def _moments(x_1CDHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel."""
    rows = max(_AT_ONCE // x_1CDHW[0, 0, 0].numel(), 1)
    parts = torch.split(x_1CDHW, rows, 2)
    if len(parts) == 1:
        return torch.batch_norm_update_stats(x_1CDHW, None, None, 0.0)
    means, variances = zip(*[torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts], strict=True)
    means_PC, variances_PC = torch.stack(means).double(), torch.stack(variances).double()
    shares_P1 = torch.tensor([[part.shape[2]] for part in parts], dtype=torch.float64) / x_1CDHW.shape[2]
    mean_C = (shares_P1 * means_PC).sum(0)
    variance_C = (shares_P1 * (variances_PC + (means_PC - mean_C).square())).sum(0)
    return mean_C.float(), variance_C.float()


def _has_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


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
