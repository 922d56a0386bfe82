"""Score-CAM (Wang et al. 2020): each channel weighs what the score becomes when only what it shows is left."""

import torch
from torch import Tensor, nn

from medseg.config import MethodConfig
from medseg.data.grids import enlarged
from medseg.explain.gradients import placed
from medseg.explain.hooks import captured, first_output
from medseg.explain.targets import Score


def explain_by_scorecam(net: nn.Module, x_BCDHW: Tensor, score: Score, layer: str, config: MethodConfig) -> Tensor:
    """ReLU(sum_k w_k A_k), w = softmax_k of the score of x * norm01(up(A_k)) (section 3 of the paper).

    The softmax is over channels and of logits, not of probabilities; the score of the baseline, which the paper
    subtracts, cancels in it. For segmentation the score is the mean over the region, since the softmax of sums over
    thousands of voxels would always pick one channel.

    Only the `config.score_channels` channels with the largest variance over positions take part. A constant channel
    has no place to tell of and never does; a map of which all channels are constant is 0.
    """
    with torch.no_grad(), captured(net, layer) as activation:
        net(x_BCDHW.clone())
    A_BCDHW = placed(activation.value, x_BCDHW, layer)
    with torch.no_grad():
        maps = [_of_one(net, x_BCDHW, score, A_BCDHW, b, config) for b in range(len(x_BCDHW))]
    return torch.stack(maps)


def _of_one(net: nn.Module, x_BCDHW: Tensor, score: Score, A_BCDHW: Tensor, row: int, config: MethodConfig) -> Tensor:
    A_CDHW = A_BCDHW[row]
    spread = A_CDHW.flatten(1).var(1, unbiased=False)
    spread = torch.where(A_CDHW.flatten(1).amax(1) > A_CDHW.flatten(1).amin(1), spread, torch.zeros_like(spread))
    kept = spread.argsort(descending=True, stable=True)[: config.score_channels]
    kept = kept[spread[kept] > 0]
    if not len(kept):
        return torch.zeros_like(A_CDHW[0])
    scores = []
    for part in torch.split(kept, config.batch_size):
        mask = enlarged(A_CDHW[part][:, None], tuple(x_BCDHW.shape[2:]))
        axes = tuple(range(2, mask.ndim))
        low = mask.amin(axes, keepdim=True)
        mask = (mask - low) / (mask.amax(axes, keepdim=True) - low).clamp(min=torch.finfo(mask.dtype).tiny)
        copies = score.take([row] * len(part))
        scores.append(copies(first_output(net(x_BCDHW[row : row + 1] * mask))) / copies.positions_B)
    weights = torch.cat(scores).softmax(0)
    return torch.einsum("k,k...->...", weights, A_CDHW[kept]).relu()
