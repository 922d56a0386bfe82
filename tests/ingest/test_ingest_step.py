"""The whole step: every input becomes a case or a line that says why not; a killed ingest goes on where it was."""

import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg.cohort import Cohort, read_cohort, verify_cohort
from medseg.config import Config, validate_config
from medseg.files import UserError, read_rows
from medseg.images import read_image
from medseg.ingest import case_maker
from medseg.ingest.dicom_write import write_radiograph, write_series
from medseg.ingest.step import run
from medseg.result import Result
from medseg.volume import Volume, to_canonical

KEY = b"k" * 32
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real scans (../shared/data) are not here")


def seg(**ingest: Any) -> Config:
    task = {"kind": "segmentation", "labels": {"front": 1, "back": 2}}
    tree = {"name": "t", "task": task, "model": {"name": "unet"}, "loss": {"name": "dice_ce"}}
    return validate_config({**tree, "ingest": {"names": "kept", **ingest}}, "test")


def cls(**ingest: Any) -> Config:
    task = {"kind": "classification", "labels": {"normal": 0, "tb": 1}, "spatial_dims": 2}
    tree = {"name": "t", "task": task, "model": {"name": "densenet"}, "loss": {"name": "cross_entropy"}}
    return validate_config({**tree, "ingest": {"names": "kept", **ingest}}, "test")


def volume(seed: int, label: bool = False, shift_mm: float = 0.0) -> Volume:
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 3 if label else 900, (9, 10, 11)).astype(np.uint8 if label else np.int16)
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    affine[0, 3] = shift_mm
    return Volume(array, affine)


def save(path: Path, volume: Volume) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume.array, volume.affine), path)
    return path


def dataset(root: Path, count: int = 4, images: str = "images", labels: str = "labels") -> Path:
    for n in range(count):
        save(root / images / f"c{n}.nii.gz", volume(n))
        save(root / labels / f"c{n}.nii.gz", volume(100 + n, label=True))
    return root


def rejects_of(result: Result) -> dict[str, str]:
    return {row["source"]: row["code"] for row in read_rows(result.paths["rejects"])}


def ingest(config: Config, source: Path, out: Path, labels: Path | None = None) -> tuple[Result, Cohort]:
    result = run(config, [source], out, labels=labels, key=KEY)
    cohort = read_cohort(out)
    verify_cohort(cohort)
    return result, cohort


@pytest.mark.parametrize(("images", "labels"), [("images", "labels"), ("imagesTr", "labelsTr")])
def test_a_data_set_folder_brings_its_labels(tmp_path: Path, images: str, labels: str) -> None:
    root = dataset(tmp_path / "d", images=images, labels=labels)
    (root / images / "._c0.nii.gz").write_bytes(b"what macOS leaves")
    result, cohort = ingest(seg(), root, tmp_path / "out")
    assert (result.status, len(cohort.cases)) == ("done", 4)
    for n, case in enumerate(cohort.cases):
        np.testing.assert_array_equal(read_image(cohort.image_paths(case)[0]).array, volume(n).array)
        np.testing.assert_array_equal(read_image(cohort.folder / case.label).array, volume(100 + n, True).array)
        assert (case.shape, case.spacing_mm, case.orientation) == ((9, 10, 11), (1, 1, 2), "LPS")
    assert cohort.label_names == {"front": 1, "back": 2}
    assert json.loads((tmp_path / "out" / "ingest.json").read_text())["figures"]["cases"] == 4


def test_orphans_and_damage_are_named_and_all_others_arrive(tmp_path: Path) -> None:
    root = dataset(tmp_path / "d")
    (root / "labels" / "c0.nii.gz").unlink()
    (root / "images" / "c1.nii.gz").unlink()
    (root / "images" / "c2.nii.gz").write_bytes(b"rubbish")
    result, cohort = ingest(seg(), root, tmp_path / "out")
    assert (result.status, result.exit_code) == ("partial", 3)
    assert [case.case_id for case in cohort.cases] == ["c3"]
    assert rejects_of(result) == {
        "images/c0.nii.gz": "no_label",
        "labels/c1.nii.gz": "label_without_image",
        "images/c2.nii.gz": "unreadable_nifti",
    }


