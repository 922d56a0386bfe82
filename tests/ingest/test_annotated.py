"""Which structures a label tells of, and files that do not say of themselves how they are stored."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from synthetic import contoured, headneck_lookalike

from medseg.cohort import Case, Cohort, read_cohort
from medseg.config import Config, IngestConfig, load_config
from medseg.files import UserError, read_rows
from medseg.images import read_image
from medseg.ingest.nifti import as_meant
from medseg.ingest.step import run
from medseg.volume import Volume, orientation_code

KEY = b"k" * 32
NAMES = tuple(load_config("headneck").task.labels)
SHAPE = (9, 8, 7)


def ingest(config: Config, source: Path, out: Path, labels: Path | None = None) -> tuple[Cohort, dict[str, str]]:
    result = run(config, [source], out, labels=labels, key=KEY)
    return read_cohort(out), {row["source"]: row["code"] for row in read_rows(result.paths["rejects"])}


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)


def two(*overrides: str) -> Config:
    """The hippocampus config: anterior 1, posterior 2."""
    return load_config("hippocampus", overrides)


def two_cases(root: Path, *held: tuple[int, ...]) -> Path:
    """Images and label maps that hold just these values."""
    for number, values in enumerate(held):
        rng = np.random.default_rng(number)
        save(root / "images" / f"c{number}.nii.gz", rng.integers(0, 900, SHAPE).astype(np.int16))
        save(root / "labels" / f"c{number}.nii.gz", rng.choice([0, *values], SHAPE).astype(np.uint8))
    return root


def test_a_look_alike_of_the_head_and_neck_set_becomes_ct_with_partial_labels(tmp_path: Path) -> None:
    source = headneck_lookalike(tmp_path / "d")
    cohort, rejects = ingest(load_config("headneck"), source, tmp_path / "out")
    assert rejects == {}
    assert len(cohort.cases) == 12
    for case in cohort.cases:
        number = int(case.case_id.removeprefix("pt_"))
        assert cohort.annotated(case) == contoured(number)
        assert case.annotated == ("" if number % 3 == 0 else "|".join(NAMES[v - 1] for v in sorted(contoured(number))))
        stored = nib.load(source / "images" / f"{case.case_id}.nii.gz").get_fdata()
        image, label = read_image(cohort.image_paths(case)[0]), read_image(cohort.folder / case.label)
        np.testing.assert_array_equal(image.array, stored - 1024)
        assert image.array.dtype == np.int16
        assert orientation_code(image.affine) == orientation_code(label.affine) == case.orientation == "PLI"
        assert case.spacing_mm == (4.0, 4.0, 2.5)
        assert case.modality == "CT"
        assert "no_orientation" not in {finding.code for finding in case.findings}


def test_ct_with_an_offset_is_refused_until_it_is_declared_and_ct_without_when_it_is(tmp_path: Path) -> None:
    source = headneck_lookalike(tmp_path / "d", 3)
    with pytest.raises(UserError, match=r"set ingest\.offset_hu"):
        ingest(load_config("headneck", ["ingest.offset_hu=0"]), source, tmp_path / "plain")
    for path in (source / "images").iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image((image.get_fdata() - 1024).astype(np.int16), image.affine), path)
    with pytest.raises(UserError, match="this file has no such offset"):
        ingest(load_config("headneck"), source, tmp_path / "twice")
    assert ingest(load_config("headneck", ["ingest.offset_hu=0"]), source, tmp_path / "true")[1] == {}


def test_what_a_training_set_needs_is_not_done_to_the_scans_of_users() -> None:
    config = load_config("headneck").ingest.for_use()
    assert (config.offset_hu, config.orientation) == (0, "")


def test_a_structure_without_a_voxel_is_absent_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    source = two_cases(tmp_path / "d", (1, 2), (1,), ())
    cohort, _ = ingest(two(), source, tmp_path / "absent")
    assert [case.annotated for case in cohort.cases] == ["", "", ""]
    cohort, rejects = ingest(two("ingest.label_missing=not_contoured"), source, tmp_path / "unknown")
    assert [case.annotated for case in cohort.cases] == ["", "anterior"]
    assert rejects == {"images/c2.nii.gz": "nothing_annotated"}


def test_a_table_lists_what_is_annotated_and_counts_before_the_config(tmp_path: Path) -> None:
    source = two_cases(tmp_path / "d", (1,), (1,), (1, 2), (1,), (1,), (1,))
    listed = ("posterior|anterior", "anterior", "anterior", "anterior|tail", "", "none")
    rows = [f"images/c{n}.nii.gz,labels/c{n}.nii.gz,{cell}" for n, cell in enumerate(listed)]
    (source / "t.csv").write_text("\n".join(["image,label,told", *rows]) + "\n")
    sets = ("ingest.table.annotated=told", "ingest.label_missing=not_contoured")
    cohort, rejects = ingest(two(*sets), source, tmp_path / "out", source / "t.csv")
    assert {case.case_id: case.annotated for case in cohort.cases} == {"c0": "", "c1": "anterior", "c4": "anterior"}
    assert rejects == {
        "images/c2.nii.gz": "label_not_listed",
        "images/c3.nii.gz": "unknown_label",
        "images/c5.nii.gz": "label_not_listed",
    }
    (source / "t.csv").write_text((source / "t.csv").read_text().replace("c1.nii.gz,anterior", "c1.nii.gz,"))
    again = run(two(*sets[:1]), [source], tmp_path / "out", labels=source / "t.csv", key=KEY)
    assert {case.case_id: case.annotated for case in read_cohort(tmp_path / "out").cases}["c1"] == ""
    assert again.figures["resumed"] == 0, "another config is another cohort"


def test_of_one_file_per_structure_a_missing_one_is_not_contoured_and_an_empty_one_absent(tmp_path: Path) -> None:
    save(tmp_path / "d" / "c" / "ct.nii.gz", np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.int16))
    save(tmp_path / "d" / "c" / "masks" / "anterior.nii.gz", np.zeros(SHAPE, np.uint8))
    sets = ["ingest.image_path=ct.nii.gz$", "ingest.label_path=masks", "ingest.label_files=one_per_label"]
    cohort, _ = ingest(two(*sets, "ingest.label_missing=not_contoured"), tmp_path / "d", tmp_path / "out")
    assert cohort.cases[0].annotated == "anterior"
    with pytest.raises(UserError, match=r"no mask of posterior.*set ingest\.label_missing"):
        ingest(two(*sets), tmp_path / "d", tmp_path / "absent")


def test_a_cohort_of_before_tells_of_all_and_a_strange_name_is_told(tmp_path: Path) -> None:
    case = Case("a", "p", ("images/a.nii.gz",), annotated="x")
    row = case.to_row()
    assert Case.from_row(row) == case
    cohort = Cohort(tmp_path, (case,), {"x": 1, "y": 2})
    assert cohort.annotated(case) == {1}
    with pytest.raises(UserError, match="annotated names 'x', which is none of y"):
        Cohort(tmp_path, (case,), {"y": 2}).annotated(case)
    del row["annotated"]
    assert cohort.annotated(Case.from_row(row)) == {1, 2}


@pytest.mark.parametrize(
    ("dtype", "offset", "kept"),
    [(np.int16, -1024, np.int16), (np.uint8, 100, np.int16), (np.uint16, 1, np.int32), (np.float32, 0.5, np.float32)],
)
def test_an_offset_never_wraps_round(dtype: type, offset: float, kept: type) -> None:
    top = 1.0 if dtype is np.float32 else np.iinfo(dtype).max
    array = np.array([[[0, top]]], dtype=dtype)
    ((shifted,), _) = as_meant([Volume(array, np.eye(4))], [], offset, "")
    np.testing.assert_array_equal(shifted.array, array.astype(np.float64) + offset)
    assert shifted.array.dtype == kept


@pytest.mark.parametrize("codes", ["RAS", "PLI", "LPS", "SAR", "IRP"])
def test_a_declared_orientation_keeps_the_spacing(codes: str) -> None:
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    ((volume,), _) = as_meant([Volume(np.zeros((2, 3, 4)), affine)], [], 0.0, codes)
    assert orientation_code(volume.affine) == codes
    assert volume.spacing_mm == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"offset_hu": -1024}, "offset_hu -1024 is for CT alone"),
        ({"orientation": "RLS", "label_grid": "image"}, "once"),
        ({"orientation": "XYZ", "label_grid": "image"}, "pattern"),
        ({"orientation": "LPS"}, "set label_grid to image"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        IngestConfig.model_validate(fields)
