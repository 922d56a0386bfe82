"""Sparse masked modelling: a convolutional encoder learns by filling in what was hidden from it, without labels.

SparK (Tian et al. 2023, arXiv:2301.03580), written from the paper. Square patches of the image are hidden. The encoder
sees the others only: after every convolution and pooling the hidden positions are 0 again, and batch norm counts
visible positions alone, which is what sparse convolutions would do. Its features at several resolutions, with a learnt
token at the hidden positions, go through a light decoder, whose error counts in hidden patches. Other than the paper's,
the decoder ends at the finest of those resolutions, where each position gives all its pixels: maps of the full size
would cost more than the encoder.

Shape legend: B batch, C channels, H W rows and columns, h w rows and columns of the patches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.files import UserError

_SPREADING = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
_LEAST_WIDTH = 16


class SparseMaskedModel(nn.Module):
    """An encoder with the decoder that trains it; images to the loss of each.

    Args:
        net: a 2D network; the feature maps that end its resolutions are decoded, those of a quarter of the image's side
            and less.
        in_channels, size: of the images; a patch is as large as what one position of the coarsest map stands for.
        mask_share: of the patches that are hidden. width: channels of the decoder at the coarsest map, halved at each
            step up.

    Raises:
        UserError: the network has no coarser maps, or they do not divide the image evenly.
    """

    def __init__(self, net: nn.Module, in_channels: int, size: tuple[int, ...], mask_share: float, width: int) -> None:
        super().__init__()
        self.net, self.mask_share = net, mask_share
        net.eval()
        with torch.no_grad():
            maps = _maps(net, torch.zeros(1, in_channels, *size), torch.ones(1, 1, 1, 1))
        sides = [map_BCHW.shape[2] for map_BCHW in maps]
        if not sides or size[0] % sides[0] or sides != [sides[0] * 2**step for step in range(len(sides))]:
            raise UserError(
                f"plan.size_px {size[0]}: the network's maps have {sides or 'no'} pixels a side, and each must have "
                "twice those of the one before; choose a multiple of 32."
            )
        self.grid, self.patch = tuple(maps[0].shape[2:]), size[0] // sides[0]
        channels = [map_BCHW.shape[1] for map_BCHW in maps]
        widths = [max(_LEAST_WIDTH, width // 2**step) for step in range(len(maps))]
        self.tokens = nn.ParameterList([nn.Parameter(0.02 * torch.randn(1, n, 1, 1)) for n in channels])
        self.norms = nn.ModuleList([nn.BatchNorm2d(n) for n in channels])
        self.skips = nn.ModuleList(
            [nn.Conv2d(n, widths[step], 3 if step else 1, padding=1 if step else 0) for step, n in enumerate(channels)]
        )
        self.ups = nn.ModuleList([_Up(a, b) for a, b in pairwise(widths)])
        self.out = nn.Conv2d(widths[-1], in_channels * (size[0] // sides[-1]) ** 2, 1)
        self.shuffle = nn.PixelShuffle(size[0] // sides[-1])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Loss (B,): mean squared error over the hidden patches, each brought to mean 0 and deviation 1."""
        visible_B1hw = self.draw(x_BCHW.shape[0]).to(x_BCHW.device)
        pred_BCHW = self.fill_in(x_BCHW, visible_B1hw)
        wanted, found = (_patches(image.float(), self.patch) for image in (x_BCHW, pred_BCHW))
        wanted = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, keepdim=True) + 1e-6).sqrt()
        error_Bn = (found - wanted).square().mean(-1)
        hidden_Bn = 1 - visible_B1hw.flatten(1)
        return (error_Bn * hidden_Bn).sum(1) / hidden_Bn.sum(1)

    def draw(self, count: int) -> Tensor:
        """(count, 1, h, w): 1 where a patch is visible; the same number of hidden patches in every image."""
        patches = self.grid[0] * self.grid[1]
        hidden = min(max(round(self.mask_share * patches), 1), patches - 1)
        rank = torch.rand(count, patches).argsort(1).argsort(1)
        return (rank >= hidden).float().view(count, 1, *self.grid)

    def fill_in(self, x_BCHW: Tensor, visible_B1hw: Tensor) -> Tensor:
        """The whole image (B, C, H, W) as the decoder sees it, from the visible patches."""
        x = x_BCHW * _at(visible_B1hw, x_BCHW)
        maps = _maps(self.net, x, visible_B1hw)
        decoded: Tensor | None = None
        for step, map_BCHW in enumerate(maps):
            seen = _at(visible_B1hw, map_BCHW)
            normed = _visible_norm(self.norms[step], map_BCHW, seen)  # type: ignore[arg-type]
            skipped = self.skips[step](torch.where(seen > 0, normed, self.tokens[step].to(normed.dtype)))
            decoded = skipped if decoded is None else self.ups[step - 1](decoded) + skipped
        pred: Tensor = self.shuffle(self.out(decoded))
        return pred