@pytest.mark.parametrize(
    ("label", "code", "words"),
    [
        (volume(0, label=True, shift_mm=3.5), "label_grid", "3.5 mm"),
        (Volume(np.zeros((9, 10, 12), np.uint8), volume(0).affine), "label_grid", "(9, 10, 12)"),
        (Volume(np.full((9, 10, 11), 7, np.uint8), volume(0).affine), "label_value", "holds 7, which task.labels"),
        (Volume(np.full((9, 10, 11), 0.5, np.float32), volume(0).affine), "label_not_integer", "0.5"),
        (Volume(np.full((9, 10, 11), -1, np.int16), volume(0).affine), "label_value", "-1"),
    ],
)
def test_labels_that_do_not_fit_are_refused_with_the_numbers(
    tmp_path: Path, label: Volume, code: str, words: str
) -> None:
    root = dataset(tmp_path / "d")
    save(root / "labels" / "c1.nii.gz", label)
    result, cohort = ingest(seg(), root, tmp_path / "out")
    assert len(cohort.cases) == 3
    (row,) = read_rows(result.paths["rejects"])
    assert (row["source"], row["code"]) == ("images/c1.nii.gz", code)
    assert words in row["reason"]


@pytest.mark.parametrize(
    ("array", "code"),
    [(np.full((9, 10, 11), 5, np.int16), "constant"), (np.full((9, 10, 11), np.nan, np.float32), "not_finite")],
)
def test_empty_images_are_refused(tmp_path: Path, array: np.ndarray, code: str) -> None:
    root = dataset(tmp_path / "d")
    save(root / "images" / "c1.nii.gz", Volume(array, volume(0).affine))
    result, _ = ingest(seg(), root, tmp_path / "out")
    assert rejects_of(result) == {"images/c1.nii.gz": code}


