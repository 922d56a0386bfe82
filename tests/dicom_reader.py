"""Reads what medseg writes as DICOM with pydicom and the standard's equations alone, and asks dciodvfy about it."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

needs_dciodvfy = pytest.mark.skipif(
    shutil.which("dciodvfy") is None, reason="dciodvfy is not installed (Debian package dicom3tools)"
)


def dciodvfy_errors(path: Path) -> list[str]:
    """What dciodvfy calls errors in a file."""
    assert path.is_file()
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, errors="replace", check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert any(not line.lstrip().startswith(("Warning", "Error")) for line in lines), "the object was recognised"
    return [line for line in lines if "Error" in line]


def seg_points(path: Path) -> dict[int, np.ndarray]:
    """World positions (n, 3) in LPS mm of the voxels of each segment that has any."""
    seg = pydicom.dcmread(path)
    shared = seg.SharedFunctionalGroupsSequence[0]
    down_mm, across_mm = (float(s) for s in shared.PixelMeasuresSequence[0].PixelSpacing)
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    points: dict[int, list[np.ndarray]] = {}
    for number, (frame, plane) in enumerate(zip(seg.PerFrameFunctionalGroupsSequence, _planes(seg), strict=True)):
        position = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        for value in np.unique(plane[plane > 0]):
            rows, columns = np.nonzero(plane == value)
            found = position + columns[:, None] * across_mm * cosines[:3] + rows[:, None] * down_mm * cosines[3:]
            points.setdefault(_segment_of(seg, number) or int(value), []).append(found)
    return {segment: np.concatenate(parts) for segment, parts in points.items()}


def measured_ml(report: pydicom.Dataset) -> dict[str, tuple[float, int, str]]:
    """Tracking UID to (volume in ml, segment number, SOP Instance UID of the segmentation) of each group."""
    found = {}
    for group in _containers(report, "125007"):
        numbers = [item for item in group.ContentSequence if item.ValueType == "NUM"]
        (value,) = (item.MeasuredValueSequence[0] for item in numbers if _name(item) == "118565006")
        assert value.MeasurementUnitsCodeSequence[0].CodeValue == "cm3"
        (tracking,) = (item.UID for item in group.ContentSequence if _name(item) == "112040")
        (segment,) = (item.ReferencedSOPSequence[0] for item in group.ContentSequence if _name(item) == "121191")
        number = int(np.atleast_1d(segment.ReferencedSegmentNumber)[0])
        found[tracking] = (float(value.NumericValue), number, segment.ReferencedSOPInstanceUID)
    return found


def evaluations(report: pydicom.Dataset) -> list[tuple[str, str]]:
    """Codes of (name, value) of all coded statements of the measurement groups, but for what identifies the group."""
    return [
        (_name(item), _code(item.ConceptCodeSequence[0]))
        for group in _containers(report, "125007")
        for item in group.ContentSequence
        if item.ValueType == "CODE"
    ]


def numbers(report: pydicom.Dataset) -> dict[str, tuple[float, ...]]:
    """Code of each measurement to its value, and the ends of its interval where it has one."""
    found = {}
    for group in _containers(report, "125007"):
        for item in (item for item in group.ContentSequence if item.ValueType == "NUM"):
            value = _number(item)
            ranges = {_name(part): _number(part) for part in item.get("ContentSequence", ())}
            ends = (value - ranges["371885007"], value + ranges["371886008"]) if ranges else ()
            found[_name(item)] = (value, *ends)
    return found


def undeclared_schemes(report: pydicom.Dataset) -> set[str]:
    """Private coding schemes (99…) of codes anywhere in the document that it does not identify."""
    used = {element.value for element in report.iterall() if element.keyword == "CodingSchemeDesignator"}
    declared = {item.CodingSchemeDesignator for item in report.get("CodingSchemeIdentificationSequence", ())}
    return {scheme for scheme in used if scheme.startswith("99")} - declared


def concepts(report: pydicom.Dataset, concept: str) -> list[str]:
    """The meanings of all codes that are said to be `concept` (a code value), anywhere in the tree."""
    return [item.ConceptCodeSequence[0].CodeMeaning for item in _items(report) if _name(item) == concept]


def _planes(seg: Any) -> np.ndarray:
    size, count = (seg.Rows, seg.Columns), int(seg.NumberOfFrames)
    if seg.BitsAllocated == 1:
        bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")
        return bits[: count * size[0] * size[1]].reshape(count, *size)
    kind = "<u2" if seg.BitsAllocated == 16 else np.uint8
    return np.frombuffer(seg.PixelData, kind)[: count * size[0] * size[1]].reshape(count, *size)


def _segment_of(seg: Any, frame: int) -> int | None:
    """The segment that a frame belongs to; None where the pixels say so."""
    if seg.SegmentationType == "LABELMAP":
        return None
    groups = (seg.PerFrameFunctionalGroupsSequence[frame], seg.SharedFunctionalGroupsSequence[0])
    given = next(group for group in groups if "SegmentIdentificationSequence" in group)
    return int(given.SegmentIdentificationSequence[0].ReferencedSegmentNumber)


def _items(item: Any) -> Iterator[Any]:
    yield item
    for child in item.get("ContentSequence", ()):
        yield from _items(child)


def _containers(report: Any, concept: str) -> Iterator[Any]:
    return (item for item in _items(report) if item.ValueType == "CONTAINER" and _name(item) == concept)


def _name(item: Any) -> str:
    return _code(item.ConceptNameCodeSequence[0]) if "ConceptNameCodeSequence" in item else ""


def _code(item: Any) -> str:
    return item.CodeValue if "CodeValue" in item else item.LongCodeValue


def _number(item: Any) -> float:
    return float(item.MeasuredValueSequence[0].NumericValue)
