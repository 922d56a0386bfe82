"""Small look-alikes of the published layouts, ingested with the very command of each manifest."""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import typer
from synthetic import pneumonia_radiographs

from medseg.cli import app
from medseg.cohort import Case, Cohort, read_cohort
from medseg.config import load_config, validate_config
from medseg.files import UserError, read_json, read_rows
from medseg.images import read_image
from medseg.ingest.dicom_write import write_series
from medseg.ingest.fetch import case_rows, write_case_table
from medseg.ingest.guess import draft_config
from medseg.ingest.manifests import find_manifest, load_manifests, next_command
from medseg.ingest.step import run
from medseg.volume import Volume

KEY = b"k" * 32
SHAPE = (9, 8, 7)
AFFINE = np.diag([-1.5, -1.5, 2.0, 1.0])
DECATHLON = [name for name in load_manifests() if name.startswith("decathlon_")]
PREFIXES = {
    "01": "BRATS_001 BRATS_002",
    "02": "la_003 la_004",
    "03": "liver_0 liver_17",
    "04": "hippocampus_001 hippocampus_003",
    "05": "prostate_00 prostate_01",
    "06": "lung_001 lung_003",
    "07": "pancreas_001 pancreas_004",
    "08": "hepaticvessel_001 hepaticvessel_002",
    "09": "spleen_2 spleen_10",
    "10": "colon_001 colon_005",
}
Made = dict[str, np.ndarray]


def image_of(name: str, channels: int = 1) -> np.ndarray:
    """Values as a CT has them, another volume for every name."""
    shape = SHAPE if channels == 1 else (*SHAPE, channels)
    return np.random.default_rng(list(name.encode())).integers(-1000, 1000, shape).astype(np.int16)


def label_of(name: str, values: Sequence[int]) -> np.ndarray:
    """Every value somewhere, background too."""
    flat = np.random.default_rng(list(name.encode())).permutation(np.resize([0, *values], np.prod(SHAPE)))
    return flat.reshape(SHAPE).astype(np.uint8)


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def ingest(name: str, root: Path, out: Path, *sets: str) -> tuple[Cohort, dict[str, str]]:
    """Run the manifest's command, its words parsed by the command line itself."""
    words = shlex.split(next_command(find_manifest(name), root))
    assert words[:2] == ["medseg", "ingest"]
    verb = typer.main.get_command(app).commands["ingest"]
    given: Mapping[str, Any] = verb.make_context("ingest", words[2:]).params
    overrides = [*(given["sets"] or ()), *sets]
    settings = load_config(given["config"], overrides) if given["config"] else draft_config(overrides)
    labels = Path(given["labels"]) if given["labels"] else None
    result = run(settings, [Path(source) for source in given["source"]], out, labels=labels, key=KEY)
    return read_cohort(out), {row["source"]: row["code"] for row in read_rows(result.paths["rejects"])}


def label(cohort: Cohort, case: Case) -> np.ndarray:
    path = cohort.label_path(case)
    assert path is not None
    return np.asarray(read_image(path).array)


def image(cohort: Cohort, case: Case, channel: int = 0) -> np.ndarray:
    return np.asarray(read_image(cohort.image_paths(case)[channel]).array)


@pytest.mark.parametrize("name", DECATHLON)
def test_decathlon(name: str, tmp_path: Path) -> None:
    manifest = find_manifest(name)
    root = tmp_path / "d" / manifest.files[0].unpack_to
    cases = PREFIXES[name[len("decathlon_task") :][:2]].split()
    channels = load_config(manifest.ingest.config).task.channels
    for case in cases:
        save(root / "imagesTr" / f"{case}.nii.gz", image_of(case, len(channels)))
        save(root / "labelsTr" / f"{case}.nii.gz", label_of(case, list(manifest.labels.values())))
        (root / "imagesTr" / f"._{case}.nii.gz").write_bytes(b"what macOS leaves in archives")
    save(root / "imagesTs" / "test_000.nii.gz", image_of("t", len(channels)))
    (root / "dataset.json").write_text(json.dumps({"labels": {"0": "background"}}))
    assert [row["case_id"] for row in case_rows(manifest.layout, tmp_path / "d")] == sorted(cases)
    cohort, rejects = ingest(name, tmp_path / "d", tmp_path / "out")
    assert rejects == {}
    assert [(c.case_id, c.patient_id) for c in cohort.cases] == [(c, c) for c in sorted(cases)]
    assert (cohort.channels, dict(cohort.label_names)) == (channels, dict(manifest.labels))
    for case in cohort.cases:
        np.testing.assert_array_equal(label(cohort, case), label_of(case.case_id, list(manifest.labels.values())))
        whole = image_of(case.case_id, len(channels)).reshape(*SHAPE, -1)
        for at in range(len(channels)):
            np.testing.assert_array_equal(image(cohort, case, at), whole[..., at])


