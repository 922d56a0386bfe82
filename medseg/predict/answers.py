"""What a network says about the windows of an image, asked as seldom as possible."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from medseg.models.sliding import EvenWindows, averaged, cut_window
from medseg.predict.heads import Head, Headless, WindowLogits, ending, may_be_split
from medseg.predict.slabs import ADD_VALUES
from medseg.predict.sweep import Sweep

Watch = Callable[[Tensor, Tensor, Head | None], None]
"""Takes windows_BCDHW and their logits_BKDHW, or features_BCDHW and the head that makes logits of them part by part."""


class Answers:
    """What the networks say of the windows of an image; they are asked once of even windows of one value in a row.

    On a CPU a single network that ends with a pointwise convolution is asked for its features from the second time
    on, where these are fewer than the classes, and where the convolution has made the same logits, up to rounding, of
    slices of the first batch as of all of it.

    Args:
        nets, mirror_axes: see `averaged`.
        image: CDHW or CHW.
        sweep, even: windows of the image.
        device: of the networks.
        watch: is told of all windows that are not even. Hooks of the network then need not see its logits.

    Attributes:
        classes: of the logits; 0 before `first`.
        taken_gb: what the network takes for the first batch, without the logits where only its features are asked for.
    """

    def __init__(
        self,
        nets: Sequence[nn.Module],
        mirror_axes: Sequence[int],
        image: Tensor,
        sweep: Sweep,
        even: EvenWindows,
        device: torch.device,
        watch: Watch | None = None,
    ) -> None:
        self._watch, hooked = watch, watch is not None
        self.even, self.device, self.classes, self.taken_gb = even, device, 0, 0.0
        alone = len(nets) == 1 and not mirror_axes
        splits = alone and device.type == "cpu" and may_be_split(nets[0], hooked=hooked)
        self._splits = nets[0] if splits else None
        self._predict, self._image, self._axes = averaged(nets, mirror_axes), image, sweep.axes
        self._patch_size = [axis.patch for axis in sweep.axes]
        self._kept: tuple[tuple[float, ...], Tensor] | None = None
        self._headless: Headless | None = None
        self._head: Head | None = None

    def first(self, batch: Sequence[tuple[int, ...]], taken_gb: Callable[[], float]) -> list[WindowLogits]:
        """Answer the first batch, and find out what the network takes.

        Args:
            taken_gb: the memory taken so far at its peak.
        """
        if self._splits is None:
            logits = self._ask(batch)
            self.classes, self.taken_gb = logits.shape[1], taken_gb()
            return [WindowLogits(one) for one in logits]
        with ending(self._splits, taken_gb, hooked=self._watch is not None) as ended:
            logits = self._ask(batch)
        self.classes, self.taken_gb = logits.shape[1], taken_gb()
        found = ended(logits)
        if found is None or len(found.features_BCDHW[0]) >= self.classes or not found.makes_the_same(ADD_VALUES):
            return [WindowLogits(one) for one in logits]
        self.taken_gb, self._head = found.before_gb, found.head
        self._headless = Headless(self._splits, found.name)
        if self._kept is not None:
            self._kept = self._kept[0], found.features_BCDHW
        return [WindowLogits(one, found.head) for one in found.features_BCDHW]

    def of(self, batch: Sequence[tuple[int, ...]]) -> list[WindowLogits]:
        """Answer a further batch; an even window is a batch of its own."""
        values = self._ask(batch)
        return [WindowLogits(one, self._head) for one in values]

    def _ask(self, batch: Sequence[tuple[int, ...]]) -> Tensor:
        """Logits_BKDHW as float32, or features_BCDHW for the head."""
        if batch[0] not in self.even.values:
            windows_BCDHW = torch.stack([self._cut(index) for index in batch])
            answers = self._net(windows_BCDHW)
            if self._watch is not None:
                self._watch(windows_BCDHW, answers, self._head)
            return answers
        values = self.even.values[batch[0]]
        if self._kept is None or self._kept[0] != values:
            self._kept = None  # before the network needs the memory
            window = torch.empty(1, len(values), *self._patch_size, device=self.device)
            for channel, value in zip(window[0], values, strict=True):
                channel.fill_(value)
            self._kept = values, self._net(window)
        return self._kept[1]

    def _net(self, windows_BCDHW: Tensor) -> Tensor:
        if self._headless is not None:
            features: Tensor | None = self._headless(windows_BCDHW)
            if features is not None:
                return features
            self._headless = self._head = self._kept = None
        return self._predict(windows_BCDHW).float()

    def _cut(self, index: tuple[int, ...]) -> Tensor:
        starts = [axis.starts[j] for axis, j in zip(self._axes, index, strict=True)]
        return cut_window(self._image, starts, self._patch_size, self.device)


def batches(
    indices: Iterator[tuple[int, ...]], even: EvenWindows, window_batch: int
) -> Iterator[list[tuple[int, ...]]]:
    """Windows in order, in batches; an even one is a batch of its own, as it may need no look."""
    batch = list[tuple[int, ...]]()
    for index in indices:
        is_even = index in even.values
        if batch and (is_even or len(batch) == max(window_batch, 1)):
            yield batch
            batch = []
        if is_even:
            yield [index]
        else:
            batch.append(index)
    if batch:
        yield batch
