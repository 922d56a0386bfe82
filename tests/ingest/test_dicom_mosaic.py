"""Siemens mosaics: nibabel's real headers place the slices where dcm2niix does; what contradicts itself stays out."""

import gzip
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dcm2niix
import nibabel as nib
import numpy as np
import pydicom
import pytest

from medseg.config import IngestConfig
from medseg.ingest.scan import Refused
from medseg.ingest.sources import discover, read_source
from medseg.volume import Volume, to_canonical

KEY = b"k" * 32
REAL = Path(nib.__file__).parent / "nicom" / "tests" / "data"
pytestmark = pytest.mark.skipif(not (REAL / "siemens_dwi_0.dcm.gz").is_file(), reason="nibabel came without test data")


def real(folder: Path, *b_values: int) -> list[Path]:
    folder.mkdir(parents=True)
    paths = []
    for b in b_values:
        paths.append(folder / f"{b}.dcm")
        data = pydicom.dcmread(io.BytesIO(gzip.decompress((REAL / f"siemens_dwi_{b}.dcm.gz").read_bytes())))
        pixels = np.random.default_rng(b).integers(0, 4096, (data.Rows, data.Columns))  # they came without any
        data.PixelData = pixels.astype("<u2").tobytes()
        data.save_as(paths[-1])
    return paths


def by_dcm2niix(folder: Path, out: Path) -> list[Volume]:
    out.mkdir()
    dcm2niix.main(["-b", "n", "-z", "n", "-f", "%j_%s_%r", "-o", str(out), str(folder)], capture_output=True)
    volumes = []
    for path in sorted(out.glob("*.nii")):
        image: Any = nib.load(path)
        array = np.asarray(image.dataobj).reshape(*image.shape[:3], -1)
        volumes += [to_canonical(Volume(array[..., t], image.affine)) for t in range(array.shape[3])]
    return volumes


def edit(path: Path, change: Callable[[Any], object]) -> None:
    data = pydicom.dcmread(path)
    change(data)
    data.save_as(path)


def turn(data: Any) -> None:
    """Another oblique orientation and place, told alike in all three accounts of the header."""
    rotation = np.array([[0.6, 0.8, 0.0], [-0.64, 0.48, 0.6], [0.48, -0.36, 0.8]])
    shift = np.array([11.0, -7.5, 3.25])
    row, column = np.reshape(np.array(data.ImageOrientationPatient, float), (2, 3)) @ rotation.T
    data.ImageOrientationPatient = [f"{number:.10f}" for number in (*row, *column)]
    moved = np.array(data.ImagePositionPatient, float) @ rotation.T + shift
    data.ImagePositionPatient = [f"{number:.9f}" for number in moved]
    normal = np.cross(row, column)
    data[0x0029, 0x1010].value = with_normal(data[0x0029, 0x1010].value, normal)
    data[0x0029, 0x1020].value = moved_slices(data[0x0029, 0x1020].value, rotation, shift)


def with_normal(content: bytes, normal: np.ndarray) -> bytes:
    """The CSA header with another SliceNormalVector, item by item in place."""
    at = content.index(b"SliceNormalVector") + 84
    for number in normal:
        length = int.from_bytes(content[at + 4 : at + 8], "little")
        text = f"{number:.8f}".encode()[: length - 1].ljust(length, b"\0")
        content = content[: at + 16] + text + content[at + 16 + length :]
        at += 16 + (length + 3) // 4 * 4
    return content


