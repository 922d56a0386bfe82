"""Read the pixels of DICOM series whose headers `medseg.ingest.dicom` has checked."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Finding
from medseg.ingest.deidentify import burned_in
from medseg.ingest.dicom_codestream import check_frames
from medseg.ingest.dicom_geometry import tilt_of, upright
from medseg.ingest.dicom_headers import read_dataset
from medseg.ingest.dicom_mosaic import is_siemens, tiles_of
from medseg.ingest.dicom_values import clear_spare_bits, padding_mask, padding_range, rescale
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
    stack = _Stack(count)
    for part in _slices(source, noticed):
        plane = stack.put(part)
        noticed.add_padding(padding_mask(part.stored, part.padding), plane)
    volume = Volume(stack.narrowed().transpose(2, 1, 0), source.affine)
    tilt_deg = tilt_of(source.affine, count)
    findings = (*noticed.burnt_in(len(source.files)), *noticed.padding(volume.array))
    if not tilt_deg:
        return volume, findings
    message = f"Gantry tilt of {tilt_deg:.2f} degrees was removed: each slice was shifted within its plane."
    findings += (Finding("gantry_tilt", "info", message, tilt_deg),)
    return upright(volume, float(volume.array.min())), findings


@dataclass(frozen=True)
class _Slice:
    """One slice: its place along k, its stored pixels (row, column), and what they mean."""

    k: int
    stored: NDArray[Any]
    slope: float
    intercept: float
    padding: tuple[int, int] | None = None


@dataclass
class _Stack:
    """The slices of a series as they come, in the narrowest type that holds them all.

    Attributes:
        planes: (slice, row, column), so that each slice is one run of memory.
    """

    count: int
    planes: NDArray[Any] = field(default_factory=lambda: np.empty((0, 0, 0), np.int16))

    def put(self, part: _Slice) -> NDArray[Any]:
        """Take in one slice; its modality values, (row, column)."""
        dtype = _rescaled_type(part)
        if self.planes.size == 0:
            self.planes = np.empty((self.count, *part.stored.shape), dtype)
        if part.stored.shape != self.planes.shape[1:]:
            raise Refused("mixed_size", "Decoded slices differ in rows and columns.")
        if (wider := _common(self.planes.dtype, dtype)) != self.planes.dtype:
            self.planes = self.planes.astype(wider)
        plane: NDArray[Any] = self.planes[part.k]
        _rescale_into(plane, part)
        return plane

    def narrowed(self) -> NDArray[Any]:
        """All planes; int16 slices among uint16 ones may have asked for more than they need together."""
        if self.planes.dtype != np.int32:
            return self.planes
        return self.planes.astype(_narrowest(int(self.planes.min()), int(self.planes.max())), copy=False)


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

    def add_padding(self, mask: NDArray[np.bool_] | None, part: NDArray[Any]) -> None:
        """Count one slice with its mask and rescaled values."""
        if mask is not None and mask.any():
            values = part[mask]
            self.padded += values.size
            self.values |= {float(values.min()), float(values.max())}

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
        bright = _above_median(low, array)
        message = f"{share:.1%} of the voxels are padding outside the field of view, with the value {span}"
        message += ", brighter than most of the image; crop it." if bright else "; they are kept as they are."
        return (Finding("padding", "warning" if bright else "info", message, round(share, 4)),)


def _slices(source: Source, noticed: _Noticed) -> Iterator[_Slice]:
    """The slices file by file: one file is in memory at a time."""
    wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for k, (file, frame) in enumerate(source.slices):
        wanted[file].append((frame, k))
    for file, frames in wanted.items():
        plain = source.plain[file] if source.plain else None
        if plain is not None and (stored := plain.read(source.files[file])) is not None:
            noticed.declared.update(plain.burnt_in)
            yield from (_Slice(k, stored, plain.slope, plain.intercept, plain.padding) for _, k in frames)
            continue
        data = read_dataset(source.files[file])
        noticed.declared.update(burned_in(data))
        if is_siemens(data):
            tiles, scale = tiles_of(data, stored_pixels(data)), rescale(data, None)
            yield from (_Slice(k, tiles[frame], *scale) for frame, k in frames)
            continue
        numbers = [frame for frame, _ in frames]
        grouped = "PerFrameFunctionalGroupsSequence" in data
        for (frame, k), stored in zip(frames, _frames(data, numbers if grouped else []), strict=True):
            if stored.shape != (data.Rows, data.Columns):
                reason = f"A slice decodes to shape {stored.shape}, which the header does not say."
                raise Refused("unreadable_pixels", reason)
            yield _Slice(k, stored, *rescale(data, frame if grouped else None), padding_range(data))


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
    return clear_spare_bits(array, allocated, stored)


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


def _rescaled_type(part: _Slice) -> np.dtype[Any]:
    """The narrowest of the types that `read_series` names for the modality values of one slice."""
    whole = part.slope.is_integer() and part.intercept.is_integer()
    if not whole or part.stored.dtype.kind not in "iu":
        return np.dtype(np.float32)
    slope, intercept, ends = int(part.slope), int(part.intercept), (int(part.stored.min()), int(part.stored.max()))
    if (slope, intercept) != (1, 0) and max(map(abs, ends)) * abs(slope) + abs(intercept) >= 2**31:
        return np.dtype(np.float32)
    return _narrowest(*sorted(value * slope + intercept for value in ends))


def _rescale_into(plane: NDArray[Any], part: _Slice) -> None:
    """Modality values of one slice, (row, column). Integers may wrap around on the way, since the values fit."""
    if plane.dtype.kind == "f":
        plane[:] = part.stored.astype(np.float64) * part.slope + part.intercept
        return
    slope, intercept = (np.array(int(number)).astype(plane.dtype) for number in (part.slope, part.intercept))
    if slope == 1:
        np.add(part.stored, intercept, out=plane, dtype=plane.dtype, casting="unsafe")
        return
    np.multiply(part.stored, slope, out=plane, dtype=plane.dtype, casting="unsafe")
    plane += intercept


def _narrowest(low: int, high: int) -> np.dtype[Any]:
    for dtype in (np.int16, np.uint16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    return np.dtype(np.float32)


def _above_median(value: float, array: NDArray[Any]) -> bool:
    """Whether `value` is above the median, which counting tells unless it falls between the two middle values."""
    limit = math.ceil(value) if array.dtype.kind in "iu" else value  # no float copy of integers
    below = int(np.count_nonzero(array < limit))
    return below > array.size // 2 if abs(2 * below - array.size) > 1 else value > float(np.median(array))


def _common(first: np.dtype[Any], second: np.dtype[Any]) -> np.dtype[Any]:
    if "f" in (first.kind, second.kind):
        return np.dtype(np.float32)
    return np.promote_types(first, second)
