"""Every compressed syntax against an independent account of its pixels: an uncompressed twin, dcm2niix, DCMTK, or an
encoder written here.

Each file becomes a series of three slices and goes through the door that every series goes through.
"""

import shutil
import subprocess
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import dcm2niix
import nibabel as nib
import numpy as np
import pydicom
import pydicom.data
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, JPEGLossless, JPEGLosslessSV1

from medseg.config import IngestConfig
from medseg.ingest.dicom_write import write_series
from medseg.ingest.sources import discover, read_source
from medseg.volume import Volume, to_canonical

KEY = b"k" * 32
FILES = Path(pydicom.data.__file__).parent / "test_files"
SLICES = 3
needs_dcmtk = pytest.mark.skipif(shutil.which("dcmcjpeg") is None, reason="DCMTK (dcmcjpeg, dcmdjpeg) is not installed")


def as_series(file: Path, folder: Path) -> Path:
    """Three slices with the pixels of one file, in its own syntax, at places of their own."""
    folder.mkdir()
    for k in range(SLICES):
        data = pydicom.dcmread(file)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"2.25.{k + 1}"
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        data.SeriesInstanceUID, data.StudyInstanceUID = "2.25.9", "2.25.8"
        data.Modality, data.InstanceNumber, data.ImageType = "MR", k + 1, ["ORIGINAL", "PRIMARY", "M"]
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 2 * k], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing = [1, 1]
        for keyword in ("NumberOfFrames", "PixelPaddingValue", "RescaleSlope", "RescaleIntercept", "SliceThickness"):
            if keyword in data:
                del data[keyword]
        data.save_as(folder / f"{k}.dcm")
    return folder


def read(folder: Path) -> Volume:
    (source,), rejects = discover([folder], IngestConfig(), key=KEY)
    assert rejects == []
    return read_source(source).channels[0]


def slice_of(folder: Path) -> NDArray[Any]:
    """(row, column) of the slices, which are alike."""
    array = read(folder).array
    assert (array == array[..., :1]).all()
    return array[..., 0].T


@pytest.mark.parametrize(
    "name",
    [
        *("MR_small_RLE", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "MR_small_bigendian"),
        *("MR_small_expb", "MR_small_implicit", "MR_small_padded"),
    ],
)
def test_pydicoms_files_are_their_uncompressed_twin(tmp_path: Path, name: str) -> None:
    twin = pydicom.dcmread(FILES / "MR_small.dcm")
    expected = np.frombuffer(twin.PixelData, "<i2").reshape(twin.Rows, twin.Columns)
    np.testing.assert_array_equal(slice_of(as_series(FILES / f"{name}.dcm", tmp_path / "s")), expected)


def by_dcm2niix(folder: Path, out: Path) -> Volume:
    out.mkdir()
    dcm2niix.main(["-b", "n", "-z", "n", "-o", str(out), str(folder)], capture_output=True)
    (path,) = out.glob("*.nii")
    image: Any = nib.load(path)
    return to_canonical(Volume(np.asarray(image.dataobj), image.affine))


@pytest.mark.parametrize("name", ["693_J2KI", "JPEG2000", "JPEGLSNearLossless_08", "JPEGLSNearLossless_16"])
def test_pydicoms_files_decode_as_dcm2niix_decodes_them(tmp_path: Path, name: str) -> None:
    folder = as_series(FILES / f"{name}.dcm", tmp_path / "s")
    ours, theirs = to_canonical(read(folder)), by_dcm2niix(folder, tmp_path / "out")
    np.testing.assert_array_equal(ours.array, theirs.array)
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-4)


def test_the_sign_of_a_jpeg_2000_file_is_that_of_its_dicom_header(tmp_path: Path) -> None:
    folder = as_series(FILES / "J2K_pixelrep_mismatch.dcm", tmp_path / "s")
    ours, theirs = to_canonical(read(folder)).array, by_dcm2niix(folder, tmp_path / "out").array.astype(int)
    # 13 bits, signed by the DICOM header and unsigned by the codestream, which dcm2niix believes.
    np.testing.assert_array_equal(ours, np.where(theirs >= 4096, theirs - 8192, theirs))
    assert ours.min() == -2000


