"""U-Net++ (Zhou et al. 2018, arXiv:1807.10165; 2020, arXiv:1912.05074): a nested grid of nodes that prunes exactly.

    X[i,0] = H(D(X[i-1,0]));   X[i,j] = H([X[i,0], …, X[i,j-1], U(X[i+1,j-1])])   for i + j ≤ depth

H is two times convolution, norm, leaky ReLU; D halves and U doubles every spatial axis. The head of level k reads
X[0,k], which depends on the nodes with i + j ≤ k alone; so a network cut to level k gives what its head k gave.

Written from the equation in the papers. The authors' own code is under a non-commercial licence, and their institution
lists a pending patent on the method; whether to use the method is the user's decision.

Shape legend: B batch, C channels, D H W the spatial axes in array order (H W for 2D), K classes.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medseg.config import UNetPPConfig
from medseg.files import UserError
from medseg.models.layout import fast_on_cpu
from medseg.models.norms import Norm

LogitsByLevel = dict[int, Tensor]
"""Level (1 … depth, deepest last) -> logits_BKDHW; all levels have the size of the image."""

_CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_MAX_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_LINEAR = {2: "bilinear", 3: "trilinear"}
_SLOPE = 0.01
_FIRST_FEATURES, _MOST_FEATURES = 32, 512


class UNetPP(nn.Module):
    """The nested U-Net in 2D or 3D.

    Args:
        config: `depth` is the number of halvings (4 in the papers), `features` the channels of each of the depth + 1
            rows. Heads of the levels below `depth` exist only with `deep_supervision`.
        spatial_dims: 2 or 3.
        in_channels: C of the image.
        out_channels: K.

    Raises:
        UserError: the fields of `config` do not fit each other.
    """

    def __init__(self, config: UNetPPConfig, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        features = config.features or _doubled(config.depth)
        if len(features) != config.depth + 1:
            raise UserError(
                f"model.features has {len(features)} entries for model.depth {config.depth}; give {config.depth + 1}."
            )
        if config.inference == "average" and not config.deep_supervision:
            raise UserError("model.inference 'average' needs the heads of model.deep_supervision; set that to true.")
        self.config = config.model_copy(update={"features": tuple(features)})
        self.spatial_dims, self.in_channels, self.out_channels = spatial_dims, in_channels, out_channels
        self.nodes = nn.ModuleDict(
            {
                f"x_{i}_{j}": _node(self.config, spatial_dims, in_channels, features, i, j)
                for i in range(config.depth + 1)
                for j in range(config.depth + 1 - i)
            }
        )
        levels = range(1, config.depth + 1) if config.deep_supervision else (config.depth,)
        self.heads = nn.ModuleDict({str(k): _CONV[spatial_dims](features[0], out_channels, 1) for k in levels})

    @property
    def depth(self) -> int:
        """The deepest level."""
        return self.config.depth

    def forward(self, x_BCDHW: Tensor, level: int | None = None) -> Tensor | LogitsByLevel:
        """Logits of the image's size.

        Args:
            x_BCDHW: every spatial axis a multiple of 2**depth, and not all of them equal to it.
            level: of this head alone, computing only the nodes it needs; by default what the mode asks for.

        Returns:
            One tensor logits_BKDHW; in training mode with deep supervision the logits of every level instead. In
            evaluation the tensor is of the deepest head (`inference: fast`), or the logarithm of the mean probability
            over all heads (`average`), whose softmax is that mean.

        Raises:
            UserError: the image's size does not fit, or there is no head of that level.
        """
        if level is not None:
            self._check_level(level)
        self._check_size(x_BCDHW)
        row = self._first_row(x_BCDHW, level or self.depth)
        if level is None and self.config.deep_supervision and (self.training or self.config.inference == "average"):
            logits = {k: self._head(k, row) for k in range(1, self.depth + 1)}
            return logits if self.training else _log_mean_probs(list(logits.values()))
        return self._head(level or self.depth, row)

    def prune_to(self, level: int) -> "UNetPP":
        """A smaller network with its own copy of the weights; this one is left as it is.

        In evaluation it gives, bit for bit, `forward(x, level)` of this network. It keeps the heads of lower levels
        (features × K weights each), so that it can be pruned or trained further; its `config` rebuilds it.

        Raises:
            UserError: there is no head of that level.
        """
        self._check_level(level)
        features = cast("tuple[int, ...]", self.config.features)[: level + 1]
        config = self.config.model_copy(update={"depth": level, "features": features, "inference": "fast"})
        with torch.device("meta"):  # nothing to initialise, and the random state stays as it was
            pruned = UNetPP(config, self.spatial_dims, self.in_channels, self.out_channels)
        mine = self.state_dict()
        pruned.load_state_dict({name: mine[name].clone() for name in pruned.state_dict()}, assign=True)
        for name, parameter in pruned.named_parameters():
            parameter.requires_grad_(self.get_parameter(name).requires_grad)
        return pruned.train(self.training)

    def _first_row(self, x_BCDHW: Tensor, level: int) -> list[Tensor]:
        """X[0,0] … X[0,level], diagonal by diagonal."""
        rows: list[list[Tensor]] = [[] for _ in range(level + 1)]
        for diagonal in range(level + 1):
            for j in range(diagonal + 1):
                i = diagonal - j
                below = rows[i + 1][j - 1] if j else rows[i - 1][0] if i else x_BCDHW
                rows[i].append(self.nodes[f"x_{i}_{j}"](below, rows[i]))
                if j and diagonal == level:
                    rows[i + 1].clear()  # read for the last time
        return rows[0]

    def _head(self, level: int, row: Sequence[Tensor]) -> Tensor:
        return cast(Tensor, self.heads[str(level)](row[level]))

    def _check_level(self, level: int) -> None:
        if str(level) in self.heads:
            return
        if not self.config.deep_supervision and 1 <= level < self.depth:
            raise UserError(
                f"level {level}: without deep supervision only the deepest level, {self.depth}, has a head; "
                "train with model.deep_supervision true to prune."
            )
        raise UserError(f"level {level}: the network has the levels 1 to {self.depth}; choose one of them.")

    def _check_size(self, x_BCDHW: Tensor) -> None:
        step, size = 2**self.depth, tuple(x_BCDHW.shape[2:])
        if len(size) != self.spatial_dims:
            raise UserError(
                f"image of shape {tuple(x_BCDHW.shape)}: a {self.spatial_dims}D U-Net++ takes (B, C, *size)."
            )
        if any(n % step for n in size):
            near = tuple(math.ceil(n / step) * step for n in size)
            raise UserError(
                f"plan.patch_size {size}: U-Net++ of model.depth {self.depth} halves every axis {self.depth} times and "
                f"needs multiples of {step}; set it to {near}, or choose a smaller depth."
            )
        if all(n == step for n in size):
            raise UserError(
                f"plan.patch_size {size}: model.depth {self.depth} leaves a single position at the bottom, where a "
                "norm erases everything; choose a larger patch, or a smaller depth."
            )


class Node(nn.Module):
    """H over the row so far and what comes from the neighbouring row.

    Args:
        resample: brings the neighbour's output to this node's size; nothing, D or U of the equation.
        in_channels: of the row so far and the resampled neighbour together.
        features: channels it puts out.
    """

    def __init__(
        self, config: UNetPPConfig, spatial_dims: int, resample: nn.Module, in_channels: int, features: int
    ) -> None:
        super().__init__()
        conv = _CONV[spatial_dims]
        self.resample = resample
        self.conv1 = conv(in_channels, features, 3, padding=1, bias=False)  # the norm would cancel a bias
        self.norm1 = _norm(config.norm, spatial_dims, features)
        self.conv2 = conv(features, features, 3, padding=1, bias=False)
        self.norm2 = _norm(config.norm, spatial_dims, features)
        self.scse: nn.Module = ScSE(spatial_dims, features) if config.scse else nn.Identity()
        for layer in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(layer.weight, a=_SLOPE)

    def forward(self, below_BCDHW: Tensor, row: Sequence[Tensor]) -> Tensor:
        """The node's output (B, features, *size); `row` holds the nodes to its left."""
        if row and self.training and torch.is_grad_enabled():
            # The concatenation is made anew in the backward pass, up to the convolution, instead of being kept.
            y = checkpoint(self._merge, below_BCDHW, *row, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self._merge(below_BCDHW, *row)
        # In place is safe: the backward pass of a norm reads its input, that of leaky ReLU its output.
        y = functional.leaky_relu(self.norm1(y), _SLOPE, inplace=True)
        y = functional.leaky_relu(self.norm2(fast_on_cpu(self.conv2(y))), _SLOPE, inplace=True)
        return cast(Tensor, self.scse(y))

    def _merge(self, below_BCDHW: Tensor, *row: Tensor) -> Tensor:
        resampled = self.resample(below_BCDHW)
        return fast_on_cpu(self.conv1(torch.cat([*row, resampled], dim=1) if row else resampled))


class ScSE(nn.Module):
    """Concurrent spatial and channel squeeze and excitation (Roy et al. 2018, arXiv:1808.08127).

    The two are joined by the element-wise maximum, as in the journal version; reduction ratio 2.
    """

    def __init__(self, spatial_dims: int, features: int) -> None:
        super().__init__()
        conv, reduced = _CONV[spatial_dims], max(1, features // 2)
        self.squeeze = conv(features, reduced, 1)
        self.excite = conv(reduced, features, 1)
        self.spatial = conv(features, 1, 1)

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """x weighed per channel or per position, whichever is larger; same shape."""
        mean_BC111 = x_BCDHW.mean(dim=tuple(range(2, x_BCDHW.ndim)), keepdim=True)
        channel = torch.sigmoid(self.excite(functional.relu(self.squeeze(mean_BC111))))
        return torch.maximum(x_BCDHW * channel, x_BCDHW * torch.sigmoid(self.spatial(x_BCDHW)))


def build_unetpp(config: UNetPPConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """U-Net++; see `UNetPP`."""
    return UNetPP(config, spatial_dims, in_channels, out_channels)


def _doubled(depth: int) -> tuple[int, ...]:
    return tuple(min(_FIRST_FEATURES * 2**i, _MOST_FEATURES) for i in range(depth + 1))


def _node(config: UNetPPConfig, dims: int, in_channels: int, features: Sequence[int], i: int, j: int) -> Node:
    if j:
        return Node(
            config, dims, _up(config.up, dims, features[i + 1], features[i]), (j + 1) * features[i], features[i]
        )
    if i:
        return Node(config, dims, _down(config.down, dims, features[i - 1]), features[i - 1], features[i])
    return Node(config, dims, nn.Identity(), in_channels, features[0])


def _up(kind: str, dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """Both kinds are linear and so need no bias before the convolution and norm that follow."""
    if kind == "transposed":
        return _TRANSPOSED[dims](in_channels, out_channels, 2, stride=2, bias=False)
    # A 1x1 convolution and linear interpolation commute; this order does it on the smaller grid.
    reduce = _CONV[dims](in_channels, out_channels, 1, bias=False)
    return nn.Sequential(reduce, nn.Upsample(scale_factor=2, mode=_LINEAR[dims], align_corners=False))


def _down(kind: str, dims: int, channels: int) -> nn.Module:
    return _MAX_POOL[dims](2) if kind == "max" else _CONV[dims](channels, channels, 2, stride=2, bias=False)


def _norm(kind: str, dims: int, channels: int) -> nn.Module:
    if kind == "batch":
        return _BATCH_NORM[dims](channels)
    return Norm(channels if kind == "instance" else math.gcd(channels, 8), channels)


def _log_mean_probs(logits_list: Sequence[Tensor]) -> Tensor:
    total = logits_list[0].float().log_softmax(1)
    for logits_BKDHW in logits_list[1:]:
        total = torch.logaddexp(total, logits_BKDHW.float().log_softmax(1))
    return total - math.log(len(logits_list))
