"""One class of settings per segmentation network of `medseg.models.MODELS`, and the union of all networks."""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from medseg.config.classifiers import (
    DenseNetConfig,
    InceptionConfig,
    MobileNetConfig,
    ResNetConfig,
    SqueezeNetConfig,
    TwoStageConfig,
    VGGConfig,
)
from medseg.config.fields import Count, Share
from medseg.config.network import NetworkConfig

Steps = Annotated[tuple[Count, ...], Field(min_length=2, max_length=3)]
"""One number per spatial axis."""


class UNetConfig(NetworkConfig):
    """Residual U-Net of MONAI (Kerfoot et al. 2018): one convolution stage per entry of `channels`."""

    name: Literal["unet"] = "unet"
    channels: tuple[Count, ...] = (32, 64, 128, 256)
    strides: tuple[Count, ...] = (2, 2, 2)
    num_res_units: Annotated[int, Field(ge=0)] = 2
    dropout: Share = 0.0

    @model_validator(mode="after")
    def _check_strides(self) -> "UNetConfig":
        _one_between(self.strides, self.channels)
        return self

    def divisors(self, spatial_dims: int) -> tuple[int, ...]:
        return (math.prod(self.strides),) * spatial_dims


class AttentionUNetConfig(NetworkConfig):
    """Attention U-Net (Oktay et al. 2018): the skip connections are weighed by what comes from below."""

    name: Literal["attention_unet"] = "attention_unet"
    channels: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=2)] = (32, 64, 128, 256)
    strides: tuple[Count, ...] = (2, 2, 2)
    dropout: Share = 0.0

    @model_validator(mode="after")
    def _check_strides(self) -> "AttentionUNetConfig":
        _one_between(self.strides, self.channels)
        return self

    def divisors(self, spatial_dims: int) -> tuple[int, ...]:
        return (math.prod(self.strides),) * spatial_dims


class DynUNetConfig(NetworkConfig):
    """The network of nnU-Net (Isensee et al. 2021), as MONAI's DynUNet; three levels or more.

    A null `strides` halves every axis between two levels, a null `kernels` is 3 everywhere. For voxels that are long in
    one axis, give one list per step (`strides: [[2, 2, 1], 2]`) or per level (`kernels: [[3, 3, 1], 3, 3]`), in the
    order of the array's axes. With `deep_supervision` every level of the decoder but the coarsest is trained by a head,
    whose loss has half the weight of the level above it.
    """

    name: Literal["dynunet"] = "dynunet"
    channels: Annotated[tuple[Count, ...], Field(min_length=3)] = (32, 64, 128, 256)
    strides: tuple[Count | Steps, ...] | None = None
    kernels: tuple[Count | Steps, ...] | None = None
    res_block: bool = False
    deep_supervision: bool = False

    @model_validator(mode="after")
    def _check_levels(self) -> "DynUNetConfig":
        if self.strides is not None:
            _one_between(self.strides, self.channels)
        if self.kernels is not None and len(self.kernels) != len(self.channels):
            raise ValueError(f"kernels has {len(self.kernels)} entries for {len(self.channels)} channels")
        if any(n % 2 == 0 for kernel in self.kernels or () for n in _per_axis(kernel, 1)):
            raise ValueError("kernels must be odd, so that the image keeps its size")
        return self

    def dims_problem(self, spatial_dims: int) -> str | None:
        for field, steps in (("strides", self.strides), ("kernels", self.kernels)):
            if any(len(step) != spatial_dims for step in steps or () if isinstance(step, tuple)):
                return f"model.{field} {steps} needs {spatial_dims} numbers in each list, one per axis of the image"
        return super().dims_problem(spatial_dims)

    def steps(self, spatial_dims: int) -> list[tuple[int, ...]]:
        """Stride per axis between each two levels."""
        return [_per_axis(stride, spatial_dims) for stride in self.strides or (2,) * (len(self.channels) - 1)]

    def kernels_of(self, spatial_dims: int) -> list[tuple[int, ...]]:
        """Kernel per axis of each level."""
        return [_per_axis(kernel, spatial_dims) for kernel in self.kernels or (3,) * len(self.channels)]

    def divisors(self, spatial_dims: int) -> tuple[int, ...]:
        return tuple(math.prod(axis) for axis in zip(*self.steps(spatial_dims), strict=True))


