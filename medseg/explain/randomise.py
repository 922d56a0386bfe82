"""Draw a network's weights anew, from the top down (cascading randomisation; Adebayo et al. 2018, section 3.1)."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medseg.explain.hooks import frozen


def cascade(net: nn.Module, x_1CDHW: Tensor, stages: int, seed: int = 0) -> Iterator[nn.Module]:
    """Copies of `net`, which itself is not touched: each stage has a further part randomised, the last one all.

    Modules are taken in reverse of the order in which they run for this image. Each of their parameters is drawn
    from a normal distribution of its own mean and standard deviation, so that the scale of the activations stays.
    Running statistics stay as they are.
    """
    copied = copy.deepcopy(net)
    modules = _in_order(copied, x_1CDHW)[::-1]
    generator = torch.Generator().manual_seed(seed)
    for part in np.array_split(np.arange(len(modules)), min(stages, max(1, len(modules)))):
        for index in part:
            for weight in modules[index].parameters(recurse=False):
                _redraw(weight, generator)
        yield copied


def _in_order(net: nn.Module, x_1CDHW: Tensor) -> list[nn.Module]:
    """Modules with parameters of their own, in the order of their first run."""
    ran: list[nn.Module] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module not in ran:
            ran.append(module)

    own = [module for module in net.modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_pre_hook(note) for module in own]
    try:
        with frozen(net), torch.no_grad():
            net(x_1CDHW.clone())
    finally:
        for handle in handles:
            handle.remove()
    return ran


def _redraw(weight: nn.Parameter, generator: torch.Generator) -> None:
    values = weight.detach()
    deviation = float(values.std()) if values.numel() > 1 else 0.0
    drawn = torch.randn(values.shape, generator=generator) * deviation + float(values.mean())
    weight.data = drawn.to(values)
