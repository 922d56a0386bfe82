"""What the stored numbers of a DICOM image mean: which bits count, which are padding, how they are rescaled."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.ingest.dicom_frames import frame_value
from medseg.ingest.scan import Refused


def clear_spare_bits(stored: NDArray[Any], allocated: int, bits: int) -> NDArray[Any]:
    """Bits above the `bits` that count are cleared or, for signed pixels, sign-extended."""
    spare = stored.dtype.itemsize * 8 - bits
    if stored.dtype.kind in "iu" and spare > 0 and allocated == stored.dtype.itemsize * 8:
        return np.asarray((stored << spare) >> spare)
    return stored


def rescale(data: Any, frame: int | None) -> tuple[float, float]:
    """Slope and intercept of a single-frame file, or of one frame.

    Raises:
        Refused: a look-up table, a slope that would make every pixel the same, an intercept that is no number.
    """
    if "ModalityLUTSequence" in data:
        raise Refused("modality_lut", "A slice is rescaled by a look-up table, which is not supported.")
    if frame is None:
        slope, intercept = rescale_slope(data), float(data.get("RescaleIntercept", 0) or 0)
    else:
        found = [
            frame_value(data, frame, "PixelValueTransformationSequence", name)
            for name in ("RescaleSlope", "RescaleIntercept")
        ]
        slope, intercept = _checked_slope(float(1 if found[0] is None else found[0])), float(found[1] or 0)
    if not np.isfinite(intercept):
        raise Refused("bad_rescale", f"Rescale Intercept {intercept:g} is no number.")
    return slope, intercept


def rescale_slope(data: Any) -> float:
    """Rescale Slope, 1 when it is not given. Raises Refused when it would make every pixel the same."""
    return _checked_slope(float(data.get("RescaleSlope", 1) or 0))


def _checked_slope(slope: float) -> float:
    if slope == 0 or not np.isfinite(slope):
        raise Refused("bad_rescale", f"Rescale Slope {slope:g} would make every pixel the same.")
    return slope


def padding_range(data: Any) -> tuple[int, int] | None:
    """The least and the greatest stored value that mark a pixel as outside the image; None where none does.

    Pixel Padding Value is that of the stored pixels; headers of implicit VR may give a negative one as its unsigned
    twin.
    """
    value = data.get("PixelPaddingValue")
    if value is None:
        return None
    limit = data.get("PixelPaddingRangeLimit")
    bits, signed = int(data.BitsAllocated), bool(data.PixelRepresentation)
    ends = sorted(int(number) % (1 << bits) for number in (value, value if limit is None else limit))
    if signed:
        ends = sorted(number - (1 << bits) * (number >> (bits - 1)) for number in ends)
    return ends[0], ends[1]


def padding_mask(stored: NDArray[Any], ends: tuple[int, int] | None) -> NDArray[np.bool_] | None:
    """The pixels within `padding_range`; None when there is none."""
    if ends is None or int(stored.max()) < ends[0] or ends[1] < int(stored.min()):
        return None
    return np.asarray((stored >= ends[0]) & (stored <= ends[1]))
