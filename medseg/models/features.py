"""Features and logits of one forward pass, for explanations and for what is unlike the training cohort.

Shape legend: B batch, F features, C channels, K classes, D H W the spatial axes in array order (H W for 2D).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medseg.files import UserError
from medseg.models.ensemble import Ensemble

_CONV = (nn.Conv2d, nn.Conv3d)
_LINEAR = (nn.Linear, *_CONV)


def features_and_logits(net: nn.Module, x_BCDHW: Tensor) -> tuple[Tensor, Tensor]:
    """Run the network once; its features are what its prediction rests on, as one vector per image.

    Of a classifier: what its head reads, the head being the last linear layer or convolution to run; averaged over
    positions where it has any. Of a segmentation network: the output of the module with the fewest positions, more than
    one, of several the last (as `bottleneck` of the explanations); averaged over positions.

    Args:
        net: x_BCDHW -> logits_BK or logits_BKDHW, in the mode the caller has set; left without a hook.
        x_BCDHW: or x_BCHW.

    Returns:
        features_BF and the logits, both part of the graph where gradients are on.

    Raises:
        UserError: the network puts out no single tensor, or no module of it has features.
    """
    found: list[Tensor] = []
    with features_watched(net, lambda image, features: found.append(features)):
        logits = net(x_BCDHW)
    return found[0], logits


@contextmanager
def features_watched(
    net: nn.Module, take: Callable[[Tensor, Tensor], None], *, classifies: bool | None = None
) -> Iterator[None]:
    """Tell `take` the image_BCDHW and the features_BF of each forward pass in the block.

    They are those of `features_and_logits`, unless the network is said to be none that classifies: then mean and
    standard deviation over positions of what the last convolution of each resolution puts out on the way down. A norm
    that follows makes both alike for all images, and the coarsest alone hardly shows noise.

    Args:
        classifies: whether the network is a classifier. Where that is known, only what its kind of features needs is
            watched: inputs of convolutions are as large as any tensor of a segmentation network.
    """
    segments = classifies is False
    watch = _Watch(_mean_and_deviation if segments else _pooled, all_levels=segments)

    def finish(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        take(inputs[0], watch.finish(module, output))

    handles = [net.register_forward_pre_hook(watch.begin)]
    for module in net.modules():
        if module is not net and (isinstance(module, _CONV) if segments else classifies is None):
            handles.append(module.register_forward_hook(watch.after))
        if isinstance(module, _LINEAR) and not segments:
            handles.append(module.register_forward_pre_hook(watch.before))
    handles.append(net.register_forward_hook(finish))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class MeanFeatures:
    """Features of one image: their mean over all passes of a network, one for each window and flip.

    Windows of one value throughout, padding or even air, do not count.
    """

    def __init__(self) -> None:
        self._sum_F: Tensor | None = None
        self._windows: Tensor | None = None

    def see(self, window_BCDHW: Tensor, features_BF: Tensor) -> None:
        """Take the features of a batch of windows."""
        counts_B = (~even(window_BCDHW)).double()
        total_F, windows = (counts_B[:, None] * features_BF.double()).sum(0), counts_B.sum()
        self._sum_F = total_F if self._sum_F is None else self._sum_F + total_F
        self._windows = windows if self._windows is None else self._windows + windows

    def mean(self) -> NDArray[np.float64] | None:
        """(F) the mean; None while nothing was seen."""
        if self._sum_F is None or self._windows is None or not self._windows:
            return None
        found: NDArray[np.float64] = (self._sum_F / self._windows).cpu().numpy()
        return found


@contextmanager
def mean_features(net: nn.Module, *, classifies: bool) -> Iterator[tuple[MeanFeatures, ...]]:
    """Features of the image that is seen in the block, of the network or of each network of an `Ensemble`."""
    members = list(net.members) if isinstance(net, Ensemble) else [net]
    found = tuple(MeanFeatures() for _ in members)
    with ExitStack() as stack:
        for member, features in zip(members, found, strict=True):
            stack.enter_context(features_watched(member, features.see, classifies=classifies))
        yield found


def even(window_BCDHW: Tensor) -> Tensor:
    """(B) whether each window has one value throughout in every channel."""
    flat = window_BCDHW.flatten(2)
    same: Tensor = (flat.amax(2) == flat.amin(2)).all(1)
    return same


class _Watch:
    """What has been seen of a running network; `pool` makes features of a module's output."""

    def __init__(self, pool: Callable[[Tensor], Tensor], *, all_levels: bool) -> None:
        self.pool, self.all_levels = pool, all_levels
        self.batch, self.axes, self.fewest = 0, 0, 0
        self.head_input: Tensor | None = None
        self.levels: dict[int, Tensor] = {}  # by positions, on the way down

    def begin(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Called before the network."""
        x_BCDHW = inputs[0]
        self.batch, self.axes = x_BCDHW.shape[0], x_BCDHW.ndim
        self.fewest = math.prod(x_BCDHW.shape[2:])
        self.head_input, self.levels = None, {}

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Called before each linear layer; the last one stays."""
        self.head_input = inputs[0]

    def after(self, module: nn.Module, inputs: object, output: object) -> None:
        """Called after each module; pooled at once, as what follows may overwrite the output in place."""
        if not isinstance(output, Tensor) or output.ndim != self.axes or output.shape[0] != self.batch:
            return
        positions = math.prod(output.shape[2:])
        if 1 < positions <= self.fewest:
            self.fewest, self.levels[positions] = positions, self.pool(output)

    def finish(self, net: nn.Module, logits: object) -> Tensor:
        """Called after the network; its features."""
        head_input, self.head_input = self.head_input, None
        if not isinstance(logits, Tensor):
            raise UserError(
                f"the network puts out {type(logits).__name__} instead of logits; put it in evaluation mode."
            )
        if logits.ndim == 2 and head_input is not None:
            return _pooled(head_input)
        if not self.levels:
            raise UserError(f"no module of {type(net).__name__} puts out features; take a network of MODELS.")
        levels = list(self.levels.values())
        return torch.cat(levels, 1) if self.all_levels else levels[-1]


def _pooled(x_BCDHW: Tensor) -> Tensor:
    return x_BCDHW.flatten(2).mean(2) if x_BCDHW.ndim > 2 else x_BCDHW


def _mean_and_deviation(x_BCDHW: Tensor) -> Tensor:
    """In two passes, as `torch.std_mean` of a CPU takes eight times as long."""
    x_BCN = x_BCDHW.flatten(2).float()
    mean_BC1 = x_BCN.mean(2, keepdim=True)
    squares_BC = (x_BCN - mean_BC1).square_().sum(2)
    return torch.cat([mean_BC1[..., 0], (squares_BC / (x_BCN.shape[2] - 1)).sqrt()], 1)