class SegResNetConfig(NetworkConfig):
    """SegResNet without the autoencoder branch (Myronenko 2018)."""

    name: Literal["segresnet"] = "segresnet"
    init_filters: Count = 16
    blocks_down: tuple[Count, ...] = (1, 2, 2, 4)
    blocks_up: tuple[Count, ...] = (1, 1, 1)

    @model_validator(mode="after")
    def _check_blocks(self) -> "SegResNetConfig":
        if len(self.blocks_up) != len(self.blocks_down) - 1:
            raise ValueError(
                f"blocks_up has {len(self.blocks_up)} entries for {len(self.blocks_down)} of blocks_down; "
                f"give {len(self.blocks_down) - 1}"
            )
        return self

    def divisors(self, spatial_dims: int) -> tuple[int, ...]:
        return (2 ** (len(self.blocks_down) - 1),) * spatial_dims


class SwinUNETRConfig(NetworkConfig):
    """Swin UNETR (Hatamizadeh et al. 2022): a shifted-window transformer encodes, convolutions decode.

    Image sizes are multiples of 32. `memory: checkpoint` computes the transformer's blocks anew in the backward pass.
    """

    name: Literal["swin_unetr"] = "swin_unetr"
    feature_size: Annotated[int, Field(ge=12, multiple_of=12)] = 24
    depths: tuple[Count, Count, Count, Count] = (2, 2, 2, 2)
    num_heads: tuple[Count, Count, Count, Count] = (3, 6, 12, 24)
    window_size: Annotated[int, Field(ge=2)] = 7
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    memory: Literal["store", "checkpoint"] = "store"

    @model_validator(mode="after")
    def _check_heads(self) -> "SwinUNETRConfig":
        for stage, heads in enumerate(self.num_heads):
            if self.feature_size * 2**stage % heads:
                raise ValueError(f"num_heads {heads} of stage {stage} does not divide {self.feature_size * 2**stage}")
        return self

    def divisors(self, spatial_dims: int) -> tuple[int, ...]:
        return (32,) * spatial_dims


class MedNeXtConfig(NetworkConfig):
    """MedNeXt (Roy et al. 2023), a U-Net of ConvNeXt blocks in the paper's four sizes; four halvings.

    The published kernels are 3 and 5; with 5, `weights` of the same network with 3 do not fit.
    """

    name: Literal["mednext"] = "mednext"
    size: Literal["S", "B", "M", "L"] = "S"
    kernel_size: Literal[3, 5, 7] = 3
    init_filters: Count = 32

    def divisors(self, spatial_dims: int) -> tuple[int, ...]:
        return (16,) * spatial_dims


class UNetPPConfig(NetworkConfig):
    """U-Net++ (Zhou et al. 2020) in 2D or 3D; patch sizes must be multiples of 2**depth (the papers' depth is 4).

    A null `features` means 32, doubled from level to level up to 512. With `deep_supervision` every level has a head:
    the network can be pruned, and `inference` may average all heads instead of taking the deepest one (`fast`).
    """

    name: Literal["unetpp"] = "unetpp"
    depth: Annotated[int, Field(ge=1, le=5)] = 3
    features: tuple[Count, ...] | None = None
    norm: Literal["instance", "group", "batch"] = "instance"
    down: Literal["max", "conv"] = "max"
    up: Literal["transposed", "linear"] = "transposed"
    scse: bool = False
    deep_supervision: bool = False
    inference: Literal["fast", "average"] = "fast"

    def divisors(self, spatial_dims: int) -> tuple[int, ...]:
        return (2**self.depth,) * spatial_dims


