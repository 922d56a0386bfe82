"""NIfTI headers are believed only where they can be true."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg.ingest.nifti import grid_offset_mm, read_channels
from medseg.ingest.scan import Refused
from medseg.volume import Volume


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 1, 1, 1]) if affine is None else affine), path)
    return path


@pytest.mark.parametrize(("dtype", "expected"), [
    (np.uint8, np.uint8), (np.int16, np.int16), (np.int8, np.int16), (np.uint32, np.float32), (np.float64, np.float32),
])  # fmt: skip
def test_values_and_types(tmp_path: Path, dtype: type, expected: type) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    (volume,), findings = read_channels((save(tmp_path / "a.nii.gz", array),))
    np.testing.assert_array_equal(volume.array, array)
    assert volume.array.dtype == expected
    assert findings == ()


def test_the_fourth_axis_counts_the_channels(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(2, 3, 4, 2)).astype(np.float32)
    channels, _ = read_channels((save(tmp_path / "a.nii", array),))
    np.testing.assert_array_equal(np.stack([c.array for c in channels], -1), array)


def test_channels_on_two_grids_are_refused(tmp_path: Path) -> None:
    array = np.zeros((2, 3, 4), np.int16)
    paths = save(tmp_path / "a.nii", array), save(tmp_path / "b.nii", array, np.diag([2.0, 1, 1.5, 1]))
    with pytest.raises(Refused, match=r"Channel 2 lies 1\.5 mm away"):
        read_channels(paths)


def test_disagreeing_forms_are_flagged_with_the_offset(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((2, 3, 4), np.int16), np.eye(4))
    moved = np.eye(4)
    moved[2, 3] = 7.0
    image.set_sform(np.eye(4), 1)
    image.set_qform(moved, 1)
    nib.save(image, tmp_path / "a.nii")
    (volume,), (finding,) = read_channels((tmp_path / "a.nii",))
    assert (finding.code, finding.number) == ("form_mismatch", 7.0)
    np.testing.assert_array_equal(volume.affine, np.eye(4))


def test_a_header_without_orientation_is_flagged(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((2, 3, 4), np.int16), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nib.save(image, tmp_path / "a.nii")
    assert [finding.code for finding in read_channels((tmp_path / "a.nii",))[1]] == ["no_orientation"]


@pytest.mark.parametrize(("unit", "code"), [("micron", "unit"), ("meter", "unit")])
def test_units_other_than_millimetres_are_refused(tmp_path: Path, unit: str, code: str) -> None:
    image = nib.Nifti1Image(np.zeros((2, 3, 4), np.int16), np.eye(4))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(Refused, match=unit) as refused:
        read_channels((tmp_path / "a.nii",))
    assert refused.value.code == code


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("keep", [0, 20, 400])
def test_files_cut_short_are_refused(tmp_path: Path, name: str, keep: int) -> None:
    values = np.random.default_rng(0).integers(0, 9999, (20, 20, 20)).astype(np.int16)
    path = save(tmp_path / name, values)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Refused, match="no readable NIfTI"):
        read_channels((path,))


def test_a_flat_grid_and_complex_values_are_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4))
    nib.save(image, tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[312:328] = bytes(16)  # srow_z
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(Refused, match="affine"):
        read_channels((tmp_path / "a.nii",))
    with pytest.raises(Refused, match="no grey values"):
        read_channels((save(tmp_path / "b.nii", np.zeros((2, 2, 2), np.complex64)),))


def test_grid_offset_is_the_largest_of_the_corners() -> None:
    array = np.zeros((3, 3, 11))
    stretched = np.diag([1.0, 1, 1.1, 1])
    assert grid_offset_mm(Volume(array, np.eye(4)), Volume(array, stretched)) == pytest.approx(1.0)
    assert grid_offset_mm(Volume(array, np.eye(4)), Volume(array[1:], np.eye(4))) is None
