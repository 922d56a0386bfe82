"""Eigen-CAM (Muhammad and Yeasin 2020): the direction in which a layer varies most, whatever the class."""

import torch
from torch import Tensor, nn

from medseg.config import MethodConfig
from medseg.explain.gradients import placed
from medseg.explain.hooks import captured
from medseg.explain.targets import Score


def eigencam(A_BCDHW: Tensor) -> Tensor:
    """Projection of the activations on their first right singular vector, (B, *space), signed.

    The activations enter as they are, not centred (eq. 2 and 3 of the paper). A singular vector has no sign of its
    own: the map is turned so that its value farthest from 0 is positive. For activations behind a ReLU every value
    of the map is then at least 0 (Perron-Frobenius).
    """
    flat_BPC = A_BCDHW.flatten(2).transpose(1, 2).double()
    vectors_BCC = torch.linalg.svd(flat_BPC, full_matrices=False).Vh
    map_BP = (flat_BPC @ vectors_BCC[:, 0, :, None])[..., 0]
    peak_B1 = map_BP.gather(1, map_BP.abs().argmax(1, keepdim=True))
    turned = torch.where(peak_B1 < 0, -map_BP, map_BP)
    return turned.view(len(A_BCDHW), *A_BCDHW.shape[2:]).to(A_BCDHW.dtype)


def explain_by_eigencam(net: nn.Module, x_BCDHW: Tensor, score: Score, layer: str, config: MethodConfig) -> Tensor:
    """Eigen-CAM of a layer; the class plays no part, so every class has the same map."""
    with torch.no_grad(), captured(net, layer) as activation:
        net(x_BCDHW.clone())
    return eigencam(placed(activation.value, x_BCDHW, layer))