class ReversibleUNetConfig(NetworkConfig):
    """U-Net of reversible blocks, in the manner of Pendse et al. (2021), in 2D or 3D.

    Patch sizes must be multiples of 2**(levels - 1). `channels` has one even number per level, `blocks_down` and
    `blocks_up` the reversible blocks of each level on the way down and up (the deepest level has none going up).
    `block` is an inverted bottleneck with `expansion`, or the plain convolution of Brügger et al. (2019).

    `memory` chooses what training keeps, with the same weights and results: everything (`store`), the input of every
    block (`checkpoint`), or the output of every level (`reversible`). In the last mode the expanded channels are
    worked through in at most `chunks` chunks of whole norm groups, one after the other; 1 is off. A null takes up to 4
    of 16 channels or more: with fewer the steps take half as long again, since a CPU computes 16 numbers at a time.
    """

    name: Literal["reversible_unet"] = "reversible_unet"
    channels: Annotated[tuple[Annotated[int, Field(ge=2, multiple_of=2)], ...], Field(min_length=1)] = (16, 32, 64, 128)
    blocks_down: tuple[Annotated[int, Field(ge=0)], ...] = (2, 2, 2, 2)
    blocks_up: tuple[Annotated[int, Field(ge=0)], ...] = (2, 2, 2)
    block: Literal["mbconv", "conv"] = "mbconv"
    expansion: Count = 4
    norm: Literal["group", "instance"] = "group"
    groups: Count = 8
    memory: Literal["store", "checkpoint", "reversible"] = "reversible"
    chunks: Count | None = None

    @field_validator("norm", mode="before")
    @classmethod
    def _no_batch_norm(cls, norm: object) -> object:
        if norm == "batch":
            raise ValueError(
                "batch norm would count every batch twice, since reversible blocks run twice a step; "
                "choose group or instance"
            )
        return norm

    def divisors(self, spatial_dims: int) -> tuple[int, ...]:
        return (2 ** (len(self.channels) - 1),) * spatial_dims


class PriorUNetConfig(NetworkConfig):
    """2D U-Net over the slices of a volume, with an earlier segmentation as prior (in the manner of arXiv:1906.07160).

    `axis` is the one across the slices, after canonical orientation: 0 sagittal, 1 coronal, 2 axial. With each slice
    the network sees `neighbours` more on either side. Training shows it priors as `augment.prior` says; prediction
    takes the mask of the patient's earlier examination, where the batch or the cohort holds one.
    """

    dims: ClassVar[tuple[int, ...]] = (3,)
    takes_prior: ClassVar[bool] = True

    name: Literal["prior_unet"] = "prior_unet"
    channels: Annotated[tuple[Count, ...], Field(min_length=3)] = (32, 64, 128, 256)
    axis: Annotated[int, Field(ge=0, le=2)] = 0
    neighbours: Annotated[int, Field(ge=0)] = 1

    def divisors(self, spatial_dims: int) -> tuple[int, ...]:
        return tuple(1 if axis == self.axis else 2 ** (len(self.channels) - 1) for axis in range(spatial_dims))


ModelConfig = Annotated[
    UNetConfig
    | AttentionUNetConfig
    | DynUNetConfig
    | SegResNetConfig
    | SwinUNETRConfig
    | MedNeXtConfig
    | UNetPPConfig
    | ReversibleUNetConfig
    | PriorUNetConfig
    | DenseNetConfig
    | ResNetConfig
    | VGGConfig
    | InceptionConfig
    | SqueezeNetConfig
    | MobileNetConfig
    | TwoStageConfig,
    Field(discriminator="name"),
]


def _one_between(strides: Sequence[object], channels: Sequence[int]) -> None:
    if len(strides) != len(channels) - 1:
        raise ValueError(f"strides has {len(strides)} entries for {len(channels)} channels; give {len(channels) - 1}")


def _per_axis(value: int | tuple[int, ...], spatial_dims: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * spatial_dims
