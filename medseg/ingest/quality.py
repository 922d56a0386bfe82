"""What the pixels and the grid of a scan show: findings as data, each with its number and its threshold.

A finding that `ingest.refuse` names keeps the scan out, and so does one of severity `error`, which leaves nothing to
work on; the others travel with the case.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Finding
from medseg.config import IngestConfig
from medseg.ingest.frontal import check_frontal
from medseg.ingest.scan import Refused, Scan
from medseg.volume import Volume, sampled

MIN_AXIS_VOXELS = 8
MIN_RADIOGRAPH_PIXELS = 64
MAX_ANISOTROPY = 5.0
SPACING_RANGE_MM = (0.05, 20.0)
MIN_LEVELS = 16
AIR_HU = -500.0
TISSUE_HU = 500.0
MIN_HU_RANGE = 300.0
EXTENT_RANGE_MM = (5.0, 4000.0)
_SAMPLES = 200_000


def check(scan: Scan, config: IngestConfig | None = None) -> tuple[Finding, ...]:
    """Everything found on a scan, the reader's findings first.

    Args:
        config: `refuse` and `offset_hu` count; by default those of an empty config.

    Raises:
        Refused: non-finite values, a constant image, or a finding that `config.refuse` names.
    """
    config = config or IngestConfig()
    findings = list(scan.findings)
    first = scan.channels[0]
    findings += _check_volume_grid(first) if scan.kind == "volume" else _check_radiograph_grid(first, findings)
    for channel in scan.channels:
        findings += _check_values(channel.array, scan.modality, config.offset_hu)
    for finding in findings:
        if finding.severity == "error":
            raise Refused(finding.code, finding.message)
        if finding.code in config.refuse:
            raise Refused(finding.code, f"{finding.message} (It is in ingest.refuse.)")
    return tuple(findings)


def _check_volume_grid(volume: Volume) -> Iterator[Finding]:
    shape, spacing = volume.array.shape, volume.spacing_mm
    if min(shape) < MIN_AXIS_VOXELS:
        message = f"The shortest axis has {min(shape)} voxels (shape {_by(shape)})."
        yield Finding("few_voxels", "warning", message, min(shape), MIN_AXIS_VOXELS)
    ratio = max(spacing) / min(spacing)
    if ratio > MAX_ANISOTROPY:
        message = f"Voxels are {ratio:.1f} times longer than wide (spacing {_by(spacing)} mm)."
        yield Finding("anisotropic", "warning", message, round(ratio, 3), MAX_ANISOTROPY)
    for threshold, extreme in zip(SPACING_RANGE_MM, (min(spacing), max(spacing)), strict=True):
        if (extreme < threshold) if threshold == SPACING_RANGE_MM[0] else (extreme > threshold):
            message = f"A spacing of {extreme:g} mm is not plausible for a patient; check the unit."
            yield Finding("implausible_spacing", "warning", message, extreme, threshold)
    extent = max(count * step for count, step in zip(shape, spacing, strict=True))
    for threshold, wrong, unit in zip(
        EXTENT_RANGE_MM, (1.0, -1.0), ("metres or centimetres", "micrometres"), strict=True
    ):
        if (threshold - extent) * wrong > 0:
            message = f"The whole grid is {extent:.3g} mm long; is it stored in {unit}? Save it in millimetres."
            yield Finding("implausible_extent", "warning", message, round(extent, 4), threshold)


def _check_radiograph_grid(image: Volume, known: Sequence[Finding]) -> Iterator[Finding]:
    if (side := min(image.array.shape)) < MIN_RADIOGRAPH_PIXELS:
        message = f"The shorter side has {side} pixels."
        yield Finding("few_pixels", "warning", message, side, MIN_RADIOGRAPH_PIXELS)
    elif not {"not_frontal_chest"} & {finding.code for finding in known}:
        yield from check_frontal(image.array)


def _check_values(array: NDArray[np.generic], modality: str, offset_hu: float) -> Iterator[Finding]:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        message = f"{count} of {array.size} voxels are not finite numbers; export the image again."
        yield Finding("not_finite", "error", message, count, 0)
        return
    low, high = float(array.min()), float(array.max())
    if low == high:
        message = f"Every voxel has the value {low:g}; the image is empty."
        yield Finding("constant", "error", message, 0, 0)
        return
    values = sampled(array, _SAMPLES)
    levels = np.unique(values).size
    if levels < MIN_LEVELS:
        message = f"The image has only {levels} different values; is it a mask?"
        yield Finding("few_levels", "warning", message, levels, MIN_LEVELS)
    if modality == "CT":
        yield from _check_hounsfield(values, low, high, offset_hu)


def _check_hounsfield(values: NDArray[np.generic], low: float, high: float, offset_hu: float) -> Iterator[Finding]:
    """Hounsfield units: air -1000, fat -100, tissue 50. A crop without air is usual, an offset of 1024 is no crop.

    A file that is in Hounsfield units already must not take the config's offset as well: its tissue lies below air.
    """
    if high - low < MIN_HU_RANGE:
        message = f"Values span {low:g} to {high:g}; Hounsfield units of a patient span more. Undo the normalisation."
        yield Finding("not_hounsfield", "warning", message, high - low, MIN_HU_RANGE)
        return
    wide = values.astype(np.float64)
    inside = wide[wide > low + 0.1 * (high - low)]
    middle = float(np.median(inside)) if inside.size else high
    if low > AIR_HU and middle > TISSUE_HU:
        message = (
            f"The lowest value is {low:g} and tissue lies at {middle:g}, but in Hounsfield units air is -1000 and "
            "tissue 0 to 100; set ingest.offset_hu (-1024 is usual), or subtract the offset from the file."
        )
        yield Finding("not_hounsfield", "warning", message, round(middle, 3), TISSUE_HU)
    elif offset_hu and middle < AIR_HU:
        message = (
            f"With ingest.offset_hu {offset_hu:g} tissue lies at {middle:g}, where air is in Hounsfield units; this "
            "file has no such offset, ingest it without."
        )
        yield Finding("not_hounsfield", "warning", message, round(middle, 3), AIR_HU)
    elif low > AIR_HU:
        message = f"The lowest value is {low:g}, but air is -1000 in Hounsfield units; is an offset missing?"
        yield Finding("no_air", "info", message, low, AIR_HU)


def _by(numbers: tuple[float, ...]) -> str:
    return "×".join(f"{number:g}" for number in numbers)
