"""Post-processing that has to earn its place: an operation is used for a label only where out-of-fold predictions say
that it helps and exclude that it harms."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.evaluate.statistics import Summary, summarise
from medseg.files import UserError
from medseg.images import read_image
from medseg.metrics import dice
from medseg.volume import Volume

SMALL_SHARES = (0.01, 0.1)
"""Objects below these shares of a label's median volume are what `remove_small` is tried on."""

Apply = Callable[..., NDArray[Any]]
"""`(labels, value, operation, *, voxel_ml, min_ml) -> labels`."""


@dataclass(frozen=True)
class Pair:
    """One case: whose it is, its out-of-fold prediction and its label map, on one grid."""

    patient: str
    pred: Path
    ref: Path


@dataclass(frozen=True)
class Choice:
    """The evidence on one operation for one label.

    Attributes:
        min_ml: what `remove_small` removes; None for the others.
        n: cases in which the label is, or was predicted. changed: those that the operation changes.
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
    decided: list[Choice] = []
    for label, value in labels.items():
        tried = _candidates(medians[label])
        used: list[Choice] = []
        while True:
            found = [_try(pairs, label, value, used, operation, apply, seed) for operation in tried]
            helping = [choice for choice in found if choice.used]
            if not helping:
                decided = [*decided, *found]
                break
            best = max(helping, key=lambda choice: choice.dice_after - choice.dice_before)
            used.append(best)
            tried = [operation for operation in tried if operation[0] != best.operation]
        decided = [*used, *decided]
    return [asdict(choice) for choice in sorted(decided, key=lambda choice: not choice.used)]


def _try(
    pairs: Sequence[Pair],
    label: str,
    value: int,
    used: Sequence[Choice],
    operation: tuple[str, float | None],
    apply: Apply,
    seed: int,
) -> Choice:
    name, min_ml = operation
    before, after, patients, changed = [], [], [], 0
    for pair in pairs:
        pred, ref = _read(pair)
        given = pred.array
        for earlier in used:
            given = apply(given, value, earlier.operation, voxel_ml=_voxel_ml(pred), min_ml=earlier.min_ml or 0.0)
        then = apply(given, value, name, voxel_ml=_voxel_ml(pred), min_ml=min_ml or 0.0)
        truth = ref.array == value
        first = dice(given == value, truth)
        if first != first:
            continue
        same = bool(np.array_equal(given, then))
        changed += not same
        before.append(first)
        after.append(first if same else dice(then == value, truth))
        patients.append(pair.patient)
    gain = _difference(after, before, patients, seed)
    helps = bool(gain.mean > 0 and gain.ci_low >= 0)
    means = [float(np.mean(found)) if found else float("nan") for found in (before, after)]
    return Choice(label, name, min_ml, gain.n, changed, means[0], means[1], gain.ci_low, gain.ci_high, helps)


def _difference(after: Sequence[float], before: Sequence[float], patients: Sequence[str], seed: int) -> Summary:
    return summarise([b - a for a, b in zip(before, after, strict=True)], patients, seed=seed)


def _candidates(median_ml: float | None) -> list[tuple[str, float | None]]:
    found: list[tuple[str, float | None]] = [("largest_component", None), ("fill_holes", None)]
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
