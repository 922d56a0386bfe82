"""Batch-norm statistics of other images than those of the training: AdaBN (Li et al. 2016, arXiv:1603.04779).

Shape legend: B batch, C channels, D H W the spatial axes in array order (H W for 2D).
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_MOST_PASSES = 20
_SETTLED = 1e-3


@dataclass(frozen=True)
class Reestimated:
    """How re-estimating went.

    Attributes:
        layers: batch norms. passes: over all images. last_change: of the last pass, the largest of any channel, in
            standard deviations (means) or as a share (variances).
    """

    layers: int
    passes: int
    last_change: float


def batch_norms(net: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a network that keep statistics."""
    return [part for part in net.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]


@torch.no_grad()
def reestimate(net: nn.Module, batches: Sequence[Tensor]) -> Reestimated:
    """Set every batch norm's mean and (biased) variance to those of its input over all images together.

    A layer's input depends on the statistics of the layers before it: after a first pass, in which each batch is
    normalised by itself, passes with the found statistics follow until none changes. So the network does to the images
    what it would do in training to all of them as a single batch, in the memory of a small one. Weights stay.

    Args:
        net: left in evaluation mode.
        batches: x_BCDHW each, of 2 images or more; together every image once.

    Raises:
        ValueError: the network has no batch norm.
    """
    layers = batch_norms(net)
    if not layers:
        raise ValueError(f"{type(net).__name__} has no batch norm")
    net.eval()
    change = math.inf
    for number in range(_MOST_PASSES):
        for layer in layers:  # training without tracking: by the batch itself, and no statistics are touched
            layer.training, layer.track_running_stats = number == 0, number > 0
        sums = [_Sums(layer) for layer in layers]
        with ExitStack() as hooks:
            for one in sums:
                hooks.callback(one.layer.register_forward_pre_hook(one.add).remove)
            for x_BCDHW in batches:
                net(x_BCDHW)
        change = max(one.set() for one in sums)
        if number and change < _SETTLED:
            break
    return Reestimated(len(layers), number + 1, change)


class _Sums:
    """Count, sum and sum of squares of what reaches one batch norm, per channel."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer, self.count = layer, 0
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self.mean_C, self.variance_C = layer.running_mean.double().clone(), layer.running_var.double().clone()
        self.sum_C, self.squares_C = torch.zeros_like(self.mean_C), torch.zeros_like(self.mean_C)

    def add(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Before the layer runs; the former mean is taken off first, so that no digits are lost."""
        x_CN = inputs[0].double().transpose(0, 1).flatten(1) - self.mean_C[:, None]
        self.count += x_CN.shape[1]
        self.sum_C += x_CN.sum(1)
        self.squares_C += x_CN.square().sum(1)

    def set(self) -> float:
        """Give the layer mean and variance of all; how far they moved."""
        shift_C = self.sum_C / self.count
        variance_C = (self.squares_C / self.count - shift_C.square()).clamp(min=0)
        assert self.layer.running_mean is not None
        assert self.layer.running_var is not None
        self.layer.running_mean.copy_(self.mean_C + shift_C)
        self.layer.running_var.copy_(variance_C)
        scale_C = self.variance_C + self.layer.eps
        moved = (shift_C.abs() / scale_C.sqrt()).max(), ((variance_C - self.variance_C).abs() / scale_C).max()
        return max(float(value) for value in moved)