def brats(folder: Path, names: Sequence[str], endings: Mapping[str, str], values: Sequence[int], suffix: str) -> None:
    for name in names:
        for channel, ending in endings.items():
            save(folder / name / f"{name}{ending}{suffix}", image_of(name + channel))
        joint = "-seg" if "-" in name else "_seg"
        save(folder / name / f"{name}{joint}{suffix}", label_of(name, values))


@pytest.mark.parametrize(
    ("names", "patients", "suffix"),
    [
        (("BraTS20_Training_001", "BraTS20_Training_355"), {"": 2}, ".nii.gz"),
        (("BraTS20_Training_001", "BraTS20_Training_002"), {"": 2}, ".nii"),
        (("BraTS2021_00000", "BraTS2021_01666"), {"": 2}, ".nii.gz"),
        (
            ("Brats18_2013_2_1", "Brats18_CBICA_AAB_1", "Brats18_TCIA01_13_1", "Brats18_TCIA01_13_2"),
            {"1": 3},
            ".nii.gz",
        ),
    ],
)
def test_brats_to_2021(names: tuple[str, ...], patients: dict[str, int], suffix: str, tmp_path: Path) -> None:
    endings = {"FLAIR": "_flair", "T1": "_t1", "T1c": "_t1ce", "T2": "_t2"}
    brats(tmp_path / "d" / "HGG", names, endings, (1, 2, 4), suffix)
    (tmp_path / "d" / "name_mapping.csv").write_text("a,b\n")
    cohort, rejects = ingest("brats_2020", tmp_path / "d", tmp_path / "out")
    assert rejects == {}
    assert [case.case_id for case in cohort.cases] == sorted(names)
    assert len({case.patient_id for case in cohort.cases}) == sum(patients.values())
    assert {case.exam for case in cohort.cases if not case.case_id.endswith("_2")} == set(patients)
    check_brats(cohort, endings, lambda name: np.where(label_of(name, (1, 2, 4)) == 4, 3, label_of(name, (1, 2, 4))))


def test_brats_2023(tmp_path: Path) -> None:
    names = ("BraTS-GLI-00000-000", "BraTS-GLI-00000-001", "BraTS-GLI-00002-000")
    endings = {"FLAIR": "-t2f", "T1": "-t1n", "T1c": "-t1c", "T2": "-t2w"}
    brats(tmp_path / "d" / "train", names, endings, (1, 2, 3), ".nii.gz")
    assert len(case_rows(find_manifest("brats_2023").layout, tmp_path / "d")) == 3
    cohort, rejects = ingest("brats_2023", tmp_path / "d", tmp_path / "out")
    assert rejects == {}
    assert [(case.case_id, case.patient_id, case.exam) for case in cohort.cases] == [
        (name, name[:15], name[16:]) for name in names
    ]
    check_brats(cohort, endings, lambda name: label_of(name, (1, 2, 3)))


def check_brats(cohort: Cohort, endings: Mapping[str, str], expected: Callable[[str], np.ndarray]) -> None:
    assert cohort.channels == tuple(endings)
    for case in cohort.cases:
        np.testing.assert_array_equal(label(cohort, case), expected(case.case_id))
        for at, channel in enumerate(endings):
            np.testing.assert_array_equal(image(cohort, case, at), image_of(case.case_id + channel))


