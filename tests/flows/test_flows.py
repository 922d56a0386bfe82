import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, get_client, runtime
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterName,
)
from prefect.client.schemas.objects import Artifact, FlowRun
from prefect.flow_engine import run_flow
from prefect.settings import get_current_settings
from synthetic import TINY, radiograph_cohort, segmentation_cohort

import flows
from flows import attempts, road, steps
from flows.identity import can_go_on, name_new_run
from medseg.cohort import read_cohort
from medseg.config import load_config
from medseg.files import UserError, read_json
from medseg.predict import step as predict_step
from medseg.result import Result
from medseg.runs import create_run, find_run, read_run

NAME = "DOE^JOHN"
SETS = [*TINY, "train.epochs=1", "explain.max_cases=1", "report={max_cases: 1, viewer_cases: 0}"]


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten scans and their label maps, in files named after a patient."""
    folder = tmp_path_factory.mktemp("hospital")
    segmentation_cohort(folder / "plain")
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
        for path in sorted((folder / "plain" / kind).iterdir()):
            shutil.move(path, folder / kind / f"{NAME}-{path.name}")
    return folder


@pytest.fixture(scope="session")
def walked(prefect_server: Path, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The whole road, once: the workspace and what came of it."""
    workspace = tmp_path_factory.mktemp("workspace")
    cohort = str(workspace / "cohorts" / "tiny")
    images, labels = str(scans / "images"), str(scans / "labels")
    return workspace, road.road_flow([images], "hippocampus", cohort, labels, SETS, workspace=str(workspace))


