"""A U-Net of reversible inverted bottlenecks, in the manner of Pendse et al. 2021 (arXiv:2104.09648).

    encoder   stem -> sequence -> down -> sequence -> … -> sequence
    decoder   up, plus the encoder's output of that level (as Brügger et al. 2019, arXiv:1906.06148) -> sequence -> …

Sequences of one resolution are reversible (`medseg.models.reversible`); stem, down, up and head are not. A block's
halves go through inverted bottlenecks (Sandler et al. 2018, arXiv:1801.04381); the same bottleneck changes the
resolution: going down its expansion has stride 2, going up its projection.

The published networks end a bottleneck with a norm. These do not: the norm's statistics would be known only after
all of the expansion was worked through, so that working in chunks would cost a third pass. The branch of Brügger et
al. ends without a norm too, and every expansion here is followed by one.

Shape legend: B batch, C channels, D H W the spatial axes in array order (H W for 2D), K classes.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, cast, get_args

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from medseg.config import ReversibleUNetConfig
from medseg.files import UserError
from medseg.models.depthwise import DepthwiseConv, depthwise
from medseg.models.layout import fast_on_cpu
from medseg.models.norms import Norm, group_norm
from medseg.models.reversible import (
    Branch,
    Coupling,
    Memory,
    Piece,
    ReversibleSequence,
    memory_now,
    recomputed,
    wide,
)

Resample = Literal["none", "down", "up"]

_CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_FUNCTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
    nn.ConvTranspose2d: functional.conv_transpose2d,
    nn.ConvTranspose3d: functional.conv_transpose3d,
}
_SLOPE = 0.01
_CHUNKS, _WIDTH = 4, 16  # where a config leaves `chunks` null: at most so many, of so many channels at least


class ReversibleUNet(nn.Module):
    """The network in 2D or 3D.

    Args:
        config: one entry of `channels` and `blocks_down` per level, one of `blocks_up` per level but the last.
        spatial_dims: 2 or 3.
        in_channels: C of the image.
        out_channels: K.

    Raises:
        UserError: the fields of `config` do not fit each other.
    """

    def __init__(self, config: ReversibleUNetConfig, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        channels, levels = config.channels, len(config.channels)
        _check_lengths(config)
        self.config, self.spatial_dims = config, spatial_dims
        self.stem = _CONV[spatial_dims](in_channels, channels[0], 3, padding=1)
        self.encoder = nn.ModuleList(
            _sequence(config, spatial_dims, channels[i], config.blocks_down[i]) for i in range(levels)
        )
        self.downs = nn.ModuleList(
            _transition(config, spatial_dims, (channels[i], channels[i + 1]), "down") for i in range(levels - 1)
        )
        self.ups = nn.ModuleList(
            _transition(config, spatial_dims, (channels[i + 1], channels[i]), "up") for i in range(levels - 1)
        )
        self.decoder = nn.ModuleList(
            _sequence(config, spatial_dims, channels[i], config.blocks_up[i]) for i in range(levels - 1)
        )
        self.head = _CONV[spatial_dims](channels[0], out_channels, 1)
        self.memory = config.memory

    @property
    def memory(self) -> Memory:
        """What training keeps; may be set at any time, the weights stay the same."""
        return self._memory

    @memory.setter
    def memory(self, memory: Memory) -> None:
        if memory not in get_args(Memory):
            raise UserError(f"model.memory {memory!r} is unknown; choose one of {', '.join(get_args(Memory))}.")
        self._memory = memory
        for module in self.modules():
            if isinstance(module, ReversibleSequence | Transition):
                module.memory = memory

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Logits.

        Args:
            x_BCDHW: every spatial axis a multiple of 2**(levels - 1), and not all of them equal to it.

        Returns:
            logits_BKDHW.

        Raises:
            UserError: the image's size does not fit.
        """
        self._check_size(x_BCDHW)
        x = self.stem(x_BCDHW)
        skips: list[Tensor] = []
        for i, sequence in enumerate(self.encoder):
            if i:
                skips.append(x)
                x = self.downs[i - 1](x)
            x = sequence(x)
        for i in reversed(range(len(self.decoder))):
            x = self.decoder[i](self.ups[i](x) + skips.pop())
        return cast(Tensor, self.head(x))

    def _check_size(self, x_BCDHW: Tensor) -> None:
        size, step = tuple(x_BCDHW.shape[2:]), 2 ** (len(self.encoder) - 1)
        if len(size) != self.spatial_dims:
            raise UserError(f"the network was built for {self.spatial_dims}D images; this one has shape {size}.")
        if any(length % step for length in size):
            fits = tuple(math.ceil(length / step) * step for length in size)
            raise UserError(
                f"plan.patch_size {size}: {len(self.encoder)} entries of model.channels need multiples of {step}; "
                f"set it to {fits}."
            )
        if math.prod(size) == step**self.spatial_dims:
            raise UserError(
                f"plan.patch_size {size}: {len(self.encoder)} entries of model.channels leave a single position at "
                "the bottom, where a norm erases everything; choose a larger patch, or fewer levels."
            )


class Transition(nn.Module):
    """A branch between two resolutions, not reversible; `memory` says what it keeps of its inside."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = branch
        self.memory: Memory = "store"

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Half or twice the size along every spatial axis; fp32 at least."""
        memory = memory_now(self, self.memory)
        if memory == "reversible":
            return recomputed(self.branch, x_BCDHW)
        if memory == "checkpoint":
            return wide(checkpoint(self.branch, x_BCDHW, use_reentrant=False, preserve_rng_state=False))
        return wide(self.branch(x_BCDHW))


