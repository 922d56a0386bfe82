"""How far to trust each structure of a result, and which results a person should see first."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.confidence import Features, from_facts
from medseg.files import UserError, read_json, write_rows
from medseg.ledger import USABLE, Row

COLUMNS = (
    "rank", "case_id", "status", "expected_dice", "structure", "agreement", "feature_distance", "distance_limit",
    "flags",
)  # fmt: skip


@dataclass(frozen=True)
class Trust:
    """Figures of one structure, all 0 to 1.

    Attributes:
        expected_dice: the Dice to expect; None unless the bundle was calibrated on out-of-fold predictions.
        interval: in which it lies for nine cases of ten; None likewise.
        soft_dice, entropy, agreement, mirrored: see `medseg.confidence.Features`; agreement is None with one network,
            mirrored without mirroring.
    """

    expected_dice: float | None
    interval: tuple[float, float] | None
    soft_dice: float
    entropy: float
    agreement: float | None
    mirrored: float | None = None


def judge(features: Mapping[str, Features], evidence: Mapping[str, Any]) -> dict[str, Trust]:
    """Features as figures for people, with the expected Dice where the bundle's evidence holds a calibration."""
    calibrated: Mapping[str, Any] = evidence.get("expected_dice") or {}
    found = {}
    for label, seen in features.items():
        expected, interval = None, None
        if calibrated.get(label):
            expected, low, high = (round(value, 4) for value in from_facts(calibrated[label])(seen))
            interval = (low, high)
        alike = [None if math.isnan(value) else round(value, 4) for value in (seen.agreement, seen.mirrored)]
        found[label] = Trust(expected, interval, round(seen.soft_dice, 4), round(seen.entropy, 4), *alike)
    return found


def least(confidence: Mapping[str, Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]] | None:
    """The structure to trust least: the lowest expected Dice, or promised Dice where nothing was calibrated."""
    if not confidence:
        return None
    return min(confidence.items(), key=lambda item: _risk(item[1]))


def write_queue(path: Path, rows: Iterable[Row]) -> Path:
    """Write `review_queue.csv` beside a ledger: every usable case.

    What is unlike the training cohort comes first, the farthest ahead, since nothing else that is said of it can be
    trusted; then the other flagged cases, then the rest, each the least trusted ahead, of equal ones the farther.
    """
    entries = []
    for row in rows:
        if row.status not in USABLE:
            continue
        try:
            result = read_json(path.parent / row.case_id / "result.json")
        except UserError:
            continue
        worst = least(result.get("confidence") or {})
        structure, figures = worst or ("", {})
        flags = [flag["code"] for flag in result.get("flags") or ()]
        entry = {
            "case_id": row.case_id,
            "status": row.status,
            "expected_dice": figures.get("expected_dice"),
            "structure": structure,
            "agreement": figures.get("agreement"),
            "feature_distance": row.feature_distance,
            "distance_limit": row.distance_limit,
            "flags": " ".join(flags),
        }
        reach = (row.feature_distance or 0.0) / (row.distance_limit or 1.0)
        unlike = reach if "unlike_training" in flags else 0.0
        risk = _risk(figures) if figures else 2.0
        entries.append(((-unlike, not flags, risk, -reach, row.case_id), entry))
    entries.sort(key=lambda item: item[0])
    return write_rows(path, COLUMNS, ({"rank": rank, **entry} for rank, (_, entry) in enumerate(entries, start=1)))


def _risk(figures: Mapping[str, Any]) -> float:
    expected = figures.get("expected_dice")
    return float(figures["soft_dice"] if expected is None else expected)
