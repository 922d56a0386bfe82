"""Batches: parameters are drawn first, as a pure function of (seed, step), then applied.

So a batch can be made again at any time from two integers, and a resumed run sees what the uninterrupted one would.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.config import AugmentConfig
from medseg.data.augment import AugmentParameters, augment, draw_augment
from medseg.data.cache import Example, release
from medseg.data.mixing import Mixed, draw_mixing, mix
from medseg.data.prior import PriorParameters, as_channels, draw_prior, make_up, without_background

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ItemParameters:
    """Which case, where its patch is centred (voxels), how it is augmented, which earlier segmentation it shows, and
    what is mixed into it."""

    index: int
    centre: tuple[int, ...]
    augment: AugmentParameters
    prior: PriorParameters | None = None
    mixed: Mixed | None = None


@dataclass(frozen=True)
class Batch:
    """image_BCDHW float32, with the channels of a prior for networks that take one; label_B1DHW (segmentation),
    target_B (classification) or target_BK (labels that are not exclusive, or mixed targets); annotated_BK bool, of
    which classes each label tells, background first, or None: all tell of all.
    """

    image: Tensor
    target: Tensor
    parameters: tuple[ItemParameters, ...]
    annotated: Tensor | None = None


class BatchSource:
    """Draws and makes training batches.

    Args:
        examples: the training cases.
        patch_size: voxels per axis of a patch.
        batch_size: items per batch.
        foreground_share: share of patches centred on a labelled voxel, of a class drawn among those of the case with
            odds of 1 / the number of cases that have it, so that what few cases have is not seen in few patches only.
        prior_classes: background and labels of the prior that the network takes; 0 for one that takes none.
        device: where batches are augmented, and lie then.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        patch_size: tuple[int, ...],
        batch_size: int,
        config: AugmentConfig,
        *,
        foreground_share: float,
        seed: int,
        prior_classes: int = 0,
        device: torch.device = _CPU,
    ) -> None:
        self.device = device
        self.examples, self.patch_size, self.batch_size = examples, patch_size, batch_size
        self.prior_classes = prior_classes
        self.config, self.foreground_share, self.seed = config, foreground_share, seed
        having = Counter(label for example in examples for label in _present(example))
        self._odds = {label: 1 / cases for label, cases in having.items()}
        self._classes = 1 + max((e.target for e in examples if isinstance(e.target, int)), default=-1)

    @property
    def steps_per_pass(self) -> int:
        """Steps in which every case is seen once."""
        return max(1, len(self.examples) // self.batch_size)

    def draw(self, step: int) -> tuple[ItemParameters, ...]:
        """The parameters of every item of batch `step` (0-based)."""
        chosen = [self._case_at(step * self.batch_size + item) for item in range(self.batch_size)]
        rng, prior_rng, mix_rng = (np.random.default_rng([self.seed, stream, step]) for stream in (1, 2, 3))
        draw = partial(draw_augment, self.config, len(self.patch_size), rng, batch_size=self.batch_size)
        mixing = draw_mixing(self.config.mixup, self.batch_size, mix_rng) if self.config.mixup else ()
        return tuple(
            ItemParameters(
                index,
                self._draw_centre(index, rng),
                draw(),
                draw_prior(self.config.prior, prior_rng) if self.prior_classes else None,
                mixed,
            )
            for index, mixed in zip_longest(chosen, mixing)
        )

    def make(self, parameters: tuple[ItemParameters, ...]) -> Batch:
        """Apply drawn parameters."""
        images, labels = [], []
        for item in parameters:
            example = self.examples[item.index]
            images.append(crop(example.image, item.centre, self.patch_size))
            release(example.image)
            if example.label is not None:
                own = crop(example.label[None], item.centre, self.patch_size)
                labels.append(own if item.prior is None else np.concatenate([own, self._prior(example, item, own)]))
                release(example.label)
        image = torch.from_numpy(np.stack(images)).to(self.device)
        label = torch.from_numpy(np.stack(labels).astype(np.float32)).to(self.device) if labels else None
        image, label = augment(image, label, [item.augment for item in parameters])
        if label is not None and self.prior_classes:
            image = torch.cat([image, as_channels(label[:, 1:], self.prior_classes)], 1)
            label = label[:, :1].contiguous()
        if label is None:
            label = torch.tensor([self.examples[item.index].target for item in parameters])
            if mixing := tuple(item.mixed for item in parameters if item.mixed is not None):
                image, label = mix(image, label, self._classes, mixing)
        return Batch(image, label, parameters, annotated_classes([self.examples[item.index] for item in parameters]))

    def stream(self, first_step: int, stop_step: int) -> Iterator[Batch]:
        """Batches of steps first..stop-1, made one ahead in a thread while the caller computes."""
        with ThreadPoolExecutor(1) as pool:
            ahead = [
                pool.submit(lambda s: self.make(self.draw(s)), s)
                for s in range(first_step, min(first_step + 2, stop_step))
            ]
            for step in range(first_step, stop_step):
                batch = ahead.pop(0).result()
                if step + 2 < stop_step:
                    ahead.append(pool.submit(lambda s: self.make(self.draw(s)), step + 2))
                yield batch

    def _prior(self, example: Example, item: ItemParameters, label: NDArray[np.generic]) -> NDArray[np.generic]:
        """(1, *patch) codes of what is known from before; `label` is the case's own on the patch, (1, *patch)."""
        assert item.prior is not None
        if not item.prior.shown:
            return np.zeros(label.shape, dtype=np.uint8)
        if example.prior is not None:
            codes = crop(example.prior[None], item.centre, self.patch_size)
            release(example.prior)
            return codes
        inside = crop(np.broadcast_to(np.uint16(1), (1, *example.image.shape[1:])), item.centre, self.patch_size)
        codes = label[0].astype(np.uint16) + inside[0]
        return make_up(without_background(codes) if example.annotated else codes, item.prior)[None]

    def _case_at(self, position: int) -> int:
        sweep, place = divmod(position, len(self.examples))
        return int(np.random.default_rng([self.seed, 0, sweep]).permutation(len(self.examples))[place])

    def _draw_centre(self, index: int, rng: np.random.Generator) -> tuple[int, ...]:
        example = self.examples[index]
        shape = example.image.shape[1:]
        present = _present(example)
        if present and rng.random() < self.foreground_share:
            odds = np.array([self._odds[label] for label in present])
            label = present[0] if len(present) == 1 else rng.choice(present, p=odds / odds.sum())
            points = example.points[label]
            centre = points[rng.integers(len(points))]
        else:
            centre = np.array([rng.integers(n) for n in shape])
        return tuple(_clamp(int(c), n, p) for c, n, p in zip(centre, shape, self.patch_size, strict=True))


def _present(example: Example) -> list[int]:
    """Places in `points` of the labels that this case has."""
    return [label for label, points in enumerate(example.points) if len(points)]


def annotated_classes(examples: Sequence[Example]) -> Tensor | None:
    """(B, K) bool, of which classes the label of each example tells, background first; None when all tell of all."""
    classes = max(len(example.annotated) for example in examples)
    if not classes:
        return None
    return torch.tensor([example.annotated or (True,) * classes for example in examples])


def crop(array: NDArray[np.generic], centre: tuple[int, ...], size: tuple[int, ...]) -> NDArray[np.generic]:
    """Cut (channel, *size) round `centre`; what lies outside the array is 0."""
    out = np.zeros((array.shape[0], *size), dtype=array.dtype)
    source, target = [slice(None)], [slice(None)]
    for c, n, p in zip(centre, array.shape[1:], size, strict=True):
        start = c - p // 2
        low = min(max(0, start), n)
        high = max(low, min(n, start + p))
        source.append(slice(low, high))
        target.append(slice(low - start, high - start))
    out[tuple(target)] = array[tuple(source)]
    return out


def _clamp(centre: int, length: int, patch: int) -> int:
    """Keep the patch inside the image where it fits, else centre the image in the patch."""
    if patch >= length:
        return length // 2
    return min(max(centre, patch // 2), length - patch + patch // 2)