def test_btcv(tmp_path: Path) -> None:
    folder, values = tmp_path / "d" / "RawData", list(range(1, 14))
    for number in ("0001", "0002", "0040"):
        save(folder / "Training" / "img" / f"img{number}.nii.gz", image_of(number))
        save(folder / "Training" / "label" / f"label{number}.nii.gz", label_of(number, values))
    save(folder / "Testing" / "img" / "img0061.nii.gz", image_of("0061"))
    assert len(case_rows(find_manifest("btcv").layout, tmp_path / "d")) == 3
    cohort, rejects = ingest("btcv", tmp_path / "d", tmp_path / "out")
    assert rejects == {"Testing/img/img0061.nii.gz": "no_label"}
    assert [case.case_id for case in cohort.cases] == ["img0001", "img0002", "img0040"]
    for case in cohort.cases:
        np.testing.assert_array_equal(label(cohort, case), label_of(case.case_id[3:], values))


def test_amos22(tmp_path: Path) -> None:
    folder, values = tmp_path / "d" / "amos22", list(range(1, 16))
    for number, part in (("0001", "Tr"), ("0410", "Va"), ("0507", "Tr"), ("0003", "Ts")):
        save(folder / f"images{part}" / f"amos_{number}.nii.gz", image_of(number))
        if part != "Ts":
            save(folder / f"labels{part}" / f"amos_{number}.nii.gz", label_of(number, values))
    assert {row["case_id"] for row in case_rows(find_manifest("amos22").layout, tmp_path / "d")} == {
        "amos_0001",
        "amos_0410",
    }
    cohort, rejects = ingest("amos22", tmp_path / "d", tmp_path / "out")
    assert rejects == {}
    assert [case.case_id for case in cohort.cases] == ["amos_0001", "amos_0410"]
    assert cohort.label_names["prostate_or_uterus"] == 15
    note = find_manifest("amos22").ingest.notes[0]
    sets = [word for word in shlex.split(note.partition("add: ")[2]) if word != "--set"]
    assert [case.case_id for case in ingest("amos22", tmp_path / "d", tmp_path / "mr", *sets)[0].cases] == ["amos_0507"]


def test_totalsegmentator(tmp_path: Path) -> None:
    manifest = find_manifest("totalsegmentator_v2")
    folder = tmp_path / "d" / manifest.files[0].unpack_to
    values = {"spleen": 1, "skull": 91, "costal_cartilages": 117}
    for case in ("s0000", "s1428"):
        save(folder / case / "ct.nii.gz", image_of(case))
        whole = label_of(case, list(values.values()))
        for name, value in manifest.labels.items():
            save(folder / case / "segmentations" / f"{name}.nii.gz", (whole == value).astype(np.uint8))
    (folder / "s1428" / "segmentations" / "liver.nii.gz").unlink()
    twice = folder / "s0000" / "segmentations" / "liver.nii.gz"
    save(twice, (label_of("s0000", list(values.values())) == 1).astype(np.uint8))  # claims the spleen as well
    assert len(case_rows(manifest.layout, tmp_path / "d")) == 2
    cohort, rejects = ingest("totalsegmentator_v2", tmp_path / "d", tmp_path / "out")
    assert rejects == {"s1428/ct.nii.gz": "label_incomplete"}
    (case,) = cohort.cases
    whole = label_of("s0000", list(values.values()))
    np.testing.assert_array_equal(label(cohort, case), np.where(whole == 1, 5, whole))
    (overlap,) = [finding for finding in case.findings if finding.code == "label_overlap"]
    assert overlap.number == (whole == 1).sum()
    fewer = ("task.labels={skull: 1, spleen: 2}",)
    cohort, rejects = ingest("totalsegmentator_v2", tmp_path / "d", tmp_path / "few", *fewer)
    assert rejects == {}
    np.testing.assert_array_equal(label(cohort, cohort.cases[0]), np.select([whole == 91, whole == 1], [1, 2]))
    save(twice, np.zeros(SHAPE, np.uint8))  # no label of this task: what was read still holds
    again = run(load_config("totalsegmentator_v2", fewer), [folder], tmp_path / "few", key=KEY)
    assert again.figures["resumed"] == 2
    skull, spleen = (folder / "s0000" / "segmentations" / f"{name}.nii.gz" for name in ("skull", "spleen"))
    skull.rename(folder / "x"), spleen.rename(skull), (folder / "x").rename(spleen)
    again = run(load_config("totalsegmentator_v2", fewer), [folder], tmp_path / "few", key=KEY)
    assert again.figures["resumed"] == 1, "masks that changed places are another label"