class _Up(nn.Sequential):
    """Twice the side: a transposed convolution, then two convolutions."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(before, before, 4, stride=2, padding=1),
            nn.Conv2d(before, before, 3, padding=1, bias=False),
            nn.BatchNorm2d(before),
            nn.ReLU6(inplace=True),
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )


def _maps(net: nn.Module, x_BCHW: Tensor, visible_B1hw: Tensor) -> list[Tensor]:
    """The last map of each resolution of a quarter of the side and less, the coarsest first; 0 where hidden."""
    last: dict[tuple[int, ...], Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and 1 < output.shape[2] <= x_BCHW.shape[2] / 4:
            last[tuple(output.shape[2:])] = output

    with _sparse(net, visible_B1hw):
        handles = [module.register_forward_hook(keep) for module in net.modules() if module is not net]
        try:
            net(x_BCHW)
        finally:
            for handle in handles:
                handle.remove()
    return [last[shape] for shape in sorted(last)]


@contextmanager
def _sparse(net: nn.Module, visible_B1hw: Tensor) -> Iterator[None]:
    """Within the block nothing reaches a hidden position, and batch norms count visible positions alone."""
    norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]

    def hide(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.mul_(_at(visible_B1hw, output))

    def visible_norm(norm: nn.BatchNorm2d, x_BCHW: Tensor) -> Tensor:
        return _visible_norm(norm, x_BCHW, _at(visible_B1hw, x_BCHW))

    handles = [part.register_forward_hook(hide) for part in net.modules() if isinstance(part, _SPREADING)]
    try:
        for norm in norms:
            norm.forward = partial(visible_norm, norm)  # type: ignore[method-assign]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms:
            del norm.forward


def _visible_norm(norm: nn.BatchNorm2d, x_BCHW: Tensor, seen_B1HW: Tensor) -> Tensor:
    """Batch norm with the statistics of the visible positions; hidden ones, 0 in x, come out as 0."""
    normed: Tensor = _VisibleNorm.apply(x_BCHW, seen_B1HW, norm.weight, norm.bias, norm)  # type: ignore[no-untyped-call]
    return normed


class _VisibleNorm(torch.autograd.Function):
    """By dense kernels, since gathering the visible positions and spreading them again costs more than the norm.

    Sums over x, which is 0 where hidden, are sums over what is visible: with a share s of it visible, the visible mean
    is mean / s and the visible variance var / s - (1 - s) (mean / s)^2.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, seen_B1HW: Tensor, weight_C: Tensor, bias_C: Tensor, norm: nn.BatchNorm2d
    ) -> Tensor:
        ctx.training, ctx.eps = norm.training, norm.eps
        running_mean_C, running_var_C = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        mean_C, var_C = running_mean_C.clone(), running_var_C.clone()
        if norm.training:
            ctx.visible = float(seen_B1HW.float().sum())
            share = ctx.visible / seen_B1HW.numel()
            # running statistics, left as they are by a momentum of 0, keep the sums of a bf16 map in fp32
            dense_mean_C, dense_var_C = torch.batch_norm_update_stats(x_BCHW, mean_C, var_C, 0.0)
            mean_C = dense_mean_C / share
            var_C = (dense_var_C / share - (1 - share) * mean_C.square()).clamp_min(0)
            running_mean_C.lerp_(mean_C, norm.momentum or 0.0)
            running_var_C.lerp_(var_C * (ctx.visible / max(ctx.visible - 1, 1)), norm.momentum or 0.0)
        ctx.save_for_backward(x_BCHW, seen_B1HW, weight_C, mean_C, var_C)
        return _affine(x_BCHW, weight_C, bias_C, mean_C, var_C, norm.eps).mul_(seen_B1HW)

    @staticmethod
    def backward(ctx: Any, dy_BCHW: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, seen_B1HW, weight_C, mean_C, var_C = ctx.saved_tensors
        dx, dweight_C, dbias_C = torch.ops.aten.native_batch_norm_backward(
            dy_BCHW * seen_B1HW, x_BCHW, weight_C, mean_C, var_C, None, None, False, ctx.eps, [True, True, True]
        )
        if ctx.training:  # mean and variance move with x: what the error has of 1 and of the normed x is taken out
            scale_C = weight_C / (var_C + ctx.eps).sqrt() / ctx.visible
            common = _affine(x_BCHW, scale_C * dweight_C, scale_C * dbias_C, mean_C, var_C, ctx.eps)
            dx -= common.mul_(seen_B1HW)
        return dx, None, dweight_C, dbias_C, None


def _affine(x: Tensor, weight_C: Tensor, bias_C: Tensor, mean_C: Tensor, var_C: Tensor, eps: float) -> Tensor:
    """x less the mean, over the deviation, times the weight, plus the bias."""
    return torch.native_batch_norm(x, weight_C, bias_C, mean_C, var_C, False, 0.0, eps)[0]


def _at(visible_B1hw: Tensor, map_BCHW: Tensor) -> Tensor:
    """The mask at the resolution of a map; where the map is coarser than the mask, what any of its patches says."""
    if map_BCHW.shape[2] < visible_B1hw.shape[2]:
        return functional.adaptive_max_pool2d(visible_B1hw, map_BCHW.shape[2:]).to(map_BCHW.dtype)
    return functional.interpolate(visible_B1hw, map_BCHW.shape[2:], mode="nearest").to(map_BCHW.dtype)


def _patches(image_BCHW: Tensor, side: int) -> Tensor:
    """(B, patches, values): squares of `side` pixels, all channels of one together."""
    return functional.unfold(image_BCHW, side, stride=side).transpose(1, 2)