def test_findings_travel_with_the_case(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    save(tmp_path / "d" / "a.nii.gz", Volume(rng.integers(0, 5, (4, 30, 30)).astype(np.int16), np.diag([9.0, 1, 1, 1])))
    _, cohort = ingest(seg(), tmp_path / "d", tmp_path / "out")
    found = {finding.code: (finding.number, finding.threshold) for finding in cohort.cases[0].findings}
    assert found == {"few_voxels": (4, 8), "anisotropic": (9.0, 5.0), "few_levels": (5, 16)}


def test_dicom_folders_meet_their_labels_by_name_whatever_the_axis_order(tmp_path: Path) -> None:
    for n in range(3):
        write_series(volume(n), tmp_path / "dicom" / f"subject-{n}", patient_id=f"Doe^{n}")
        save(tmp_path / "labels" / f"subject-{n}.nii.gz", to_canonical(volume(100 + n, label=True)))
    result, cohort = ingest(seg(), tmp_path / "dicom", tmp_path / "out", tmp_path / "labels")
    assert result.status == "done"
    assert len({case.patient_id for case in cohort.cases}) == 3
    for case in cohort.cases:
        label = read_image(cohort.folder / case.label)
        n = next(n for n in range(3) if np.array_equal(read_image(cohort.image_paths(case)[0]).array, volume(n).array))
        np.testing.assert_array_equal(label.array, volume(100 + n, label=True).array)


def test_no_byte_of_a_dicom_cohort_names_the_patient(tmp_path: Path) -> None:
    for n in range(3):
        folder = tmp_path / "dicom" / "Zebedee" / f"{n}"
        write_series(volume(n), folder, patient_id="Zebedee^X", seed_uid=str(n), series_description="Zebedee")
    write_series(volume(5), tmp_path / "dicom" / "Zebedee" / "odd", patient_id="Zebedee^X", modality="CT")
    lookup = tmp_path / "private" / "lookup.csv"
    run(seg(modality=["MR"]), [tmp_path / "dicom"], tmp_path / "out", key=KEY, lookup=lookup)
    for path in (tmp_path / "out").rglob("*"):
        assert "Zebedee" not in path.name
        if path.is_file():
            content = path.read_bytes()
            assert b"Zebedee" not in content
            assert b"2.25." not in content  # no UID
    rows = read_rows(lookup)
    assert len(rows) == 4
    assert all("Zebedee" in row["folder"] for row in rows)
    assert lookup.stat().st_mode & 0o777 == 0o600


def table(folder: Path, text: str) -> Path:
    (folder / "cases.csv").write_text(text)
    return folder / "cases.csv"


def radiographs(folder: Path, count: int = 6) -> Path:
    (folder / "images").mkdir(parents=True)
    for n in range(count):
        pixels = np.random.default_rng(n).integers(0, 255, (70, 80)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"x{n}.png")
    return folder


def test_a_table_gives_class_patient_site_and_split(tmp_path: Path) -> None:
    root = radiographs(tmp_path / "d")
    (root / "masks").mkdir()
    (root / "masks" / "x0.png").write_bytes((root / "images" / "x0.png").read_bytes())
    rows = [f"images/x{n}.png,{n % 2},p{n // 2},s,{'test' if n > 3 else 'train'},masks/x{n}.png" for n in range(6)]
    csv = table(root, "image,tb,patient_id,site,split,lung_mask\n" + "\n".join(rows))
    config = cls(table={"target": "tb", "label": ""}, target_names={"0": "normal", "1": "tb"})
    result, cohort = ingest(config, root, tmp_path / "out", csv)
    assert (result.status, len(cohort.cases)) == ("done", 6)  # the mask is no image of its own
    assert [case.target for case in cohort.cases] == ["normal", "tb"] * 3
    assert [case.split for case in cohort.cases] == ["train"] * 4 + ["test"] * 2
    assert list(Counter(case.patient_id for case in cohort.cases).values()) == [2, 2, 2]
    assert {(case.site, case.kind, case.spacing_mm) for case in cohort.cases} == {("s", "radiograph", ())}


def test_rows_that_do_not_fit_are_named(tmp_path: Path) -> None:
    root = radiographs(tmp_path / "d")
    text = "image,target\nimages/x0.png,tb\nx1.png,normal\ngone.png,tb\nx2.png,flu\nx3.png,\nx4,tb\n"
    result, cohort = ingest(cls(), root, tmp_path / "out", table(root, text))
    assert [case.case_id for case in cohort.cases] == ["x0", "x1", "x4"]
    assert rejects_of(result) == {
        "gone.png": "image_not_found",
        "images/x2.png": "unknown_target",
        "images/x3.png": "no_target",
        "images/x5.png": "no_label",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("image,target\n", "no rows"),
        ("image,class\nx0.png,tb\n", "no column 'target'"),
        ("image,target\nx0.png,tb\nimages/x0.png,tb\n", "lines 2 and 3 name one image"),
        ("image,target,split\nx0.png,tb,hold\n", "line 2: split 'hold'"),
        ("image,target,split,patient_id\nx0.png,tb,train,p\nx1.png,tb,test,p\n", "lies in splits test, train"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused_as_a_whole(tmp_path: Path, text: str, words: str) -> None:
    root = radiographs(tmp_path / "d")
    with pytest.raises(UserError, match=words):
        run(cls(), [root], tmp_path / "out", labels=table(root, text), key=KEY)
    assert not (tmp_path / "out" / "cohort.json").exists()


def test_grey_masks_become_labels_above_the_threshold(tmp_path: Path) -> None:
    root = radiographs(tmp_path / "d", 3)
    (root / "m").mkdir()
    for n in range(3):
        (root / "m" / f"x{n}.png").write_bytes((root / "images" / f"x{n}.png").read_bytes())
    tree = seg(label_threshold=127).model_dump()
    tree["task"] |= {"labels": {"lung": 1}, "spatial_dims": 2}
    _, cohort = ingest(validate_config(tree, "t"), root / "images", tmp_path / "out", root / "m")
    label = read_image(cohort.folder / cohort.cases[0].label).array
    np.testing.assert_array_equal(label, read_image(cohort.image_paths(cohort.cases[0])[0]).array > 127)


def test_volumes_are_refused_where_radiographs_are_wanted(tmp_path: Path) -> None:
    write_radiograph(np.eye(80, dtype=np.uint16), (0.1, 0.1), tmp_path / "d" / "x.dcm", patient_id="p")
    save(tmp_path / "d" / "v.nii.gz", volume(0))
    result, cohort = ingest(cls(), tmp_path / "d", tmp_path / "out")
    assert list(rejects_of(result).values()) == ["wrong_kind"]
    assert cohort.cases[0].kind == "radiograph"


def test_a_second_ingest_takes_finished_cases_as_they_are(tmp_path: Path) -> None:
    root = dataset(tmp_path / "d")
    first, _ = ingest(seg(), root, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").iterdir()}
    second, _ = ingest(seg(), root, tmp_path / "out")
    assert (first.figures["resumed"], second.figures["resumed"]) == (0, 4)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").iterdir()}
    assert first.figures["sha256"] == second.figures["sha256"]


def test_what_changed_is_read_again_and_what_is_gone_is_removed(tmp_path: Path) -> None:
    root = dataset(tmp_path / "d")
    ingest(seg(), root, tmp_path / "out")
    save(root / "images" / "c1.nii.gz", volume(77))
    for folder in ("images", "labels"):
        (root / folder / "c2.nii.gz").unlink()
    result, cohort = ingest(seg(), root, tmp_path / "out")
    assert result.figures["resumed"] == 2
    np.testing.assert_array_equal(read_image(cohort.image_paths(cohort.cases[1])[0]).array, volume(77).array)
    left = sorted(path.name for path in (tmp_path / "out").rglob("c2*"))
    assert left == []


def test_a_killed_ingest_goes_on_and_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = dataset(tmp_path / "d", 6)
    whole, _ = ingest(seg(), root, tmp_path / "whole")
    write, calls = case_maker.write_nifti, []

    def dying(path: Path, volume: Volume) -> Path:
        calls.append(path)
        if len(calls) > 7:
            raise KeyboardInterrupt
        return write(path, volume)

    monkeypatch.setattr(case_maker, "write_nifti", dying)
    with pytest.raises(KeyboardInterrupt):
        run(seg(), [root], tmp_path / "out", key=KEY)
    assert not (tmp_path / "out" / "cohort.json").exists()
    monkeypatch.undo()
    result, _ = ingest(seg(), root, tmp_path / "out")
    assert 0 < int(str(result.figures["resumed"])) < 6
    assert result.figures["sha256"] == whole.figures["sha256"]


def test_an_archive_is_read_and_nothing_of_it_stays(tmp_path: Path) -> None:
    root = dataset(tmp_path / "d")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for path in root.rglob("*.nii.gz"):
            archive.write(path, path.relative_to(root.parent))
    result, _ = ingest(seg(), tmp_path / "d.zip", tmp_path / "out")
    assert result.figures["sha256"] == ingest(seg(), root, tmp_path / "other")[0].figures["sha256"]
    assert not (tmp_path / "out" / ".unpacked").exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: root / "gone", "does not exist"),
        (lambda root: (root / "empty").mkdir() or root / "empty", "is empty"),
        (lambda root: (root / "a.txt").write_text("x") and root / "a.txt", "none of the 1 files"),
        (lambda root: Path("dicomweb://host/studies"), "is an address"),
    ],
)
def test_input_that_is_wrong_as_a_whole(tmp_path: Path, make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(seg(), [make(tmp_path)], tmp_path / "out", key=KEY)
    assert not (tmp_path / "out").exists()


def test_when_nothing_is_left_the_first_reason_is_told(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.nii.gz").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"none of 1 inputs became a case; a\.nii\.gz: The file is no readable NIfTI"):
        run(seg(), [tmp_path / "d"], tmp_path / "out", key=KEY)
    save(tmp_path / "d" / "a.nii.gz", volume(0))
    assert run(seg(), [tmp_path / "d"], tmp_path / "out", key=KEY).status == "done"


def test_a_cohort_is_never_written_among_other_files(tmp_path: Path) -> None:
    root = dataset(tmp_path / "d")
    with pytest.raises(UserError, match="no cohort's"):
        run(seg(), [dataset(tmp_path / "e")], root, key=KEY)
    with pytest.raises(UserError, match="lies inside the source"):
        run(seg(), [root], root / "cohort", key=KEY)


def test_equal_names_in_two_folders_stay_two_cases(tmp_path: Path) -> None:
    for n, folder in enumerate(("a", "b")):
        save(tmp_path / "d" / folder / "scan.nii.gz", volume(n))
    _, cohort = ingest(seg(), tmp_path / "d", tmp_path / "out")
    assert [case.case_id for case in cohort.cases] == ["a-scan", "b-scan"]


def test_bids_sessions_belong_to_one_patient(tmp_path: Path) -> None:
    for n, session in enumerate(("ses-1", "ses-2")):
        save(tmp_path / "d" / "sub-07" / session / "anat" / f"sub-07_{session}_T1w.nii.gz", volume(n))
        save(tmp_path / "d" / "sub-07" / session / "func" / f"sub-07_{session}_bold.nii.gz", volume(9))
    _, cohort = ingest(seg(), tmp_path / "d", tmp_path / "out")
    assert [(case.case_id, case.patient_id) for case in cohort.cases] == [
        ("sub-07_ses-1_T1w", "sub-07"),
        ("sub-07_ses-2_T1w", "sub-07"),
    ]


@pytest.mark.shared_data
@needs_shared
def test_hippocampus_gives_205_cases_and_names_three(tmp_path: Path) -> None:
    result, cohort = ingest(seg(), SHARED / "hippocampus", tmp_path / "out")
    assert len(cohort.cases) == 205
    assert rejects_of(result) == {
        "images/hippocampus_118.nii.gz": "no_label",
        "labels/hippocampus_010.nii.gz": "label_without_image",
        "labels/hippocampus_281.nii.gz": "label_without_image",
    }


@pytest.mark.shared_data
@needs_shared
def test_chest_radiographs_come_with_their_table(tmp_path: Path) -> None:
    config = cls(table={"target": "tb", "label": ""}, target_names={"0": "normal", "1": "tb"})
    result, cohort = ingest(config, SHARED / "cxr_tb", tmp_path / "out", SHARED / "cxr_tb" / "cases.csv")
    assert (result.status, len(cohort.cases)) == ("done", 598)
    counts = Counter((case.site, case.target) for case in cohort.cases)
    assert counts[("montgomery", "tb")] == 30
    assert counts[("shenzhen", "tb")] == 258


def test_what_a_killed_writer_left_of_a_record_costs_no_finished_case(tmp_path: Path) -> None:
    """A record's temporary file is whole JSON, and must not pass for the record of another case."""
    from synthetic import segmentation_cohort, tiny_config

    from medseg.ingest.step import run

    made = segmentation_cohort(tmp_path / "raw")
    config = tiny_config("ingest.modality=[]")
    words = {"labels": made.folder / "labels", "key": b"k" * 32}
    run(config, [made.folder / "images"], tmp_path / "cohort", **words)
    record = next((tmp_path / "cohort" / "records").glob("*.json"))
    left = record.with_name(f".part-x-{record.name}")
    left.write_bytes(record.read_bytes())
    again = run(config, [made.folder / "images"], tmp_path / "cohort", **words)
    assert again.figures["resumed"] == again.figures["cases"] == 10
    assert not left.exists()
    assert len(list((tmp_path / "cohort" / "images").iterdir())) == 10