def test_structures_without_a_config_are_named_like_their_files(tmp_path: Path) -> None:
    for name in ("kidney", "adrenal_gland"):
        save(tmp_path / "d" / "s1" / "segmentations" / f"{name}.nii.gz", label_of(name, [1]))
    save(tmp_path / "d" / "s1" / "ct.nii.gz", image_of("s1"))
    sets = ["ingest.image_path=/ct.nii.gz$", "ingest.label_path=segmentations", "ingest.label_files=one_per_label"]
    result = run(draft_config(sets), [tmp_path / "d"], tmp_path / "out", key=KEY)
    assert result.figures["labels"] == {"adrenal_gland": 1, "kidney": 2}
    with pytest.raises(UserError, match=r"needs ingest\.label_path"):
        run(draft_config(sets[2:]), [tmp_path / "d"], tmp_path / "other", key=KEY)


def test_mswal(tmp_path: Path) -> None:
    folder, values = tmp_path / "d" / "MSWAL", list(range(1, 8))
    for case in ("0001", "0484"):
        save(folder / "imagesTr" / f"MSWAL_{case}_0000.nii.gz", image_of(case))
        save(folder / "labelsTr" / f"MSWAL_{case}.nii.gz", label_of(case, values))
    names = {name.replace("_", " "): value for name, value in find_manifest("mswal").labels.items()}
    about = {"channel_names": {"0": "CT"}, "labels": {"background": 0, **names}}
    (folder / "dataset.json").write_text(json.dumps(about))
    assert len(case_rows(find_manifest("mswal").layout, tmp_path / "d")) == 2
    cohort, rejects = ingest("mswal", tmp_path / "d", tmp_path / "out")
    assert rejects == {}
    for case in cohort.cases:
        np.testing.assert_array_equal(label(cohort, case), label_of(case.case_id[-4:], values))
    exchanged = {**names, "gallstone": 2, "kidney stone": 1}
    (folder / "dataset.json").write_text(json.dumps({**about, "labels": {"background": 0, **exchanged}}))
    with pytest.raises(UserError, match=r"task\.labels gives 'gallstone' the value 1, but .*dataset\.json gives it 2"):
        ingest("mswal", tmp_path / "d", tmp_path / "other")
    assert ingest("mswal", tmp_path / "d", tmp_path / "same", "ingest.label_values={1: 2, 2: 1}")[1] == {}


def test_mrbrains18(tmp_path: Path) -> None:
    folder, values = tmp_path / "d" / "mrbrains18", list(range(1, 11))
    for case in ("1", "14", "070"):
        for name in ("FLAIR", "reg_T1", "reg_IR", "T1", "IR"):
            save(folder / "training" / case / "pre" / f"{name}.nii.gz", image_of(case + name))
            save(folder / "training" / case / "orig" / f"{name}.nii.gz", image_of(case + name + "orig"))
        save(folder / "training" / case / "segm.nii.gz", label_of(case, values))
    assert len(case_rows(find_manifest("mrbrains18").layout, tmp_path / "d")) == 3
    cohort, rejects = ingest("mrbrains18", tmp_path / "d", tmp_path / "out")
    assert rejects == {}
    assert [case.case_id for case in cohort.cases] == ["070", "1", "14"]
    for case in cohort.cases:
        np.testing.assert_array_equal(label(cohort, case), label_of(case.case_id, values))
        for at, name in enumerate(("reg_T1", "reg_IR", "FLAIR")):
            np.testing.assert_array_equal(image(cohort, case, at), image_of(case.case_id + name))


