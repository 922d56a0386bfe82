"""Losses by name. `LOSSES` is the one registry: each builder takes its config, the training targets' counts and the
number of training cases."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from monai.losses import DiceLoss
from monai.networks import one_hot
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


class Heads(NamedTuple):
    """What a deeply supervised network puts out in training; in evaluation it puts out the logits of the first alone.

    Attributes:
        logits: of each head, of the target's size. weights: with which their losses count.
    """

    logits: tuple[Tensor, ...]
    weights: tuple[float, ...]


def losses_of(loss: nn.Module, output: Any, *targets: Tensor) -> dict[str, Tensor]:
    """`loss`, the sum that is minimised; beside it `<name>_loss` of each that the network itself brings."""
    if not isinstance(output, WithLosses):
        return {"loss": loss(output, *targets)}
    own = {f"{name}_loss": value for name, value in output.losses.items()}
    return {"loss": loss(output.logits, *targets) + sum(own.values()), **own}


class DiceCELoss(nn.Module):
    """Soft Dice over the foreground classes, summed over the batch (Drozdzal et al. 2016), plus cross-entropy.

    Batch-wise sums keep the Dice term defined where a patch lacks a class.

    Where a label does not tell of all classes, its background holds the others. The cross-entropy is then that of the
    marginal probabilities (Shi et al. 2021, arXiv:2007.03868): the background's is the sum of its own and of those of
    the classes not annotated. The Dice of a class sums over the cases that annotate it, and is left out of the mean
    when no case of the batch does.
    """

    def __init__(self, dice_weight: float, ce_weight: float) -> None:
        super().__init__()
        self.dice_weight, self.ce_weight = dice_weight, ce_weight
        self.dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
        self.dice_of_each = DiceLoss(include_background=False, batch=True, reduction="none")

    def forward(self, logits_BKDHW: Tensor, label_B1DHW: Tensor, annotated_BK: Tensor | None = None) -> Tensor:
        """Scalar loss; `label` holds integers 0..K-1, `annotated` says of which classes each tells (None: of all)."""
        logits = logits_BKDHW.float()
        if annotated_BK is None:
            dice: Tensor = self.dice(logits, label_B1DHW)
        else:
            dice = self._dice_of_annotated(logits, label_B1DHW, annotated_BK)
            logits = marginal_logits(logits, annotated_BK)
        cross_entropy = functional.cross_entropy(logits, label_B1DHW[:, 0].long())
        return self.ce_weight * cross_entropy + self.dice_weight * dice

    def _dice_of_annotated(self, logits_BKDHW: Tensor, label_B1DHW: Tensor, annotated_BK: Tensor) -> Tensor:
        known = _per_voxel(annotated_BK, logits_BKDHW)
        truth = one_hot(label_B1DHW, logits_BKDHW.shape[1])
        of_each: Tensor = self.dice_of_each(logits_BKDHW.softmax(1) * known, truth * known).flatten()
        counted = annotated_BK[:, 1:].any(0)
        return (of_each * counted).sum() / counted.sum().clamp(min=1)


def marginal_logits(logits_BKDHW: Tensor, annotated_BK: Tensor) -> Tensor:
    """Logits whose softmax is that of the input with the classes not annotated added to the background.

    Args:
        annotated_BK: bool, background first; that of the background is taken to be True.

    Returns:
        (B, K, D, H, W); -inf for the classes not annotated.
    """
    known = _per_voxel(annotated_BK, logits_BKDHW)
    merged = ~known
    merged[:, 0] = True
    background = logits_BKDHW.masked_fill(~merged, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([background, logits_BKDHW.masked_fill(~known, -math.inf)[:, 1:]], dim=1)


def _per_voxel(of_class_BK: Tensor, like_BKDHW: Tensor) -> Tensor:
    return of_class_BK.reshape(*of_class_BK.shape, *[1] * (like_BKDHW.ndim - 2))


class HeadMean(nn.Module):
    """The loss of one tensor, or its mean over the heads of a deeply supervised network, weighted as these say.

    Zhou et al. 2020 (arXiv:1912.05074) add the heads' losses with weights of 1; the mean is that sum over the number
    of heads, so that learning rate and clipping mean the same with and without deep supervision.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self, logits: Tensor | Mapping[int, Tensor] | Heads, target: Tensor, annotated_BK: Tensor | None = None
    ) -> Tensor:
        """Scalar loss; a mapping goes from level to logits of the target's size, which count alike."""
        if isinstance(logits, Tensor):
            alone: Tensor = self.loss(logits, target, annotated_BK)
            return alone
        heads = logits if isinstance(logits, Heads) else Heads(tuple(logits.values()), (1.0,) * len(logits))
        losses = [w * self.loss(head, target, annotated_BK) for head, w in zip(*heads, strict=True)]
        return torch.stack(losses).sum() / sum(heads.weights)


class ClassificationLoss(nn.Module):
    """Cross-entropy over classes with optional class weights."""

    def __init__(self, weight_K: Tensor | None, label_smoothing: float) -> None:
        super().__init__()
        self.register_buffer("weight_K", weight_K)
        self.label_smoothing = label_smoothing

    def forward(self, logits_BK: Tensor, target: Tensor) -> Tensor:
        """Scalar loss, the mean over the cases, weighted; `target` holds class indices (B,) or shares (B, K)."""
        weight = self.get_buffer("weight_K") if self.weight_K is not None else None
        logits, smoothing = logits_BK.float(), self.label_smoothing
        if target.ndim == 1:
            return functional.cross_entropy(logits, target.long(), weight, label_smoothing=smoothing)
        total = functional.cross_entropy(logits, target, weight, label_smoothing=smoothing, reduction="sum")
        return total / (target if weight is None else target * weight).sum()


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


def guessing_loss(config: LossConfig, class_counts: Sequence[int], cases: int) -> float | None:
    """The loss of a classifier that looks at no image and says for each the share of every class, weighted as the loss
    weighs them; None for segmentation. Without label smoothing no constant answer has a smaller one."""
    if isinstance(config, DiceCEConfig):
        return None
    loss, counts = build_loss(config, class_counts, cases), torch.tensor(class_counts, dtype=torch.float32)
    if isinstance(loss, MultiLabelLoss):
        weight = loss.get_buffer("pos_weight_K") if loss.pos_weight_K is not None else torch.ones_like(counts)
        odds_K = weight * counts / (cases - counts)
        present_NK = torch.arange(cases)[:, None] < counts
        return float(loss(odds_K.log().expand(cases, -1), present_NK))
    weight = loss.get_buffer("weight_K") if loss.weight_K is not None else torch.ones_like(counts)
    targets_N = torch.repeat_interleave(torch.arange(len(counts)), counts.long())
    return float(loss((weight * counts).log().expand(len(targets_N), -1), targets_N))
