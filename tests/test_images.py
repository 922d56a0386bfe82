"""What is written is what is read back: values, types, affines; damaged files are named."""

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg.files import UserError
from medseg.images import read_image, write_nifti, write_png
from medseg.volume import Volume

OBLIQUE = np.array([[0.0, -0.8, 1.2, 10], [1.0, 0.0, 0.0, -20], [0.0, 0.6, 1.6, 30], [0, 0, 0, 1]])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32])
def test_nifti_keeps_values_type_and_affine(tmp_path: Path, dtype: Any) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    back = read_image(write_nifti(tmp_path / "a.nii.gz", Volume(array, OBLIQUE)))
    np.testing.assert_array_equal(back.array, array)
    assert back.array.dtype == dtype
    np.testing.assert_allclose(back.affine, OBLIQUE, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_compressed_nifti_is_the_plain_one_packed(tmp_path: Path, dtype: Any, order: Any) -> None:
    array = np.random.default_rng(0).normal(100, 30, (40, 30, 20)).astype(dtype, order=order)
    array[:20] = -1 if dtype != np.uint8 else 0
    plain, packed = (write_nifti(tmp_path / name, Volume(array, OBLIQUE)) for name in ("a.nii", "a.nii.gz"))
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    assert packed.stat().st_size < 0.8 * plain.stat().st_size
    assert write_nifti(tmp_path / "again.nii.gz", Volume(array, OBLIQUE)).read_bytes() == packed.read_bytes()


def test_sform_and_qform_say_the_same(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", Volume(np.zeros((2, 3, 4), np.uint8), OBLIQUE))
    header = nib.load(path).header
    assert int(header["sform_code"]) == int(header["qform_code"]) == 1
    assert header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(header.get_sform(), header.get_qform(), atol=1e-4)


def test_scaled_nifti_is_read_in_its_true_unit(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    image = nib.Nifti1Image(np.full((2, 2, 2), 4.0), np.eye(4), image.header)
    image.set_data_dtype(np.int16)
    nib.save(image, tmp_path / "s.nii")
    assert read_image(tmp_path / "s.nii").array.mean() == pytest.approx(4.0, abs=1e-3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_round_trip(tmp_path: Path, dtype: Any) -> None:
    array = np.linspace(0, np.iinfo(dtype).max, 35).reshape(5, 7).astype(dtype)
    back = read_image(write_png(tmp_path / "a.png", array))
    np.testing.assert_array_equal(back.array, array)
    assert back.array.dtype == dtype


def test_one_bit_png_becomes_0_and_255(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_image(tmp_path / "b.png").array, [[0, 255]])


@pytest.mark.parametrize(("name", "content"), [("a.nii.gz", b"no gzip"), ("a.nii", b""), ("a.png", b"\x89PNG")])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        read_image(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.nii"):
        read_image(tmp_path / "gone.nii")


def test_nothing_stays_behind_when_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_png(tmp_path / "a.png", np.zeros((2, 2), np.float32))
    assert list(tmp_path.iterdir()) == []
