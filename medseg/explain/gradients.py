"""Maps from one backward pass: the Grad-CAM family and plain input gradients, in 2D and 3D alike.

A_BCDHW: activations of the layer; g_BCDHW: gradient of the score with respect to them. Maps are raw: no
normalisation, so that "no evidence" (all zero) can be told from strong evidence, and maps of cases compare.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from medseg.explain.hooks import captured, first_output
from medseg.explain.targets import Score
from medseg.files import UserError


def gradcam(A_BCDHW: Tensor, g_BCDHW: Tensor) -> Tensor:
    """ReLU(sum_c mean_p(g_c) A_c) (Selvaraju et al. 2017, eq. 1 and 2)."""
    weights = g_BCDHW.flatten(2).mean(2).view(*g_BCDHW.shape[:2], *[1] * (g_BCDHW.ndim - 2))
    return (weights * A_BCDHW).sum(1).relu()


def hirescam(A_BCDHW: Tensor, g_BCDHW: Tensor) -> Tensor:
    """sum_c g_c A_c, signed (Draelos and Carin 2020, eq. 2).

    Where a single linear layer follows, the map of the layer sums to the score without its bias.
    """
    return (g_BCDHW * A_BCDHW).sum(1)


def layercam(A_BCDHW: Tensor, g_BCDHW: Tensor) -> Tensor:
    """ReLU(sum_c ReLU(g_c) A_c) (Jiang et al. 2021, eq. 6 and 7)."""
    return (g_BCDHW.relu() * A_BCDHW).sum(1).relu()


def from_layer(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module, Tensor, Score, str], Tensor]:
    """Make an explainer of a function of activations and gradients.

    Returns:
        Function (net, x_BCDHW, score, layer) -> map of the layer's size; `net` must be frozen.
    """

    def explain_layer(net: nn.Module, x_BCDHW: Tensor, score: Score, layer: str) -> Tensor:
        with captured(net, layer) as activation:
            scores = score(first_output(net(_leaf(x_BCDHW).clone())))
        A_BCDHW = activation.value
        if A_BCDHW is None:
            raise UserError(f"explain.layer {layer!r} did not run for this input; choose another.")
        if A_BCDHW.ndim != x_BCDHW.ndim:
            shape = tuple(A_BCDHW.shape)
            raise UserError(f"explain.layer {layer!r} puts out shape {shape}, which has no place in the image.")
        return combine(A_BCDHW.detach(), _gradient(scores, A_BCDHW, layer))

    return explain_layer


def input_gradient(net: nn.Module, x_BCDHW: Tensor, score: Score, layer: str) -> Tensor:
    """max_c |dS/dx_c| (Simonyan et al. 2013, section 3.1); the layer plays no part."""
    leaf = _leaf(x_BCDHW)
    # a copy goes in: a network that changes its input in place must not change the leaf
    scores = score(first_output(net(leaf.clone())))
    return _gradient(scores, leaf, "input").abs().amax(1)


def _leaf(x_BCDHW: Tensor) -> Tensor:
    return x_BCDHW.detach().clone().requires_grad_()


def _gradient(scores: Tensor, at: Tensor, name: str) -> Tensor:
    """d(score of sample b)/d(at of sample b): in evaluation mode samples do not mix, so the sum's gradient holds it."""
    found = torch.autograd.grad(scores.sum(), at, allow_unused=True)[0] if at.requires_grad else None
    if found is None:
        raise UserError(f"explain.layer {name!r} does not lead to the score of the target; choose another.")
    return found
