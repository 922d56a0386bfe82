"""Validation inside the loop: on the network's grid, for curves and selection. Test figures come from `evaluate`."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

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
        two classes the accuracy), and per class `val_dice_<label>`.
    """
    net.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if examples[0].label is None:
            return _classification(net, loss, examples, device)
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
        losses.append(float(loss(logits, label)))
        pred = logits.argmax(1, keepdim=True)
        for name, value in labels.items():
            inside, truth = pred == value, label == value
            if size := int(inside.sum() + truth.sum()):
                scores[name].append(2 * int((inside & truth).sum()) / size)
    dice = {f"val_dice_{name}": float(np.mean(found)) for name, found in scores.items() if found}
    mean = float(np.mean(list(dice.values()))) if dice else 0.0
    return {"val_loss": float(np.mean(losses)), "val_score": mean, **dice}


def _classification(
    net: nn.Module, loss: nn.Module, examples: Sequence[Example], device: torch.device
) -> dict[str, float]:
    logits_list = []
    for start in range(0, len(examples), 16):
        images = np.stack([example.image for example in examples[start : start + 16]])
        logits_list.append(net(torch.from_numpy(images).to(device)).float())
    logits = torch.cat(logits_list)
    target = torch.tensor([example.target for example in examples], device=device)
    figures = {"val_loss": float(loss(logits, target))}
    probs = logits.softmax(1).cpu().numpy()
    truth = target.cpu().numpy()
    if probs.shape[1] == 2 and len(set(truth.tolist())) == 2:
        figures["val_auc"] = float(roc_auc(truth, probs[:, 1]))
        return figures | {"val_score": figures["val_auc"]}
    return figures | {"val_score": float((probs.argmax(1) == truth).mean())}
