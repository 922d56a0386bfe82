"""What a model says of its own results, held against the labels: calibrated out of fold, measured on held-out cases."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from medseg.confidence import Features, compare, fit_expected_dice
from medseg.evaluate.earned import Pair
from medseg.evaluate.outcomes import Outcome
from medseg.files import UserError, read_json
from medseg.images import read_image

ByFold = Mapping[int, Sequence[Outcome]]


def calibrate(by_fold: ByFold, labels: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Fit, per label, the Dice to expect on out-of-fold cases.

    Each case was predicted by the one network that had not seen it, and brings that network's features. The errors
    reported are those on folds left out of the fit; with one fold only, cases are dealt into five groups for this.

    Returns:
        Per label that can be calibrated `coefficients`, `low`, `high`, `n` (see `ExpectedDice`), and `held_out`: how
        the expected Dice compares with that reached, beside the mean Dice of the other folds as a guess for all.
    """
    found = {}
    for label in labels:
        x, y, groups = _features(by_fold, label)
        if len(set(groups)) == 1:
            groups = [number % 5 for number in range(len(groups))]
        fitted = fit_expected_dice(x, y, groups)
        if fitted is None:
            continue
        expected, held_out = fitted
        guesses = [
            float(np.mean([d for d, other in zip(y, groups, strict=True) if other != group])) for group in groups
        ]
        inside = [expected.low <= d - e <= expected.high for d, e in zip(y, held_out, strict=True)]
        about = {**compare(held_out, y), "coverage": float(np.mean(inside))}
        about["absolute_error_of_mean"] = float(np.mean(np.abs(np.array(guesses) - np.array(y))))
        found[label] = {**asdict(expected), "held_out": about}
    return found


def measure(outcomes: Sequence[Outcome], labels: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """How well the expected Dice of predictions fits the Dice they reached.

    Returns:
        Per label with an expected Dice in some result: see `medseg.confidence.compare`, `coverage` of the interval,
        and how each feature alone ranks the cases (Spearman). Empty when the model is not calibrated.
    """
    found = {}
    for label in labels:
        rows = []
        for outcome in outcomes:
            said = _said(outcome).get(label) or {}
            reached = outcome.figures.get(f"dice_{label}", math.nan)
            if said.get("expected_dice") is not None and not math.isnan(reached):
                rows.append((said, reached))
        if not rows:
            continue
        reached_dice = [reached for _, reached in rows]
        figures: dict[str, Any] = dict(compare([said["expected_dice"] for said, _ in rows], reached_dice))
        inside = [said["interval"][0] <= reached <= said["interval"][1] for said, reached in rows]
        figures["coverage"] = float(np.mean(inside))
        for name, sign in (("agreement", 1), ("entropy", -1), ("soft_dice", 1), ("mirrored", 1)):
            values = [math.nan if said.get(name) is None else sign * float(said[name]) for said, _ in rows]
            figures[f"spearman_{name}"] = compare(values, reached_dice).get("spearman", math.nan)
        found[label] = figures
    return found


def volume_ranges(pairs: Sequence[Pair], labels: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Per label of volumes the median, lowest and highest reference volume in ml, and the median absolute deviation of
    its logarithm, over the `n` cases that have the label; labels with fewer than five cases are left out."""
    volumes: dict[str, list[float]] = {label: [] for label in labels}
    for pair in pairs:
        ref = read_image(pair.ref)
        if ref.array.ndim != 3:
            continue
        counts = np.bincount(ref.array.reshape(-1).astype(np.int64), minlength=max(labels.values()) + 1)
        for label, value in labels.items():
            if counts[value]:
                volumes[label].append(float(counts[value]) * ref.voxel_ml)
    return {label: _range(found) for label, found in volumes.items() if len(found) >= 5}


def _range(volumes: Sequence[float]) -> dict[str, float]:
    median = statistics.median(volumes)
    spread = statistics.median(abs(math.log(volume / median)) for volume in volumes)
    return {"median": median, "low": min(volumes), "high": max(volumes), "mad_log": spread, "n": len(volumes)}


def _features(by_fold: ByFold, label: str) -> tuple[list[tuple[float, ...]], list[float], list[int]]:
    """What the Dice to expect is fitted on; the agreement with mirrored passes counts where every case has it."""
    seen, y, groups = [], [], []
    for fold, outcomes in sorted(by_fold.items()):
        for outcome in outcomes:
            said = _said(outcome).get(label)
            dice = outcome.figures.get(f"dice_{label}", math.nan)
            if said and not math.isnan(dice):
                mirrored = said.get("mirrored")
                known = math.nan if mirrored is None else float(mirrored)
                seen.append(Features(float(said["soft_dice"]), float(said["entropy"]), mirrored=known))
                y.append(dice)
                groups.append(fold)
    size = min((len(features.columns) for features in seen), default=0)
    return [features.columns[:size] for features in seen], y, groups


def _said(outcome: Outcome) -> Mapping[str, Any]:
    """The `confidence` of the case's `result.json`, beside its mask; empty where there is none."""
    if outcome.pred is None:
        return {}
    try:
        found: Mapping[str, Any] = read_json(Path(outcome.pred).with_name("result.json")).get("confidence") or {}
    except UserError:
        return {}
    return found
