"""Read the headers of many DICOM files, never their pixels, in parallel threads."""

import io
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from medseg.ingest import dicom_elements, dicom_frames, dicom_mosaic, dicom_plain
from medseg.ingest.deidentify import known_modality
from medseg.ingest.scan import Refused

_HEADER_TAGS = [
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "PatientID", "InstitutionName", "Modality", "ImageType"),
    *("StudyInstanceUID", "FrameOfReferenceUID", "StudyDate"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "InstanceNumber", "SeriesDescription"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SpacingBetweenSlices"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *dicom_frames.TRAIT_TAGS,
    *dicom_frames.MOSAIC_TAGS,
    *dicom_plain.TAGS,
]
UNKNOWN_MOSAIC = "The images are mosaics of slices; export the series as single slices."
_DICOMDIR = "1.2.840.10008.1.3.10"
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_START_BYTES = 4096
_MAX_HEADER_BYTES = 256 << 20  # thousands of frames with private groups stay far below
_MAX_HEADER_READS = 4_000_000  # zeros parse as elements of 8 bytes, for hours
_MAX_DEFLATED_BYTES = 1 << 30
_MAX_PIXEL_BYTES = 16 << 30  # of one file, decoded
_MAX_EXTRA_BYTES = 512 << 20  # a file beyond its declared pixels
_MAX_FRAMES = 100_000


@dataclass(frozen=True)
class Header:
    """What ordering needs of one image: a file, or one frame of a multi-frame file. Lengths in mm, directions LPS.

    `frame` counts from 0 within the file. `planar` is False for multi-frame files that do not say, frame by frame,
    where each lies. `mosaic` says why the slices of a mosaic cannot be placed; it is empty otherwise, and the slices
    count as frames. `traits` are what may tell the volumes of one series apart, in the order of `dicom_frames.TRAITS`.
    `plain` is what reading the pixels takes, where the header tells all of it.
    """

    path: Path = field(repr=False)
    root: Path = field(repr=False)
    sop_class: str
    sop_uid: str
    series_uid: str
    patient: str = field(repr=False)
    institution: str = field(repr=False)
    modality: str
    image_type: tuple[str, ...]
    rows: int
    columns: int
    frames: int
    samples: int
    has_pixels: bool
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    frame: int = 0
    planar: bool = True
    mosaic: str = ""
    instance: int = 0
    description: str = field(default="", repr=False)
    study_uid: str = field(default="", repr=False)
    frame_uid: str = field(default="", repr=False)
    study_date: str = field(default="", repr=False)
    traits: tuple[str, ...] = field(default=(), repr=False)
    plain: dicom_plain.Plain | None = field(default=None, repr=False)


class _Bounded(io.RawIOBase):
    """A file of which no more than `allowed` bytes are read: a damaged length cannot fill the memory."""

    def __init__(self, file: BinaryIO, allowed: int) -> None:
        self.inner = file
        self.left = allowed
        self.reads_left = _MAX_HEADER_READS
        self.size = os.fstat(file.fileno()).st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = self.size if size is None or size < 0 else size
        if wanted > self.left and (wanted := min(wanted, self.size - self.inner.tell())) > self.left:
            raise Refused("too_large", f"The header is larger than {_MAX_HEADER_BYTES >> 20} MB; export it again.")
        self.left -= wanted
        self.reads_left -= 1
        if self.reads_left < 0:
            raise Refused("too_large", f"The header makes {_MAX_HEADER_READS} reads and goes on; export it again.")
        return self.inner.read(max(wanted, 0))

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self.inner.seek(offset, whence)

    def tell(self) -> int:
        return self.inner.tell()


def read_dataset(path: Path, **options: Any) -> Any:
    """`pydicom.dcmread` without its warnings about odd values, which quote them and so may name the patient.

    Raises:
        Refused: the file is damaged, or larger than what it declares by far; the sentence quotes nothing of it.
    """
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        with path.open("rb") as file:
            _check_deflated(file)
            if not options.get("stop_before_pixels"):
                return pydicom.dcmread(file, force=True, **options)
            return pydicom.dcmread(_Bounded(file, _MAX_HEADER_BYTES), force=True, **options)
    except Refused:
        raise
    except OSError as error:
        raise Refused("unreadable", f"The file cannot be read ({error.strerror or 'I/O error'}).") from error
    except Exception as error:  # pydicom raises anything on damaged files
        raise Refused("unreadable_dicom", _damage(error)) from error


