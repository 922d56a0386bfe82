"""Look inside a network without leaving a trace: activations of a layer, and the layers there are.

Shape legend: B batch, C channels, K classes, D H W the spatial axes in array order (H W for 2D).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from medseg.files import UserError
from medseg.models.ensemble import Ensemble


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Evaluation mode, weights without gradient, gradients on, autocast off; all as it was before on the way out.

    The mode of every module is restored by itself, so a network of which only a part was in training mode stays so.
    Gradients that the weights already hold are not touched.
    """
    modes = [(module, module.training) for module in net.modules()]
    flags = [(weight, weight.requires_grad) for weight in net.parameters()]
    device = next((weight.device.type for weight, _ in flags), "cpu")
    try:
        net.eval()
        for weight, _ in flags:
            weight.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for weight, flag in flags:
            weight.requires_grad_(flag)


@contextmanager
def run_order(net: nn.Module) -> Iterator[list[str]]:
    """Dotted names of the modules with parameters of their own, in the order in which they first run in the block."""
    ran: list[str] = []

    def noting(name: str) -> Callable[[nn.Module, Any], None]:
        def note(module: nn.Module, inputs: object) -> None:
            if name not in ran:
                ran.append(name)

        return note

    own = [(n, module) for n, module in net.named_modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_pre_hook(noting(name)) for name, module in own]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Activation:
    """What a layer put out when the network last ran: of joined networks one part each, in the graph, None before the
    first run."""

    parts: list[Tensor | None]

    @property
    def value(self) -> Tensor | None:
        """The parts side by side, as the channels of one layer; None where one has not run."""
        ran = [part for part in self.parts if part is not None]
        return None if len(ran) < len(self.parts) else side_by_side(ran)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """(B, C, *space) of each network as (B, sum of C, *space); one part is returned as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


@contextmanager
def captured(net: nn.Module, layer: str) -> Iterator[Activation]:
    """Capture the output of the module called `layer`; its hook is removed whatever happens inside.

    The rest of the network gets a copy, so that an in-place activation behind the layer cannot overwrite what was
    captured. A module that runs several times is captured at its last run. Of joined networks, a name inside each of
    them means that layer of all.

    Raises:
        UserError: there is no such module.
    """
    found = _modules_called(net, layer)
    activation = Activation([None] * len(found))

    def keep(number: int, module: nn.Module, inputs: tuple[Any, ...], output: object) -> object:
        if not isinstance(output, Tensor):
            raise UserError(f"explain.layer {layer!r} puts out no tensor but {type(output).__name__}; choose another.")
        activation.parts[number] = output
        return output.clone()

    handles = [module.register_forward_hook(partial(keep, number)) for number, module in enumerate(found)]
    try:
        yield activation
    finally:
        for handle in handles:
            handle.remove()


def _modules_called(net: nn.Module, layer: str) -> list[nn.Module]:
    modules = dict(net.named_modules())
    if layer in modules:
        return [modules[layer]]
    if isinstance(net, Ensemble):
        inside = [dict(member.named_modules()) for member in net.members]
        if all(layer in names for names in inside):
            return [names[layer] for names in inside]
        modules = inside[0]
    raise UserError(f"explain.layer {layer!r} is no module of the network; {_suggest(layer, modules)}")


def first_output(output: object) -> Tensor:
    """The logits of a network that puts out one tensor, or several of which the first is the main one."""
    main = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(main, Tensor):
        raise UserError(f"the network puts out {type(main).__name__} instead of logits; it cannot be explained.")
    return main


def logits_and_layer(net: nn.Module, x_BCDHW: Tensor, layer: str) -> tuple[Tensor, str]:
    """Run the network once, without a graph, and find the layer that is meant.

    Args:
        layer: a module's dotted name, which is returned as it is, or
            `last`: the last module with spatial output before the head; that is before global pooling in a classifier,
            before the channels become the classes in a segmentation network.
            `bottleneck`: the module with the fewest positions, more than one; of several the last.

    Returns:
        Logits (B, K) or (B, K, *space), and the dotted name; of joined networks that inside each of them.

    Raises:
        UserError: no module has a spatial output.
    """
    if layer not in ("last", "bottleneck"):
        with torch.no_grad():
            return first_output(net(x_BCDHW)), layer
    logits, spatial = _spatial_runs(net, x_BCDHW)
    if not spatial:
        raise UserError(f"explain.layer {layer!r}: no module of the network has a spatial output; name one by hand.")
    if layer == "last":
        return logits, spatial[-1][0]
    smallest = min(math.prod(shape[2:]) for _, shape in spatial)
    return logits, [name for name, shape in spatial if math.prod(shape[2:]) == smallest][-1]


def stage_layers(net: nn.Module, x_BCDHW: Tensor, count: int) -> list[str]:
    """From `last` backwards, the module that ends each of the `count` coarsest resolutions; fewer where there are."""
    found: dict[int, str] = {}
    for name, shape in reversed(_spatial_runs(net, x_BCDHW)[1]):
        positions = math.prod(shape[2:])
        if len(found) < count and positions > max(found, default=1) and shape[0] == len(x_BCDHW):
            found[positions] = name
    return list(found.values())


def _spatial_runs(net: nn.Module, x_BCDHW: Tensor) -> tuple[Tensor, list[tuple[str, tuple[int, ...]]]]:
    """Logits, and the modules with spatial output before the head, in the order in which they ran, with its shape.

    Joined networks are built alike, so the modules of the first stand for all.
    """
    runs: list[tuple[str, tuple[int, ...]]] = []
    part = net.members[0] if isinstance(net, Ensemble) else net
    handles = [module.register_forward_hook(_recorder(name, runs)) for name, module in part.named_modules() if name]
    try:
        with torch.no_grad():
            logits = first_output(net(x_BCDHW))
    finally:
        for handle in handles:
            handle.remove()
    spatial = [(name, shape) for name, shape in runs if len(shape) == x_BCDHW.ndim and math.prod(shape[2:]) > 1]
    if logits.ndim == x_BCDHW.ndim:
        while spatial and spatial[-1][1][1:] == tuple(logits.shape[1:]):
            spatial.pop()
    return logits, spatial


def _recorder(name: str, runs: list[tuple[str, tuple[int, ...]]]) -> Callable[[nn.Module, Any, object], None]:
    def record(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            runs.append((name, tuple(output.shape)))

    return record


def _suggest(layer: str, modules: dict[str, nn.Module]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(layer, [name for name in modules if name], n=3, cutoff=0.4)
    return f"take 'last', 'bottleneck' or for example {', '.join(near)}." if near else "take 'last' or 'bottleneck'."
