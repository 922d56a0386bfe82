"""Channels in files or series of their own become one case, in the order of the task, or a line that says why not."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest

from medseg.cohort import Cohort, read_cohort
from medseg.config import Config, validate_config
from medseg.files import UserError, read_rows
from medseg.images import read_image
from medseg.ingest.dicom_write import write_series
from medseg.ingest.guess import draft_config
from medseg.ingest.sources import discover, read_source
from medseg.ingest.step import run
from medseg.result import Result
from medseg.volume import Volume

KEY = b"k" * 32
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "brain_tumour"
CHANNELS = {"FLAIR": "flair", "T1c": "t1ce?"}
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


def config(channels: dict[str, str] = CHANNELS, **ingest: Any) -> Config:
    task = {"kind": "segmentation", "labels": {"front": 1, "back": 2}, "channels": list(channels)}
    tree = {"name": "t", "task": task, "model": {"name": "unet"}, "loss": {"name": "dice_ce"}}
    return validate_config({**tree, "ingest": {"channels": channels, "names": "kept", **ingest}}, "test")


def volume(seed: int, label: bool = False, shift_mm: float = 0.0) -> Volume:
    array = np.random.default_rng(seed).integers(0, 3 if label else 900, (9, 10, 11))
    affine = AFFINE.copy()
    affine[0, 3] = shift_mm
    return Volume(array.astype(np.uint8 if label else np.int16), affine)


def save(path: Path, image: Volume) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(image.array, image.affine), path)


def ingest(settings: Any, source: Path, out: Path) -> tuple[Cohort, dict[str, tuple[str, str]]]:
    result: Result = run(settings, [source], out, key=KEY)
    rows = read_rows(result.paths["rejects"])
    return read_cohort(out), {row["source"]: (row["code"], row["reason"]) for row in rows}


def arrays(cohort: Cohort) -> list[list[np.ndarray]]:
    return [[read_image(path).array for path in cohort.image_paths(case)] for case in cohort.cases]


@pytest.mark.parametrize(
    "names",
    [
        ("c{}/c{}_t1ce.nii.gz", "c{}/c{}_flair.nii.gz", "c{}/c{}_seg.nii.gz"),  # a folder a case
        ("c{}_T1CE.nii", "c{}_FLAIR.nii", "c{}_seg.nii"),  # one folder
        ("c{}/T1c.nii.gz", "c{}/Flair.nii.gz", "c{}/seg.nii.gz"),  # nothing in the name but the channel
        ("x/c{}-t1ce-reg.nii.gz", "x/c{}-flair-reg.nii.gz", "x/c{}-seg-reg.nii.gz"),
    ],
)
def test_files_that_differ_in_the_channel_are_one_case(tmp_path: Path, names: tuple[str, str, str]) -> None:
    for n in range(3):
        for at, name in enumerate(names):
            save(tmp_path / "d" / name.replace("{}", str(n)), volume(10 * n + at, label=at == 2))
    cohort, rejects = ingest(config(label_name="seg"), tmp_path / "d", tmp_path / "out")
    assert rejects == {}
    assert [case.case_id for case in cohort.cases] == (
        ["c0_reg", "c1_reg", "c2_reg"] if "reg" in names[0] else ["c0", "c1", "c2"]
    )
    assert cohort.channels == ("FLAIR", "T1c")
    assert [Path(name).name for name in cohort.cases[0].images] == [
        f"{cohort.cases[0].case_id}_{channel}.nii.gz" for channel in CHANNELS
    ]
    for n, (flair, t1c) in enumerate(arrays(cohort)):
        np.testing.assert_array_equal(flair, volume(10 * n + 1).array)
        np.testing.assert_array_equal(t1c, volume(10 * n).array)
        label = cohort.label_path(cohort.cases[n])
        assert label is not None
        np.testing.assert_array_equal(read_image(label).array, volume(10 * n + 2, label=True).array)


def test_what_does_not_fit_is_named_with_its_reason(tmp_path: Path) -> None:
    root = tmp_path / "d"
    for case in ("good", "moved", "small", "twice", "lone", "bare"):
        save(root / case / "flair.nii.gz", volume(1))
        if case != "lone":
            save(root / case / "t1c.nii.gz", volume(2, shift_mm=3.5 * (case == "moved")))
        if case != "bare":
            save(root / case / "seg.nii.gz", volume(3, label=True))
    save(root / "small" / "t1c.nii.gz", Volume(volume(2).array[1:], AFFINE))
    save(root / "twice" / "t1ce.nii.gz", volume(2))
    save(root / "good" / "brainmask.nii.gz", volume(2))
    cohort, rejects = ingest(config(label_name="seg"), root, tmp_path / "out")
    assert [case.case_id for case in cohort.cases] == ["good"]
    assert {name: code for name, (code, _) in rejects.items()} == {
        "good/brainmask.nii.gz": "no_channel",
        "moved/flair.nii.gz": "channel_grid",
        "small/flair.nii.gz": "channel_grid",
        "twice": "several_for_channel",
        "lone": "missing_channel",
        "bare/flair.nii.gz": "no_label",
    }
    assert "3.5 mm" in rejects["moved/flair.nii.gz"][1]
    assert "8 × 10 × 11" in rejects["small/flair.nii.gz"][1]
    assert "Channel T1c is missing" in rejects["lone"][1]


def test_the_longest_match_counts_and_a_tie_is_refused(tmp_path: Path) -> None:
    for name in ("t1", "t1ce", "flair"):
        save(tmp_path / "d" / f"a_{name}.nii.gz", volume(len(name)))
    save(tmp_path / "d" / "b_flairt1x.nii.gz", volume(1))
    channels = {"T1": "t1", "T1c": "t1ce", "FLAIR": "flair"}
    cohort, rejects = ingest(config(channels), tmp_path / "d", tmp_path / "out")
    assert [array.tolist() for array in arrays(cohort)[0]] == [volume(n).array.tolist() for n in (2, 4, 5)]
    assert rejects["b_t1x"][0] == "missing_channel"  # flair is longer than t1
    cohort, rejects = ingest(config({"A": "flair", "B": "t1ce|a_f"}), tmp_path / "d", tmp_path / "other")
    assert len(cohort.cases) == 1
    save(tmp_path / "tie" / "xxyy.nii.gz", volume(1))
    with pytest.raises(UserError, match="fits channels A and B"):
        ingest(config({"A": "xx", "B": "yy"}), tmp_path / "tie", tmp_path / "third")


def study(folder: Path, patient: str, *series: str, shift_mm: float = 0.0) -> None:
    """Series of one study, T1c shifted against the rest."""
    for at, description in enumerate(series):
        image = volume(10 * len(patient) + at, shift_mm=shift_mm * ("T1" in description))
        seed = f"{patient}/{description}"
        for path in write_series(image, folder / patient / str(at), patient_id=patient, seed_uid=seed):
            data = pydicom.dcmread(path)
            data.StudyInstanceUID, data.FrameOfReferenceUID = f"2.25.{len(patient)}", f"2.25.9{len(patient)}"
            data.SeriesDescription = description
            data.save_as(path)


def test_the_series_of_a_study_are_one_case(tmp_path: Path) -> None:
    study(tmp_path / "d", "a", "AX T1 CE", "AX FLAIR", "LOC")
    study(tmp_path / "d", "bb", "AX FLAIR", "AX T2")
    study(tmp_path / "d", "ccc", "AX FLAIR", "AX T1 CE", shift_mm=2.5)
    study(tmp_path / "d", "dddd", "AX FLAIR", "AX T1 CE", "COR T1 CE")
    cohort, rejects = ingest(config({"FLAIR": "flair", "T1c": "t1 ce"}), tmp_path / "d", tmp_path / "out")
    (case,) = cohort.cases
    assert (case.modality, case.patient_id[:8], len(case.images)) == ("MR", "patient-", 2)
    flair, t1c = arrays(cohort)[0]
    np.testing.assert_array_equal(flair, volume(11).array)
    np.testing.assert_array_equal(t1c, volume(10).array)
    codes = sorted(code for code, _ in rejects.values())
    assert codes == ["channel_grid", "missing_channel", "no_channel", "no_channel", "several_for_channel"]
    assert any("2.5 mm" in reason for code, reason in rejects.values() if code == "channel_grid")
    again = run(config({"FLAIR": "flair", "T1c": "t1 ce"}), [tmp_path / "d"], tmp_path / "out", key=KEY)
    assert again.figures["resumed"] == 1


def test_results_refer_to_the_slices_of_the_first_channel(tmp_path: Path) -> None:
    study(tmp_path / "d", "a", "AX T1 CE", "AX FLAIR")
    (source,), _ = discover([tmp_path / "d"], config({"FLAIR": "flair", "T1c": "t1 ce"}).ingest, key=KEY)
    scan = read_source(source)
    assert len(source.files) == 2 * len(scan.source_files)
    for k, path in enumerate(scan.source_files):
        np.testing.assert_array_equal(pydicom.dcmread(path).pixel_array.T, scan.channels[0].array[:, :, k])


def test_series_in_different_frames_of_reference_are_not_laid_on_one_another(tmp_path: Path) -> None:
    study(tmp_path / "d", "a", "AX T1 CE", "AX FLAIR")
    for path in (tmp_path / "d" / "a" / "1").iterdir():
        data = pydicom.dcmread(path)
        data.FrameOfReferenceUID = "2.25.77"
        data.save_as(path)
    with pytest.raises(UserError, match="different frames of reference"):
        ingest(config({"FLAIR": "flair", "T1c": "t1 ce"}), tmp_path / "d", tmp_path / "out")


@pytest.mark.parametrize(
    ("ingest_fields", "words"),
    [
        ({"channels": {"T1c": "t1c", "FLAIR": "flair"}}, "in their order"),
        ({"channels": {"FLAIR": "flair"}}, "must name task.channels"),
        ({"channels": {"FLAIR": "(", "T1c": "t"}}, "no regular expression"),
        ({"channels": {"FLAIR": "", "T1c": "t"}}, "needs a regular expression"),
        ({"channels": {"a/b": "x", "T1c": "t"}}, "part of file names"),
        ({"channels": {}, "label_name": "seg"}, "which is empty"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused_at_load(ingest_fields: dict[str, Any], words: str) -> None:
    tree = config().model_dump(mode="json")
    with pytest.raises(UserError, match=words):
        validate_config({**tree, "ingest": {**tree["ingest"], **ingest_fields}}, "test")


def test_without_a_config_the_channels_name_the_task(tmp_path: Path) -> None:
    for n in range(2):
        save(tmp_path / "d" / f"c{n}_flair.nii.gz", volume(n))
        save(tmp_path / "d" / f"c{n}_t1ce.nii.gz", volume(5 + n))
        save(tmp_path / "d" / f"c{n}_seg.nii.gz", volume(9, label=True))
    draft = draft_config(["ingest.channels={FLAIR: flair, T1c: t1ce}", "ingest.label_name=seg"])
    cohort, rejects = ingest(draft, tmp_path / "d", tmp_path / "out")
    assert (cohort.channels, len(cohort.cases), rejects) == (("FLAIR", "T1c"), 2, {})
    assert cohort.label_names == {"label_1": 1, "label_2": 2}


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real scans (../shared/data) are not here")
def test_brats_of_real_patients(tmp_path: Path) -> None:
    settings = config({"Flair": "flair.*", "T1c": "t1c.*"}, label_name="otmulticlass").model_dump(mode="json")
    settings["task"]["labels"] = {"necrosis": 1, "oedema": 2, "non_enhancing": 3, "enhancing": 4}
    cohort, rejects = ingest(validate_config(settings, "t"), SHARED, tmp_path / "out")
    assert [case.shape for case in cohort.cases] == [(240, 240, 155)] * 4
    assert {code for code, _ in rejects.values()} == {"no_channel"}  # the brain masks
    for case in cohort.cases:
        flair, t1c = (nib.load(SHARED / case.case_id / f"{name}_subtrMeanDivStd.nii.gz") for name in ("Flair", "T1c"))
        np.testing.assert_array_equal(read_image(cohort.image_paths(case)[0]).array, np.float32(flair.get_fdata()))
        np.testing.assert_array_equal(read_image(cohort.image_paths(case)[1]).array, np.float32(t1c.get_fdata()))