def test_a_deflated_file_is_what_zlib_inflates(tmp_path: Path) -> None:
    content = (FILES / "image_dfl.dcm").read_bytes()
    length = int.from_bytes(content[140:144], "little")
    inflated = zlib.decompress(content[144 + length :], -zlib.MAX_WBITS)
    pixels = np.frombuffer(inflated[inflated.rindex(b"\xe0\x7f\x10\x00") + 12 :], np.uint8)[: 512 * 512]
    np.testing.assert_array_equal(
        slice_of(as_series(FILES / "image_dfl.dcm", tmp_path / "s")), pixels.reshape(512, 512)
    )


def predict(image: NDArray[np.int64], selection: int, bits: int) -> NDArray[np.int64]:
    """The prediction of every sample (ITU-T T.81, table H.1; its first line and column by H.1.1)."""
    a, b, c = (np.zeros_like(image) for _ in range(3))  # left, above, left above
    a[:, 1:], b[1:], c[1:, 1:] = image[:, :-1], image[:-1], image[:-1, :-1]
    inner = (a, b, c, a + b - c, a + ((b - c) >> 1), b + ((a - c) >> 1), (a + b) >> 1)[selection - 1]
    predicted = inner.copy()
    predicted[0], predicted[1:, 0], predicted[0, 0] = a[0], b[1:, 0], 1 << (bits - 1)
    return predicted


def lossless_jpeg(image: NDArray[Any], selection: int, bits: int) -> bytes:
    """Lossless, sequential, Huffman-coded JPEG (ITU-T T.81, annex H); all 17 categories have codes of five bits."""
    difference = (image.astype(np.int64) - predict(image.astype(np.int64), selection, bits)) & 0xFFFF
    stream = []
    for value in difference.ravel().tolist():
        signed = value - 65536 if value > 32768 else value
        category = abs(signed).bit_length()  # 32768 is category 16 and carries no further bits
        stream.append(f"{category:05b}")
        if 0 < category < 16:
            stream.append(f"{signed if signed > 0 else signed + (1 << category) - 1:0{category}b}")
    text = "".join(stream)
    text += "1" * (-len(text) % 8)
    coded = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")
    rows, columns = image.shape
    frame = bytes([bits, *rows.to_bytes(2, "big"), *columns.to_bytes(2, "big"), 1, 1, 0x11, 0])
    table = bytes([0, *(17 if length == 5 else 0 for length in range(1, 17)), *range(17)])
    scan = bytes([1, 1, 0, selection, 0, 0])
    segments = [(0xC3, frame), (0xC4, table), (0xDA, scan)]
    head = b"".join(bytes([0xFF, mark]) + (len(body) + 2).to_bytes(2, "big") + body for mark, body in segments)
    return b"\xff\xd8" + head + coded + b"\xff\xd9"


def encapsulated(folder: Path, frame: bytes, syntax: Any, image: NDArray[Any], bits: int) -> Path:
    """A series whose every slice is this frame."""
    zeros = np.zeros((*image.T.shape, SLICES), image.dtype)
    for path in write_series(Volume(zeros, np.eye(4)), folder, patient_id="p"):
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = syntax
        data.BitsAllocated, data.BitsStored, data.HighBit = 8 * image.dtype.itemsize, bits, bits - 1
        data.PixelRepresentation = int(image.dtype.kind == "i")
        data.PixelData = encapsulate([frame])
        data["PixelData"].is_undefined_length = True
        data.save_as(path)
    return folder


