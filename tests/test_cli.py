"""The command line as schedulers and people meet it: help, JSON, exit codes, interruption, and the whole road once."""

import csv
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from synthetic import TINY, segmentation_cohort

from medseg import screen
from medseg.result import Result

ROOT = Path(__file__).parent.parent
VERBS = ("ingest", "plan", "train", "evaluate", "predict", "report", "models", "data", "up", "doctor", "deploy", "demo")
ON_SHELVES = (
    "models list",
    "models show",
    "models pretrain",
    "models join",
    "models prune",
    "models adapt",
    "models calibrate",
    "models promote",
    "models export",
    "data list",
    "data show",
    "data fetch",
)
INGEST = ("--config", "hippocampus", "--set", "ingest.modality=[]", "--set", "ingest.split.val=0.2")
NAMED = "tracking={system_metrics: false, register_as: tiny}"


@dataclass(frozen=True)
class Ended:
    """A finished process."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        lines = self.out.splitlines()
        assert len(lines) == 1, f"stdout is for one JSON object alone: {self.out}"
        tree = json.loads(lines[0])
        assert isinstance(tree, dict)
        return tree


def start(*words: object, columns: int = 80) -> subprocess.Popen[str]:
    """Start a medseg process in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-m", "medseg.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": str(columns)},
    )


def run(*words: object) -> Ended:
    process = start(*words)
    out, err = process.communicate(timeout=500)
    return Ended(process.returncode, out, err)