def _check_deflated(file: BinaryIO) -> None:
    """Refuse a deflated file that swells beyond all measure; pydicom inflates it whole. Leaves `file` at its start."""
    start = file.read(_START_BYTES)
    if (at := start.find(_DEFLATED)) >= 0:
        length = int.from_bytes(start[140:144], "little") if start[132:136] == b"\x02\0\0\0" else 0
        file.seek(144 + length if 144 + length > at else at + len(_DEFLATED))
        inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while chunk := inflater.unconsumed_tail or file.read(1 << 16):
            size += len(inflater.decompress(chunk, 1 << 20))
            if size > _MAX_DEFLATED_BYTES:
                raise Refused("too_large", f"The deflated file unpacks to over {_MAX_DEFLATED_BYTES >> 20} MB.")
            if inflater.eof:
                break
    file.seek(0)


def read_header(path: Path, root: Path) -> tuple[Header, ...] | None:
    """Read the header of one file, not its pixels. None when it is a directory record (DICOMDIR) or no DICOM.

    Returns:
        One header, or one per frame of a multi-frame file whose functional groups place each frame.

    Raises:
        Refused: it begins like DICOM and cannot be parsed, or lacks what names it.
    """
    try:
        with path.open("rb", buffering=0) as file:
            start = file.read(dicom_elements.FIRST_BYTES)
            size = os.fstat(file.fileno()).st_size
            marked = start[128:132] == b"DICM"
            walked = dicom_elements.walk(file, start, _header_tags()) if marked else None
    except OSError as error:
        raise Refused("unreadable", f"The file cannot be read ({error.strerror or 'I/O error'}).") from error
    except Exception as error:  # an unknown character set
        raise Refused("unreadable_dicom", _damage(error)) from error
    if not marked and start[:2] not in (b"\x08\x00", b"\x02\x00"):  # files without the preamble begin with a tag
        return None
    if marked and start[132:136] in (b"", bytes(4)):  # read without end, element by element, if it is all zeros
        raise Refused("unreadable_dicom", "The DICOM file is damaged (no element follows its mark); export it again.")
    data: Any = walked or read_dataset(path, stop_before_pixels=True, specific_tags=list(_header_tags()))
    try:
        sop_class = str(data.get("SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID") or "")
        if sop_class == _DICOMDIR or not (sop_class or marked):
            return None
        _check_size(size, data)
        plain = dicom_plain.find_plain(data, walked.pixels, size) if walked and walked.pixels else None
        return _headers(path, root, data, sop_class, plain)
    except Refused:
        raise
    except Exception as error:  # values are parsed when they are asked for, and may be anything
        raise Refused("unreadable_dicom", _damage(error)) from error


@cache
def _header_tags() -> frozenset[int]:
    """The tags as numbers: pydicom looks names up anew for every file."""
    from pydicom.tag import Tag

    return frozenset(Tag(name) for name in (*_HEADER_TAGS, "SpecificCharacterSet"))


def read_headers(
    paths: Sequence[tuple[Path, Path]],
) -> tuple[list[Header], list[tuple[Path, Path, Refused]], list[Path]]:
    """Read many headers in parallel threads.

    Args:
        paths: (file, folder that was given).

    Returns:
        Headers in the order given; damaged files with the cause; files that are no DICOM.
    """
    headers: list[Header] = []
    damaged: list[tuple[Path, Path, Refused]] = []
    others: list[Path] = []
    _header_tags()  # imports pydicom, which threads that begin at different parts of it would find half made
    with ThreadPoolExecutor(max_workers=8) as pool:
        for (path, root), result in zip(paths, pool.map(_attempt, paths), strict=True):
            if isinstance(result, Refused):
                damaged.append((path, root, result))
            elif result is None:
                others.append(path)
            else:
                headers += result
    return headers, damaged, others


def _attempt(item: tuple[Path, Path]) -> tuple[Header, ...] | Refused | None:
    try:
        return read_header(*item)
    except Refused as error:
        return error


