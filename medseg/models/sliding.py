"""Logits of a whole image from a network that sees windows; shared by validation and prediction."""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn


@torch.inference_mode()
def window_logits(
    net: nn.Module,
    image_BCDHW: Tensor,
    patch_size: Sequence[int],
    overlap: float,
    window_batch: int = 1,
    mirror_axes: Sequence[int] = (),
    stitch_on: torch.device | None = None,
) -> Tensor:
    """Slide a window over the image and blend the logits with Gaussian weights.

    Args:
        net: x_BCDHW -> logits_BKDHW of the same spatial size; in the mode the caller has set.
        image_BCDHW: or image_BCHW; axes shorter than the window are padded with 0, and the logits cut back.
        patch_size: the window, one number per spatial axis.
        overlap: share of a window that its neighbour sees too, 0 ≤ overlap < 1.
        window_batch: windows per call of the network.
        mirror_axes: spatial axes (0 = D); the logits are averaged over all combinations of flips along them.
        stitch_on: device that holds the blended logits; by default the image's.

    Returns:
        logits_BKDHW, in the image's dtype.

    Raises:
        ValueError: the window does not fit the image's axes, or the network returns no logits of the window's size.
    """
    total: Tensor | None = None
    flips = [axes for n in range(len(mirror_axes) + 1) for axes in combinations(sorted(set(mirror_axes)), n)]
    for axes in flips:
        dims = [axis + 2 for axis in axes]
        logits: Tensor = sliding_window_inference(
            image_BCDHW.flip(dims) if dims else image_BCDHW,
            tuple(patch_size),
            window_batch,
            _checked(net),
            overlap,
            mode="gaussian",
            device=stitch_on,
        )
        logits = logits.flip(dims) if dims else logits
        total = logits if total is None else total.add_(logits)
    assert total is not None
    return total if len(flips) == 1 else total.div_(len(flips))


def _checked(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network, held to its contract: a list of heads or a smaller map would be blended without a word."""

    def logits_of(window: Tensor) -> Tensor:
        logits = net(window)
        if not isinstance(logits, Tensor) or logits.shape[2:] != window.shape[2:]:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the network returned {got} for a window {tuple(window.shape)}; logits must match it")
        return logits

    return logits_of