def test_pancreas_ct(tmp_path: Path) -> None:
    """The DICOM of a patient and a label map whose header puts the rows upside down, as it was published."""
    root = tmp_path / "d"
    for number in ("0001", "0002"):
        series = root / "Pancreas-CT" / f"PANCREAS_{number}" / "11-24-2015" / "Pancreas"
        volume = Volume(image_of(number), AFFINE)
        write_series(volume, series, modality="CT", patient_id=f"PANCREAS_{number}", seed_uid=number)
        upside_down = AFFINE * [[1], [-1], [1], [1]]
        save(root / "TCIA_pancreas_labels" / f"label{number}.nii.gz", label_of(number, [1]), upside_down)
    save(root / "TCIA_pancreas_labels" / "label0070.nii.gz", label_of("0070", [1]))
    cohort, rejects = ingest("pancreas_ct", root, tmp_path / "out")
    assert list(rejects.values()) == ["label_without_image"]
    assert len(cohort.cases) == 2
    found = {image(cohort, case).tobytes(): label(cohort, case) for case in cohort.cases}
    for number in ("0001", "0002"):
        np.testing.assert_array_equal(found[image_of(number).tobytes()], label_of(number, [1]))
    with pytest.raises(UserError, match="mm from the image's"):
        ingest("pancreas_ct", root, tmp_path / "header", "ingest.label_grid=header")


def test_covid19_radiography(tmp_path: Path) -> None:
    """Folders name the classes, one with a space in it; masks, and a class that is not asked for, are passed over."""
    manifest = find_manifest("covid19_radiography")
    root = pneumonia_radiographs(tmp_path / "d", count=4)
    rows = case_rows(manifest.layout, root)
    assert len(rows) == 12
    assert {row["finding"]: Path(row["lung_mask"]).parts[1] for row in rows} == {
        name: name for name in manifest.layout.target_names
    }
    write_case_table(manifest.layout, rows, root)
    cohort, rejects = ingest("covid19_radiography", root, tmp_path / "out")
    assert rejects == {}
    assert dict(cohort.label_names) == dict(manifest.labels)
    assert Counter(case.target for case in cohort.cases) == dict.fromkeys(manifest.labels, 4)
    for case in cohort.cases:
        stem = case.case_id.replace("Viral-", "Viral ")
        (source,) = root.glob(f"*/*/images/{stem}.png")
        assert manifest.layout.target_names[source.parts[-3]] == case.target
        np.testing.assert_array_equal(image(cohort, case), read_image(source).array)
    assert len({case.patient_id for case in cohort.cases}) == 12


def test_an_nnunet_folder_brings_its_own_names(tmp_path: Path) -> None:
    """Without a config, names and values are those of the dataset.json."""
    for case in ("scan_0001", "scan_0002"):
        save(tmp_path / "d" / "imagesTr" / f"{case}_0000.nii.gz", image_of(case))
        save(tmp_path / "d" / "labelsTr" / f"{case}.nii.gz", label_of(case, (1, 2)))
    about = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "first kind": 1, "second kind": 2}}
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(about))
    result = run(draft_config(["ingest.modality=[CT]", "ingest.names=kept"]), [tmp_path / "d"], tmp_path / "o", key=KEY)
    assert result.figures["labels"] == {"first_kind": 1, "second_kind": 2}
    assert [case.case_id for case in read_cohort(tmp_path / "o").cases] == ["scan_0001", "scan_0002"]


def test_oasis_keeps_the_examinations_of_a_subject_apart_and_together(tmp_path: Path) -> None:
    root = tmp_path / "d" / "oasis3"
    days = {f"sub-OAS3000{n}": ("d0129", "d0757", "d2340")[: n % 3 + 1] for n in range(1, 9)}
    for subject, sessions in days.items():
        for day in sessions:
            save(root / subject / f"ses-{day}" / "anat" / f"{subject}_ses-{day}_T1w.nii.gz", image_of(subject + day))
            save(root / subject / f"ses-{day}" / "func" / f"{subject}_ses-{day}_bold.nii.gz", image_of("bold"))
    rows = case_rows(find_manifest("oasis3").layout, tmp_path / "d")
    assert len(rows) == sum(map(len, days.values()))
    cohort, rejects = ingest("oasis3", tmp_path / "d", tmp_path / "out")
    assert rejects == {}
    found = [(case.patient_id, case.exam) for case in cohort.cases]
    assert found == [(row["patient_id"], row["exam"]) for row in rows]
    splits = {subject: {c.split for c in cohort.cases if c.patient_id == subject} for subject in days}
    assert all(len(found) == 1 for found in splits.values())
    assert {"train", "test"} <= set().union(*splits.values())
    keyed, _ = ingest("oasis3", tmp_path / "d", tmp_path / "keyed", "ingest.names=keyed")
    assert sorted(case.exam for case in keyed.cases) == sorted(case.exam for case in cohort.cases)
    assert not any("OAS" in case.case_id + case.patient_id for case in keyed.cases)


