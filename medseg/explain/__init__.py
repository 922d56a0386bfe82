"""Which part of an image speaks for a prediction: activation maps of classifiers and segmentation networks.

`EXPLAINERS` is the one registry: an explainer is a function (net, x_BCDHW, score, layer, config) -> raw map at its own
size. docs/explanation.md has the equations, and where each differs from other implementations.

Shape legend: B batch, C channels, K classes, D H W the spatial axes in array order (H W for 2D).
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from medseg.config import MethodConfig
from medseg.data.grids import enlarged
from medseg.explain.eigencam import explain_by_eigencam
from medseg.explain.fullgrad import explain_by_fullgrad
from medseg.explain.gradients import from_layer, gradcam, gradcampp, hirescam, input_gradient, layercam
from medseg.explain.hooks import frozen, logits_and_layer
from medseg.explain.occlusion import explain_by_occlusion
from medseg.explain.scorecam import explain_by_scorecam
from medseg.explain.targets import Score, Target, make_score
from medseg.files import UserError

Explainer = Callable[[nn.Module, Tensor, Score, str, MethodConfig], Tensor]

EXPLAINERS: dict[str, Explainer] = {
    "gradcam": from_layer(gradcam),
    "gradcampp": from_layer(gradcampp),
    "hirescam": from_layer(hirescam),
    "layercam": from_layer(layercam),
    "eigencam": explain_by_eigencam,
    "scorecam": explain_by_scorecam,
    "fullgrad": explain_by_fullgrad,
    "occlusion": explain_by_occlusion,
    "gradients": input_gradient,
}

LAYERLESS = ("fullgrad", "occlusion", "gradients")
"""Methods in which the layer plays no part."""


def explain(
    net: nn.Module,
    x_BCDHW: Tensor,
    method: str = "gradcam",
    target: Target = 1,
    layer: str = "bottleneck",
    *,
    region_BDHW: Tensor | None = None,
    size: Literal["input", "layer"] = "input",
    config: MethodConfig | None = None,
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
        config: settings of single methods.

    Returns:
        map_BDHW, float32, raw: not scaled and not clipped beyond what the method itself does.

    Raises:
        UserError: unknown method, layer or target.
    """
    if method not in EXPLAINERS:
        raise UserError(f"explain.method {method!r} is not registered; choose one of {', '.join(EXPLAINERS)}.")
    with frozen(net):
        x_BCDHW = x_BCDHW.detach().clone()  # a tensor made under inference mode cannot join a graph
        # where the layer plays no part, none is looked for: "" is the network itself
        logits, layer_name = logits_and_layer(net, x_BCDHW.clone(), "" if method in LAYERLESS else layer)
        score = make_score(logits, target, region_BDHW)
    return explain_score(net, x_BCDHW, score, method, layer_name, size=size, config=config)


def explain_score(
    net: nn.Module,
    x_BCDHW: Tensor,
    score: Score,
    method: str,
    layer: str,
    *,
    size: Literal["input", "layer"] = "input",
    config: MethodConfig | None = None,
) -> Tensor:
    """As `explain`, for a score that is fixed already and a layer by its dotted name."""
    with frozen(net):
        found = EXPLAINERS[method](net, x_BCDHW.detach().clone(), score, layer, config or MethodConfig())
        map_BDHW = found.detach().float()
        return map_BDHW if size == "layer" else enlarged(map_BDHW[:, None], tuple(x_BCDHW.shape[2:]))[:, 0]
