"""Mixup: pairs of images of a batch, and their targets, are mixed (Zhang et al. 2018, arXiv:1710.09412).

Shape legend: B batch, K classes or labels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Mixed:
    """What is mixed into one item.

    Attributes:
        partner: position in the batch of the other item; its own where nothing is mixed in. share: of the item's own.
    """

    partner: int
    share: float


def draw_mixing(alpha: float, batch_size: int, rng: np.random.Generator) -> tuple[Mixed, ...]:
    """One share for the batch, from Beta(alpha, alpha), and a partner for each of its items."""
    share = float(rng.beta(alpha, alpha))
    return tuple(Mixed(int(partner), share) for partner in rng.permutation(batch_size))


def mix(image_BCHW: Tensor, target: Tensor, classes: int, mixing: tuple[Mixed, ...]) -> tuple[Tensor, Tensor]:
    """Images and targets (B, K), float, each with its partner mixed in.

    Args:
        target: (B,) class indices, or (B, K) of which labels are present.
        classes: how many there are, where `target` holds indices.
    """
    target_BK = (functional.one_hot(target, classes) if target.ndim == 1 else target).float()
    partner_B = torch.tensor([item.partner for item in mixing], device=image_BCHW.device)
    share_B = torch.tensor([item.share for item in mixing], device=image_BCHW.device)
    mixed = image_BCHW[partner_B].lerp(image_BCHW, share_B.view(-1, *[1] * (image_BCHW.ndim - 1)))
    of_target = partner_B.to(target.device)
    return mixed, target_BK[of_target].lerp(target_BK, share_B.to(target.device)[:, None])
