"""Losses by name. `LOSSES` is the one registry: each builder takes its config, the training targets' counts and the
number of training cases."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from monai.losses import DiceLoss
from torch import Tensor, nn
from torch.nn import functional

from medseg.config import BinaryCrossEntropyConfig, CrossEntropyConfig, DiceCEConfig, LossConfig


class WithLosses(NamedTuple):
    """What a network that brings losses of its own puts out in training; in evaluation it puts out the logits alone.

    Attributes:
        logits: as any network's.
        losses: by name, scalar and weighted, to be added to the loss of the logits.
    """

    logits: Tensor
    losses: Mapping[str, Tensor]


def losses_of(loss: nn.Module, output: Any, target: Tensor) -> dict[str, Tensor]:
    """`loss`, the sum that is minimised; beside it `<name>_loss` of each that the network itself brings."""
    if not isinstance(output, WithLosses):
        return {"loss": loss(output, target)}
    own = {f"{name}_loss": value for name, value in output.losses.items()}
    return {"loss": loss(output.logits, target) + sum(own.values()), **own}


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


class MultiLabelLoss(nn.Module):
    """Binary cross-entropy, mean over cases and labels, with optional weights of the present labels."""

    def __init__(self, pos_weight_K: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("pos_weight_K", pos_weight_K)

    def forward(self, logits_BK: Tensor, target_BK: Tensor) -> Tensor:
        """Scalar loss; `target` is 1 where a label is present, else 0."""
        weight = self.get_buffer("pos_weight_K") if self.pos_weight_K is not None else None
        return functional.binary_cross_entropy_with_logits(logits_BK.float(), target_BK.float(), pos_weight=weight)


def build_dice_ce(config: DiceCEConfig, class_counts: Sequence[int], cases: int) -> nn.Module:
    """Soft Dice + cross-entropy for segmentation."""
    return HeadMean(DiceCELoss(config.dice_weight, config.ce_weight))


def build_cross_entropy(config: CrossEntropyConfig, class_counts: Sequence[int], cases: int) -> nn.Module:
    """Cross-entropy; with `balance`, class weight = cases / (classes * cases of the class)."""
    weight = None
    if config.balance:
        counts = torch.tensor(class_counts, dtype=torch.float32).clamp(min=1)
        weight = counts.sum() / (len(counts) * counts)
    return ClassificationLoss(weight, config.label_smoothing)


def build_binary_cross_entropy(config: BinaryCrossEntropyConfig, class_counts: Sequence[int], cases: int) -> nn.Module:
    """Binary cross-entropy; with `balance`, weight of a present label = cases without it / cases with it."""
    weight = None
    if config.balance:
        counts = torch.tensor(class_counts, dtype=torch.float32)
        weight = (cases - counts) / counts.clamp(min=1)
    return MultiLabelLoss(weight)


LOSSES: dict[str, Callable[[Any, Sequence[int], int], nn.Module]] = {
    "dice_ce": build_dice_ce,
    "cross_entropy": build_cross_entropy,
    "binary_cross_entropy": build_binary_cross_entropy,
}


def build_loss(config: LossConfig, class_counts: Sequence[int] = (), cases: int = 0) -> nn.Module:
    """Build the configured loss. `class_counts`: of the `cases` in the training split those with each class or label
    (classification)."""
    return LOSSES[config.name](config, class_counts, cases)
