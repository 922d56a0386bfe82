"""Take the most or the least relevant pixels away and watch the probability: deletion, insertion, ROAD.

Removing the least relevant first, read from its end, is inserting the most relevant first: one curve serves both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from medseg.data.grids import enlarged
from medseg.data.imputation import impute
from medseg.explain.checks import area, removal_rank
from medseg.explain.hooks import first_output, frozen
from medseg.explain.targets import Score

BLUR = 0.05
"""Standard deviation of the blurred baseline, as a share of each side of the image."""
_CPU_BATCH = 4


@dataclass(frozen=True)
class Probe:
    """A network, one image and what is asked of it; every figure below is of this image.

    Attributes:
        x_1CDHW: the image. score: of one sample. batch_size: of perturbed copies, at most; on a CPU four, since more do
            not fit its cache.
    """

    net: nn.Module
    x_1CDHW: Tensor
    score: Score
    batch_size: int = 16

    def probabilities(self, copies: Sequence[Tensor]) -> NDArray[np.float64]:
        """Probability of the class for perturbed copies of the image, each (C, *space)."""
        found, step = [], self.batch_size if self.x_1CDHW.is_cuda else min(self.batch_size, _CPU_BATCH)
        with frozen(self.net), torch.no_grad():
            for first in range(0, len(copies), step):
                part = torch.stack(list(copies[first : first + step]))
                logits = first_output(self.net(part))
                found.append(self.score.take([0] * len(part)).probability(logits).double().cpu())
        return torch.cat(found).numpy()


def deletion_insertion(
    probe: Probe, values: NDArray[np.floating], coarse: tuple[int, ...], *, steps: int, random_maps: int, seed: int = 0
) -> dict[str, float]:
    """Areas under the curves of Petsiuk et al. 2018 (RISE), against maps of noise, over two baselines.

    Removed pixels take the value of the blurred image or of the channel's mean; the figures are means over both.
    Noise of `coarse` cells is enlarged as a map of that size would be: single random pixels would be easier to beat,
    because a network resists salt and pepper less than holes.

    Returns:
        `deletion_auc`, `insertion_auc`, `random_auc`: mean probability along the curves, 0 to 1; `deletion` (random
        minus deletion) and `insertion` (insertion minus random): positive is better than chance.
    """
    x = probe.x_1CDHW[0]
    space = tuple(x.shape[1:])
    noise = np.random.default_rng(seed).random((random_maps, *coarse))
    chance = enlarged(torch.from_numpy(noise)[:, None], space)[:, 0].numpy()
    # most relevant first, least relevant first, and noise
    orders = [values, -values, *chance]
    ranks = [torch.from_numpy(removal_rank(order, seed)).to(x.device) for order in orders]
    shares = np.arange(1, steps) / steps
    fillings = _baselines(probe.x_1CDHW)
    copies = [x, *fillings]
    copies += [_removed(x, filling, rank, share) for filling in fillings for rank in ranks for share in shares]
    probs = probe.probabilities(copies)
    ends = probs[1 : 1 + len(fillings)]
    inner = probs[1 + len(fillings) :].reshape(len(fillings), len(ranks), len(shares))
    areas = np.array(
        [[area(np.array([probs[0], *curve, end])) for curve in curves] for curves, end in zip(inner, ends, strict=True)]
    ).mean(axis=0)
    deleted, inserted, random = float(areas[0]), float(areas[1]), float(areas[2:].mean())
    return {
        "deletion": random - deleted,
        "insertion": inserted - random,
        "deletion_auc": deleted,
        "insertion_auc": inserted,
        "random_auc": random,
    }


def road(probe: Probe, values: NDArray[np.floating], *, steps: int, seed: int = 0) -> dict[str, float]:
    """ROAD (Rong et al. 2022): pixels are removed by noisy linear imputation, so that holes do not show.

    Returns:
        `road`: mean over the shares 1/steps to 1 - 1/steps of (LeRF - MoRF) / 2; `morf`, `lerf`: mean probability
        after the most, or the least, relevant pixels were removed.
    """
    x = probe.x_1CDHW[0]
    shares = np.arange(1, steps) / steps
    ranks = [torch.from_numpy(removal_rank(order, seed)).to(x.device) for order in (values, -values)]
    missing = torch.stack([rank < share * rank.numel() for rank in ranks for share in shares])
    copies = [
        copy
        for part in torch.split(missing, probe.batch_size)
        for copy in impute(x[None].expand(len(part), *x.shape), part, seed=seed)
    ]
    probs = probe.probabilities(copies)
    morf, lerf = (float(part.mean()) for part in probs.reshape(2, -1))
    return {"road": (lerf - morf) / 2, "morf": morf, "lerf": lerf}


def _baselines(x_1CDHW: Tensor) -> list[Tensor]:
    """(C, *space) each: blurred, and at the mean of every channel."""
    x = x_1CDHW[0]
    sigma = [0.0, *(BLUR * n for n in x.shape[1:])]
    blurred = ndimage.gaussian_filter(x.detach().cpu().numpy(), sigma, mode="nearest")
    mean = x.flatten(1).mean(1).view(-1, *[1] * (x.ndim - 1)).expand_as(x)
    return [torch.from_numpy(blurred).to(x), mean]


def _removed(x: Tensor, filling: Tensor, rank: Tensor, share: float) -> Tensor:
    return torch.where(rank < share * rank.numel(), filling, x)
