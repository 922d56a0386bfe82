"""Bad input: one sentence that names the file or field and the remedy, the right exit code, nothing half-written."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import TINY, radiograph_cohort, segmentation_cohort, tiny_config

from medseg import cli
from medseg.cohort import read_cohort, write_cohort
from medseg.images import read_image, write_nifti
from medseg.ingest import case_maker
from medseg.volume import Volume

Told = tuple[int, str]
Medseg = Callable[..., Told]
INGEST = ("--config", "hippocampus", "--set", "ingest.modality=[]")


def sets(*overrides: str) -> list[str]:
    return [word for override in (*TINY, *overrides) for word in ("--set", override)]


@pytest.fixture
def medseg(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Medseg:
    """Run a command line in this process: its exit code, and all that it said; failures are one sentence."""
    monkeypatch.setenv("MEDSEG_WORKSPACE", str(tmp_path / "workspace"))

    def call(*words: object) -> Told:
        monkeypatch.setattr(sys, "argv", ["medseg", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err, err
        code = end.value.code or 0
        assert isinstance(code, int)
        if code == 2 and "Usage:" not in err:
            assert out == ""
            told = [line for line in err.splitlines() if line.startswith("Error: ")]
            assert len(told) == 1
            assert told[0].endswith("."), told
        return code, out + err

    return call


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmentation cohort, a radiograph cohort, raw scans and a bundle; tests copy what they change."""
    from medseg.bundle_writing import save_bundle
    from medseg.models import build_from_config
    from medseg.train.planning import make_plan

    folder = tmp_path_factory.mktemp("made")
    cohort = segmentation_cohort(folder / "cohort", 6)
    radiograph_cohort(folder / "radiographs", 12)
    for name in ("images", "labels"):
        shutil.copytree(folder / "cohort" / name, folder / "raw" / name)
    config = tiny_config()
    net = build_from_config(config.model, spatial_dims=3, in_channels=1, out_channels=3)
    save_bundle(
        folder / "bundle",
        state_dict=net.state_dict(),
        config=config,
        plan=make_plan(config, cohort),
        run_id="20260101-000000-far-away-0000",
        cohort_sha256=cohort.sha256,
        metrics={},
    )
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Configuration


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("modle.name=unet", ("modle", "not a known field")),
        ("train.epoch=3", ("train.epoch", "not a known field")),
        ("train.epochs=many", ("train.epochs", "valid integer", "'many'")),
        ("train.epochs=0", ("train.epochs", "greater than or equal to 1")),
        ("model.name=unett", ("model", "unett")),
        ("train.epochs", ("--set 'train.epochs'", "field.path=value")),
        ("name.x=1", ("--set 'name.x=1'", "not a group of fields")),
        ("task.labels={anterior: 1, posterior: 3}", ("label values", "without gaps")),
    ],
)
def test_override_that_does_not_fit(override: str, words: tuple[str, ...], medseg: Medseg, made: Path) -> None:
    before = tree(made)
    code, said = medseg("train", "hippocampus", "--cohort", made / "cohort", "--set", override)
    assert code == 2
    assert all(word in said for word in words), said
    assert tree(made) == before
    assert not Path(os.environ["MEDSEG_WORKSPACE"]).exists()


