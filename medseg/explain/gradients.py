"""Maps from one backward pass: the Grad-CAM family and plain input gradients, in 2D and 3D alike.

A_BCDHW: activations of the layer; g_BCDHW: gradient of the score with respect to them. Maps are raw: no
normalisation, so that "no evidence" (all zero) can be told from strong evidence, and maps of cases compare.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from medseg.config import MethodConfig
from medseg.explain.hooks import captured, first_output, side_by_side
from medseg.explain.targets import Score
from medseg.files import UserError


def gradcam(A_BCDHW: Tensor, g_BCDHW: Tensor) -> Tensor:
    """ReLU(sum_c mean_p(g_c) A_c) (Selvaraju et al. 2017, eq. 1 and 2)."""
    weights = g_BCDHW.flatten(2).mean(2).view(*g_BCDHW.shape[:2], *[1] * (g_BCDHW.ndim - 2))
    return (weights * A_BCDHW).sum(1).relu()


def gradcampp(A_BCDHW: Tensor, g_BCDHW: Tensor) -> Tensor:
    """ReLU(sum_c w_c A_c), w_c = sum_p alpha_cp ReLU(g_cp) (Chattopadhay et al. 2018, eq. 7 and 19).

    alpha_cp = g^2 / (2 g^2 + (sum_q A_cq) g^3) = 1 / (2 + (sum_q A_cq) g): with g^2 cancelled no epsilon is needed,
    and small gradients keep their weight. The factor exp(S) of the paper is one number per sample and is left out.
    Where the denominator vanishes, which takes activations below 0, alpha is 0.
    """
    axes = tuple(range(2, A_BCDHW.ndim))
    denominator = 2 + A_BCDHW.sum(axes, keepdim=True) * g_BCDHW
    alpha = torch.where(denominator.abs() > 1e-6, 1 / denominator, torch.zeros_like(denominator))
    weights = (alpha * g_BCDHW.relu()).sum(axes, keepdim=True)
    return (weights * A_BCDHW).sum(1).relu()


def hirescam(A_BCDHW: Tensor, g_BCDHW: Tensor) -> Tensor:
    """sum_c g_c A_c, signed (Draelos and Carin 2020, eq. 2).

    Where a single linear layer follows, the map of the layer sums to the score without its bias.
    """
    return (g_BCDHW * A_BCDHW).sum(1)


def layercam(A_BCDHW: Tensor, g_BCDHW: Tensor) -> Tensor:
    """ReLU(sum_c ReLU(g_c) A_c) (Jiang et al. 2021, eq. 6 and 7)."""
    return (g_BCDHW.relu() * A_BCDHW).sum(1).relu()


def from_layer(
    combine: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[nn.Module, Tensor, Score, str, MethodConfig], Tensor]:
    """Make an explainer of a function of activations and gradients.

    Returns:
        Function (net, x_BCDHW, score, layer, config) -> map of the layer's size; `net` must be frozen.
    """

    def explain_layer(net: nn.Module, x_BCDHW: Tensor, score: Score, layer: str, config: MethodConfig) -> Tensor:
        return combine(*activation_and_gradient(net, x_BCDHW, score, layer))

    return explain_layer


def activation_and_gradient(net: nn.Module, x_BCDHW: Tensor, score: Score, layer: str) -> tuple[Tensor, Tensor]:
    """A_BCDHW and g_BCDHW of a layer; `net` must be frozen. The layers of joined networks are one with all channels.

    Raises:
        UserError: the layer did not run, has no place in the image, or does not lead to the score.
    """
    with captured(net, layer) as activation:
        scores = score(first_output(net(leaf_of(x_BCDHW).clone())))
    parts = [placed(part, x_BCDHW, layer) for part in activation.parts]
    return side_by_side([A.detach() for A in parts]), side_by_side(gradients_of(scores, parts, layer))


def placed(A_BCDHW: Tensor | None, x_BCDHW: Tensor, layer: str) -> Tensor:
    """The captured activation, which must be there and have spatial axes; else UserError."""
    if A_BCDHW is None:
        raise UserError(f"explain.layer {layer!r} did not run for this input; choose another.")
    if A_BCDHW.ndim != x_BCDHW.ndim:
        shape = tuple(A_BCDHW.shape)
        raise UserError(f"explain.layer {layer!r} puts out shape {shape}, which has no place in the image.")
    return A_BCDHW


def input_gradient(net: nn.Module, x_BCDHW: Tensor, score: Score, layer: str, config: MethodConfig) -> Tensor:
    """max_c |dS/dx_c| (Simonyan et al. 2013, section 3.1); the layer plays no part."""
    leaf = leaf_of(x_BCDHW)
    # a copy goes in: a network that changes its input in place must not change the leaf
    scores = score(first_output(net(leaf.clone())))
    return gradients_of(scores, [leaf], "input")[0].abs().amax(1)


def leaf_of(x_BCDHW: Tensor) -> Tensor:
    """A copy of the image at which gradients can be taken."""
    return x_BCDHW.detach().clone().requires_grad_()


def gradients_of(scores: Tensor, at: Sequence[Tensor], name: str) -> list[Tensor]:
    """d(score of sample b)/d(at of sample b): in evaluation mode samples do not mix, so the sum's gradient holds it."""
    if all(one.requires_grad for one in at):
        found = torch.autograd.grad(scores.sum(), list(at), allow_unused=True)
        if (known := [g for g in found if g is not None]) and len(known) == len(at):
            return known
    raise UserError(f"explain.layer {name!r} does not lead to the score of the target; choose another.")
