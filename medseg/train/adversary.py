"""Site-adversarial training: features from which a second head cannot tell where a case comes from."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.data.cache import Example
from medseg.files import UserError
from medseg.models.features import features_and_logits
from medseg.plan import Plan

_HIDDEN = 64


class SiteAdversary(nn.Module):
    """Names each case's site from the network's features, whose gradient comes back reversed (Ganin et al. 2016,
    JMLR 17:59).

    Sites are told apart within each class and count the same there: a disease that is commoner at one site is no reason
    to unlearn the disease. Classes that only one site has do not count.

    Args:
        features: length of the network's feature vector.
        sites, targets: name and class of each training case; an empty name does not count.
        weight: of the reversed gradient, at the end of training.

    Raises:
        UserError: no class is found at two sites.
    """

    def __init__(self, features: int, sites: Sequence[str], targets: Sequence[Any], weight: float) -> None:
        super().__init__()
        names = sorted({site for site in sites if site})
        share_N = torch.tensor(balance(sites, targets))
        if not share_N.any():
            raise UserError(
                f"train.site_adversary {weight}: no class of the training cases is found at two sites "
                f"({', '.join(names) or 'none is named'}); set it to 0, or ingest cases of another site."
            )
        self.weight = weight
        self.head = nn.Sequential(nn.Linear(features, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, len(names)))
        self.register_buffer("share_N", share_N)
        self.register_buffer("site_N", torch.tensor([names.index(site) if site else 0 for site in sites]))

    def forward(self, features_BF: Tensor, case_B: Tensor, progress: float) -> Tensor:
        """Scalar loss of the head.

        Args:
            case_B: which training cases these are. progress: finished share of the training; the weight rises with it
                from 0, so that the features are not shaken before they mean anything.
        """
        strength = self.weight * (2 / (1 + math.exp(-10 * progress)) - 1)
        reversed_BF: Tensor = _Reversed.apply(features_BF.float(), strength)  # type: ignore[no-untyped-call]
        losses = functional.cross_entropy(self.head(reversed_BF), self.get_buffer("site_N")[case_B], reduction="none")
        return (losses * self.get_buffer("share_N")[case_B]).mean()


def make_adversary(net: nn.Module, examples: Sequence[Example], plan: Plan, weight: float) -> SiteAdversary:
    """The adversary of a classifier and its training cases, on the network's device."""
    device = next(net.parameters()).device
    image = torch.zeros(1, examples[0].image.shape[0], *plan.patch_size, device=device)
    net.eval()
    with torch.inference_mode():
        features_BF, _ = features_and_logits(net, image)
    sites, targets = [example.case.site for example in examples], [example.target for example in examples]
    return SiteAdversary(features_BF.shape[1], sites, targets, weight).to(device)


def balance(sites: Sequence[str], targets: Sequence[Any]) -> list[float]:
    """Weight of each case, 1 on average: within each class all sites weigh the same; 0 where a class has one site."""
    groups = Counter((site, target) for site, target in zip(sites, targets, strict=True) if site)
    sites_of = Counter(target for _, target in groups)
    raw = [
        1 / groups[site, target] if site and sites_of[target] > 1 else 0.0
        for site, target in zip(sites, targets, strict=True)
    ]
    total = sum(raw)
    return [len(raw) * value / total if total else 0.0 for value in raw]


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient is multiplied by minus `strength`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None
