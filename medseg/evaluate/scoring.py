"""A classifier's logits for many images, prepared and run as `predict` does."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medseg.cohort import Case, Cohort
from medseg.data.preprocess import prepare
from medseg.images import read_image
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
    """

    def __init__(self, net: nn.Module, plan: Plan) -> None:
        self.net, self.plan = net.eval(), plan
        first = next(net.parameters(), None)
        self.device = first.device if first is not None else torch.device("cpu")

    def score(
        self, cohort: Cohort, cases: Sequence[Case], change: Change | None = None, *, what: str = "Scoring"
    ) -> NDArray[np.float64]:
        """Logits (n, K) of the cases.

        Args:
            change: applied to every channel before it is prepared.
            what: named by the progress bar.

        Raises:
            UserError: an image is missing or damaged.
            ValueError: the network gives logits that are not finite.
        """

        def ready(item: tuple[int, Case]) -> NDArray[np.float32]:
            number, case = item
            channels = [read_image(path) for path in cohort.image_paths(case)]
            return prepare([change(number, channel) if change else channel for channel in channels], self.plan).image

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
        logits = self.net(given).double().cpu().numpy()
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
