"""Calibrating a fold's probabilities on the cases that it has not seen."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn

from medseg.confidence import calibration_error, fit_temperature
from medseg.data.cache import Example
from medseg.models.sliding import window_logits
from medseg.plan import Plan

VOXELS_PER_CASE = 2000
_MARGIN = 3  # voxels round what is labelled or predicted; farther off, all networks are sure and right


def calibrate_voxels(
    net: nn.Module, examples: Sequence[Example], plan: Plan, device: torch.device, *, seed: int = 0
) -> dict[str, float]:
    """Fit one temperature on voxels in and near the structures, equally many from each case.

    Where a label does not tell of all structures, the probabilities of the others count as background.

    Args:
        net: segments; its weights are those that will be saved. examples: cases it has not seen, with labels.

    Returns:
        `temperature`, fitted on all cases; `ece_before` and `ece_after`, the calibration error of the called class,
        the latter with a temperature that was fitted on the other half of the cases; `voxels`.
    """
    logits_list, labels, told, halves = [], [], [], []
    rng = np.random.default_rng(seed)
    net.eval()
    for number, example in enumerate(examples):
        z, y = _sample(net, example, plan, device, rng)
        logits_list.append(z)
        labels.append(y)
        told.append(np.tile(example.annotated or (True,) * z.shape[1], (len(y), 1)))
        halves.append(np.full(len(y), number % 2))
    z, y, half = np.concatenate(logits_list), np.concatenate(labels), np.concatenate(halves)
    known = np.concatenate(told)
    after = []
    for side in (0, 1):
        here = half == side
        if here.any() and (~here).any():
            fitted = fit_temperature(z[~here], y[~here], known[~here])
            after.append(calibration_error(z[here], y[here], fitted, annotated=known[here]))
    found = {"temperature": fit_temperature(z, y, known), "ece_before": calibration_error(z, y, annotated=known)}
    found["voxels"] = float(len(y))
    return found | ({"ece_after": float(np.mean(after))} if after else {})


def _sample(
    net: nn.Module, example: Example, plan: Plan, device: torch.device, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Logits (n, classes) and labels (n,) of voxels drawn near the structures of one case."""
    image = torch.from_numpy(np.array(example.image))[None].to(device)
    logits_KDHW = window_logits(net, image, plan.patch_size, overlap=0.25)[0].float().cpu().numpy()
    label = np.asarray(example.label).astype(np.int64)
    structure = ndimage.generate_binary_structure(label.ndim, 1)
    near = ndimage.binary_dilation((label > 0) | (logits_KDHW.argmax(0) > 0), structure, iterations=_MARGIN)
    places = np.flatnonzero(near if near.any() else np.ones_like(near))
    chosen = rng.choice(places, min(VOXELS_PER_CASE, len(places)), replace=False)
    flat = logits_KDHW.reshape(len(logits_KDHW), -1)
    return flat[:, chosen].T.astype(np.float64), label.reshape(-1)[chosen]