@pytest.mark.parametrize("selection", range(1, 8))
@pytest.mark.parametrize(("dtype", "bits"), [("u1", 8), ("u2", 12), ("u2", 16), ("i2", 16)])
def test_lossless_jpeg_of_every_predictor(tmp_path: Path, selection: int, dtype: str, bits: int) -> None:
    rng = np.random.default_rng(selection)
    smooth = np.add.outer(np.arange(21), np.arange(26)) * ((1 << bits) // 60)
    image = ((smooth + rng.integers(0, 1 << bits, (21, 26)) * (rng.random((21, 26)) < 0.2)) % (1 << bits)).astype(
        f"u{dtype[1]}"
    )
    syntax = JPEGLosslessSV1 if selection == 1 else JPEGLossless
    frame, image = lossless_jpeg(image, selection, bits), image.view(dtype)
    np.testing.assert_array_equal(slice_of(encapsulated(tmp_path / "s", frame, syntax, image, bits)), image)


def test_baseline_jpeg_is_what_pillow_decodes(tmp_path: Path) -> None:
    smooth = 100 + 80 * np.sin(np.add.outer(np.arange(40) / 9, np.arange(56) / 7))
    file = BytesIO()
    Image.fromarray(smooth.astype(np.uint8)).save(file, format="JPEG", quality=90)
    expected = np.asarray(Image.open(file))
    found = slice_of(encapsulated(tmp_path / "s", file.getvalue(), JPEGBaseline8Bit, expected, 8))
    assert np.abs(found.astype(int) - expected).max() <= 1  # decoders may round their cosines differently


def test_extended_jpeg_shows_what_its_jpeg_2000_twin_shows(tmp_path: Path) -> None:
    twelve = slice_of(as_series(FILES / "JPGExtended.dcm", tmp_path / "a")).astype(float)
    twin = slice_of(as_series(FILES / "JPEG2000.dcm", tmp_path / "b")).astype(float)  # both are lossy, and strongly
    assert twelve.max() > 255
    assert np.corrcoef(twelve.ravel(), twin.ravel())[0, 1] > 0.95


@needs_dcmtk
def test_extended_jpeg_is_what_dcmtk_decodes(tmp_path: Path) -> None:
    found = slice_of(as_series(FILES / "JPGExtended.dcm", tmp_path / "s")).astype(int)
    assert np.abs(found - decoded_by_dcmtk(FILES / "JPGExtended.dcm", tmp_path)).max() <= 1


@needs_dcmtk
@pytest.mark.parametrize(("option", "levels"), [("+el", 0), ("+e1", 0), ("+eb", 1)])
def test_what_dcmtk_codes_is_what_dcmtk_decodes(tmp_path: Path, option: str, levels: int) -> None:
    bits = 8 if option == "+eb" else 12
    smooth = (1 + np.sin(np.add.outer(np.arange(48) / 9, np.arange(56) / 7))) * ((1 << bits) / 2 - 1)
    files = write_series(Volume(smooth.T[..., None].astype(np.uint16), np.eye(4)), tmp_path / "one", patient_id="p")
    data = pydicom.dcmread(files[0])
    if bits == 8:
        data.BitsAllocated, data.PixelData = 8, smooth.astype(np.uint8).tobytes()
        data["PixelData"].VR = "OB"
    data.BitsStored, data.HighBit, data.PixelRepresentation = bits, bits - 1, 0
    data.save_as(tmp_path / "raw.dcm")
    coded = tmp_path / "coded.dcm"
    subprocess.run(["dcmcjpeg", "+un", option, tmp_path / "raw.dcm", coded], check=True, capture_output=True)
    assert "JPEG" in pydicom.dcmread(coded).file_meta.TransferSyntaxUID.name
    found = slice_of(as_series(coded, tmp_path / "s")).astype(int)
    assert np.abs(found - decoded_by_dcmtk(coded, tmp_path)).max() <= levels


def decoded_by_dcmtk(file: Path, folder: Path) -> NDArray[Any]:
    subprocess.run(["dcmdjpeg", file, folder / "plain.dcm"], check=True, capture_output=True)
    plain = pydicom.dcmread(folder / "plain.dcm")
    dtype = "<u1" if plain.BitsAllocated == 8 else "<u2"
    return np.frombuffer(plain.PixelData, dtype)[: plain.Rows * plain.Columns].reshape(plain.Rows, plain.Columns)
