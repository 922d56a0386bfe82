"""Reasons to look at a result before using it, each with its number and its threshold."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from medseg.cohort import Finding
from medseg.feature_distance import RATE
from medseg.ingest.scan import Scan
from medseg.plan import Plan
from medseg.volume import Volume, closest_axes

MAX_SPACING_RATIO = 3.0
MAX_BORDER_SHARE = 0.01
MAX_FILLED_SHARE = 0.95
MAX_ROBUST_Z = 3.5
"""Modified z-score from which on a value counts as an outlier (Iglewicz and Hoaglin 1993)."""


def check_scan(scan: Scan, plan: Plan) -> Iterator[Finding]:
    """What sets the scan apart from those the model was trained on."""
    modalities = sorted(plan.fingerprint.get("modalities", {}))
    if scan.modality and all(modalities) and modalities and scan.modality not in modalities:
        message = f"The scan is {scan.modality}; the model was trained on {', '.join(modalities)}."
        yield Finding("other_modality", "warning", message)
    if not plan.spacing_mm:
        return
    first = scan.channels[0]
    spacing = [first.spacing_mm[axis] for axis in closest_axes(first.affine)[0]]
    for own, trained in zip(spacing, plan.spacing_mm, strict=True):
        ratio = max(own / trained, trained / own)
        if ratio > MAX_SPACING_RATIO:
            message = f"A spacing of {own:.3g} mm is {ratio:.1f} times off the {trained:.3g} mm of the training data."
            yield Finding("other_spacing", "warning", message, round(ratio, 3), MAX_SPACING_RATIO)
            return


def check_distance(distance: float | None, limit: float | None) -> Iterator[Finding]:
    """A scan farther from the training cohort than new cases like it lie; see `medseg.feature_distance`."""
    if distance is not None and limit is not None and distance > limit:
        message = (
            f"The scan is unlike the training cohort: in the network's features it lies {distance:.3g} away, beyond "
            f"{limit:.3g}, which {1 - RATE:.0%} of new cases keep to."
        )
        yield Finding("unlike_training", "warning", message, round(distance, 4), round(limit, 4))


def check_mask(mask: Volume, labels: Mapping[str, int]) -> Iterator[Finding]:
    """Nothing found; almost everything found; a structure of a volume that is cut by the field of view."""
    size = max(labels.values()) + 1
    counts = np.bincount(mask.array.reshape(-1), minlength=size)
    filled = 1 - counts[0] / mask.array.size
    if filled == 0:
        yield Finding("empty_prediction", "warning", "Nothing was found in the whole scan.", 0, 0)
    elif filled > MAX_FILLED_SHARE:
        message = f"{filled:.0%} of the scan is labelled; is it the kind of scan that the model knows?"
        yield Finding("fills_scan", "warning", message, round(float(filled), 4), MAX_FILLED_SHARE)
    if mask.array.ndim != 3:
        return
    inner = np.bincount(mask.array[1:-1, 1:-1, 1:-1].reshape(-1), minlength=size)
    for name, value in labels.items():
        share = (counts[value] - inner[value]) / counts[value] if counts[value] else 0.0
        if share > MAX_BORDER_SHARE:
            message = f"{share:.1%} of {name!r} lie on the border of the field of view; it may be cut off."
            yield Finding("touches_border", "warning", message, round(float(share), 4), MAX_BORDER_SHARE)


def check_volumes(volumes_ml: Mapping[str, float], evidence: Mapping[str, Any]) -> Iterator[Finding]:
    """A structure larger or smaller than all those of the training cohort, and far from most of them.

    Args:
        evidence: `volumes_ml` in it gives `median`, `low`, `high` in ml and `mad_log`, the median absolute deviation of
            the logarithm, per label; without it nothing is said.
    """
    known: Mapping[str, Any] = evidence.get("volumes_ml") or {}
    for name, found_ml in volumes_ml.items():
        about = known.get(name)
        if not about or not found_ml or about["low"] <= found_ml <= about["high"]:
            continue
        score = 0.6745 * abs(math.log(found_ml / about["median"])) / max(about["mad_log"], 1e-3)
        if score > MAX_ROBUST_Z:
            message = (
                f"{name!r} has {found_ml:.3g} ml; in the {about['n']} training cases it had "
                f"{about['low']:.3g} to {about['high']:.3g} ml."
            )
            yield Finding("implausible_volume", "warning", message, round(score, 2), MAX_ROBUST_Z)
