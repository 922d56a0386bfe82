"""Headers walked without pydicom say what pydicom says, and pixels read in one piece are those that it decodes."""

import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_files
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, VR

from medseg.config import IngestConfig
from medseg.ingest import dicom_elements, dicom_headers
from medseg.ingest.dicom_headers import Header, read_header
from medseg.ingest.dicom_pixels import _above_median
from medseg.ingest.dicom_write import write_series
from medseg.ingest.scan import Refused, Source
from medseg.ingest.sources import discover, read_source
from medseg.volume import Volume

Outcome = list[Header] | tuple[str, str] | None


def outcome(path: Path) -> Outcome:
    """The headers of a file, less what only the walk finds, or the refusal."""
    try:
        headers = read_header(path, path.parent)
    except Refused as error:
        return error.code, error.reason
    return None if headers is None else [replace(header, plain=None) for header in headers]


def by_pydicom(path: Path, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    with monkeypatch.context() as patched:
        patched.setattr(dicom_elements, "walk", lambda *_: None)
        return outcome(path)


def walked(path: Path) -> dicom_elements.Elements | None:
    with path.open("rb") as file:
        return dicom_elements.walk(file, file.read(dicom_elements.FIRST_BYTES), dicom_headers._header_tags())


def mutant(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(132, min(len(data), 3000))
        data[at] = rng.choice([0, 0x7F, 0xFF, rng.randrange(256)])
    return bytes(data[: rng.randrange(132, len(data))] if rng.random() < 0.1 else data)


def one_source(folder: Path) -> Source:
    (source,), rejects = discover([folder], IngestConfig(), key=b"k" * 32)
    assert rejects == []
    return source


def refusal(source: Source) -> tuple[str, str]:
    with pytest.raises(Refused) as caught:
        read_source(source)
    return caught.value.code, caught.value.reason


def test_the_value_representations_are_pydicoms() -> None:
    assert {vr.decode() for vr in dicom_elements.LONG_VRS} == {str(vr) for vr in EXPLICIT_VR_LENGTH_32}
    known = {str(vr) for vr in VR if len(vr) == 2}
    assert {vr.decode() for vr in dicom_elements.SHORT_VRS | dicom_elements.LONG_VRS} == known


def test_every_file_of_pydicom_has_the_header_that_pydicom_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings.simplefilter("ignore")
    paths = [path for path in map(Path, get_testdata_files()) if path.is_file() and path.stat().st_size < 1 << 19]
    for path in paths:
        assert outcome(path) == by_pydicom(path, monkeypatch), path.name
    assert sum(walked(path) is not None for path in paths) > 30


def test_damaged_headers_are_read_or_refused_as_pydicom_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings.simplefilter("ignore")
    files = [write_series(Volume(np.ones((8, 8, 3), np.int16), np.eye(4)), tmp_path / "s", patient_id="p")[0]]
    names = ("CT_small.dcm", "MR_small.dcm", "MR_small_implicit.dcm", "JPEG2000.dcm", "nested_priv_SQ.dcm")
    files += [Path(str(pydicom.data.get_testdata_file(name))) for name in names]
    contents, rng, taken = [path.read_bytes() for path in files], random.Random(0), 0
    path = tmp_path / "mutant"
    for _ in range(300):
        path.write_bytes(mutant(rng.choice(contents), rng))
        assert outcome(path) == by_pydicom(path, monkeypatch)
        taken += walked(path) is not None
    assert taken > 50


def scanner_like(path: Path, syntax: str, change: Callable[[Any], None]) -> None:
    """Give a file what scanners add: private elements, nested sequences with and without lengths, a character set."""
    data = pydicom.dcmread(path)
    data.SpecificCharacterSet = "ISO_IR 192"
    data.PatientID, data.InstitutionName, data.SeriesDescription = "Łódź", "Krankenhaus Süd", "Kopf öäü"
    inner = Dataset()
    inner.CodeValue = "T-A0100"
    for undefined in (True, False):
        item = Dataset()
        item.PurposeOfReferenceCodeSequence = Sequence([inner])
        item["PurposeOfReferenceCodeSequence"].is_undefined_length = undefined
        item.ReferencedSOPInstanceUID = "1.2.3"
        item.is_undefined_length_sequence_item = undefined
        name = "ReferencedImageSequence" if undefined else "SourceImageSequence"
        setattr(data, name, Sequence([item, Dataset(), item]))
        data[name].is_undefined_length = undefined
    block = data.private_block(0x0029, "MAKER HEADER", create=True)
    block.add_new(0x10, "OB", bytes(80_000))  # longer than what is read at first
    data.PixelPaddingValue = -2000
    change(data)
    data.file_meta.TransferSyntaxUID = syntax
    data.save_as(path, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_what_scanners_write_is_walked(tmp_path: Path, syntax: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_series(Volume(np.ones((8, 9, 3), np.int16), np.eye(4)), tmp_path / "s", patient_id="p")
    for path in files:
        scanner_like(path, syntax, lambda data: None)
    assert outcome(files[0]) == by_pydicom(files[0], monkeypatch)
    (header,) = read_header(files[0], tmp_path) or ()
    assert (header.patient, header.institution) == ("Łódź", "Krankenhaus Süd")
    assert header.plain is not None
    assert header.plain.padding == (-2000, -2000)


def test_what_is_irregular_is_left_to_pydicom(tmp_path: Path) -> None:
    (path, *_) = write_series(Volume(np.ones((8, 9, 3), np.int16), np.eye(4)), tmp_path / "s", patient_id="p")
    scanner_like(path, ExplicitVRLittleEndian, lambda data: None)
    content = path.read_bytes()
    assert walked(path) is not None
    item, rows = content.index(b"\xfe\xff\x00\xe0"), content.index(b"\x28\x00\x10\x00US")
    changes = {
        "an unknown value representation": content[: rows + 4] + b"QQ" + content[rows + 6 :],
        "tags that fall": content[:rows] + b"\x08\x00" + content[rows + 2 :],
        "an item with no end": content[: item + 4] + b"\x04\0\0\0" + content[item + 8 :],
        "no pixels": content[: content.index(b"\xe0\x7f\x10\x00")],
        "another syntax": content.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.2\0", 1),
        "no preamble": content[132:],
    }
    for change, damaged in changes.items():
        path.write_bytes(damaged)
        assert walked(path) is None, change


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
@pytest.mark.parametrize("bits", [None, 12])
@pytest.mark.parametrize("scale", [(1, 0), (1, -1024), (1, 40000), (-3, 7), (0.5, 0.25)])
def test_pixels_read_in_one_piece_are_those_that_pydicom_decodes(
    tmp_path: Path, dtype: Any, bits: int | None, scale: tuple[float, float]
) -> None:
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (9, 7, 4), endpoint=True).astype(dtype)

    def change(data: Any) -> None:
        data.BitsStored = bits if bits and dtype != np.uint8 else data.BitsAllocated
        data.HighBit = data.BitsStored - 1
        data.RescaleSlope, data.RescaleIntercept = scale[0], scale[1] + int(data.InstanceNumber)
        data.PixelPaddingValue, data.PixelPaddingRangeLimit = (100, 20) if dtype != np.int16 else (-300, -20)

    for path in write_series(Volume(values, np.eye(4)), tmp_path / "s", patient_id="p"):
        scanner_like(path, ExplicitVRLittleEndian, change)
    source = one_source(tmp_path)
    assert all(plain is not None for plain in source.plain)
    fast, slow = read_source(source), read_source(replace(source, plain=()))
    np.testing.assert_array_equal(fast.channels[0].array, slow.channels[0].array)
    assert fast.channels[0].array.dtype == slow.channels[0].array.dtype
    assert (fast.findings, fast.source_sha256) == (slow.findings, slow.source_sha256)
    data = [pydicom.dcmread(path) for path in source.files]
    true = [d.pixel_array.T * float(d.RescaleSlope) + float(d.RescaleIntercept) for d in data]
    np.testing.assert_allclose(fast.channels[0].array, np.stack(true, axis=2))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-10],
        lambda content: content + b"\xfc\xff\xfc\xffOB\0\0\x04\0\0\0abcd",
        lambda content: content[:-16] + bytes(16),
        lambda content: b"",
    ],
)
def test_a_file_that_changes_after_it_was_found_is_read_or_refused_as_it_is(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    volume = Volume(np.arange(8 * 9 * 3).reshape(8, 9, 3).astype(np.int16), np.eye(4))
    path = write_series(volume, tmp_path / "s", patient_id="p")[1]
    source = one_source(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    again = replace(source, plain=())
    try:
        expected = read_source(again).channels[0].array
    except Refused:
        assert refusal(source) == refusal(again)
    else:
        np.testing.assert_array_equal(read_source(source).channels[0].array, expected)


def test_bytes_behind_the_pixels_are_read_by_pydicom(tmp_path: Path) -> None:
    volume = Volume(np.arange(8 * 9 * 3).reshape(8, 9, 3).astype(np.int16), np.eye(4))
    for path in write_series(volume, tmp_path / "s", patient_id="p"):
        path.write_bytes(path.read_bytes() + b"\xfc\xff\xfc\xffOB\0\0\x04\0\0\0abcd")
    source = one_source(tmp_path)
    assert source.plain == (None,) * 3
    np.testing.assert_array_equal(read_source(source).channels[0].array, volume.array)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_counting_tells_what_lies_above_the_median(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(50):
        array = rng.integers(0, 5, count).astype(np.int16)
        for value in range(-1, 6):
            assert _above_median(value, array) == (value > np.median(array))
