"""What a map explains: one number per sample, taken from the logits before softmax or sigmoid."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medseg.files import UserError

Target = int | Sequence[int] | Tensor | None


@dataclass(frozen=True)
class Score:
    """One number per sample from logits: that of its own class, over its own region if it has one.

    Attributes:
        chosen_B: class index of each sample, int64.
        region_BDHW: bool, where the logits of a segmentation network are summed; None for a classifier.
        exclusive: whether the classes exclude each other, so that their probabilities add up to 1.
    """

    chosen_B: Tensor
    region_BDHW: Tensor | None = None
    exclusive: bool = True

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (B, K) or (B, K, *space) -> (B,) scores; each depends on its own sample alone."""
        found = _of_class(logits, self.chosen_B)
        return found if self.region_BDHW is None else (found * self.region_BDHW.to(found.dtype)).flatten(1).sum(1)

    def probability(self, logits: Tensor) -> Tensor:
        """(B,) probability of the class, 0 to 1; of a segmentation network its mean over the region (0 if empty)."""
        if not self.exclusive:
            return _of_class(logits.sigmoid(), self.chosen_B)
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        found = _of_class(logits.softmax(1), self.chosen_B)
        if self.region_BDHW is None:
            return found
        return (found * self.region_BDHW.to(found.dtype)).flatten(1).sum(1) / self.positions_B

    def take(self, rows: Tensor | Sequence[int]) -> "Score":
        """The same score for a batch made of these samples, each as often as it is named."""
        index = torch.as_tensor(rows, device=self.chosen_B.device)
        region_BDHW = None if self.region_BDHW is None else self.region_BDHW[index]
        return Score(self.chosen_B[index], region_BDHW, self.exclusive)

    @property
    def positions_B(self) -> Tensor:
        """Positions that are summed, at least 1; 1 for a classifier."""
        if self.region_BDHW is None:
            return torch.ones_like(self.chosen_B)
        return self.region_BDHW.flatten(1).sum(1).clamp(min=1)


def make_score(
    logits: Tensor, target: Target = None, region_BDHW: Tensor | None = None, *, exclusive: bool = True
) -> Score:
    """Fix class and region by the logits of the image as it is; the score then also holds for changed images.

    Classification, logits (B, K): the logit of the target class. Segmentation, logits (B, K, *space): the sum of the
    target class's logits over a region, by default where that class is predicted (Vinogradova et al. 2020); nothing is
    predicted, nothing is explained: the score is 0 and so is every map. A network with a single logit has two
    classes: the score of class 1 is the logit, that of class 0 its negative.

    Args:
        target: class index for all samples, one per sample, or None for the predicted class (classification only).
        region_BDHW: bool mask that replaces the predicted region.
        exclusive: whether the classes exclude each other; labels of one image need not (classification with one logit
            per label), and then the predicted class is the most probable label.

    Returns:
        The score, a function from logits to (B,).

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
        return Score(chosen, exclusive=exclusive)
    return Score(chosen, _region(logits, chosen, region_BDHW))


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
