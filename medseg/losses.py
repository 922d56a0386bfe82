"""Losses by name. `LOSSES` is the one registry: each builder takes its config and the training targets' counts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.losses import DiceLoss
from torch import Tensor, nn
from torch.nn import functional

from medseg.config import CrossEntropyConfig, DiceCEConfig, LossConfig


class DiceCELoss(nn.Module):
    """Soft Dice over the foreground classes, summed over the batch (Drozdzal et al. 2016), plus cross-entropy.

    Batch-wise sums keep the Dice term defined where a patch lacks a class.
    """

    def __init__(self, dice_weight: float, ce_weight: float) -> None:
        super().__init__()
        self.dice_weight, self.ce_weight = dice_weight, ce_weight
        self.dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)

    def forward(self, logits_BKDHW: Tensor, label_B1DHW: Tensor) -> Tensor:
        """Scalar loss; `label` holds integers 0..K-1."""
        logits = logits_BKDHW.float()
        cross_entropy = functional.cross_entropy(logits, label_B1DHW[:, 0].long())
        dice: Tensor = self.dice(logits, label_B1DHW)
        return self.ce_weight * cross_entropy + self.dice_weight * dice


class HeadMean(nn.Module):
    """The loss of one tensor, or its mean over the heads of a deeply supervised network.

    Zhou et al. 2020 (arXiv:1912.05074) add the heads' losses with weights of 1; the mean is that sum over the number
    of heads, so that learning rate and clipping mean the same with and without deep supervision.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor | Mapping[int, Tensor], target: Tensor) -> Tensor:
        """Scalar loss; a mapping goes from level to logits of the target's size."""
        heads = [logits] if isinstance(logits, Tensor) else list(logits.values())
        return torch.stack([self.loss(head, target) for head in heads]).mean()


class ClassificationLoss(nn.Module):
    """Cross-entropy over classes with optional class weights."""

    def __init__(self, weight_K: Tensor | None, label_smoothing: float) -> None:
        super().__init__()
        self.register_buffer("weight_K", weight_K)
        self.label_smoothing = label_smoothing

    def forward(self, logits_BK: Tensor, target_B: Tensor) -> Tensor:
        """Scalar loss; `target` holds class indices."""
        weight = self.get_buffer("weight_K") if self.weight_K is not None else None
        return functional.cross_entropy(
            logits_BK.float(), target_B.long(), weight, label_smoothing=self.label_smoothing
        )


def build_dice_ce(config: DiceCEConfig, class_counts: Sequence[int]) -> nn.Module:
    """Soft Dice + cross-entropy for segmentation."""
    return HeadMean(DiceCELoss(config.dice_weight, config.ce_weight))


def build_cross_entropy(config: CrossEntropyConfig, class_counts: Sequence[int]) -> nn.Module:
    """Cross-entropy; with `balance`, class weight = cases / (classes * cases of the class)."""
    weight = None
    if config.balance:
        counts = torch.tensor(class_counts, dtype=torch.float32).clamp(min=1)
        weight = counts.sum() / (len(counts) * counts)
    return ClassificationLoss(weight, config.label_smoothing)


LOSSES: dict[str, Callable[[Any, Sequence[int]], nn.Module]] = {
    "dice_ce": build_dice_ce,
    "cross_entropy": build_cross_entropy,
}


def build_loss(config: LossConfig, class_counts: Sequence[int] = ()) -> nn.Module:
    """Build the configured loss. `class_counts`: cases per class in the training split (classification)."""
    return LOSSES[config.name](config, class_counts)
