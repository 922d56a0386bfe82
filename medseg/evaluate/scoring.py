"""A classifier's logits for many images, prepared and run as `predict` does."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medseg.cohort import Case, Cohort
from medseg.data.lung_view import LungView
from medseg.data.preprocess import prepare
from medseg.images import read_image
from medseg.models.sliding import class_logits
from medseg.plan import Plan
from medseg.progress import progress
from medseg.volume import Volume

_BATCH = 16
_READERS = 2

Change = Callable[[int, Volume], Volume]  # position of the case, its image; the image as the network shall see it


class Scorer:
    """Runs one network over cases of a cohort, changed on the way if asked.

    Args:
        net: x_BC[D]HW -> logits_BK, in evaluation mode on its device.
        plan: the grid and normalisation of the network.
        lungs: what the network sees of a radiograph; by default all.
        mirror_axes: logits are averaged over flips along them.
    """

    def __init__(
        self, net: nn.Module, plan: Plan, lungs: LungView | None = None, mirror_axes: Sequence[int] = ()
    ) -> None:
        self.net, self.plan, self.lungs, self.mirror_axes = net.eval(), plan, lungs, mirror_axes
        first = next(net.parameters(), None)
        self.device = first.device if first is not None else torch.device("cpu")

    def score(
        self,
        cohort: Cohort,
        cases: Sequence[Case],
        change: Change | None = None,
        *,
        lungs_before: bool = False,
        what: str = "Scoring",
    ) -> NDArray[np.float64]:
        """Logits (n, K) of the cases.

        Args:
            change: applied to every channel before anything else.
            lungs_before: the lung fields are those of the image before the change, not after it.
            what: named by the progress bar.

        Raises:
            UserError: an image is missing or damaged.
            ValueError: the network gives logits that are not finite.
        """

        def ready(item: tuple[int, Case]) -> NDArray[np.float32]:
            number, case = item
            channels: Sequence[Volume] = [read_image(path) for path in cohort.image_paths(case)]
            like = channels[0] if lungs_before else None
            if change is not None:
                channels = [change(number, channel) for channel in channels]
            if self.lungs is not None:
                channels = self.lungs.show(channels, cohort.label_path(case), like=like)
            return prepare(channels, self.plan).image

        found: list[NDArray[np.float64]] = []
        with ThreadPoolExecutor(_READERS) as pool, progress(what, len(cases)) as shown:
            for batch in _batches(_ahead(pool, ready, list(enumerate(cases)))):
                found.append(self.logits(batch))
                shown.advance(len(batch))
        return np.concatenate(found)

    @torch.inference_mode()
    def logits(self, images: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        """Logits (n, K) of prepared images (channel, *space) of one shape."""
        given = torch.from_numpy(np.stack(images)).to(self.device)
        logits = class_logits(self.net, given, self.mirror_axes).double().cpu().numpy()
        if not np.isfinite(logits).all():
            raise ValueError("the network's logits are not finite; its weights or the image are damaged")
        return np.asarray(logits)


def _ahead(
    pool: ThreadPoolExecutor, ready: Callable[[tuple[int, Case]], NDArray[np.float32]], items: list[tuple[int, Case]]
) -> Iterator[NDArray[np.float32]]:
    """Prepared images in order, at most two batches ahead of the network."""
    waiting = iter(items)
    futures = [pool.submit(ready, item) for item in islice(waiting, 2 * _BATCH)]
    while futures:
        image = futures.pop(0).result()
        futures += [pool.submit(ready, item) for item in islice(waiting, 1)]
        yield image


def _batches(images: Iterable[NDArray[np.float32]]) -> Iterator[list[NDArray[np.float32]]]:
    """Runs of images of one shape, at most sixteen."""
    batch: list[NDArray[np.float32]] = []
    for image in images:
        if batch and (len(batch) == _BATCH or image.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch
