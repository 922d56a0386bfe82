"""Draw a network's weights anew, from the top down (cascading randomisation; Adebayo et al. 2018, section 3.1)."""

import copy
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor, nn

from medseg.explain.hooks import frozen, run_order
from medseg.models.ensemble import Ensemble


def cascade(
    net: nn.Module, x_1CDHW: Tensor, stages: int, seed: int = 0, order: Sequence[str] = ()
) -> Iterator[nn.Module]:
    """Copies of `net`, which itself is not touched: each stage has a further part randomised, the last one all.

    Modules are taken in reverse of the order in which they run for this image, of joined networks those of all at
    once. Each of their parameters is drawn from a normal distribution of its own mean and standard deviation, so that
    the scale of the activations stays. Running statistics stay as they are.

    Args:
        order: what `run_order` has seen of such an image; by default the network runs once to find out.
    """
    copied = copy.deepcopy(net)
    order = order or _in_order(copied, x_1CDHW)
    if isinstance(copied, Ensemble):
        order = _side_by_side(order)
    modules = [copied.get_submodule(name) for name in reversed(order)]
    generator = torch.Generator().manual_seed(seed)
    for part in np.array_split(np.arange(len(modules)), min(stages, max(1, len(modules)))):
        for index in part:
            for weight in modules[index].parameters(recurse=False):
                _redraw(weight, generator)
        yield copied


def _in_order(net: nn.Module, x_1CDHW: Tensor) -> list[str]:
    with frozen(net), torch.no_grad(), run_order(net) as ran:
        net(x_1CDHW.clone())
    return ran


def _side_by_side(order: Sequence[str]) -> list[str]:
    """The first module of each member, then the second of each."""
    members: dict[str, list[str]] = {}
    for name in order:
        members.setdefault(".".join(name.split(".")[:2]), []).append(name)
    return [name for names in zip_longest(*members.values()) for name in names if name is not None]


def _redraw(weight: nn.Parameter, generator: torch.Generator) -> None:
    values = weight.detach()
    deviation = float(values.std()) if values.numel() > 1 else 0.0
    drawn = torch.randn(values.shape, generator=generator) * deviation + float(values.mean())
    weight.data = drawn.to(values)