@pytest.mark.parametrize(("names", "dates"), [("kept", "shift"), ("keyed", "shift"), ("keyed", "drop")])
def test_adni_dates_are_kept_shifted_or_dropped(names: str, dates: str, tmp_path: Path) -> None:
    for patient, day in (("002_S_0295", "2006-04-18"), ("002_S_0295", "2007-05-25"), ("011_S_0002", "2006-04-18")):
        save(
            tmp_path / "d" / patient / "MP-RAGE" / f"{day}_08_20_30.0" / "I13722" / "scan.nii.gz",
            image_of(patient + day),
        )
    note = next(note for note in find_manifest("oasis3").ingest.notes if note.startswith("ADNI"))
    (override,) = [word for word in shlex.split(note) if word.startswith("ingest.")]
    sets = [override, f"ingest.names={names}", f"ingest.dates={dates}"]
    run(draft_config(sets), [tmp_path / "d"], tmp_path / "out", key=KEY)
    by_patient: dict[str, list[str]] = {}
    for case in read_cohort(tmp_path / "out").cases:
        by_patient.setdefault(case.patient_id, []).append(case.exam)
    exams = {tuple(sorted(found)) for found in by_patient.values()}
    if names == "kept":
        assert exams == {("2006-04-18", "2007-05-25"), ("2006-04-18",)}
    elif dates == "drop":
        assert exams == {("", ""), ("",)}
    else:
        from datetime import date

        (repeat,) = [found for found in exams if len(found) == 2]
        first, second = (date.fromisoformat(day) for day in repeat)
        assert (second - first).days == (date(2007, 5, 25) - date(2006, 4, 18)).days
        assert first < date(2006, 4, 18)


def test_a_cohort_of_before_has_no_examinations(tmp_path: Path) -> None:
    case = Case("a", "p", ("images/a.nii.gz",), exam="3")
    row = case.to_row()
    assert Case.from_row(row) == case
    del row["exam"]
    assert Case.from_row(row).exam == ""


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_path": "("}, "no regular expression"),
        ({"image_path": "(?P<case>x)", "label_path": "{number}.nii"}, "label_path names {number}"),
        ({"label_path": "{"}, "cannot be read"),
        ({"label_values": {4: -1}}, "label_values"),
        ({"channels": {"image": "x"}, "label_name": "seg", "label_path": "seg.nii"}, "give one of them"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused_at_load(fields: dict[str, Any], words: str) -> None:
    tree = load_config("btcv").model_dump(mode="json")
    ingest = {**tree["ingest"], "image_path": "", "label_path": "", **fields}
    with pytest.raises(UserError, match=words):
        validate_config({**tree, "ingest": ingest}, "test")


def test_values_change_places_and_paths_that_fit_nothing_are_told(tmp_path: Path) -> None:
    save(tmp_path / "d" / "img" / "img0001.nii.gz", image_of("a"))
    save(tmp_path / "d" / "label" / "label0001.nii.gz", label_of("a", (1, 2, 3)))
    run(load_config("btcv", ["ingest.label_values={1: 2, 2: 1}"]), [tmp_path / "d"], tmp_path / "out", key=KEY)
    cohort = read_cohort(tmp_path / "out")
    before = label_of("a", (1, 2, 3))
    np.testing.assert_array_equal(label(cohort, cohort.cases[0]), np.array([0, 2, 1, 3], np.uint8)[before])
    with pytest.raises(UserError, match=r"image_path .* fits none of 2 files"):
        run(
            load_config("btcv", ["ingest.image_path=/scan", "ingest.label_path=''"]),
            [tmp_path / "d"],
            tmp_path / "none",
            key=KEY,
        )
    about = read_json(tmp_path / "out" / "cohort.json")
    assert about["provenance"]["ingest"]["label_values"] == {"1": 2, "2": 1}