def flow_runs(name: str) -> dict[str, FlowRun]:
    """Flow runs with this name, by flow."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))
        return {client.read_flow(run.flow_id).name: run for run in found}


def artifacts(run: FlowRun) -> dict[str, Artifact]:
    with get_client(sync_client=True) as client:
        chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        return {str(found.key): found for found in client.read_artifacts(artifact_filter=chosen)}


def figures(artifact: Artifact) -> dict[str, Any]:
    return {row["figure"]: row["value"] for row in json.loads(str(artifact.data))}


def test_importing_the_flows_silences_prefect_and_keeps_it_out_of_the_home_folder() -> None:
    settings = get_current_settings()
    assert not settings.server.analytics_enabled
    assert not settings.cloud.enable_orchestration_telemetry
    assert os.environ["DO_NOT_TRACK"] == "true"
    assert settings.home == Path(os.environ["PREFECT_HOME"])
    assert settings.flows.heartbeat_frequency == int(flows.SETTINGS["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])


def test_the_road_carries_one_identity(walked: tuple[Path, Result]) -> None:
    workspace, result = walked
    assert result.status == "done"
    runs = flow_runs(result.run_id)
    assert set(runs) == {"medseg-road", "medseg-train", "medseg-evaluate", "medseg-report"}
    assert all(run.state_name == "Completed" for run in runs.values())

    about = read_run(find_run(workspace, result.run_id))
    assert about["status"] == "FINISHED"
    in_mlflow = mlflow_run(workspace, about["mlflow_run_id"])
    assert in_mlflow.info.run_name == result.run_id
    assert in_mlflow.info.status == "FINISHED"
    assert in_mlflow.data.tags["prefect.flow_run_id"] == str(runs["medseg-train"].id)


def mlflow_run(workspace: Path, run_id: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{workspace / 'mlflow.db'}").get_run(run_id)


def test_the_road_leaves_its_figures_and_links(walked: tuple[Path, Result]) -> None:
    workspace, result = walked
    runs = flow_runs(result.run_id)
    metrics = read_json(find_run(workspace, result.run_id).path / "evaluation" / "test" / "metrics.json")
    left = artifacts(runs["medseg-evaluate"])
    assert figures(left["medseg-evaluate"])["mean_dice"] == pytest.approx(metrics["mean_dice"], abs=1e-3)
    url = read_run(find_run(workspace, result.run_id))["mlflow_url"]
    for step in ("road", "train", "evaluate", "report"):
        left = artifacts(runs[f"medseg-{step}"])
        assert set(left) == {f"medseg-{step}", f"medseg-{step}-run"}
        assert url in str(left[f"medseg-{step}-run"].data)


def test_a_batch_is_predicted_as_one_run(walked: tuple[Path, Result], tmp_path: Path) -> None:
    workspace, trained = walked
    cohort = str(workspace / "cohorts" / "tiny")
    result = steps.predict_flow(trained.run_id, [cohort], str(tmp_path / "out"), str(workspace))
    run = flow_runs(result.run_id)["medseg-predict"]
    about = read_run(find_run(workspace, result.run_id))
    assert mlflow_run(workspace, about["mlflow_run_id"]).info.run_name == run.name == result.run_id
    count = len(read_cohort(Path(cohort)).cases)
    ledger = (tmp_path / "out" / "ledger.csv").read_text().splitlines()
    assert len(ledger) == count + 1
    assert figures(artifacts(run)["medseg-predict"])["cases"] == count


def test_a_batch_that_meets_a_broken_disk_goes_on_in_its_run(
    walked: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, trained = walked
    monkeypatch.setattr(attempts, "RETRY_DELAYS_S", [0.0, 0.0])
    predict, calls = predict_step.run, []

    def broken_once(*given: Any, **options: Any) -> Result:
        calls.append(given)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        return predict(*given, **options)

    monkeypatch.setattr(predict_step, "run", broken_once)
    cohort = str(workspace / "cohorts" / "tiny")
    result = steps.predict_flow(trained.run_id, [cohort], str(tmp_path / "out"), str(workspace))
    about = read_run(find_run(workspace, result.run_id))
    assert (about["status"], about["sessions"]) == ("FINISHED", 2)
    assert mlflow_run(workspace, about["mlflow_run_id"]).info.status == "FINISHED"
    assert set(flow_runs(result.run_id)) == {"medseg-predict"}


def test_a_user_error_is_not_tried_again_and_fails_with_its_sentence(
    prefect_server: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = tmp_path / "scans" / f"{NAME}.txt"
    scan.parent.mkdir()
    scan.write_text("no scan")
    with pytest.raises(UserError, match="none of the 1 files") as caught:
        steps.ingest_flow([str(scan.parent)], str(tmp_path / "cohort"), config="hippocampus", workspace=str(tmp_path))
    assert str(caught.value) in capsys.readouterr().err.replace(str(tmp_path), "<workspace>")
    run = newest("medseg-ingest")
    assert run.state is not None
    assert run.state.is_failed()
    assert str(caught.value) in str(run.state.message)
    assert run_counts(run) == [1]


def newest(flow_name: str) -> FlowRun:
    with get_client(sync_client=True) as client:
        known = client.read_flow_by_name(flow_name)
        return max((run for run in client.read_flow_runs() if run.flow_id == known.id), key=lambda run: run.created)


def run_counts(run: FlowRun) -> list[int]:
    with get_client(sync_client=True) as client:
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        return [task.run_count for task in client.read_task_runs(flow_run_filter=chosen)]


def try_step(error: Exception, place: Path, *, restartable: bool) -> Result:
    """A flow whose step fails at its first call, as a disk or a network may."""
    calls: list[Exception] = []

    def step() -> Result:
        calls.append(error)
        if len(calls) == 1:
            raise error
        return Result("try", "done", figures={"calls": len(calls)})

    @flow(name="medseg-try")
    def trial_flow() -> Result:
        return attempts.call_step("try", place, step, restartable=restartable)

    return trial_flow()


def test_only_a_restartable_step_is_tried_again(
    prefect_server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "RETRY_DELAYS_S", [0.0, 0.0])
    broken = OSError(5, "Input/output error", f"/scans/{NAME}/1.dcm")
    assert try_step(broken, tmp_path, restartable=True).figures == {"calls": 2}
    assert run_counts(newest("medseg-try")) == [2]
    with pytest.raises(attempts.StepError, match=r"^OSError"):
        try_step(broken, tmp_path, restartable=False)
    assert run_counts(newest("medseg-try")) == [1]
    with pytest.raises(attempts.StepError, match=r"^KeyError"):
        try_step(KeyError("a mistake in the code"), tmp_path, restartable=True)
    assert run_counts(newest("medseg-try")) == [1]
    with pytest.raises(UserError, match="no such field"):
        try_step(UserError("config: no such field"), tmp_path, restartable=True)
    assert run_counts(newest("medseg-try")) == [1]


def test_a_flow_run_started_again_goes_on_with_its_run(walked: tuple[Path, Result]) -> None:
    workspace, trained = walked
    given = {"config": "hippocampus", "workspace": str(workspace)}

    @flow(name="medseg-train", flow_run_name=name_new_run)
    def started(config: str, workspace: str) -> str:
        return str(runtime.flow_run.name)

    assert started(**given) != trained.run_id
    with get_client(sync_client=True) as client:
        before = client.create_flow_run(started, name=trained.run_id, parameters=given)
    assert run_flow(started, flow_run=before, parameters=given) == trained.run_id
    assert can_go_on(workspace, trained.run_id)


def test_nothing_of_a_patient_is_in_prefect(walked: tuple[Path, Result], prefect_server: Path) -> None:
    """Runs last: names of scans were in the sources of the road, and in errors."""
    files = [path for path in prefect_server.parent.glob(f"{prefect_server.name}*") if path.is_file()]
    content = b"".join(path.read_bytes() for path in files)
    assert walked[1].run_id.encode() in content, "this is the database"
    assert NAME.encode() not in content
    kept = [path for path in Path(os.environ["PREFECT_HOME"]).rglob("*") if path.is_file()]
    assert all(NAME.encode() not in path.read_bytes() for path in kept)


@pytest.mark.slow
def test_a_cross_validation_trains_each_fold_and_joins_them_under_its_own_name(
    walked: tuple[Path, Result],
) -> None:
    workspace, _ = walked
    cohort, sets = str(workspace / "cohorts" / "tiny"), [*SETS, "train.folds=2", "explain.max_cases=0"]
    result = steps.cross_validate_flow("hippocampus", cohort, sets, str(workspace), run_id="crossed")
    assert result.run_id == "crossed"
    assert [member["run_id"] for member in read_json(result.paths["bundle"] / "bundle.json")["members"]] == [
        "crossed-fold0",
        "crossed-fold1",
    ]
    assert set(flow_runs("crossed")) == {"medseg-cross-validate"}
    assert set(flow_runs("crossed-fold1")) == {"medseg-train"}
    history = workspace / "runs" / "crossed-fold0" / "history.csv"
    before = history.stat().st_mtime_ns
    assert can_go_on(workspace, "crossed")
    steps.cross_validate_flow("hippocampus", cohort, sets, str(workspace), run_id="crossed")
    assert history.stat().st_mtime_ns == before, "a finished fold is not trained again"


@pytest.mark.slow
def test_each_fold_can_learn_from_its_own_images_without_labels_first(prefect_server: Path, tmp_path: Path) -> None:
    cohort = str(radiograph_cohort(tmp_path / "cohort", 24).folder)
    sets = ["model={name: densenet, init_features: 8, growth_rate: 4, block_config: [2, 2]}", "train.folds=2"]
    sets += ["plan={size_px: 32, batch_size: 4}", "pretrain.width=16", "train.epochs=1", "explain.max_cases=0"]
    given = ("tb_radiograph", cohort, [*sets, 'tracking.register_as=""'], str(tmp_path))
    sha256 = read_cohort(Path(cohort)).sha256
    for step, run_id in (("pretrain", "crossed-pretrain-fold0"), ("train", "crossed-fold0")):  # killed at once
        create_run(tmp_path, "x", run_id, step=step, seed=0, cohort_sha256=sha256, fold=0, folds=2)
    steps.cross_validate_flow(*given, run_id="crossed", pretrain_epochs=2)
    runs, encoders = tmp_path / "runs", {}
    for fold in range(2):
        first, then = runs / f"crossed-pretrain-fold{fold}", runs / f"crossed-fold{fold}"
        assert [read_json(run / "run.json")["fold"] for run in (first, then)] == [fold, fold]
        encoders[first] = (first / "encoder.safetensors").read_bytes()
        assert load_config(then / "config.yaml").model.weights == str(first / "encoder.safetensors")
        assert load_config(first / "config.yaml").train.epochs == 2
    assert set(flow_runs("crossed-pretrain-fold1")) == {"medseg-pretrain"}
    for name in ("evaluation", "bundle", "checkpoints"):  # as if it had been killed before its first checkpoint
        shutil.rmtree(runs / "crossed-fold1" / name)
    mlflow_run_id = read_json(runs / "crossed-fold1" / "run.json")["mlflow_run_id"]
    again = steps.cross_validate_flow(*given, run_id="crossed", pretrain_epochs=2)
    assert len(read_json(again.paths["bundle"] / "bundle.json")["members"]) == 2
    assert read_json(runs / "crossed-fold1" / "run.json")["mlflow_run_id"] == mlflow_run_id
    assert all((run / "encoder.safetensors").read_bytes() == before for run, before in encoders.items())