def moved_slices(content: bytes, rotation: np.ndarray, shift: np.ndarray) -> bytes:
    """The protocol with its slices turned and moved; the text keeps its length, so that the header stays whole."""
    start = content.index(b"### ASCCONV BEGIN", content.index(b"MrPhoenixProtocol"))
    end = content.index(b"### ASCCONV END", start)
    lines = content[start:end].decode("latin-1").split("\n")
    centres = np.zeros((48, 3))
    kept = []
    for line in lines:
        found = re.match(r"sSliceArray\.asSlice\[(\d+)\]\.sPosition\.d(Sag|Cor|Tra)\s*= (\S+)", line)
        if found:
            centres[int(found[1]), ["Sag", "Cor", "Tra"].index(found[2])] = float(found[3])
        elif "sNormal" not in line:
            kept.append(line)
    for k, centre in enumerate(centres @ rotation.T + shift):
        for axis, value in zip(("Sag", "Cor", "Tra"), centre, strict=True):
            kept.insert(1, f"sSliceArray.asSlice[{k}].sPosition.d{axis} = {value:.8f}")
    text = "\n".join(kept).encode("latin-1")
    assert len(text) <= end - start
    return content[:start] + text.ljust(end - start) + content[end:]


@pytest.mark.parametrize("change", [None, turn])
def test_real_mosaics_come_out_as_dcm2niix_makes_them(tmp_path: Path, change: Callable[[Any], None] | None) -> None:
    for path in real(tmp_path / "d", 0, 1000):
        if change is not None:
            edit(path, change)
    theirs = by_dcm2niix(tmp_path / "d", tmp_path / "out")
    sources, rejects = discover([tmp_path / "d"], IngestConfig(), key=KEY)
    assert (len(sources), len(theirs), rejects) == (2, 2, [])
    for source in sources:
        ours = to_canonical(read_source(source).channels[0])
        assert ours.array.shape == (128, 128, 48)
        (same,) = [other for other in theirs if np.array_equal(other.array, ours.array)]
        np.testing.assert_allclose(ours.affine, same.affine, atol=1e-4)


def private(data: Any, offset: int, old: bytes, new: bytes) -> None:
    content = data[0x0029, offset].value
    assert old in content
    data[0x0029, offset].value = content.replace(old, new)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[0x0019, 0x100A].__setattr__("value", 47), "47 or 48 slices"),
        (lambda data: data.__delitem__((0x0029, 0x1010)), "no CSA header"),
        (lambda data: data.__setattr__("ImagePositionPatient", [-805, -825, -70.1]), r"5\.00 mm along"),
        (lambda data: data.__setattr__("ImagePositionPatient", [-700, -825, -75.1]), "58.4 pixels beside"),
        (lambda data: data.__setattr__("SpacingBetweenSlices", 2.5), "3.000 mm apart by the protocol and 2.500"),
        (lambda data: data.__setattr__("ImageOrientationPatient", [1, 0, 0, 0, 0, 1]), "off the picture's"),
        (lambda data: data.__setattr__("PixelSpacing", None), "missing"),
        (lambda data: private(data, 0x1020, b"asSlice[47]", b"asSlice[48]"), "places 49 slices|places 48 slices"),
        (lambda data: private(data, 0x1010, b"0.99998629", b"-.99998629"), "run along the normal"),
        (lambda data: private(data, 0x1020, b"SV10", b"SV99"), "version 2"),
        (
            lambda data: data[0x0029, 0x1010].__setattr__("value", b"SV10" + bytes(4) + b"\x05\0\0\0" + bytes(90)),
            "damaged",
        ),
    ],
)
def test_a_mosaic_that_contradicts_itself_is_refused(tmp_path: Path, change: Callable[[Any], None], words: str) -> None:
    (path,) = real(tmp_path / "d", 0)
    edit(path, change)
    sources, (reject,) = discover([tmp_path / "d"], IngestConfig(), key=KEY)
    assert (sources, reject.code) == ([], "mosaic")
    assert re.search(words, reject.reason), reject.reason


def test_a_picture_cut_short_is_refused(tmp_path: Path) -> None:
    (path,) = real(tmp_path / "d", 0)
    path.write_bytes(path.read_bytes()[:-100_000])
    (source,), _ = discover([tmp_path / "d"], IngestConfig(), key=KEY)
    with pytest.raises(Refused, match="cut short"):
        read_source(source)
