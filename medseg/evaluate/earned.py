"""Post-processing that has to earn its place: an operation is used for a label only where out-of-fold predictions say
that it helps and exclude that it harms."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.files import UserError
from medseg.images import read_image
from medseg.metrics import dice
from medseg.statistics import summarise
from medseg.volume import Volume

SMALL_SHARES = (0.01, 0.1)
"""Objects below these shares of a label's median volume are what `remove_small` is tried on."""

Operation = tuple[str, float | None]
"""Its name, and the volume in ml that `remove_small` takes."""

Apply = Callable[..., NDArray[Any]]
"""`(labels, value, operation, *, voxel_ml, min_ml) -> labels`."""


@dataclass(frozen=True)
class Pair:
    """One case: whose it is, its out-of-fold prediction and its label map, on one grid, and the labels of which that
    does not tell."""

    patient: str
    pred: Path
    ref: Path
    not_annotated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The evidence on one operation for one label.

    Attributes:
        min_ml: what `remove_small` removes; None for the others.
        n: cases in which the label is, or was predicted. changed: those whose Dice the operation changes.
        dice_before, dice_after: means over these cases; before: with what was chosen earlier for this label.
        ci_low, ci_high: 95 % interval of the mean difference, bootstrapped over patients.
        used: the mean rises and the interval does not reach below 0.
    """

    label: str
    operation: str
    min_ml: float | None
    n: int
    changed: int
    dice_before: float
    dice_after: float
    ci_low: float
    ci_high: float
    used: bool


def choose(pairs: Sequence[Pair], labels: Mapping[str, int], apply: Apply, *, seed: int = 0) -> list[dict[str, Any]]:
    """Decide, label by label: the best operation that helps is taken, then the best beside it, until none helps.

    Args:
        apply: does an operation to one label of a map.

    Returns:
        A `Choice` as a mapping for each operation and label, those that are used first and in their order.

    Raises:
        UserError: a map cannot be read, or the two of a case do not share a grid.
    """
    medians = _median_volumes_ml(pairs, labels)
    tried = {label: _candidates(medians[label]) for label in labels}
    used: dict[str, list[Choice]] = {label: [] for label in labels}
    rejected: list[Choice] = []
    while tried:
        found = _round(pairs, labels, tried, used, apply, seed)
        for label, choices in found.items():
            helping = [choice for choice in choices if choice.used]
            if not helping:
                rejected += choices
                del tried[label]
                continue
            best = max(helping, key=lambda choice: choice.dice_after - choice.dice_before)
            used[label].append(best)
            tried[label] = [operation for operation in tried[label] if operation[0] != best.operation]
    return [asdict(choice) for choices in used.values() for choice in choices] + [asdict(c) for c in rejected]


def _round(
    pairs: Sequence[Pair],
    labels: Mapping[str, int],
    tried: Mapping[str, Sequence[Operation]],
    used: Mapping[str, Sequence[Choice]],
    apply: Apply,
    seed: int,
) -> dict[str, list[Choice]]:
    """The evidence on every operation still open, each beside what is used already; every case is read once."""
    scores: dict[tuple[str, Operation], list[tuple[str, float, float]]] = {}
    for pair in pairs:
        pred, ref = _read(pair)
        for label, operations in tried.items():
            if label in pair.not_annotated:
                continue
            for operation, before, after in _scores(pred, ref, labels[label], operations, used[label], apply):
                scores.setdefault((label, operation), []).append((pair.patient, before, after))
    return {
        label: [_choice(label, operation, scores.get((label, operation), []), seed) for operation in operations]
        for label, operations in tried.items()
    }


def _scores(
    pred: Volume, ref: Volume, value: int, operations: Sequence[Operation], used: Sequence[Choice], apply: Apply
) -> Iterator[tuple[Operation, float, float]]:
    """Dice before and after each operation, in the box that holds the label in both maps; nothing without a label."""
    box = _box(pred.array == value, ref.array == value)
    if box is None:
        return
    given, truth, voxel_ml = pred.array[box], ref.array[box] == value, _voxel_ml(pred)
    for earlier in used:
        given = apply(given, value, earlier.operation, voxel_ml=voxel_ml, min_ml=earlier.min_ml or 0.0)
    before = dice(given == value, truth)
    for operation in operations:
        then = apply(given, value, operation[0], voxel_ml=voxel_ml, min_ml=operation[1] or 0.0)
        yield operation, before, before if np.array_equal(given, then) else dice(then == value, truth)


def _box(pred: NDArray[np.bool_], ref: NDArray[np.bool_]) -> tuple[slice, ...] | None:
    found = ndimage.find_objects((pred | ref).view(np.uint8))
    return tuple(found[0]) if found else None


def _choice(label: str, operation: Operation, scores: Sequence[tuple[str, float, float]], seed: int) -> Choice:
    patients = [patient for patient, _, _ in scores]
    before, after = [score[1] for score in scores], [score[2] for score in scores]
    gain = summarise([b - a for a, b in zip(before, after, strict=True)], patients, seed=seed)
    means = [float(np.mean(found)) if found else math.nan for found in (before, after)]
    helps = bool(gain.mean > 0 and gain.ci_low >= 0)
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    return Choice(label, *operation, gain.n, changed, means[0], means[1], gain.ci_low, gain.ci_high, helps)


def _candidates(median_ml: float | None) -> list[Operation]:
    found: list[Operation] = [("largest_component", None), ("fill_holes", None)]
    if median_ml:
        found += [("remove_small", float(f"{share * median_ml:.3g}")) for share in SMALL_SHARES]
    return found


def _median_volumes_ml(pairs: Sequence[Pair], labels: Mapping[str, int]) -> dict[str, float | None]:
    """Median volume of each label over the cases that have it; None for pictures, and where no case has it."""
    volumes: dict[str, list[float]] = {label: [] for label in labels}
    for pair in pairs:
        ref = read_image(pair.ref)
        for label, value in labels.items():
            if ref.array.ndim == 3 and (count := int(np.count_nonzero(ref.array == value))):
                volumes[label].append(count * ref.voxel_ml)
    return {label: statistics.median(found) if found else None for label, found in volumes.items()}


def _read(pair: Pair) -> tuple[Volume, Volume]:
    pred, ref = read_image(pair.pred), read_image(pair.ref)
    if pred.array.shape != ref.array.shape:
        raise UserError(f"{pair.pred} has shape {pred.array.shape}, its label {ref.array.shape}; predict it again.")
    return pred, ref


def _voxel_ml(volume: Volume) -> float:
    return volume.voxel_ml if volume.array.ndim == 3 else 0.0