def test_config_file_that_is_none(medseg: Medseg, made: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("name: [unclosed")
    (tmp_path / "list.yaml").write_text("- name")
    for name, word in (("broken.yaml", "cannot be read as YAML"), ("list.yaml", "holds no mapping")):
        code, said = medseg("train", tmp_path / name, "--cohort", made / "cohort")
        assert code == 2
        assert str(tmp_path / name) in said
        assert word in said
    code, said = medseg("train", "hipocampus", "--cohort", made / "cohort")
    assert code == 2
    assert "hipocampus" in said
    assert "tb_radiograph" in said  # the names there are


# Cohorts


def test_cohort_that_is_none_or_unfinished(medseg: Medseg, made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made / "cohort", tmp_path / "cohort")
    (copy / "cohort.json").unlink()
    for place in (tmp_path / "nowhere", copy):
        for words in (("train", "hippocampus"), ("plan", "hippocampus"), ("evaluate", made / "bundle")):
            code, said = medseg(*words, "--cohort", place)
            assert code == 2
            assert f"{place} is not a finished cohort" in said
            assert "medseg ingest" in said


def test_cohort_of_another_task(medseg: Medseg, made: Path) -> None:
    code, said = medseg("train", "hippocampus", "--cohort", made / "radiographs")
    assert code == 2
    assert "task.labels" in said
    code, said = medseg("train", "tb_radiograph", "--cohort", made / "cohort")
    assert code == 2
    assert "task.labels" in said
    assert not (Path(os.environ["MEDSEG_WORKSPACE"]) / "runs").exists()


def test_model_of_another_task_than_the_cohort(medseg: Medseg, made: Path) -> None:
    code, said = medseg("evaluate", made / "bundle", "--cohort", made / "radiographs")
    assert code == 2
    assert "radiograph" in said or "label" in said


def test_class_missing_from_a_split(medseg: Medseg, made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made / "radiographs", tmp_path / "cohort")
    cohort = read_cohort(copy)
    cases = tuple(replace(c, split="train" if c.target == "normal" else "test") for c in cohort.cases)
    write_cohort(replace(cohort, cases=cases), [], {"made_by": "tests"})
    code, said = medseg("train", "tb_radiograph", "--cohort", copy)
    assert code == 2
    assert "class 'tb' is missing from split 'train'" in said
    assert "ingest.split" in said


def test_label_missing_from_every_training_case(medseg: Medseg, made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made / "cohort", tmp_path / "cohort")
    cohort = read_cohort(copy)
    for case in cohort.cases:
        path = copy / case.label
        label = read_image(path)
        write_nifti(path, Volume(np.where(label.array == 2, 0, label.array).astype(np.uint8), label.affine))
    write_cohort(cohort, [], {"made_by": "tests"})
    code, said = medseg("train", "hippocampus", "--cohort", copy, *sets())
    assert code == 2
    assert "label 'posterior' (2) occurs in no case of split 'train'" in said


def test_case_id_that_stands_twice(medseg: Medseg, made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made / "cohort", tmp_path / "cohort")
    lines = (copy / "cohort.csv").read_text().splitlines()
    (copy / "cohort.csv").write_text("\n".join([*lines, lines[1]]) + "\n")
    code, said = medseg("train", "hippocampus", "--cohort", copy)
    assert code == 2
    assert "case-00" in said
    assert "2 times" in said


# Scans


def test_ingest_of_a_wrong_path_or_an_empty_folder(medseg: Medseg, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "notes.txt").write_text("no scan")
    for source, word in (("nowhere", "does not exist"), ("empty", "is empty"), ("words", "none of the 1 files")):
        code, said = medseg("ingest", tmp_path / source, "--cohort", tmp_path / "cohort", *INGEST)
        assert code == 2
        assert str(tmp_path / source) in said
        assert word in said
        assert not (tmp_path / "cohort").exists()


def test_damaged_scan_among_good_ones_is_rejected_by_name(medseg: Medseg, made: Path, tmp_path: Path) -> None:
    raw = shutil.copytree(made / "raw", tmp_path / "raw")
    whole = (raw / "images" / "case-00.nii.gz").read_bytes()
    (raw / "images" / "case-00.nii.gz").write_bytes(whole[: len(whole) // 2])
    code, said = medseg("ingest", raw, "--cohort", tmp_path / "cohort", *INGEST)
    assert code == 3
    assert "rejects.csv" in said
    rejects = (tmp_path / "cohort" / "rejects.csv").read_text().splitlines()
    assert len(rejects) == 2
    assert "case-00.nii.gz" in rejects[1]
    assert len(read_cohort(tmp_path / "cohort").cases) == 5


def test_damaged_scan_alone_is_a_usage_error(medseg: Medseg, tmp_path: Path) -> None:
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes(b"\x1f\x8b\x08 nothing")
    code, said = medseg("ingest", scan, "--cohort", tmp_path / "cohort", *INGEST)
    assert code == 2
    assert "scan.nii.gz" in said
    assert "rejects.csv" in said
    assert not (tmp_path / "cohort" / "cohort.json").exists()


def test_label_value_that_the_config_does_not_name(medseg: Medseg, made: Path, tmp_path: Path) -> None:
    raw = shutil.copytree(made / "raw", tmp_path / "raw")
    label = read_image(raw / "labels" / "case-01.nii.gz")
    array = np.array(label.array)
    array[0, 0, 0] = 9
    write_nifti(raw / "labels" / "case-01.nii.gz", Volume(array, label.affine))
    code, _ = medseg("ingest", raw, "--cohort", tmp_path / "cohort", *INGEST)
    assert code == 3
    rejects = (tmp_path / "cohort" / "rejects.csv").read_text().splitlines()
    assert len(rejects) == 2
    assert "case-01" in rejects[1]
    assert "9" in rejects[1]
    assert "task.labels" in rejects[1]


def test_damaged_dicom_is_rejected_and_its_holder_finds_it_again(medseg: Medseg, made: Path, tmp_path: Path) -> None:
    from medseg.ingest.dicom_write import write_series

    voxels = np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8)
    volume = Volume(voxels, np.diag([1.0, 1.0, 2.0, 1.0]))
    for name in ("good", "short"):
        write_series(
            volume, tmp_path / "raw" / name, modality="MR", patient_id=name, series_description="t", seed_uid=name
        )
    damaged = sorted((tmp_path / "raw" / "short").iterdir())[3]
    damaged.write_bytes(damaged.read_bytes()[:-40])
    (tmp_path / "raw" / "text.dcm").write_text("this is a letter")
    code, said = medseg("predict", made / "bundle", tmp_path / "raw", "--out", tmp_path / "out")
    assert code == 3
    rejects = (tmp_path / "out" / "rejects.csv").read_text()
    assert "not_dicom" in rejects
    assert "text.dcm" not in rejects, "a hospital's file name may name the patient"
    places = (tmp_path / "workspace" / "pseudonyms.csv").read_text()
    names = [row["source"] for row in csv.DictReader(rejects.splitlines()) if row["code"] == "not_dicom"]
    assert any(line.startswith(names[0]) and line.endswith("text.dcm") for line in places.splitlines())
    ledger = (tmp_path / "out" / "ledger.csv").read_text()
    assert ledger.count("rejected") == 2
    assert "2" in said


# Models


def test_model_that_does_not_exist_in_any_form(medseg: Medseg, made: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for model, word in (
        (tmp_path / "nowhere", "neither a bundle folder"),
        (tmp_path / "empty", "holds no bundle"),
        ("20260101-000000-none-0000", "no run yet"),
        ("models:nonsense", "models:/NAME@ALIAS"),
    ):
        code, said = medseg("predict", model, made / "raw", "--out", tmp_path / "out")
        assert code == 2
        assert str(model) in said
        assert word in said
        assert not (tmp_path / "out").exists()


def test_registered_model_that_does_not_exist(medseg: Medseg, made: Path, tmp_path: Path) -> None:
    code, said = medseg("predict", "models:/lungs@champion", made / "raw", "--out", tmp_path / "out")
    assert code == 2
    assert "'lungs' is not registered" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "config.yaml", "plan.yaml", "bundle.json", "MODEL_CARD.md"])
def test_damaged_bundle_is_never_used(name: str, medseg: Medseg, made: Path, tmp_path: Path) -> None:
    for harm in ("change", "remove"):
        bundle = shutil.copytree(made / "bundle", tmp_path / harm)
        content = bytearray((bundle / name).read_bytes())
        content[len(content) // 2] ^= 1
        (bundle / name).write_bytes(content)
        if harm == "remove":
            (bundle / name).unlink()
        code, said = medseg("predict", bundle, made / "raw", "--out", tmp_path / "out")
        assert code == 2
        assert str(bundle / name) in said or "holds no bundle" in said, said
        assert not (tmp_path / "out").exists()


# Runs


def test_resume_of_what_cannot_be_resumed(medseg: Medseg, made: Path) -> None:
    from medseg.config import dump_config
    from medseg.runs import create_run

    words = ("train", "hippocampus", "--cohort", made / "cohort", *sets())
    code, said = medseg(*words, "--resume", "20260101-000000-none-0000")
    assert code == 2
    assert "'20260101-000000-none-0000' is not in" in said
    run = create_run(Path(os.environ["MEDSEG_WORKSPACE"]), "hippocampus", "early")
    code, said = medseg(*words, "--resume", "early")  # it died before it wrote its config
    assert code == 2
    assert "early" in said
    (run.path / "config.yaml").write_text(dump_config(tiny_config("seed=5")))
    code, said = medseg(*words, "--resume", "early")
    assert code == 2
    assert "field 'seed'" in said
    (run.path / "config.yaml").write_text(dump_config(tiny_config()))
    code, said = medseg(*words, "--resume", "early")
    assert code == 2
    assert "no readable checkpoint" in said
    assert json.loads((run.path / "run.json").read_text())["status"] == "FAILED"


# Places to write


def test_file_in_the_way_of_a_folder(medseg: Medseg, made: Path, tmp_path: Path) -> None:
    way = tmp_path / "way"
    way.write_text("mine")
    for words in (
        ("ingest", made / "raw", "--cohort", way, *INGEST),
        ("predict", made / "bundle", made / "raw", "--out", way),
        ("train", "hippocampus", "--cohort", made / "cohort", *sets(), "--workspace", way),
        ("predict", made / "bundle", made / "raw", "--out", tmp_path / "out", "--workspace", way),
        ("ingest", made / "raw", "--cohort", tmp_path / "cohort", *INGEST, "--workspace", way),
    ):
        code, said = medseg(*words)
        assert code == 2, said
        assert str(way) in said
    assert way.read_text() == "mine"
    assert not (tmp_path / "cohort").exists()


class Disk:
    """A small disk of its own, mounted for one test."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs the rights of root")

    def change(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    if not shutil.which("mount"):
        pytest.skip("this system has no mount command")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", str(path)], capture_output=True, check=False)


def parts(folder: Path) -> list[Path]:
    return list(folder.rglob(".part-*"))


def test_ingest_on_a_full_disk_goes_on_after_space_is_freed(
    medseg: Medseg, made: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(case_maker, "_WORKERS", 1)  # several at once may all be half written
    disk.mount("size=72k")
    words = ("ingest", made / "raw", "--cohort", disk.path / "cohort", *INGEST)
    code, said = medseg(*words)
    assert code == 2
    assert "No space left on device" in said
    assert "free space" in said
    assert str(disk.path) in said
    assert not (disk.path / "cohort" / "cohort.json").exists()
    assert not parts(disk.path)
    disk.change("size=16m")
    code, said = medseg(*words)
    assert code == 0
    assert "resumed" in said
    assert len(read_cohort(disk.path / "cohort").cases) == 6


def test_predict_on_a_full_disk_goes_on_after_space_is_freed(medseg: Medseg, made: Path, disk: Disk) -> None:
    disk.mount("size=120k")
    words = ("predict", made / "bundle", made / "raw" / "images", "--out", disk.path / "out")
    code, said = medseg(*words)
    assert code == 2, said
    assert "No space left on device" in said
    assert str(disk.path) in said
    assert not parts(disk.path)
    disk.change("size=64m")
    code, said = medseg(*words)
    assert code == 0, said


@pytest.mark.parametrize("size_kb", [8, 200, pytest.param(60, marks=pytest.mark.slow)])
def test_train_on_a_full_disk_goes_on_after_space_is_freed(
    size_kb: int, medseg: Medseg, made: Path, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'elsewhere.db'}")
    disk.mount(f"size={size_kb}k")
    long = "train={epochs: 60, validate_every: 60, warmup_steps: 2, precision: fp32, checkpoint_minutes: 0.0005}"
    words = ("train", "hippocampus", "--cohort", made / "cohort", *sets(long), "--workspace", disk.path)
    code, said = medseg(*words)
    assert code == 2, said
    assert "No space left on device" in said
    assert not parts(disk.path)
    disk.change("size=64m")
    saved = list(disk.path.glob("runs/*/checkpoints/step_*.pt"))
    code, said = medseg(*words, *(("--resume", saved[0].parent.parent.name) if saved else ()))
    assert code == 0, said
    assert list(disk.path.glob("runs/*/bundle/weights.safetensors"))


def test_read_only_places(medseg: Medseg, made: Path, disk: Disk, tmp_path: Path) -> None:
    disk.mount("size=1m,ro")
    for words in (
        ("ingest", made / "raw", "--cohort", disk.path / "cohort", *INGEST),
        ("predict", made / "bundle", made / "raw", "--out", disk.path / "out"),
        ("train", "hippocampus", "--cohort", made / "cohort", *sets(), "--workspace", disk.path / "ws"),
        ("models", "list", "--workspace", disk.path / "ws"),
    ):
        code, said = medseg(*words)
        assert code == 2, said
        assert "Read-only file system" in said
        assert str(disk.path) in said
    assert not (tmp_path / "cohort").exists()
