"""Pooling and kernels by axis, for networks whose config leaves them to the plan."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from medseg.config import ModelConfig

_DIVISOR = 8
_FEWEST = 4  # voxels per axis that pooling leaves, as in nnU-Net (Isensee et al. 2021)
_COARSE = 2.0  # an axis waits while its spacing exceeds the finest so many times


def pool_by_axis(model: ModelConfig, patch: Sequence[int], spacing_mm: Sequence[float]) -> dict[str, Any]:
    """The fields `strides` and `kernels` for a patch, of a network whose config has them and leaves them null.

    Returns:
        Nothing where the network has no such choice, or where halving every axis with kernels of 3 is right.
    """
    if not model.pooled_by_plan or not spacing_mm:
        return {}
    steps = len(getattr(model, "channels", ())) - 1
    strides, kernels = stages_by_axis(patch, spacing_mm, steps)
    if all(set(stride) == {2} for stride in strides) and all(set(kernel) == {3} for kernel in kernels):
        return {}
    chosen: dict[str, Any] = {"strides": strides}
    if "kernels" in type(model).model_fields and getattr(model, "kernels", ()) is None:
        chosen["kernels"] = kernels
    return chosen


def stages_by_axis(
    patch: Sequence[int], spacing_mm: Sequence[float], steps: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Stride of each of `steps` poolings, and kernel of each of the `steps + 1` levels, per axis.

    An axis is halved while at least 4 voxels stay, and only while its spacing is at most twice the finest one's; until
    then its kernel is 1. Where an axis has too few voxels for that, the finest spacing is that of the axes that still
    can be halved, so that none waits for an axis that is done.

    Args:
        patch: voxels per axis. spacing_mm: per axis.
    """
    size, spacing = [float(n) for n in patch], [float(s) for s in spacing_mm]
    axes = range(len(size))
    strides, kernels = [], []
    waiting = set(axes)
    for level in range(steps + 1):
        finest = min(spacing)
        waiting = {axis for axis in waiting if spacing[axis] > _COARSE * finest}
        kernels.append(tuple(1 if axis in waiting else 3 for axis in axes))
        if level == steps:
            break
        able = [axis for axis in axes if size[axis] / 2 >= _FEWEST]
        base = min((spacing[axis] for axis in able), default=finest)
        stride = tuple(2 if axis in able and spacing[axis] <= _COARSE * base else 1 for axis in axes)
        strides.append(stride)
        size = [n / s for n, s in zip(size, stride, strict=True)]
        spacing = [n * s for n, s in zip(spacing, stride, strict=True)]
    return strides, kernels


def completed(model: ModelConfig, network: Mapping[str, Any]) -> ModelConfig:
    """The model's config with the fields that `pool_by_axis` chose."""
    return type(model).model_validate({**model.model_dump(), **network}) if network else model


def divisors_of(model: ModelConfig, spatial_dims: int, network: Mapping[str, Any]) -> tuple[int, ...]:
    """Per axis, what a planned patch is a multiple of: of 8 too, but for a network that the plan pools by axis.

    Args:
        network: fields of `model` that `pool_by_axis` chose.
    """
    divisors = completed(model, network).divisors(spatial_dims)
    return divisors if network else tuple(math.lcm(_DIVISOR, d) for d in divisors)
