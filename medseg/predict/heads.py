"""Logits made from a network's last features where they are needed, so that those of a whole window never exist.

Most networks end with a pointwise convolution from a few features to all classes: each voxel's logits follow from its
own features. Made part by part they stay in the processor's cache, and a window takes the memory of its features.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ROUNDING = 1e-5  # of the largest logit; far below what could tell two classes apart but in a tie


@dataclass(frozen=True)
class Head:
    """Makes logits of features, each voxel by itself.

    Attributes:
        conv: the network's pointwise convolution.
        lower: the type of autocast in which the network first made logits; None without autocast.
    """

    conv: nn.Module
    lower: torch.dtype | None = None

    def __call__(self, features_BCDHW: Tensor) -> Tensor:
        """logits_BKDHW, float32."""
        with torch.autocast(features_BCDHW.device.type, self.lower, enabled=self.lower is not None):
            logits: Tensor = self.conv(features_BCDHW)
        return logits.float()

    @property
    def classes(self) -> int:
        """How many logits a voxel has."""
        assert isinstance(self.conv.weight, Tensor)
        return len(self.conv.weight)


@dataclass(frozen=True)
class WindowLogits:
    """Logits of a window or a part of it; with a head they exist only while they are used.

    Attributes:
        values_CDHW: logits, or the features that `head` makes them from.
        head: None for logits.
    """

    values_CDHW: Tensor
    head: Head | None = None

    def part(self, where: Sequence[slice]) -> "WindowLogits":
        """A box of it."""
        return WindowLogits(self.values_CDHW[(slice(None), *where)], self.head)

    def made(self) -> Tensor:
        """logits_KDHW."""
        return self.values_CDHW if self.head is None else self.head(self.values_CDHW[None])[0]


@dataclass(frozen=True)
class Ending:
    """The pointwise convolution that a network ended with when it saw a batch.

    Attributes:
        name: of the module; empty where the network is nothing else.
        features_BCDHW, logits_BKDHW: what it was given, and what it made of it.
        before_gb: memory that the network had taken up to then, at its peak.
    """

    name: str
    head: Head
    features_BCDHW: Tensor
    logits_BKDHW: Tensor
    before_gb: float

    def makes_the_same(self, values: int) -> bool:
        """Whether the head gives the same for slices of the window, of about so many logits at a time.

        On several threads a convolution adds up in another order for another size, so that last bits may differ.
        """
        step = max(values // math.prod((self.logits_BKDHW.shape[1], *self.logits_BKDHW.shape[3:])), 1)
        tolerance = _ROUNDING * float(self.logits_BKDHW.abs().max())
        return all(
            torch.allclose(self.head(features), logits.float(), rtol=0, atol=tolerance)
            for features, logits in zip(
                torch.split(self.features_BCDHW, step, 2), torch.split(self.logits_BKDHW, step, 2), strict=True
            )
        )


@contextmanager
def ending(
    net: nn.Module, taken_gb: Callable[[], float], *, hooked: bool = False
) -> Iterator[Callable[[Tensor], Ending | None]]:
    """Watch how a network makes logits in the block; afterwards a function gives the head that made given ones.

    Args:
        taken_gb: the memory taken so far at its peak.
        hooked: whether the head may have hooks, which it then has in vain.
    """
    calls: list[str] = []
    lower = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    last: list[tuple[nn.Module, Tensor, float]] = []
    made: list[Ending] = []

    def begin(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        last[:], made[:] = [(module, inputs[0], taken_gb())], []

    def end(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(names[module])
        module, features, before_gb = last[0]
        made[:] = [Ending(names[module], Head(module, lower), features, output, before_gb)]

    names = {module: name for name, module in net.named_modules() if is_pointwise(module, hooked=hooked)}
    handles = [module.register_forward_pre_hook(begin) for module in names]
    handles += [module.register_forward_hook(end) for module in names]

    def of(logits: Tensor) -> Ending | None:
        found = made[0] if made else None
        if found is None or calls.count(found.name) != 1:
            return None
        same = found.logits_BKDHW is logits or (lower is not None and torch.equal(found.logits_BKDHW.float(), logits))
        return found if same else None

    try:
        yield of
    finally:
        for handle in handles:
            handle.remove()


def is_pointwise(module: nn.Module, *, hooked: bool = False) -> bool:
    """Whether a module is a convolution that sees one voxel at a time, and that nobody watches, unless it may be."""
    if not isinstance(module, nn.Conv2d | nn.Conv3d) or (_is_watched(module) and not hooked):
        return False
    alone = {*module.kernel_size, *module.stride} == {1}
    return alone and module.padding in ((0,) * len(module.kernel_size), "valid", "same")


def may_be_split(net: nn.Module, *, hooked: bool = False) -> bool:
    """Whether nothing but its caller takes the network's logits: no hook, unless it may have one, and no compiler."""
    return (hooked or not _is_watched(net)) and not hasattr(net, "_orig_mod")


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class Headless(nn.Module):
    """A network without its head; it shares all weights with the network, which stays as it is.

    Args:
        name: of the head in the network.
    """

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        self._end = _End()
        self.net = _replaced(net, name.split("."), self._end) if name else self._end

    def forward(self, x_BCDHW: Tensor) -> Tensor | None:
        """Features; None where the network does not end with its head this time, or keeps it in a second place."""
        features: Tensor = self.net(x_BCDHW)
        seen, self._end.seen = self._end.seen, None
        return features if seen is features else None


class _End(nn.Module):
    """Stands where the head was, and lets the features through."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        self.seen = x_BCDHW
        return x_BCDHW


def _replaced(net: nn.Module, path: Sequence[str], end: nn.Module) -> nn.Module:
    """A copy of the modules that lead to one, and of nothing else, with that one replaced."""
    twin = copy.copy(net)
    child = net._modules[path[0]]
    assert child is not None
    twin._modules = {**net._modules, path[0]: _replaced(child, path[1:], end) if path[1:] else end}
    return twin