class MBConv(Branch):
    """Inverted bottleneck: expand, norm, act; depthwise, norm, act; project.

    Norm groups lie inside a chunk of the expanded channels and the projection is linear, so the bottleneck is the sum
    of its chunks.

    Args:
        out_channels: the expansion has `config.expansion` times the fewer of both channels.
        resample: `down` expands with stride 2, `up` projects with stride 2; kernel 2 then, not 1.
        gain: scales the projection's first weights.
    """

    def __init__(
        self,
        config: ReversibleUNetConfig,
        dims: int,
        in_channels: int,
        out_channels: int,
        resample: Resample,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        hidden, conv = config.expansion * min(in_channels, out_channels), _CONV[dims]
        down, up = (2 if resample == "down" else 1), (2 if resample == "up" else 1)
        project = _TRANSPOSED[dims] if resample == "up" else conv
        self.expand = conv(in_channels, hidden, down, stride=down, bias=False)  # the norm would cancel a bias
        self.norm1 = _norm(config, hidden)
        self.depthwise = DepthwiseConv(dims, hidden)
        self.norm2 = _norm(config, hidden)
        self.project = project(hidden, out_channels, up, stride=up, bias=False)
        self.chunks = _most_divisor(self.norm1.num_groups, config.chunks or max(1, min(_CHUNKS, hidden // _WIDTH)))
        for layer in (self.expand, self.depthwise, self.project):
            nn.init.kaiming_normal_(layer.weight, a=_SLOPE)
        self.project.weight.data.mul_(gain)

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """(B, out_channels, *size)."""
        y = fast_on_cpu(self.expand(fast_on_cpu(x_BCDHW)))
        y = functional.leaky_relu(self.norm1(y), _SLOPE, inplace=True)
        y = functional.leaky_relu(self.norm2(self.depthwise(y)), _SLOPE, inplace=True)
        return cast(Tensor, self.project(y))

    def pieces(self) -> Sequence[Piece]:
        """One per chunk of the expanded channels."""
        width = self.depthwise.weight.shape[0] // self.chunks
        return [partial(self._piece, chunk=slice(i * width, (i + 1) * width)) for i in range(self.chunks)]

    def _piece(self, x_BCDHW: Tensor, chunk: slice) -> Tensor:
        y = fast_on_cpu(_convolve(self.expand, fast_on_cpu(x_BCDHW), self.expand.weight[chunk]))
        y = self._normed(self.norm1, y, chunk)
        y = self._normed(self.norm2, depthwise(y, self.depthwise.weight[chunk]), chunk)
        weight = self.project.weight[chunk] if self.project.transposed else self.project.weight[:, chunk]
        return _convolve(self.project, y, weight)

    def _normed(self, norm: Norm, x_BCDHW: Tensor, chunk: slice) -> Tensor:
        groups = norm.num_groups // self.chunks
        y = group_norm(x_BCDHW, groups, norm.weight[chunk], norm.bias[chunk], norm.eps)
        return functional.leaky_relu(y, _SLOPE, inplace=True)


class NormActConv(Branch):
    """Norm, act, 3x3(x3) convolution: the branch of Brügger et al.; the norm is of the input's channels.

    Args:
        resample: `down` convolves with kernel and stride 2, `up` likewise, transposed.
        gain: scales the convolution's first weights.
    """

    def __init__(
        self,
        config: ReversibleUNetConfig,
        dims: int,
        in_channels: int,
        out_channels: int,
        resample: Resample,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.norm = _norm(config, in_channels)
        kind = _TRANSPOSED[dims] if resample == "up" else _CONV[dims]
        kernel, stride, padding = (3, 1, 1) if resample == "none" else (2, 2, 0)
        self.conv = kind(in_channels, out_channels, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, a=_SLOPE).data.mul_(gain)

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """(B, out_channels, *size)."""
        return cast(Tensor, self.conv(functional.leaky_relu(self.norm(x_BCDHW), _SLOPE, inplace=True)))


_BRANCHES = {"mbconv": MBConv, "conv": NormActConv}


def build_reversible_unet(
    config: ReversibleUNetConfig, spatial_dims: int, in_channels: int, out_channels: int
) -> nn.Module:
    """The reversible U-Net; see `ReversibleUNet`."""
    return ReversibleUNet(config, spatial_dims, in_channels, out_channels)


def _transition(config: ReversibleUNetConfig, dims: int, ends: tuple[int, int], resample: Resample) -> Transition:
    return Transition(_BRANCHES[config.block](config, dims, *ends, resample))


def _sequence(config: ReversibleUNetConfig, dims: int, channels: int, blocks: int) -> ReversibleSequence:
    half, kind = channels // 2, _BRANCHES[config.block]

    def branch() -> Branch:  # scaled so that the sum over all blocks has the variance of one
        return kind(config, dims, half, half, "none", blocks**-0.5)

    return ReversibleSequence([Coupling(branch(), branch()) for _ in range(blocks)], reuse_output=True)


def _norm(config: ReversibleUNetConfig, channels: int) -> Norm:
    return Norm(channels if config.norm == "instance" else math.gcd(channels, config.groups), channels)


def _most_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


def _convolve(layer: _ConvNd, x: Tensor, weight: Tensor) -> Tensor:
    """What `layer` does, with part of its weights."""
    return _FUNCTIONS[type(layer)](x, weight, stride=layer.stride)


def _check_lengths(config: ReversibleUNetConfig) -> None:
    levels = len(config.channels)
    for field, blocks, wanted in (
        ("blocks_down", config.blocks_down, levels),
        ("blocks_up", config.blocks_up, levels - 1),
    ):
        if len(blocks) != wanted:
            raise UserError(
                f"model.{field} has {len(blocks)} entries for {levels} entries of model.channels; give {wanted}."
            )
