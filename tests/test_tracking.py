"""Tracking against a real sqlite store in a folder with a blank: what is logged, how runs end, the registry."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from medseg.cohort import Case, Cohort
from medseg.config import TrackingConfig
from medseg.files import UserError, sha256_file, write_json, write_text
from medseg.runs import RunFolder, create_run, hold_run, read_run, update_run
from medseg.tracking import (
    Tracker,
    close_dead_runs,
    fetch_model,
    find_version,
    list_models,
    run_url,
    set_alias,
    show_model,
    track,
)
from medseg.tracking.failure import describe_failure, scrub
from medseg.tracking.store import open_store, tracking_uri, without_credentials

QUIET = TrackingConfig(system_metrics=False)
SCAN = "/data/Anna Müller/scan 1.nii.gz"
WORKER = """
import os, sys, time
from pathlib import Path
from medseg.config import TrackingConfig
from medseg.runs import find_run
from medseg.tracking import track
run = find_run(Path(sys.argv[1]), sys.argv[2])
with track(run, TrackingConfig(system_metrics=False)) as tracker:
    tracker.log_metrics({"loss": 1.0}, step=1)
    print("working", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One workspace for all tests here: making the tables of the store takes seconds."""
    return tmp_path_factory.mktemp("a workspace")


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def mlflow_run(run: RunFolder, config: TrackingConfig = QUIET) -> Any:
    return open_store(run.workspace, config).client.get_run(read_run(run)["mlflow_run_id"])


def artifact(run: RunFolder, name: str) -> str:
    client = open_store(run.workspace, QUIET).client
    return Path(client.download_artifacts(read_run(run)["mlflow_run_id"], name)).read_text()


def make_bundle(folder: Path, scale: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    save_file({"weight": np.full((2, 2), scale, np.float32)}, folder / "weights.safetensors")
    write_text(folder / "MODEL_CARD.md", "# A card\n")
    files = {name: sha256_file(folder / name) for name in ("weights.safetensors", "MODEL_CARD.md")}
    write_json(folder / "bundle.json", {"name": "tiny", "files": files, "sha256": files["weights.safetensors"]})
    return folder


def small_cohort(folder: Path) -> Cohort:
    cases = (
        Case("case-1", "MUELLER^ANNA", ("images/mueller.nii.gz",), site="Charité", split="train"),
        Case("case-2", "MUELLER^ANNA", ("images/mueller2.nii.gz",), site="Charité", split="train"),
        Case("case-3", "HUBER^MAX", ("images/huber.nii.gz",), split="test"),
    )
    return Cohort(folder / "mueller", cases, {"anterior": 1, "posterior": 2}, ("t1",), "ab" * 32)


def wait_for(run: RunFolder, status: str, seconds: float = 100) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        about = read_run(run)
        if about["status"] == status and "mlflow_open" not in about:
            return about
        time.sleep(0.1)
    raise AssertionError(f"run.json says {read_run(run)}")


@contextlib.contextmanager
def worker(run: RunFolder) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", WORKER, str(run.workspace), run.id]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "working\n"
            yield process
        finally:
            process.kill()


def watchers(run: RunFolder) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().decode().split("\0")
            if "medseg.watch" in command and run.id in command:
                found.append(int(folder.name))
    return found


def test_one_identity_on_disk_and_in_mlflow(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "0f0f")
    run = create_run(workspace, "hippocampus", step="train")
    with track(run, QUIET, tags={"team": "radiology"}) as tracker:
        assert read_run(run)["status"] == "RUNNING"
        assert read_run(run)["pid"] == os.getpid()
        assert mlflow_run(run).info.status == "RUNNING"
        assert len(watchers(run)) == 1
    about, found = read_run(run), mlflow_run(run)
    assert (about["status"], found.info.status) == ("FINISHED", "FINISHED")
    assert found.info.run_name == run.id == found.data.tags["medseg.run_id"]
    assert found.info.run_id == tracker.mlflow_run_id == about["mlflow_run_id"]
    assert found.data.tags["medseg.step"] == "train"
    assert found.data.tags["team"] == "radiology"
    assert found.data.tags["prefect.flow_run_id"] == "0f0f"
    assert found.info.artifact_uri.startswith((workspace / "artifacts").as_uri())
    assert run_url(run) == tracker.url
    assert tracker.url.endswith(f"/runs/{tracker.mlflow_run_id}")
    assert "mlflow_open" not in about
    assert watchers(run) == []


def test_a_run_is_tracked_by_one_process_and_once_unless_resumed(workspace: Path) -> None:
    run = create_run(workspace, "twice")
    with hold_run(run), pytest.raises(UserError, match="worked on by"), track(run, QUIET):
        pass
    with track(run, QUIET) as first:
        first.log_metrics({"dice": 0.5}, step=1)
    with pytest.raises(UserError, match="resume it"), track(run, QUIET):
        pass
    with track(run, QUIET, resume=True, tags={"medseg.evaluated": "test"}) as again:
        assert mlflow_run(run).info.status == "RUNNING"
        again.log_metrics({"dice": 0.7}, step=2)
    found = mlflow_run(run)
    history = open_store(workspace, QUIET).client.get_metric_history(first.mlflow_run_id, "dice")
    assert again.mlflow_run_id == first.mlflow_run_id
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 0.7)]
    assert found.data.tags["medseg.evaluated"] == "test"
    assert found.data.tags["medseg.sessions"] == "2"
    assert found.info.status == "FINISHED"


def test_what_is_logged_is_found_again(workspace: Path, tmp_path: Path) -> None:
    run = create_run(workspace, "logs")
    (tmp_path / "a table.csv").write_text("case_id\n1\n")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.html").write_text("<p>")
    many = {f"p{i}": i for i in range(600)}
    with track(run, QUIET) as tracker:
        tracker.log_params({"model": {"name": "unet", "channels": [8, 16], "empty": {}}, "none": None, "many": many})
        tracker.log_params({"uri": "https://me:secret@server/x", "long": "x" * 9000, "odd (key)": True})
        tracker.log_metrics({"val_dice_left (1)": 0.5, "bad": math.nan, "worse": math.inf}, step=3)
        tracker.log_metrics({f"m{i}": i for i in range(1100)}, step=3)
        tracker.log_artifact(tmp_path / "a table.csv", "tables")
        tracker.log_artifact(tmp_path / "pages", "report")
        tracker.log_text("hello", "notes.txt")
        with pytest.raises(UserError, match=r"nothing\.csv is missing"):
            tracker.log_artifact(tmp_path / "nothing.csv")
    data = mlflow_run(run).data
    assert len(data.params) == 607
    assert data.params["model.channels"] == "[8, 16]"
    assert (data.params["none"], data.params["model.empty"], data.params["odd _key_"]) == ("null", "{}", "true")
    assert data.params["uri"] == "https://server/x"
    assert len(data.params["long"]) == 6000
    assert data.metrics["val_dice_left _1_"] == 0.5
    assert len(data.metrics) == 1101
    assert data.tags["medseg.not_finite"] == "step 3: bad, worse"
    assert artifact(run, "tables/a table.csv") == "case_id\n1\n"
    assert artifact(run, "report/index.html") == "<p>"
    assert artifact(run, "notes.txt") == "hello"


def test_the_cohort_is_named_by_its_hash_and_by_nothing_of_a_patient(workspace: Path, tmp_path: Path) -> None:
    run = create_run(workspace, "inputs")
    with track(run, QUIET) as tracker:
        tracker.log_cohort(small_cohort(tmp_path), "train")
        tracker.log_cohort(small_cohort(tmp_path), "test")
    inputs = mlflow_run(run).inputs.dataset_inputs
    dataset = inputs[0].dataset
    assert dataset.digest == ("ab" * 32)[:36]
    assert json.loads(dataset.source)["sha256"] == "ab" * 32
    profile = json.loads(dataset.profile)
    assert (profile["num_rows"], profile["patients"], profile["splits"]) == (3, 2, {"train": 2, "test": 1})
    told = json.dumps([dict(i.dataset) for i in inputs]).lower()
    assert not any(word in told for word in ("mueller", "huber", "charit", str(tmp_path).lower()))


def test_an_exception_is_failed_with_its_cause_and_without_paths(workspace: Path) -> None:
    run = create_run(workspace, "fails")
    with pytest.raises(RuntimeError), track(run, QUIET):
        _fail_on(SCAN, workspace / "cohorts" / "x.csv")
    found = mlflow_run(run)
    assert found.info.status == "FAILED"
    assert found.data.tags["medseg.failure"] == "RuntimeError: <path>; export it again"
    details = artifact(run, "failure.txt")
    assert "in _fail_on" in details
    assert "FileNotFoundError" in details
    assert "<workspace>/cohorts/x.csv" in details
    assert "Müller" not in details
    assert read_run(run)["status"] == "FAILED"
    assert SCAN in (run.path / "failure.txt").read_text()
    with track(run, QUIET, resume=True):
        pass
    assert mlflow_run(run).info.status == "FINISHED"
    assert "medseg.failure" not in mlflow_run(run).data.tags
    assert "failure" not in read_run(run)


def _fail_on(scan: str, table: Path) -> None:
    try:
        table.read_text()
    except OSError as error:
        raise RuntimeError(f"{scan} is corrupt; export it again") from error


def test_ctrl_c_is_killed_in_mlflow_and_interrupted_here(workspace: Path) -> None:
    run = create_run(workspace, "stopped")
    with pytest.raises(KeyboardInterrupt), track(run, QUIET):
        raise KeyboardInterrupt
    assert (mlflow_run(run).info.status, read_run(run)["status"]) == ("KILLED", "INTERRUPTED")
    assert mlflow_run(run).data.tags["medseg.failure"] == "KeyboardInterrupt"


def test_sigterm_is_recorded_and_its_handler_is_given_back(workspace: Path) -> None:
    run = create_run(workspace, "terminated")
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), track(run, QUIET):
        _terminate_and_wait()
    assert mlflow_run(run).info.status == "KILLED"
    assert mlflow_run(run).data.tags["medseg.failure"] == "Terminated: SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def _terminate_and_wait() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


def test_a_sigkilled_run_is_failed_by_its_watcher(workspace: Path) -> None:
    run = create_run(workspace, "killed")
    with worker(run) as process:
        assert mlflow_run(run).info.status == "RUNNING"
        (watcher,) = watchers(run)
        assert os.getsid(watcher) != os.getsid(process.pid)
        os.kill(watcher, signal.SIGINT)  # Ctrl-C reaches it, too
        process.kill()
        about = wait_for(run, "FAILED")
    assert about["failure"].startswith("killed (no clean end)")
    assert mlflow_run(run).info.status == "FAILED"
    assert mlflow_run(run).data.tags["medseg.failure"].startswith("killed (no clean end)")
    assert mlflow_run(run).data.metrics["loss"] == 1.0


def test_a_run_whose_watcher_died_too_is_closed_by_the_next_run(workspace: Path) -> None:
    dead, alive, elsewhere = (create_run(workspace, name) for name in ("dead", "alive", "elsewhere"))
    with worker(dead) as process:
        for watcher in watchers(dead):
            os.kill(watcher, signal.SIGKILL)
        process.kill()
    update_run(alive, status="RUNNING")
    update_run(elsewhere, status="RUNNING", mlflow_store="http://another.example")
    with hold_run(alive), track(create_run(workspace, "next"), QUIET):
        assert read_run(dead)["status"] == "FAILED"
        assert mlflow_run(dead).info.status == "FAILED"
        assert read_run(alive)["status"] == "RUNNING"
        assert read_run(elsewhere)["status"] == "RUNNING"
    assert close_dead_runs(workspace, QUIET) == (alive.id,)


def test_logs_wait_while_the_store_is_out_of_reach(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("medseg.tracking.tracker._RETRY_AFTER_S", 0.0)
    run = create_run(workspace, "outage")
    with track(run, QUIET) as tracker:
        client = tracker._client
        with monkeypatch.context() as patch:
            patch.setattr(client._tracking_client.store, "log_batch", _refuse)
            tracker.log_metrics({"loss": 2.0}, step=1)
            tracker.log_metrics({"loss": 1.0}, step=2)
        tracker.log_metrics({"loss": 0.5}, step=3)
        history = client.get_metric_history(tracker.mlflow_run_id, "loss")
        assert [(m.step, m.value) for m in history] == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert "out of reach" in capsys.readouterr().err


def test_an_end_that_mlflow_missed_is_told_by_the_next_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run(workspace, "missed")
    with monkeypatch.context() as patch:
        with track(run, QUIET) as tracker:
            patch.setattr(tracker._client._tracking_client.store, "update_run_info", _refuse)
        assert "missed the end" in capsys.readouterr().err
    assert read_run(run)["status"] == "FINISHED"
    assert mlflow_run(run).info.status == "RUNNING"
    assert run.id in close_dead_runs(workspace, QUIET)
    assert mlflow_run(run).info.status == "FINISHED"


def _refuse(*args: object, **kwargs: object) -> None:
    raise OSError("connection refused")


def test_system_metrics_reach_the_run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    run = create_run(workspace, "machine")
    with track(run, TrackingConfig()):
        end = time.monotonic() + 60
        while "system/cpu_utilization_percentage" not in mlflow_run(run).data.metrics and time.monotonic() < end:
            time.sleep(0.1)
    found = mlflow_run(run).data.metrics
    assert 0 <= found["system/cpu_utilization_percentage"] <= 100
    assert found["system/system_memory_usage_megabytes"] > 0


@pytest.fixture(scope="session")
def trained(workspace: Path) -> tuple[RunFolder, Tracker, Path]:
    """A run that registered two versions of a model."""
    run = create_run(workspace, "bundled")
    with track(run, QUIET) as tracker:
        for scale in (1.0, 2.0):
            folder = make_bundle(run.path / f"v{scale:.0f}" / "bundle", scale)
            assert tracker.log_bundle(folder, "tiny net") is not None
        assert tracker.log_bundle(folder, "") is None
    return run, tracker, folder


def test_a_bundle_is_a_model_without_pickle(workspace: Path, trained: tuple[RunFolder, Tracker, Path]) -> None:
    run, tracker, bundle = trained
    first, second = reversed(show_model("tiny net", workspace, QUIET))
    assert (first.version, second.version) == (1, 2)
    assert first.run_id == run.id
    assert first.mlflow_run_id == tracker.mlflow_run_id
    assert first.description == "# A card\n"
    fetched = fetch_model("models:/tiny net/latest", workspace, QUIET)
    assert fetched == workspace / "models" / second.bundle_sha256
    assert {p.name: p.read_bytes() for p in fetched.iterdir()} == {p.name: p.read_bytes() for p in bundle.iterdir()}
    kept = [p for p in (workspace / "artifacts").rglob("*") if p.is_file()]
    assert not [p for p in kept if p.suffix in (".pkl", ".pickle", ".pt", ".pth") or p.read_bytes()[:1] == b"\x80"]
    model_file = next(p for p in kept if p.name == "MLmodel").read_text()
    assert "loader_module: medseg.predict.pyfunc" in model_file
    outputs = mlflow_run(run).outputs.model_outputs
    assert len(outputs) == 3


def test_mlflow_loads_the_model_through_its_loader(
    workspace: Path, trained: tuple[RunFolder, Tracker, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import mlflow.pyfunc

    (tmp_path / "echo_loader.py").write_text(
        "from pathlib import Path\n"
        "from safetensors.numpy import load_file\n"
        "class Echo:\n"
        "    def __init__(self, folder):\n"
        "        self.weight = load_file(Path(folder) / 'weights.safetensors')['weight']\n"
        "    def predict(self, model_input, params=None):\n"
        "        return [f'{path}: {self.weight.sum()}' for path in model_input['path']]\n"
        "def _load_pyfunc(path): return Echo(path)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("medseg.tracking.tracker.LOADER", "echo_loader")
    run = create_run(workspace, "echo")
    with track(run, QUIET) as tracker:
        tracker.log_bundle(make_bundle(run.path / "bundle", 3.0), "echo")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(workspace, QUIET))
    model = mlflow.pyfunc.load_model("models:/echo/1")
    import pandas as pd

    assert model.predict(pd.DataFrame({"path": ["scan.nii.gz"]})) == ["scan.nii.gz: 12.0"]


def test_an_alias_points_at_one_version(workspace: Path, trained: tuple[RunFolder, Tracker, Path]) -> None:
    set_alias("tiny net", "champion", 1, workspace, QUIET)
    assert find_version("models:/tiny net@champion", workspace, QUIET).version == 1
    assert set_alias("tiny net", "champion", 2, workspace, QUIET).aliases == ("champion",)
    assert find_version("models:/tiny net@champion", workspace, QUIET).version == 2
    versions = [v for v in list_models(workspace, QUIET) if v.name == "tiny net"]
    assert [(v.version, v.aliases) for v in versions] == [(2, ("champion",)), (1, ())]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("tiny net", "not of the form"),
        ("models:/nobody@champion", "not registered .*tiny net"),
        ("models:/tiny net/99", "does not exist .*2.*1"),
        ("models:/tiny net@nobody", "does not exist"),
        ("models:/it's/1", "not registered"),
    ],
)
def test_a_wrong_model_address_says_what_there_is(
    workspace: Path, trained: tuple[RunFolder, Tracker, Path], uri: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        find_version(uri, workspace, QUIET)


def test_reserved_aliases_and_malformed_names_are_user_errors(
    workspace: Path, trained: tuple[RunFolder, Tracker, Path]
) -> None:
    for alias in ("latest", "v1", "a b"):
        with pytest.raises(UserError, match="not allowed"):
            set_alias("tiny net", alias, 1, workspace, QUIET)
    run = create_run(workspace, "named")
    with pytest.raises(UserError, match=r"tracking\.register_as"), track(run, TrackingConfig(register_as="a/b")):
        pass
    assert read_run(run)["status"] == "CREATED"


def test_a_moved_workspace_keeps_its_artifacts_inside(workspace: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "mlflow.db").write_bytes((workspace / "mlflow.db").read_bytes())
    run = create_run(moved, "after")
    with track(run, QUIET) as tracker:
        tracker.log_text("x", "x.txt")
    assert len(list((moved / "artifacts").rglob("x.txt"))) == 1


@pytest.mark.parametrize(
    ("uri", "message"),
    [("file:///tmp/mlruns", "is a folder"), ("mlruns", "is a folder"), ("http://127.0.0.1:9", "no MLflow server")],
)
def test_an_unusable_address_fails_at_once_and_fails_the_run(workspace: Path, uri: str, message: str) -> None:
    run = create_run(workspace, "unreachable")
    start = time.monotonic()
    with pytest.raises(UserError, match=message), track(run, TrackingConfig(uri=uri)):
        pass
    assert time.monotonic() - start < 60  # MLflow by itself tries for minutes
    assert read_run(run)["status"] == "FAILED"


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("label 3 is not named in task.labels; add it", "label 3 is not named in task.labels; add it"),
        ("{w}/cohorts/a/cohort.csv is missing; ingest", "<workspace>/cohorts/a/cohort.csv is missing; ingest"),
        ("/mnt/pacs/Huber Max/1.dcm: no pixels", "<path>: no pixels"),
        ("cannot read 'C:\\scans\\Huber Max\\1.dcm' now", "cannot read '<path>' now"),
        ("Huber_Max.nii.gz is corrupt", "<file> is corrupt"),
        ("scans/Huber Max is empty; give another", "<path>; give another"),
        ("models:/lungs@champion is gone; register it", "models:/lungs@champion is gone; register it"),
    ],
)
def test_what_is_told_of_a_failure_holds_no_path_of_a_scan(message: str, told: str, workspace: Path) -> None:
    text = message.format(w=workspace)
    assert scrub(text, workspace).replace("<path>' now", "<path>' now") == told.replace("'<path>'", "<path>")
    assert "Huber" not in describe_failure(ValueError(text), workspace).cause


def test_passwords_stay_out_of_configs_and_records(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI") as caught:
        tracking_uri(workspace, TrackingConfig(uri="http://me:secret@server"))
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(UserError, match="no MLflow server") as caught:
        open_store(workspace, QUIET)
    assert "secret" not in str(caught.value)
    assert without_credentials("postgresql://me:pw@db/x") == "postgresql://db/x"
    assert without_credentials("sqlite:////a b/x@y.db") == "sqlite:////a b/x@y.db"


@pytest.mark.slow
def test_a_server_changes_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mlflow_server(tmp_path / "server") as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        run, killed = create_run(tmp_path / "work", "remote"), create_run(tmp_path / "work", "killed")
        with track(run, QUIET) as tracker:
            tracker.log_params({"a": {"b": 1}})
            tracker.log_metrics({"dice": 0.9}, step=1)
            tracker.log_text("hello", "notes.txt")
            tracker.log_cohort(small_cohort(tmp_path), "train")
            tracker.log_bundle(make_bundle(run.path / "bundle"), "remote net")
        assert (
            tracker.url == f"{uri}/#/experiments/{read_run(run)['mlflow_experiment_id']}/runs/{tracker.mlflow_run_id}"
        )
        found = mlflow_run(run)
        assert (found.info.status, found.info.run_name) == ("FINISHED", run.id)
        assert (found.data.params, found.data.metrics) == ({"a.b": "1"}, {"dice": 0.9})
        assert artifact(run, "notes.txt") == "hello"
        set_alias("remote net", "champion", 1, tmp_path / "work", QUIET)
        fetched = fetch_model("models:/remote net@champion", tmp_path / "work", QUIET)
        assert (fetched / "bundle.json").read_bytes() == (run.path / "bundle" / "bundle.json").read_bytes()
        with worker(killed) as process:
            process.kill()
            wait_for(killed, "FAILED")
        assert mlflow_run(killed).info.status == "FAILED"
    assert not (tmp_path / "work" / "mlflow.db").exists()


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """A server of its own, whose artifacts only it can reach."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/s.db", "--artifacts-destination", str(folder / "files")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as server:
        try:
            uri = f"http://127.0.0.1:{port}"
            for _ in range(600):
                with contextlib.suppress(UserError):
                    open_store(folder, TrackingConfig(uri=uri))
                    break
                time.sleep(0.2)
            yield uri
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def test_importing_tracking_does_not_import_mlflow() -> None:
    code = "import medseg.tracking, sys; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
