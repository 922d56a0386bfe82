"""Read DICOM radiographs: CR, DX and what else carries one projection image.

They keep every grey level the detector stored: no window is applied unless the config asks for it, because windows
differ between vendors and clip. They are turned so that bright is dense (MONOCHROME1 and negative slopes inverted)
and start at 0.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Finding
from medseg.ingest.deidentify import burned_in
from medseg.ingest.dicom_headers import read_dataset
from medseg.ingest.dicom_pixels import stored_pixels
from medseg.ingest.dicom_values import padding_mask, padding_range, rescale_slope
from medseg.ingest.radiograph import check_view
from medseg.ingest.scan import Refused, Source
from medseg.volume import Volume

_FOR_PROCESSING = ("1.2.840.10008.5.1.4.1.1.1.1.1", "1.2.840.10008.5.1.4.1.1.1.2.1", "1.2.840.10008.5.1.4.1.1.1.3.1")
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
_MAX_MAGNIFICATION = 3.0


def read_radiograph(source: Source) -> tuple[Volume, tuple[Finding, ...]]:
    """Read one image as (row, column) uint8 or uint16, 0 the least dense level that can be stored.

    With `source.windowed`, the VOI look-up table or window of the header is applied and spread over 16 bits; where
    the header has none, the image is as without.

    Returns:
        The image with its pixel spacing (or, failing that, that of the detector), and findings: view and body part,
        the window the vendor proposes, which spacing was used, burnt-in text, raw images meant for processing.

    Raises:
        Refused: the pixels are missing, cut short or cannot be decoded; more than 16 bits.
    """
    data = read_dataset(source.files[0])
    stored = stored_pixels(data)
    bits = int(data.BitsStored)
    if stored.ndim != 2 or bits > 16:
        raise Refused("not_grey", f"Pixels of shape {stored.shape} with {bits} bits are no grey radiograph.")
    array = _windowed(data, stored) if source.windowed and _has_window(data) else _all_levels(data, stored, bits)
    padding = padding_mask(stored, padding_range(data))
    if padding is not None:
        array[padding] = 0
    spacing_mm, findings = _spacing(data)
    findings += _pixel_findings(data, source.windowed)
    findings += [*check_view(data), *burned_in(data)]
    affine = np.diag([*(spacing_mm or (1.0, 1.0)), 1.0, 1.0])
    return Volume(array, affine), tuple(findings)


def _all_levels(data: Any, stored: NDArray[Any], bits: int) -> NDArray[Any]:
    low = -(1 << (bits - 1)) if data.PixelRepresentation else 0
    high = low + (1 << bits) - 1
    wide = stored.astype(np.int32)
    array = high - wide if _dense_is_low(data) else wide - low
    return np.asarray(array.astype(np.uint8 if bits <= 8 else np.uint16))


def _dense_is_low(data: Any) -> bool:
    return bool((data.get("PhotometricInterpretation") == "MONOCHROME1") != (rescale_slope(data) < 0))


def _has_window(data: Any) -> bool:
    return bool(data.get("VOILUTSequence")) or None not in (data.get("WindowCenter"), data.get("WindowWidth"))


def _windowed(data: Any, stored: NDArray[Any]) -> NDArray[Any]:
    """What the vendor shows: rescaled, through the first look-up table or window, over 0 to 65535, bright dense."""
    from pydicom.pixels.processing import apply_rescale, apply_voi_lut

    try:
        shown = np.asarray(apply_voi_lut(apply_rescale(stored, data), data), dtype=np.float64)
        if sequence := data.get("VOILUTSequence"):
            low, high = 0.0, float((1 << int(sequence[0].LUTDescriptor[2])) - 1)
        else:
            low, high = _output_range(data)
    except Refused:
        raise
    except Exception as error:  # descriptors of damaged tables raise anything
        name = type(error).__name__
        raise Refused(
            "bad_window", f"The window or look-up table is damaged ({name}); set ingest.radiograph_window to none."
        ) from error
    if not np.isfinite(shown).all() or high <= low:
        raise Refused("bad_window", "The window gives no finite values; set ingest.radiograph_window to none.")
    share = np.clip((shown - low) / (high - low), 0.0, 1.0)
    if data.get("PhotometricInterpretation") == "MONOCHROME1":
        share = 1.0 - share
    return np.asarray(np.rint(share * 65535).astype(np.uint16))


def _output_range(data: Any) -> tuple[float, float]:
    """The range onto which a window maps (PS3.3 C.11.2.1.2): that of the rescaled stored values."""
    bits, signed = int(data.BitsStored), bool(data.PixelRepresentation)
    low = -(1 << (bits - 1)) if signed else 0
    ends = np.array([low, low + (1 << bits) - 1]) * rescale_slope(data) + float(data.get("RescaleIntercept", 0) or 0)
    return float(ends.min()), float(ends.max())


def _spacing(data: Any) -> tuple[tuple[float, float] | None, list[Finding]]:
    """Pixel Spacing, which is calibrated to the body; else that of the detector, less the known magnification."""
    for keyword in _SPACINGS:
        value = data.get(keyword)
        if value is None or len(value) != 2 or not min(float(v) for v in value) > 0:
            continue
        spacing = float(value[0]), float(value[1])
        if keyword == "PixelSpacing":
            return spacing, []
        factor = float(data.get("EstimatedRadiographicMagnificationFactor") or 0)
        if keyword == "ImagerPixelSpacing" and 1.0 <= factor <= _MAX_MAGNIFICATION:
            message = f"Pixel spacing is that of the detector, divided by the stated magnification {factor:g}."
            spacing = spacing[0] / factor, spacing[1] / factor
            return spacing, [Finding("detector_spacing", "info", message, round(spacing[0], 6))]
        message = "Pixel spacing is that of the detector; the body is magnified by an unknown factor."
        return spacing, [Finding("detector_spacing", "info", message, spacing[0])]
    return None, [Finding("spacing_unknown", "info", "The image states no pixel spacing.")]


def _pixel_findings(data: Any, windowed: bool) -> list[Finding]:
    findings = []
    centre, width = data.get("WindowCenter"), data.get("WindowWidth")
    if centre is not None and width is not None:
        first = [float(np.atleast_1d(number)[0]) for number in (centre, width)]
        applied = "applied" if windowed and not data.get("VOILUTSequence") else "not applied"
        message = f"The vendor proposes a window of centre {first[0]:g} and width {first[1]:g}; {applied}."
        findings.append(Finding("display_window", "info", message, first[0]))
    if data.get("PresentationIntentType") == "FOR PROCESSING" or data.get("SOPClassUID") in _FOR_PROCESSING:
        message = "The image is raw, meant for processing and not for reading."
        findings.append(Finding("for_processing", "warning", message))
    return findings
