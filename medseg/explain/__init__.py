"""Which part of an image speaks for a prediction: activation maps of classifiers and segmentation networks.

`EXPLAINERS` is the one registry: an explainer is a function (net, x_BCDHW, score, layer) -> raw map at its own size.

Shape legend: B batch, C channels, K classes, D H W the spatial axes in array order (H W for 2D).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.explain.gradients import from_layer, gradcam, hirescam, input_gradient, layercam
from medseg.explain.hooks import frozen, logits_and_layer
from medseg.explain.targets import Score, Target, make_score
from medseg.files import UserError

Explainer = Callable[[nn.Module, Tensor, Score, str], Tensor]

EXPLAINERS: dict[str, Explainer] = {
    "gradcam": from_layer(gradcam),
    "hirescam": from_layer(hirescam),
    "layercam": from_layer(layercam),
    "gradients": input_gradient,
}


def explain(
    net: nn.Module,
    x_BCDHW: Tensor,
    method: str = "gradcam",
    target: Target = 1,
    layer: str = "bottleneck",
    *,
    region_BDHW: Tensor | None = None,
    size: Literal["input", "layer"] = "input",
) -> Tensor:
    """Explain the score of one class for each image of a batch.

    The network is run in evaluation mode, without autocast; its mode, flags and gradients are left as they were.

    Args:
        net: x_BCDHW -> logits (B, K) or (B, K, *space); of several outputs the first counts.
        x_BCDHW: images as the network takes them, on its device.
        method: name in `EXPLAINERS`.
        target: class index for all samples or one per sample; None for the predicted class of a classifier.
        layer: `last`, `bottleneck` or a module's dotted name (see `hooks.logits_and_layer`).
        region_BDHW: for segmentation, where the target's logits are summed; by default where it is predicted.
        size: `input` interpolates the map linearly to the size of the image, cell centres aligned; `layer` leaves it.

    Returns:
        map_BDHW, float32, raw: not scaled and not clipped beyond what the method itself does.

    Raises:
        UserError: unknown method, layer or target.
    """
    if method not in EXPLAINERS:
        raise UserError(f"explain.method {method!r} is not registered; choose one of {', '.join(EXPLAINERS)}.")
    with frozen(net):
        x_BCDHW = x_BCDHW.detach().clone()  # a tensor made under inference mode cannot join a graph
        logits, layer_name = logits_and_layer(net, x_BCDHW.clone(), layer)
        score = make_score(logits, target, region_BDHW)
        map_BDHW = EXPLAINERS[method](net, x_BCDHW, score, layer_name).detach().float()
        return map_BDHW if size == "layer" else _enlarged(map_BDHW, tuple(x_BCDHW.shape[2:]))


def _enlarged(map_BDHW: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(map_BDHW.shape[1:]) == shape:
        return map_BDHW
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape)]
    with torch.no_grad():
        return functional.interpolate(map_BDHW[:, None], size=shape, mode=mode, align_corners=False)[:, 0]
