"""Fitting the feature distance on the cases that the network was trained on, seen as prediction will see them."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medseg.config import PredictConfig
from medseg.data.cache import Example, release
from medseg.data.preprocess import normalised_limit
from medseg.feature_distance import CohortDistance, fit_distance
from medseg.models.features import mean_features
from medseg.models.precision import autocast
from medseg.models.sliding import averaged, class_logits, cut_window, even_windows, fast_batch, window_starts
from medseg.plan import Plan
from medseg.progress import tracked


def fit_cohort_distance(
    net: nn.Module,
    train: Sequence[Example],
    held_out: Sequence[Example],
    plan: Plan,
    config: PredictConfig,
    device: torch.device,
    *,
    most_cases: int,
) -> CohortDistance | None:
    """Fit the distance from the training cases, and measure cases that the network has not seen.

    Args:
        net: its weights are those that will be saved.
        most_cases: of either kind; more are thinned out evenly.

    Returns:
        None with too few training cases.
    """
    net.eval()
    chosen, unseen = _spread(train, most_cases), _spread(held_out, most_cases)
    examples = tracked([*chosen, *unseen], "Measuring the cohort's features", len(chosen) + len(unseen))
    seen = [_case_features(net, example, plan, config, device) for example in examples]
    telling = [features for features in seen[: len(chosen)] if features is not None]
    fitted = fit_distance(telling, [features for features in seen[len(chosen) :] if features is not None])
    return CohortDistance((fitted,)) if fitted is not None else None


@torch.inference_mode()
def _case_features(
    net: nn.Module, example: Example, plan: Plan, config: PredictConfig, device: torch.device
) -> NDArray[np.float64] | None:
    """(F) the features of one case; None where it is even throughout."""
    image = torch.from_numpy(np.array(example.image))
    release(example.image)
    classifies = example.label is None
    computing = autocast(config.precision, device, one_image=classifies)
    with mean_features(net, classifies=classifies) as (features,), computing:
        if classifies:
            class_logits(net, image[None].to(device), config.mirror_axes)
            return features.mean()
        predict = averaged([net], config.mirror_axes)
        starts = [window_starts(n, p, config.overlap) for n, p in zip(image.shape[1:], plan.patch_size, strict=True)]
        even = even_windows(image, starts, plan.patch_size, normalised_limit(config.air_below, plan)).values
        indices = [index for index in product(*[range(len(firsts)) for firsts in starts]) if index not in even]
        step = fast_batch(plan.patch_size, device)
        for at in range(0, len(indices), step):
            places = [[firsts[j] for firsts, j in zip(starts, i, strict=True)] for i in indices[at : at + step]]
            predict(torch.stack([cut_window(image, place, plan.patch_size, device) for place in places]))
        return features.mean()


def _spread(examples: Sequence[Example], most: int) -> list[Example]:
    if len(examples) <= most:
        return list(examples)
    return [examples[i] for i in np.linspace(0, len(examples) - 1, most).round().astype(int)]