def _damage(error: Exception) -> str:
    return f"The DICOM file is damaged ({type(error).__name__}); export it again."


def _check_size(size: int, data: Any) -> None:
    """Refuse files that would fill the memory: pixels without end, or junk behind an image."""
    values = [int(data.get(name) or 1) for name in ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel")]
    declared = int(np.prod(values, dtype=object)) * max(int(data.get("BitsAllocated") or 8), 8) // 8
    if declared > _MAX_PIXEL_BYTES or values[2] > _MAX_FRAMES:
        raise Refused("too_large", f"The file declares {declared / 1e9:.1f} GB of pixels in {values[2]} frames.")
    if "BitsAllocated" in data and size > 2 * declared + _MAX_EXTRA_BYTES:
        raise Refused("too_large", f"The file has {size / 1e6:.0f} MB for {declared / 1e6:.1f} MB of pixels.")


def _headers(path: Path, root: Path, data: Any, sop_class: str, plain: dicom_plain.Plain | None) -> tuple[Header, ...]:
    whole = _header(path, root, data, sop_class)
    if dicom_mosaic.is_siemens(data) and whole.frames == 1:
        return _tiles(path, data, whole)
    if "PerFrameFunctionalGroupsSequence" not in data:
        single = whole.frames == 1
        return (replace(whole, planar=single, traits=dicom_frames.traits_of(data), plain=plain if single else None),)
    planes = dicom_frames.planes(data)
    if len(planes) != whole.frames:
        raise Refused("frame_count", f"The file declares {whole.frames} frames and describes {len(planes)}.")
    return tuple(
        replace(
            whole,
            frame=number,
            position=plane.position,
            orientation=plane.orientation,
            spacing=plane.spacing,
            image_type=plane.frame_type or whole.image_type,
            mosaic=whole.mosaic or UNKNOWN_MOSAIC * plane.mosaic,
            traits=plane.traits,
        )
        for number, plane in enumerate(planes)
    )


def _tiles(path: Path, data: Any, whole: Header) -> tuple[Header, ...]:
    """One header per slice of a mosaic; the whole, marked, when its slices cannot be placed."""
    private = read_dataset(path, stop_before_pixels=True, specific_tags=dicom_mosaic.TAGS)
    try:
        mosaic = dicom_mosaic.read_mosaic(data, private)
    except Refused as error:
        return (replace(whole, mosaic=error.reason),)
    return tuple(
        replace(
            whole,
            frame=number,
            position=tuple(map(float, position)),
            rows=mosaic.rows,
            columns=mosaic.columns,
            mosaic="",
            image_type=tuple(part for part in whole.image_type if part != "MOSAIC"),
            traits=dicom_frames.traits_of(data),
        )
        for number, position in enumerate(mosaic.positions)
    )


def _header(path: Path, root: Path, data: Any, sop_class: str) -> Header:
    return Header(
        path=path,
        root=root,
        sop_class=sop_class,
        sop_uid=str(data.get("SOPInstanceUID") or path),
        series_uid=str(data.get("SeriesInstanceUID") or ""),
        patient=str(data.get("PatientID") or "").strip(),
        institution=str(data.get("InstitutionName") or "").strip(),
        modality=known_modality(data.get("Modality")),
        image_type=tuple(str(part) for part in np.atleast_1d(data.get("ImageType") or [])),
        rows=int(data.get("Rows") or 0),
        columns=int(data.get("Columns") or 0),
        frames=int(data.get("NumberOfFrames") or 1),
        samples=int(data.get("SamplesPerPixel") or 1),
        has_pixels="BitsAllocated" in data,
        position=dicom_frames.numbers(data.get("ImagePositionPatient")),
        orientation=dicom_frames.numbers(data.get("ImageOrientationPatient")),
        spacing=dicom_frames.numbers(data.get("PixelSpacing")),
        mosaic=UNKNOWN_MOSAIC * dicom_frames.is_mosaic(data),
        instance=int(data.get("InstanceNumber") or 0),
        description=str(data.get("SeriesDescription") or ""),
        study_uid=str(data.get("StudyInstanceUID") or ""),
        frame_uid=str(data.get("FrameOfReferenceUID") or ""),
        study_date=str(data.get("StudyDate") or ""),
    )