def sets(*overrides: str) -> list[str]:
    return [word for override in (*TINY, *overrides) for word in ("--set", override)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a space in its name and ten raw volumes with labels."""
    folder = tmp_path_factory.mktemp("the road")
    segmentation_cohort(folder / "made")
    for name in ("images", "labels"):
        shutil.copytree(folder / "made" / name, folder / "raw" / name)
    (folder / "raw" / "images" / "case-99.nii.gz").write_bytes(b"\x1f\x8b no volume at all")
    shutil.copy(folder / "raw" / "labels" / "case-00.nii.gz", folder / "raw" / "labels" / "case-99.nii.gz")
    return folder


@pytest.fixture(scope="module")
def road(home: Path) -> dict[str, Ended]:
    """Every step once, by process, with --json."""
    at = ("--workspace", home / "work space", "--json")
    cohort, done = home / "cohort", {}
    done["ingest"] = run("ingest", home / "raw", "--cohort", cohort, *INGEST, *at)
    done["train"] = run("train", "hippocampus", "--cohort", cohort, *sets(NAMED), *at)
    model = done["train"].json["run_id"]
    done["evaluate"] = run("evaluate", model, "--cohort", cohort, *at)
    scans = home / "raw" / "images"
    done["predict"] = run("predict", "models:/tiny/1", scans, "--out", home / "out", *at)
    done["report"] = run("report", home / "out", *at)
    return done


@pytest.mark.parametrize("verb", ["", *VERBS, *ON_SHELVES])
def test_help_fits_a_terminal_of_24_lines_and_80_columns(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from medseg import cli

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["medseg", *verb.split(), "--help"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr().out
    assert end.value.code in (0, None)
    assert len(shown.splitlines()) <= 24
    assert max(map(len, shown.splitlines())) <= 80
    if not verb:
        assert all(f"  {name} " in shown for name in VERBS)
        assert "..." not in shown.split("Commands:")[1]  # no sentence is cut


def test_help_loads_nothing_heavy_and_takes_less_than_a_second() -> None:
    code = "import sys, medseg.cli; sys.argv = ['medseg', '--help']; medseg.cli.app(standalone_mode=False)"
    heavy = "{'torch', 'monai', 'mlflow', 'prefect', 'nibabel', 'pydicom', 'numpy'}"
    probe = f"{code}; print('heavy:', sorted({heavy} & set(sys.modules)))"
    before = os.times()
    shown = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    after = os.times()
    assert shown.endswith("heavy: []\n")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 1.0  # processor time, so that a busy machine does not decide


def test_the_road_ends_with_the_documented_exit_codes(road: dict[str, Ended]) -> None:
    codes = {name: ended.code for name, ended in road.items()}
    # One volume is damaged, so ingest and predict finish with 3 and say which.
    assert codes == {"ingest": 3, "train": 0, "evaluate": 0, "predict": 3, "report": 0}, road


def test_json_names_status_paths_and_figures_and_nothing_empty(road: dict[str, Ended]) -> None:
    for name, ended in road.items():
        tree = ended.json
        assert tree["step"] == name
        assert tree["status"] == ("partial" if ended.code == 3 else "done")
        assert tree["figures"]
        assert not {"rows", "text"} & set(tree)
        for path in tree["paths"].values():
            assert Path(path).is_absolute()
            assert Path(path).exists(), path
    assert road["train"].json["run_id"] == road["evaluate"].json["run_id"]
    assert {"mean_dice", "dice_anterior", "dice_posterior"} <= set(road["evaluate"].json["figures"])


def test_the_seconds_of_an_evaluation_are_those_of_its_predictions_too(road: dict[str, Ended]) -> None:
    ended = road["evaluate"].json
    comparing = json.loads((Path(ended["paths"]["metrics"]).parent / "evaluate.json").read_text())["figures"]["seconds"]
    assert ended["figures"]["seconds"] > comparing + 0.5


def test_no_traceback_and_no_library_chatter_on_stderr(road: dict[str, Ended]) -> None:
    for name, ended in road.items():
        assert "Traceback" not in ended.err, name
        assert not re.search(r"alembic|INFO mlflow|FutureWarning|DeprecationWarning", ended.err), (name, ended.err)


def test_tables_say_which_case_was_refused_and_why(road: dict[str, Ended], home: Path) -> None:
    with Path(road["ingest"].json["paths"]["rejects"]).open() as file:
        rejects = list(csv.DictReader(file))
    assert [row["code"] for row in rejects] == ["unreadable_nifti"]
    assert "case-99" in rejects[0]["source"]
    with (home / "out" / "ledger.csv").open() as file:
        ledger = list(csv.DictReader(file))
    refused = [row for row in ledger if row["status"] == "rejected"]
    assert (len(ledger), len(refused)) == (11, 1)
    assert "readable" in refused[0]["reason"]


def test_no_step_leaves_a_temporary_file(road: dict[str, Ended], home: Path) -> None:
    assert road
    assert not list(home.rglob(".part-*"))
    assert not list(home.rglob("*-old"))


def test_usage_error_of_the_parser_is_json_too() -> None:
    ended = run("evaluate", "model", "--cohort", "x", "--split", "foo", "--json")
    assert ended.code == 2
    assert ended.json["kind"] == "usage"
    assert "'foo' is not one of 'train', 'val', 'test'" in ended.json["error"]


def test_prints_of_a_step_go_to_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from medseg import cli, shelf

    def noisy() -> Result:
        print("a library talks")
        return Result("data", "done", figures={"datasets": 1})

    monkeypatch.setattr(shelf, "list_data", noisy)
    monkeypatch.setattr(sys, "argv", ["medseg", "data", "list", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    out, err = capsys.readouterr()
    assert json.loads(out)["figures"] == {"datasets": 1}
    assert err == "a library talks\n"


def test_internal_failure_is_1_and_shows_its_cause_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from medseg import cli, shelf

    def broken() -> Result:
        raise RuntimeError("a gear broke")

    monkeypatch.setattr(shelf, "list_data", broken)
    monkeypatch.setattr(sys, "argv", ["medseg", "data", "list", "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert end.value.code == 1
    assert json.loads(out) == {"status": "error", "kind": "internal", "error": "RuntimeError: a gear broke"}
    assert "Traceback" in err


def test_a_screen_keeps_paths_whole_and_figures_aligned() -> None:
    place = Path("/a folder") / ("long" * 60) / "index.html"
    figures = {"cases": 3, "rejects": 0, "spacing_mm": (1.5, 1.5, 2.0), "labels": {"a": 1, "b": 2}, "loss": 0.123456}
    shown = screen.as_text(Result("train", "done", {"report": place}, figures, "run-7"), "medseg evaluate RUN")
    lines = shown.splitlines()
    assert lines[0] == "train (run run-7): done"
    assert f"report        {place}" in lines
    assert "spacing (mm)  1.5 × 1.5 × 2" in lines
    assert "labels        a 1, b 2" in lines
    assert "loss          0.123" in lines
    assert "rejects" not in shown  # none: nothing to say
    assert lines[-1] == "next: medseg evaluate run-7"


def test_a_screen_shows_rows_uncut() -> None:
    rows = [{"model": "m" * 90, "run_id": "r"}, {"model": "n", "run_id": "s" * 90}]
    shown = screen.as_text(Result("models", "done", rows=rows)).splitlines()
    assert shown[0].split() == ["model", "run", "id"]
    assert "m" * 90 in shown[1]
    assert "s" * 90 in shown[2]


# Interruption

LONG = ("train={epochs: 40, validate_every: 40, warmup_steps: 2, precision: fp32, checkpoint_minutes: 0.0005}",)


def train_words(home: Path, workspace: str, *more: object) -> list[object]:
    place = home / workspace
    words = ["train", "hippocampus", "--cohort", home / "made", *sets(*LONG)]
    return [*words, "--workspace", place, "--json", *more]


def wait_for(path: Path, pattern: str, count: int, process: subprocess.Popen[str]) -> Path:
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        if len(found := sorted(path.glob(pattern))) >= count:
            return found[-1]
        time.sleep(0.02)
    raise AssertionError(f"{pattern} did not come: {process.communicate()[1]}")


def weights(run_folder: Path) -> bytes:
    return (run_folder / "bundle" / "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unbroken(home: Path) -> bytes:
    """The weights of a run that nothing interrupted."""
    return weights(Path(run(*train_words(home, "unbroken")).json["paths"]["run"]))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted_training_resumes_to_the_same_weights(number: int, home: Path, unbroken: bytes) -> None:
    space = f"stopped by {number}"
    process = start(*train_words(home, space))
    folder = wait_for(home / space, "runs/*/checkpoints/step_*.pt", 1, process).parent.parent
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=100)
    about = json.loads((folder / "run.json").read_text())
    assert process.returncode == 130, err
    assert json.loads(out)["kind"] == "interrupted"
    assert "Traceback" not in err
    assert about["status"] == "INTERRUPTED"
    assert mlflow_status(home / space, about["mlflow_run_id"]) == "KILLED"
    assert not (folder / "bundle").exists()
    resumed = run(*train_words(home, space, "--resume", folder.name))
    assert resumed.code == 0, resumed.err
    assert weights(folder) == unbroken
    assert mlflow_status(home / space, about["mlflow_run_id"]) == "FINISHED"


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_weights(home: Path, unbroken: bytes) -> None:
    process = start(*train_words(home, "killed"))
    folder = wait_for(home / "killed", "runs/*/checkpoints/step_*.pt", 1, process).parent.parent
    for wait_s in (0.05, 0.4):
        time.sleep(wait_s)
        process.kill()
        process.communicate()
        process = start(*train_words(home, "killed", "--resume", folder.name))
        known = set(folder.glob("checkpoints/step_*.pt"))
        while process.poll() is None and set(folder.glob("checkpoints/step_*.pt")) == known:
            time.sleep(0.02)
    process.kill()
    process.communicate()
    about = wait_for_status(folder, "FAILED")
    assert "killed" in about["failure"]
    resumed = run(*train_words(home, "killed", "--resume", folder.name))
    assert resumed.code == 0, resumed.err
    assert weights(folder) == unbroken


@pytest.mark.slow
def test_killed_ingest_keeps_what_it_finished(home: Path) -> None:
    cohort = home / "killed cohort"
    words = ("ingest", home / "raw", "--cohort", cohort, *INGEST, "--workspace", home / "killed ws", "--json")
    process = start(*words)
    wait_for(cohort, "records/[!.]*.json", 1, process)
    process.kill()
    process.communicate()
    kept = {path.name: path.stat().st_mtime_ns for path in (cohort / "records").glob("[!.]*.json")}
    again = run(*words)
    assert again.code == 3, again.err
    assert again.json["figures"]["resumed"] >= len(kept)
    assert all((cohort / "records" / name).stat().st_mtime_ns == when for name, when in kept.items())
    assert not list(cohort.rglob(".part-*"))


@pytest.mark.slow
def test_killed_predict_keeps_what_it_finished(road: dict[str, Ended], home: Path) -> None:
    out = home / "killed out"
    scans = home / "raw" / "images"
    model = road["train"].json["run_id"]
    words = ("predict", model, scans, "--out", out, "--workspace", home / "work space", "--json")
    process = start(*words)
    wait_for(out, "*/result.json", 2, process)
    process.kill()
    process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/mask.nii.gz")}
    again = run(*words)
    assert again.code == 3, again.err
    assert again.json["figures"]["resumed"] >= 2
    same = [path for path, when in kept.items() if path.stat().st_mtime_ns == when]
    assert len(same) >= 2
    assert not list(out.rglob(".part-*"))


def mlflow_status(workspace: Path, mlflow_run_id: str) -> str:
    with sqlite3.connect(workspace / "mlflow.db") as database:
        row = database.execute("select status from runs where run_uuid = ?", (mlflow_run_id,)).fetchone()
    return str(row[0])


def wait_for_status(folder: Path, status: str) -> dict[str, Any]:
    """The watcher needs some seconds to close a run whose process is gone."""
    end = time.monotonic() + 100
    about: dict[str, Any] = {}
    while time.monotonic() < end:
        about = json.loads((folder / "run.json").read_text())
        if about["status"] == status:
            return about
        time.sleep(0.1)
    raise AssertionError(f"{about.get('status')} is not {status}")
