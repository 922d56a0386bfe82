"""FullGrad (Srinivas and Fleuret 2019): input gradient times input, and what every bias adds.

For a network of convolutions, batch norm in evaluation mode, linear layers and piecewise linear activations,
S(x) = sum(dS/dx * x) + sum over biases (dS/db * b) holds exactly (their eq. 2 and proposition 1). Norms whose
statistics come from the image (instance, group, layer norm) and smooth activations break the sum; their maps are
still defined.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from medseg.config import MethodConfig
from medseg.data.grids import enlarged
from medseg.explain.gradients import leaf_of
from medseg.explain.hooks import first_output
from medseg.explain.targets import Score
from medseg.files import UserError

_CHANNELS_SECOND = (_ConvNd, _BatchNorm, _InstanceNorm, nn.GroupNorm)


@dataclass(frozen=True)
class FullGradients:
    """The parts of a score, signed.

    Attributes:
        input_BCDHW: dS/dx * x.
        biases: one tensor per bias that ran, dS/d(output) * b, of the shape of the module's output.
    """

    input_BCDHW: Tensor
    biases: list[Tensor] = field(default_factory=list)

    def total_B(self) -> Tensor:
        """Sum of all parts; the score itself where the network is piecewise linear."""
        return self.input_BCDHW.flatten(1).sum(1) + sum(part.flatten(1).sum(1) for part in self.biases)


def full_gradients(net: nn.Module, x_BCDHW: Tensor, score: Score) -> FullGradients:
    """Take the score apart; `net` must be frozen.

    Raises:
        UserError: the score does not depend on the image.
    """
    leaf = leaf_of(x_BCDHW)
    with _outputs_with_bias(net) as seen:
        scores = score(first_output(net(leaf.clone())))
    if not scores.requires_grad:
        raise UserError("the score of the target does not depend on the image; it cannot be explained.")
    outputs = [output for output, _ in seen]
    gradients = torch.autograd.grad(scores.sum(), [leaf, *outputs], allow_unused=True)
    parts = [g * bias for g, (_, bias) in zip(gradients[1:], seen, strict=True) if g is not None]
    at_input = torch.zeros_like(leaf) if gradients[0] is None else gradients[0] * leaf
    return FullGradients(at_input.detach(), [part.detach() for part in parts])


def explain_by_fullgrad(net: nn.Module, x_BCDHW: Tensor, score: Score, layer: str, config: MethodConfig) -> Tensor:
    """sum_c |dS/dx_c * x_c| + sum over biases and channels of up(|dS/d(out) * b|); the layer plays no part.

    Parts are not rescaled before they are summed, so that each counts as much as it adds to the score. The biases of
    layers without spatial output have no place in the image and are left out, and so are those of layers that ran on
    cut-outs of it, whose batch is not the image's.
    """
    parts = full_gradients(net, x_BCDHW, score)
    space = tuple(x_BCDHW.shape[2:])
    total = parts.input_BCDHW.abs().sum(1, keepdim=True)
    for part in parts.biases:
        if part.ndim == x_BCDHW.ndim and len(part) == len(x_BCDHW):
            total = total + enlarged(part.abs().sum(1, keepdim=True), space)
    return total[:, 0]


@contextmanager
def _outputs_with_bias(net: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect (output, bias that was added to it, broadcast) of every module that runs; hooks always removed."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: object) -> object:
        bias = bias_of(module)
        if bias is None or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        if isinstance(module, _CHANNELS_SECOND):
            bias = bias.view(1, -1, *[1] * (output.ndim - 2))
        seen.append((output, bias))
        return output.clone()  # an activation in place behind it must not touch what was collected

    handles = [module.register_forward_hook(keep) for module in net.modules() if bias_of(module) is not None]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def bias_of(module: nn.Module) -> Tensor | None:
    """What a module adds to a linear map of its input: its bias, and for batch norm the shift by the running mean."""
    if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
        scale = (module.running_var + module.eps).rsqrt()
        if module.affine:
            scale = scale * module.weight
        shift = -module.running_mean * scale
        return (shift + module.bias if module.affine else shift).detach()
    if isinstance(module, (*_CHANNELS_SECOND, nn.Linear, nn.LayerNorm)):
        bias = module.bias
        return bias.detach() if isinstance(bias, Tensor) else None
    return None
