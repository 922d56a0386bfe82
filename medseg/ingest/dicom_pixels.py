"""Read the pixels of DICOM series whose headers `medseg.ingest.dicom` has checked."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Finding
from medseg.ingest.deidentify import burned_in
from medseg.ingest.dicom_codestream import check_frames
from medseg.ingest.dicom_frames import frame_value
from medseg.ingest.dicom_geometry import tilt_of, upright
from medseg.ingest.dicom_headers import read_dataset
from medseg.ingest.dicom_mosaic import is_siemens, tiles_of
from medseg.ingest.scan import Refused, Source
from medseg.volume import Volume

_PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99")  # little endian, also deflated


def read_series(source: Source) -> tuple[Volume, tuple[Finding, ...]]:
    """Read a series: `array[column, row, slice]` in the order of `source.slices`, rescaled slice by slice.

    Returns:
        A volume of int16, uint16 or int32 where every rescaled value is an integer, else float32; its affine is
        the source's, or where the gantry was tilted that of the upright grid. Findings: text burnt in, padding, and the
        tilt that was removed.

    Raises:
        Refused: a file's pixels are missing, cut short or cannot be decoded.
    """
    assert source.affine is not None
    count, noticed = len(source.slices), _Noticed()
    planes: NDArray[Any] = np.empty((0, 0, 0), np.int16)  # (slice, row, column): each slice is one run of memory
    for k, part in _slices(source, noticed):
        dtype = part.dtype if part.dtype.kind == "f" else _narrowest(part)
        if planes.size == 0:
            planes = np.empty((count, *part.shape), dtype)
        if part.shape != planes.shape[1:]:
            raise Refused("mixed_size", "Decoded slices differ in rows and columns.")
        if (wider := _common(planes.dtype, dtype)) != planes.dtype:
            planes = planes.astype(wider)
        planes[k] = part
    if planes.dtype == np.int32:  # int16 slices among uint16 ones
        planes = planes.astype(_narrowest(planes), copy=False)
    volume = Volume(planes.transpose(2, 1, 0), source.affine)
    tilt_deg = tilt_of(source.affine, count)
    findings = (*noticed.burnt_in(len(source.files)), *noticed.padding(volume.array))
    if not tilt_deg:
        return volume, findings
    message = f"Gantry tilt of {tilt_deg:.2f} degrees was removed: each slice was shifted within its plane."
    findings += (Finding("gantry_tilt", "info", message, tilt_deg),)
    return upright(volume, float(planes.min())), findings


@dataclass
class _Noticed:
    """What the files of a series show or say besides their voxels.

    Attributes:
        padded: how many voxels are padding.
        values: their rescaled values.
        declared: findings about text burnt into the pixels, and how many files have each.
    """

    padded: int = 0
    values: set[float] = field(default_factory=set)
    declared: Counter[Finding] = field(default_factory=Counter)

    def add_header(self, data: Any) -> None:
        """Count what the header of one file declares."""
        self.declared.update(burned_in(data))

    def add_padding(self, mask: NDArray[np.bool_] | None, part: NDArray[Any]) -> None:
        """Count one slice with its mask and rescaled values."""
        if mask is not None and mask.any():
            self.padded += int(mask.sum())
            self.values |= {float(part[mask].min()), float(part[mask].max())}

    def burnt_in(self, files: int) -> Iterator[Finding]:
        """Says in how many of the files the pixels may show names."""
        for finding, count in self.declared.items():
            yield replace(finding, message=f"{finding.message} ({count} of {files} files.)", number=count)

    def padding(self, array: NDArray[Any]) -> tuple[Finding, ...]:
        """Says that there is padding: voxels outside the field of view, which are kept as they are."""
        if not self.padded:
            return ()
        share, low, high = self.padded / array.size, min(self.values), max(self.values)
        span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        bright = low > float(np.median(array))
        message = f"{share:.1%} of the voxels are padding outside the field of view, with the value {span}"
        message += ", brighter than most of the image; crop it." if bright else "; they are kept as they are."
        return (Finding("padding", "warning" if bright else "info", message, round(share, 4)),)


def padding_mask(data: Any, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """The pixels that Pixel Padding Value (and Range Limit) mark as outside the image; None when none is marked.

    The value is that of the stored pixels; headers of implicit VR may give a negative one as its unsigned twin.
    """
    value = data.get("PixelPaddingValue")
    if value is None:
        return None
    limit = data.get("PixelPaddingRangeLimit")
    bits, signed = int(data.BitsAllocated), bool(data.PixelRepresentation)
    ends = sorted(int(number) % (1 << bits) for number in (value, value if limit is None else limit))
    if signed:
        ends = sorted(number - (1 << bits) * (number >> (bits - 1)) for number in ends)
    wide = stored.astype(np.int64)
    return np.asarray((wide >= ends[0]) & (wide <= ends[1]))


def _slices(source: Source, noticed: _Noticed) -> Iterator[tuple[int, NDArray[Any]]]:
    """Each slice as (k, modality values of (row, column)), file by file: one file is in memory at a time."""
    wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for k, (file, frame) in enumerate(source.slices):
        wanted[file].append((frame, k))
    for file, frames in wanted.items():
        data = read_dataset(source.files[file])
        noticed.add_header(data)
        if is_siemens(data):
            tiles, rescale = tiles_of(data, stored_pixels(data)), _rescale(data, None)
            yield from ((k, _rescaled(tiles[frame], *rescale)) for frame, k in frames)
            continue
        numbers = [frame for frame, _ in frames]
        grouped = "PerFrameFunctionalGroupsSequence" in data
        for (frame, k), stored in zip(frames, _frames(data, numbers if grouped else []), strict=True):
            if stored.shape != (data.Rows, data.Columns):
                reason = f"A slice decodes to shape {stored.shape}, which the header does not say."
                raise Refused("unreadable_pixels", reason)
            part = _rescaled(stored, *_rescale(data, frame if grouped else None))
            noticed.add_padding(padding_mask(data, stored), part)
            yield k, part


def _frames(data: Any, numbers: list[int]) -> Iterator[NDArray[Any]]:
    """The stored pixels of some frames, decoded one by one; those of the whole file when none is named."""
    from pydicom.pixels import iter_pixels

    if not numbers:
        yield stored_pixels(data)
        return
    _check_codestreams(data)
    pixels = iter_pixels(data, indices=numbers)
    for _ in numbers:
        yield stored_pixels(data, lambda: next(pixels))


def _check_codestreams(data: Any) -> None:
    try:
        check_frames(data)
    except Refused:
        raise
    except Exception as error:  # damaged fragments, or a file without what describes its pixels
        name = type(error).__name__
        raise Refused(
            "unreadable_pixels", f"The pixels of a file cannot be found ({name}); export it again."
        ) from error


def _rescale(data: Any, frame: int | None) -> tuple[float, float]:
    """Slope and intercept of a single-frame file, or of one frame."""
    if "ModalityLUTSequence" in data:
        raise Refused("modality_lut", "A slice is rescaled by a look-up table, which is not supported.")
    if frame is None:
        return rescale_slope(data), float(data.get("RescaleIntercept", 0) or 0)
    found = [
        frame_value(data, frame, "PixelValueTransformationSequence", name)
        for name in ("RescaleSlope", "RescaleIntercept")
    ]
    slope, intercept = float(1 if found[0] is None else found[0]), float(found[1] or 0)
    if slope == 0 or not np.isfinite(slope):
        raise Refused("bad_rescale", f"Rescale Slope {slope:g} would make every pixel the same.")
    return slope, intercept


def stored_pixels(data: Any, decode: Callable[[], NDArray[Any]] | None = None) -> NDArray[Any]:
    """Decode to (row, column) integers. Bits above Bits Stored are cleared or, for signed pixels, sign-extended.

    Args:
        data: a pydicom data set.
        decode: gives the pixels where they are not those of the whole file.

    Raises:
        Refused: the pixels are missing, cut short, or cannot be decoded.
    """
    if decode is None:
        _check_codestreams(data)
    try:
        array: NDArray[Any] | None = _plain_pixels(data) if decode is None else decode()
        if array is None:
            array = data.pixel_array
        allocated, stored = int(data.BitsAllocated), int(data.BitsStored)
    except MemoryError as error:
        raise Refused("too_large", "The pixels do not fit into memory.") from error
    except Exception as error:  # decoders raise anything on damaged files
        syntax = getattr(getattr(data, "file_meta", None), "TransferSyntaxUID", None)
        reason = f"{type(error).__name__}, transfer syntax {getattr(syntax, 'name', 'unknown')}"
        raise Refused(
            "unreadable_pixels",
            f"The pixels of a slice are cut short or cannot be decoded ({reason}); export it again.",
        ) from error
    spare = array.dtype.itemsize * 8 - stored
    if array.dtype.kind in "iu" and spare > 0 and allocated == array.dtype.itemsize * 8:
        array = (array << spare) >> spare
    return array


def _plain_pixels(data: Any) -> NDArray[Any] | None:
    """The pixels of one uncompressed grey frame, read-only; None for all else, which pydicom's decoders take.

    Most scans are such, and setting up a decoder takes ten times as long as this does.
    """
    syntax = getattr(getattr(data, "file_meta", None), "TransferSyntaxUID", "")
    if syntax not in _PLAIN or int(data.get("NumberOfFrames") or 1) != 1 or data.SamplesPerPixel != 1:
        return None
    rows, columns, bits, content = int(data.Rows), int(data.Columns), int(data.BitsAllocated), data.get("PixelData")
    size = rows * columns * bits // 8
    if bits not in (8, 16) or data.PixelRepresentation not in (0, 1) or content is None:
        return None
    if len(content) != size + size % 2:  # cut short, or with a tail to be warned about
        return None
    kind = f"<{'ui'[data.PixelRepresentation]}{bits // 8}"
    return np.frombuffer(content, kind, rows * columns).reshape(rows, columns)


def rescale_slope(data: Any) -> float:
    """Rescale Slope, 1 when it is not given. Raises Refused when it would make every pixel the same."""
    slope = float(data.get("RescaleSlope", 1) or 0)
    if slope == 0 or not np.isfinite(slope):
        raise Refused("bad_rescale", f"Rescale Slope {slope:g} would make every pixel the same.")
    return slope


def _rescaled(stored: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    """Modality values of one slice, (row, column): integers when slope and intercept are whole, else float32."""
    if not np.isfinite(intercept):
        raise Refused("bad_rescale", f"Rescale Intercept {intercept:g} is no number.")
    if slope.is_integer() and intercept.is_integer() and stored.dtype.kind in "iu":
        if (slope, intercept) == (1, 0):
            return stored
        largest = max(abs(int(stored.min())), abs(int(stored.max()))) * abs(slope) + abs(intercept)
        if largest < 2**31:
            return stored.astype(np.int32) * np.int32(slope) + np.int32(intercept)
    return (stored.astype(np.float64) * slope + intercept).astype(np.float32)


def _narrowest(part: NDArray[Any]) -> np.dtype[Any]:
    low, high = int(part.min()), int(part.max())
    for dtype in (np.int16, np.uint16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    return np.dtype(np.float32)


def _common(first: np.dtype[Any], second: np.dtype[Any]) -> np.dtype[Any]:
    if "f" in (first.kind, second.kind):
        return np.dtype(np.float32)
    return np.promote_types(first, second)
