"""Occlusion (Zeiler and Fergus 2014): how much the score falls when a window of the image is covered."""

from itertools import product

import torch
from torch import Tensor, nn

from medseg.config import MethodConfig
from medseg.explain.hooks import first_output
from medseg.explain.targets import Score


def explain_by_occlusion(net: nn.Module, x_BCDHW: Tensor, score: Score, layer: str, config: MethodConfig) -> Tensor:
    """Mean over the windows that cover a position of S(x) - S(x with the window at the mean of its channel).

    Positive where the image speaks for the class; in units of the score, of the size of the image. The layer plays
    no part. Windows have `config.occlusion_window` of each side and a stride of half of that; the last one along an
    axis ends with the image. One forward pass per window, in batches of `config.batch_size`.
    """
    space = tuple(x_BCDHW.shape[2:])
    window = tuple(max(1, round(n * config.occlusion_window)) for n in space)
    stride = tuple((n + 1) // 2 for n in window)
    with torch.no_grad():
        maps = [
            occlude(net, x_BCDHW[b : b + 1], score.take([b]), window, stride, config.batch_size)
            for b in range(len(x_BCDHW))
        ]
    return torch.stack(maps)


def occlude(
    net: nn.Module, x_1CDHW: Tensor, score: Score, window: tuple[int, ...], stride: tuple[int, ...], batch_size: int
) -> Tensor:
    """The map (*space) of one image; `score` is that of one sample.

    Args:
        window, stride: in voxels, one per axis.
    """
    fill = x_1CDHW.flatten(2).mean(2).view(1, -1, *[1] * len(window))
    whole = score(first_output(net(x_1CDHW.clone())))[0]
    fall = torch.zeros(x_1CDHW.shape[2:], dtype=whole.dtype, device=x_1CDHW.device)
    count = torch.zeros_like(fall)
    places = list(product(*map(_starts, x_1CDHW.shape[2:], window, stride)))
    for first in range(0, len(places), batch_size):
        part = [
            tuple(slice(a, a + n) for a, n in zip(place, window, strict=True)) for place in places[first:][:batch_size]
        ]
        copies = x_1CDHW.repeat(len(part), *[1] * (x_1CDHW.ndim - 1))
        for copy, box in zip(copies, part, strict=True):
            copy[(slice(None), *box)] = fill[0]
        found = score.take([0] * len(part))(first_output(net(copies)))
        for value, box in zip(whole - found, part, strict=True):
            fall[box] += value
            count[box] += 1
    return fall / count


def _starts(size: int, window: int, stride: int) -> list[int]:
    """First voxels of windows that together cover an axis."""
    last = size - window
    return [*range(0, last, stride), last]
