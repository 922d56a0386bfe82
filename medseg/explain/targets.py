"""What a map explains: one number per sample, taken from the logits before softmax or sigmoid."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from medseg.files import UserError

Score = Callable[[Tensor], Tensor]
Target = int | Sequence[int] | Tensor | None


def make_score(logits: Tensor, target: Target = None, region_BDHW: Tensor | None = None) -> Score:
    """Fix class and region by the logits of the image as it is; the score then also holds for changed images.

    Classification, logits (B, K): the logit of the target class. Segmentation, logits (B, K, *space): the sum of the
    target class's logits over a region, by default where that class is predicted (Vinogradova et al. 2020); nothing is
    predicted, nothing is explained: the score is 0 and so is every map. A network with a single logit has two
    classes: the score of class 1 is the logit, that of class 0 its negative.

    Args:
        target: class index for all samples, one per sample, or None for the predicted class (classification only).
        region_BDHW: bool mask that replaces the predicted region.

    Returns:
        Function from logits to (B,) scores; each depends on its own sample alone.

    Raises:
        UserError: the target does not exist, or a region or a target is missing or does not fit.
    """
    classes = max(2, logits.shape[1])
    if target is None and logits.ndim > 2:
        raise UserError("target is None; name the class whose region is to be explained.")
    chosen = _predicted(logits) if target is None else torch.as_tensor(target, device=logits.device)
    chosen = chosen.long().expand(len(logits)) if chosen.ndim == 0 else chosen.long()
    if chosen.shape != (len(logits),):
        raise UserError(
            f"target has shape {tuple(chosen.shape)} for {len(logits)} samples; give one class or {len(logits)}."
        )
    if not bool(((chosen >= 0) & (chosen < classes)).all()):
        raise UserError(f"target {chosen.tolist()} is not below the {classes} classes of the network.")
    if logits.ndim == 2:
        if region_BDHW is not None:
            raise UserError("region is for segmentation networks; leave it out.")
        return lambda found: _of_class(found, chosen)
    region = _region(logits, chosen, region_BDHW).to(logits.dtype)
    return lambda found: (_of_class(found, chosen) * region).flatten(1).sum(1)


def _of_class(logits: Tensor, chosen: Tensor) -> Tensor:
    """(B,) or (B, *space): each sample's own class."""
    if logits.shape[1] == 1:
        sign = (2 * chosen - 1).to(logits.dtype)
        return logits[:, 0] * sign.view(-1, *[1] * (logits.ndim - 2))
    return logits[torch.arange(len(logits), device=logits.device), chosen]


def _predicted(logits: Tensor) -> Tensor:
    """(B,) or (B, *space) class indices."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def _region(logits: Tensor, chosen: Tensor, given: Tensor | None) -> Tensor:
    if given is None:
        return _predicted(logits) == chosen.view(-1, *[1] * (logits.ndim - 2))
    if given.shape != (len(logits), *logits.shape[2:]):
        raise UserError(f"region has shape {tuple(given.shape)}, not {(len(logits), *logits.shape[2:])}.")
    return given.to(logits.device).bool()
