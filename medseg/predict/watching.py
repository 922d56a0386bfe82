"""What the networks say of each structure while they predict it, gathered window by window.

Sums are kept and no map, so that neither the size of the scan nor the number of networks needs memory; voxels that
several windows see count as often, and windows of one value throughout not at all. Out of fold and later the figures
are made in the same way, which is what counts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from medseg.confidence import Features, agreement_bound
from medseg.models.ensemble import Ensemble
from medseg.models.features import even
from medseg.models.sliding import mirrored_dims
from medseg.predict.heads import Head

_SLAB, _VALUES = 16, 4_000_000  # slices and logits at a time: with many classes those of a window are large


class Watcher:
    """Gathers the sums over all windows of one image.

    Args:
        members: how many networks answer each window.
        temperatures: of each network's logits.
        mirror_axes: along which each window is seen flipped, as `medseg.models.sliding.averaged` does.
    """

    def __init__(self, members: int, temperatures: Sequence[float], mirror_axes: Sequence[int] = ()) -> None:
        self._members, self._temperatures = members, temperatures
        self._flips, self._passes = mirrored_dims(mirror_axes), 0
        self._waiting: list[Tensor] = []
        self._sums: Tensor | None = None  # (member, figure, class)
        self._shared: dict[tuple[int, int], Tensor] = {}
        self._plain: list[list[Tensor]] = []  # labels of the window seen without a flip, by slab and member
        self._mirrored: Tensor | None = None  # (member, figure, class): of the plain pass, and shared with each other

    def see(self, window_BCDHW: Tensor, logits_BKDHW: Tensor, head: Head | None = None) -> None:
        """Take the logits of the next network for a window.

        Args:
            logits_BKDHW: or features_BCDHW, of which `head` makes logits; then those of a window never exist at once.
        """
        self._waiting.append(logits_BKDHW)
        if len(self._waiting) < self._members:
            return
        answers, self._waiting = self._waiting, []
        flip = self._flips[self._passes % len(self._flips)]
        self._passes += 1
        if not flip:
            self._plain.clear()
        telling = (~even(window_BCDHW)).nonzero()[:, 0]
        if not len(telling):
            return
        if len(telling) < len(window_BCDHW):
            answers = [logits[telling] for logits in answers]
        step = _thickness(answers[0], head)
        for number, slab in enumerate(_slabs(answers[0].shape[2], step, reverse=2 in flip)):
            parts = [logits[:, :, slab] for logits in answers]
            called = self._add(parts if head is None else [head(features) for features in parts])
            if len(self._flips) > 1:
                self._compare(number, [labels.flip([dim - 1 for dim in flip]) for labels in called])

    def features(self, labels: Mapping[str, int]) -> dict[str, Features]:
        """Per label that at least one network finds."""
        if self._sums is None:
            return {}
        size, soft, hit, entropy = self._sums.cpu().double().unbind(1)
        shared = {pair: counts.cpu().double() for pair, counts in self._shared.items()}
        found = {}
        for name, c in labels.items():
            members = [k for k in range(self._members) if size[k, c] > 0]
            if not members:
                continue
            promised = [float(2 * hit[k, c] / (size[k, c] + soft[k, c])) for k in members]
            unsure = [float(entropy[k, c] / size[k, c]) for k in members]
            pairs = [(i, j) for i, j in shared if size[i, c] + size[j, c] > 0]
            alike = [float(2 * shared[i, j][c] / (size[i, c] + size[j, c])) for i, j in pairs]
            agreement = sum(alike) / len(alike) if alike else math.nan
            mean = [sum(values) / len(values) for values in (promised, unsure)]
            mirrored = self._mirror_agreement(size, members, c)
            found[name] = Features(mean[0], mean[1], agreement, agreement_bound(alike), mirrored)
        return found

    def _mirror_agreement(self, size: Tensor, members: Sequence[int], c: int) -> float:
        """Mean over networks of the Dice between the plain pass and each mirrored one; NaN without mirroring."""
        if self._mirrored is None:
            return math.nan
        plain, same = self._mirrored.cpu().unbind(1)
        others = len(self._flips) - 1
        dice = [float(2 * same[k, c] / ((others - 1) * plain[k, c] + size[k, c])) for k in members]
        return sum(dice) / len(dice)

    def _add(self, answers: Sequence[Tensor]) -> list[Tensor]:
        """Add what the networks say of a slab; returns the labels (B, D, H, W) that each calls."""
        classes, called, rows = answers[0].shape[1], [], []
        for logits, temperature in zip(answers, self._temperatures, strict=True):
            log_probs = (logits.float() / temperature).log_softmax(1)
            probs = log_probs.exp()
            sure, label = probs.max(1)
            entropy = -(probs * log_probs).sum(1) / math.log(classes)
            flat = label.reshape(-1)
            soft = probs.transpose(0, 1).reshape(classes, -1).sum(1)
            size, hit, unsure = (_count(flat, classes, w) for w in (None, sure.reshape(-1), entropy.reshape(-1)))
            rows.append(torch.stack([size, soft.double(), hit, unsure]))
            called.append(label)
        sums = torch.stack(rows)
        self._sums = sums if self._sums is None else self._sums + sums
        for i, j in combinations(range(self._members), 2):
            same = _count(called[i][called[i] == called[j]], classes)
            self._shared[i, j] = self._shared[i, j] + same if (i, j) in self._shared else same
        return called

    def _compare(self, slab: int, called: Sequence[Tensor]) -> None:
        """Hold the labels of a pass, flipped back, against those of the plain one, which comes first."""
        assert self._sums is not None
        is_plain = slab == len(self._plain)
        if is_plain:
            self._plain.append([labels.to(torch.int32) for labels in called])
        counts = torch.zeros_like(self._sums[:, :2])
        for k, (labels, plain) in enumerate(zip(called, self._plain[slab], strict=True)):
            counts[k, 0 if is_plain else 1] = _count(labels[labels == plain], self._sums.shape[2])
        self._mirrored = counts if self._mirrored is None else self._mirrored + counts


@contextmanager
def watched(
    net: nn.Module, temperatures: Sequence[float], mirror_axes: Sequence[int] = (), *, hooks: bool = True
) -> Iterator[Watcher]:
    """Watch a network, or each network of an `Ensemble`, while the block runs; nothing about them changes.

    Args:
        hooks: whether to see what the networks put out; otherwise `see` is for who asks a single network.
    """
    members = list(net.members) if isinstance(net, Ensemble) else [net]
    given = list(temperatures) if len(temperatures) == len(members) else [1.0] * len(members)
    watcher = Watcher(len(members), given, mirror_axes)

    def see(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        if isinstance(output, Tensor) and output.ndim > 2:
            watcher.see(inputs[0], output)

    handles = [member.register_forward_hook(see) for member in members if hooks]
    try:
        yield watcher
    finally:
        for handle in handles:
            handle.remove()


def _thickness(answer_BCDHW: Tensor, head: Head | None) -> int:
    """How many slices to look at together."""
    classes = answer_BCDHW.shape[1] if head is None else head.classes
    return min(max(_VALUES // (classes * answer_BCDHW[:, 0, 0].numel()), 1), _SLAB)


def _slabs(size: int, step: int, *, reverse: bool) -> Iterator[slice]:
    """A window's slices in slabs; of one flipped along them, in the order in which they lie unflipped."""
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield slice(size - stop, size - start) if reverse else slice(start, stop)


def _count(flat: Tensor, classes: int, weights: Tensor | None = None) -> Tensor:
    return torch.bincount(flat, None if weights is None else weights.double(), minlength=classes).double()
