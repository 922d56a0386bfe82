"""Validation inside the loop: on the network's grid, for curves and selection. Test figures come from `evaluate`."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medseg.data.batches import annotated_classes
from medseg.data.cache import Example, release
from medseg.metrics import roc_auc
from medseg.models.sliding import window_logits
from medseg.plan import Plan


def validate(
    net: nn.Module,
    loss: nn.Module,
    examples: Sequence[Example],
    plan: Plan,
    labels: Mapping[str, int],
    *,
    device: torch.device,
    bf16: bool,
) -> dict[str, float]:
    """Loss and score of `net` on whole cases.

    Returns:
        `val_loss`, `val_score` (mean foreground Dice over classes, or the area under the ROC curve; with more than
        two classes the accuracy; with labels that are not exclusive the mean of their areas), and per class
        `val_dice_<label>` or per such label `val_auc_<label>`.
    """
    net.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if examples[0].label is None:
            return _classification(net, loss, examples, labels, device)
        return _segmentation(net, loss, examples, plan, labels, device)


def _segmentation(
    net: nn.Module,
    loss: nn.Module,
    examples: Sequence[Example],
    plan: Plan,
    labels: Mapping[str, int],
    device: torch.device,
) -> dict[str, float]:
    losses: list[float] = []
    scores: dict[str, list[float]] = {name: [] for name in labels}
    for example in examples:
        image = torch.from_numpy(np.array(example.image))[None].to(device)
        label = torch.from_numpy(np.array(example.label).astype(np.int64))[None, None].to(device)
        release(example.image)
        logits = window_logits(net, image, plan.patch_size, overlap=0.25)
        known = annotated_classes([example])
        losses.append(float(loss(logits, label) if known is None else loss(logits, label, known.to(device))))
        pred = logits.argmax(1, keepdim=True)
        for name, value in labels.items():
            if example.annotated and not example.annotated[value]:
                continue
            inside, truth = pred == value, label == value
            if size := int(inside.sum() + truth.sum()):
                scores[name].append(2 * int((inside & truth).sum()) / size)
    dice = {f"val_dice_{name}": float(np.mean(found)) for name, found in scores.items() if found}
    mean = float(np.mean(list(dice.values()))) if dice else 0.0
    return {"val_loss": float(np.mean(losses)), "val_score": mean, **dice}


def _classification(
    net: nn.Module, loss: nn.Module, examples: Sequence[Example], labels: Mapping[str, int], device: torch.device
) -> dict[str, float]:
    logits_list = []
    for start in range(0, len(examples), 16):
        images = np.stack([example.image for example in examples[start : start + 16]])
        logits_list.append(net(torch.from_numpy(images).to(device)).float())
    logits = torch.cat(logits_list)
    target = torch.tensor([example.target for example in examples], device=device)
    figures = {"val_loss": float(loss(logits, target))}
    truth = target.cpu().numpy()
    if truth.ndim == 2:
        return figures | _label_areas(truth, logits.cpu().numpy(), labels)
    probs = logits.softmax(1).cpu().numpy()
    if probs.shape[1] == 2 and len(set(truth.tolist())) == 2:
        figures["val_auc"] = float(roc_auc(truth, probs[:, 1]))
        return figures | {"val_score": figures["val_auc"]}
    return figures | {"val_score": float((probs.argmax(1) == truth).mean())}


def _label_areas(
    truth_NK: NDArray[np.int64], score_NK: NDArray[np.float32], labels: Mapping[str, int]
) -> dict[str, float]:
    """The area under the ROC curve of each label that some cases have and some have not, and their mean."""
    areas = {
        f"val_auc_{name}": float(roc_auc(truth_NK[:, k], score_NK[:, k]))
        for name, k in labels.items()
        if 0 < truth_NK[:, k].sum() < len(truth_NK)
    }
    mean = float(np.mean(list(areas.values()))) if areas else 0.0
    return {"val_auc": mean, "val_score": mean, **areas}
