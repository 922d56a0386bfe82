"""Features and logits of one forward pass, for explanations and scores of what is out of distribution.

Shape legend: B batch, F features, C channels, K classes, D H W the spatial axes in array order (H W for 2D).
"""

import math
from typing import Any

from torch import Tensor, nn

from medseg.files import UserError

_LINEAR = (nn.Linear, nn.Conv2d, nn.Conv3d)


def features_and_logits(net: nn.Module, x_BCDHW: Tensor) -> tuple[Tensor, Tensor]:
    """Run the network once; its features are what its prediction rests on, as one vector per image.

    Of a classifier: what its head reads, the head being the last linear layer or convolution to run; averaged over
    positions where it has any. Of a segmentation network: the output of the module with the fewest positions, more than
    one, of several the last (as `bottleneck` of the explanations); averaged over positions.

    Args:
        net: x_BCDHW -> logits_BK or logits_BKDHW, in the mode the caller has set; left without a hook.
        x_BCDHW: or x_BCHW.

    Returns:
        features_BF and the logits, both part of the graph where gradients are on.

    Raises:
        UserError: the network puts out no single tensor, or no module of it has features.
    """
    watch = _Watch(x_BCDHW)
    handles = [module.register_forward_hook(watch.after) for module in net.modules() if module is not net]
    handles += [
        module.register_forward_pre_hook(watch.before) for module in net.modules() if isinstance(module, _LINEAR)
    ]
    try:
        logits = net(x_BCDHW)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor):
        raise UserError(f"the network puts out {type(logits).__name__} instead of logits; put it in evaluation mode.")
    features = _pooled(watch.head_input) if logits.ndim == 2 and watch.head_input is not None else watch.bottom
    if features is None:
        raise UserError(f"no module of {type(net).__name__} puts out features; take a network of MODELS.")
    return features, logits


class _Watch:
    """What has been seen of a running network."""

    def __init__(self, x_BCDHW: Tensor) -> None:
        self.batch, self.axes = x_BCDHW.shape[0], x_BCDHW.ndim
        self.fewest = math.prod(x_BCDHW.shape[2:])
        self.head_input: Tensor | None = None
        self.bottom: Tensor | None = None

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Called before each linear layer; the last one stays."""
        self.head_input = inputs[0]

    def after(self, module: nn.Module, inputs: object, output: object) -> None:
        """Called after each module; pooled at once, as what follows may overwrite the output in place."""
        if not isinstance(output, Tensor) or output.ndim != self.axes or output.shape[0] != self.batch:
            return
        positions = math.prod(output.shape[2:])
        if 1 < positions <= self.fewest:
            self.fewest, self.bottom = positions, _pooled(output)


def _pooled(x_BCDHW: Tensor) -> Tensor:
    return x_BCDHW.flatten(2).mean(2) if x_BCDHW.ndim > 2 else x_BCDHW
