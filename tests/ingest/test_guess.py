"""Ingest without a config: the task follows from the scans and labels, says that it was guessed, and can be trained."""

import gc
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from synthetic import tiny_config, tiny_radiograph_config

from medseg import road
from medseg.cohort import Cohort, read_cohort
from medseg.explain.scans import Scans
from medseg.files import UserError, read_json, read_rows, sha256_file
from medseg.images import write_png
from medseg.ingest.dicom_write import write_series
from medseg.ingest.guess import draft_config
from medseg.ingest.sources import discover
from medseg.ingest.step import run
from medseg.result import Result
from medseg.train.step import check_cohort
from medseg.volume import Volume

AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


def image(seed: int, *more: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 900, (9, 10, 11, *more)).astype(np.int16)


def label(*values: int) -> np.ndarray:
    array = np.zeros((9, 10, 11), np.uint16)
    for at, value in enumerate(values):
        array[at, 2:7, 3:8] = value
    return array


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)


def decathlon(root: Path, labels: Any = None, values: tuple[int, ...] = (1, 2), count: int = 8) -> Path:
    """A data set in the Decathlon's layout; `dataset.json` only when it has labels to declare."""
    for n in range(count):
        save(root / "imagesTr" / f"c{n}.nii.gz", image(n))
        save(root / "labelsTr" / f"c{n}.nii.gz", label(*values))
    if labels is not None:
        (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


def radiographs(root: Path, count: int = 8) -> Path:
    for n in range(count):
        pixels = np.random.default_rng(n).integers(0, 255, (70, 80)).astype(np.uint8)
        write_png(root / "images" / f"x{n}.png", pixels)
    return root


def ingest(tmp_path: Path, source: Path, *sets: str, labels: Path | None = None) -> tuple[Result, Cohort]:
    result = run(draft_config(["ingest.names=kept", *sets]), [source], tmp_path / "out", labels=labels, key=b"k" * 32)
    return result, read_cohort(tmp_path / "out")


@pytest.mark.parametrize(
    ("declared", "names"),
    [
        ({"0": "background", "1": "Anterior", "2": "Posterior"}, {"anterior": 1, "posterior": 2}),
        ({"background": 0, "Anterior part": 1, "anterior-part": 2}, {"anterior_part": 1, "anterior_part_2": 2}),
        ({"background": 0, "whole": [1, 2], "core": 2}, {"label_1": 1, "label_2": 2}),
        (None, {"label_1": 1, "label_2": 2}),
    ],
)
def test_a_data_set_names_its_labels_and_the_cohort_can_be_trained_on(
    tmp_path: Path, declared: Any, names: dict[str, int]
) -> None:
    result, cohort = ingest(tmp_path, decathlon(tmp_path / "d", declared))
    assert (result.status, len(cohort.cases)) == ("done", 8)
    assert dict(cohort.label_names) == names
    assert read_json(cohort.folder / "cohort.json")["provenance"]["task"] == "guessed"
    figures = read_json(cohort.folder / "ingest.json")["figures"]
    assert (figures["task"], figures["labels"]) == ("guessed", names)
    check_cohort(tiny_config(), cohort)


def test_only_guessed_names_may_differ_and_never_be_exchanged(tmp_path: Path) -> None:
    root = decathlon(tmp_path / "d", {"0": "background", "1": "posterior", "2": "anterior"})
    _, exchanged = ingest(tmp_path, root)
    with pytest.raises(UserError, match=r"task\.labels"):
        check_cohort(tiny_config(), exchanged)
    with pytest.raises(UserError, match=r"task\.labels"):
        check_cohort(tiny_config("task.labels={a: 1, b: 2, c: 3}"), replace(exchanged, label_names={"a": 1, "b": 2}))
    _, given = ingest(tmp_path, root, "task.labels={front: 1, back: 2}")
    assert dict(given.label_names) == {"front": 1, "back": 2}
    assert read_json(given.folder / "cohort.json")["provenance"]["task"] == "given"
    with pytest.raises(UserError, match=r"task\.labels"):
        check_cohort(tiny_config(), given)


def test_gaps_between_values_are_filled_but_grey_masks_are_no_labels(tmp_path: Path) -> None:
    _, cohort = ingest(tmp_path, decathlon(tmp_path / "d", values=(1, 4), count=3))
    assert dict(cohort.label_names) == {f"label_{n}": n for n in (1, 2, 3, 4)}
    grey = decathlon(tmp_path / "grey", values=(255,), count=3)
    with pytest.raises(UserError, match=r"1 values up to 255.*label_threshold"):
        ingest(tmp_path, grey)
    _, cohort = ingest(tmp_path, grey, "ingest.label_threshold=127")
    assert dict(cohort.label_names) == {"label_1": 1}


def test_two_data_sets_that_name_a_value_differently_are_not_mixed(tmp_path: Path) -> None:
    decathlon(tmp_path / "d" / "one", {"0": "background", "1": "liver"}, (1,), 2)
    decathlon(tmp_path / "d" / "two", {"0": "background", "1": "spleen"}, (1,), 2)
    with pytest.raises(UserError, match=r"label 1 'liver', another 'spleen'"):
        ingest(tmp_path, tmp_path / "d")


def test_a_damaged_label_costs_its_case_alone(tmp_path: Path) -> None:
    root = decathlon(tmp_path / "d", count=4)
    (root / "labelsTr" / "c1.nii.gz").write_bytes(b"rubbish")
    result, cohort = ingest(tmp_path, root)
    assert (result.status, len(cohort.cases)) == ("partial", 3)
    assert dict(cohort.label_names) == {"label_1": 1, "label_2": 2}


def test_a_table_names_the_classes(tmp_path: Path) -> None:
    root = radiographs(tmp_path / "d")
    (root / "cases.csv").write_text("image,tb\n" + "".join(f"images/x{n}.png,{n % 2}\n" for n in range(8)))
    sets = ["ingest.table.target=tb", 'ingest.target_names={"0": normal, "1": tb}']
    sets += ["ingest.split={val: 0.25, test: 0.25}"]
    result, cohort = ingest(tmp_path, root, *sets, labels=root / "cases.csv")
    assert (result.status, len(cohort.cases)) == ("done", 8)
    assert dict(cohort.label_names) == {"normal": 0, "tb": 1}
    assert [case.target for case in cohort.cases] == ["normal", "tb"] * 4
    check_cohort(tiny_radiograph_config(), cohort)


def test_classes_are_sorted_as_numbers_where_they_are(tmp_path: Path) -> None:
    root = radiographs(tmp_path / "d", 3)
    (root / "cases.csv").write_text("image,target\nx0.png,10\nx1.png,9\nx2.png,none\n")
    _, cohort = ingest(tmp_path, root, labels=root / "cases.csv")
    assert dict(cohort.label_names) == {"9": 0, "10": 1, "none": 2}


def test_a_table_of_label_maps_is_a_segmentation(tmp_path: Path) -> None:
    root = decathlon(tmp_path / "d", count=3)
    rows = "".join(f"imagesTr/c{n}.nii.gz,labelsTr/c{n}.nii.gz\n" for n in range(3))
    (root / "cases.csv").write_text("image,label\n" + rows)
    _, cohort = ingest(tmp_path, root, labels=root / "cases.csv")
    assert dict(cohort.label_names) == {"label_1": 1, "label_2": 2}
    assert all(case.label and not case.target for case in cohort.cases)


def test_a_table_without_either_column_is_told_both_ways_out(tmp_path: Path) -> None:
    root = radiographs(tmp_path / "d", 2)
    (root / "cases.csv").write_text("image,tb\nx0.png,1\nx1.png,0\n")
    with pytest.raises(UserError, match=r"'target' nor 'label'.*ingest\.table\.target.*ingest\.table\.label"):
        ingest(tmp_path, root, labels=root / "cases.csv")


def test_bare_folders_demand_nothing(tmp_path: Path) -> None:
    for n in range(3):
        save(tmp_path / "volumes" / f"v{n}.nii.gz", image(n))
        save(tmp_path / "channels" / f"v{n}.nii.gz", image(n, 2))
    _, cohort = ingest(tmp_path, tmp_path / "volumes")
    assert (dict(cohort.label_names), cohort.channels) == ({"label_1": 1}, ("image",))
    _, cohort = ingest(tmp_path, tmp_path / "channels")
    assert cohort.channels == ("image_0", "image_1")
    assert {case.images for case in cohort.cases} == {
        (f"images/v{n}_image_0.nii.gz", f"images/v{n}_image_1.nii.gz") for n in range(3)
    }
    _, cohort = ingest(tmp_path, radiographs(tmp_path / "flat", 3))
    assert {case.kind for case in cohort.cases} == {"radiograph"}


def test_what_is_set_is_kept_and_what_is_wrong_is_named(tmp_path: Path) -> None:
    draft = draft_config(["task.channels=[t1]", "ingest.min_slices=5"])
    save(tmp_path / "d" / "v.nii.gz", image(0))
    found, _ = discover([tmp_path / "d"], draft.ingest)
    config = draft.settle(found, None)
    assert (config.task.channels, config.task.kind, config.ingest.min_slices) == (("t1",), "segmentation", 5)
    for override, words in [
        ("ingest.minslices=5", r"ingest\.minslices is not a known field"),
        ("task.kind=detection", r"task\.kind"),
        ("task=3", r"set task\.labels"),
    ]:
        with pytest.raises(UserError, match=words):
            draft_config([override])
    with pytest.raises(UserError, match="no table names a class"):
        draft_config(["task.kind=classification"]).settle(found, None)
    classes = draft_config(["task={kind: classification, labels: {normal: 0, tb: 1}}"]).settle(found, None)
    assert (classes.task.labels, classes.model.name) == ({"normal": 0, "tb": 1}, "densenet")


def test_the_verb_needs_no_config_and_a_site_finds_its_dicom_cases_again(tmp_path: Path) -> None:
    for n in range(2):
        write_series(Volume(image(n), AFFINE), tmp_path / "d" / f"s{n}", patient_id=f"Doe^{n}", seed_uid=str(n))
    result = road.ingest([str(tmp_path / "d")], tmp_path / "out", None, None, ["seed=1"], tmp_path / "workspace")
    cohort = read_cohort(tmp_path / "out")
    assert (result.figures["task"], result.figures["labels"]) == ("guessed", {"label_1": 1})
    assert result.paths["report"].is_file()
    lookup = tmp_path / "workspace" / "pseudonyms.csv"
    places = {row["case_id"]: Path(row["folder"]).name for row in read_rows(lookup)}
    assert {places[case.case_id] for case in cohort.cases} == {"s0", "s1"}
    assert lookup.stat().st_mode & 0o777 == 0o600


def test_scans_of_an_archive_are_found_again_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    save(tmp_path / "v.nii.gz", image(0))
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as archive:
        archive.write(tmp_path / "v.nii.gz", "inner/v.nii.gz")
    scans = Scans([tmp_path / "scans.zip"])
    (channel,) = scans.channels("v", {"input_sha256": sha256_file(tmp_path / "v.nii.gz")})
    np.testing.assert_array_equal(channel.array, image(0))
    assert list((tmp_path / "temporary").rglob("v.nii.gz"))
    del scans
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())
