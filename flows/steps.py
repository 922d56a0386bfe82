"""One flow for each step of the road.

Parameters are paths, names and small values; a relative path is taken from the current folder, which under a worker
is the workspace. Prefect stores parameters as they are given: where the path of a scan may name a patient, give
`@FILE`, a text file with one source a line.

Reading scans and predicting are tried again after a failure and go on where they stopped. Training is not: a flow run
that Prefect starts again, by hand or after a crash, goes on with its run from the last checkpoint.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from prefect import flow

from flows.artifacts import leave_artifacts
from flows.attempts import call_step
from flows.identity import (
    can_go_on,
    current_run_id,
    name_by_step,
    name_new_run,
    prefect_tags,
    refuse_named,
    take_name,
    workspace_folder,
)
from medseg import folds, road
from medseg.files import UserError
from medseg.result import Result
from medseg.runs import find_run

FLOW_OPTIONS: dict[str, Any] = {"retries": 0, "persist_result": False, "result_serializer": "json", "log_prints": False}


@flow(name="medseg-ingest", flow_run_name=name_by_step, **FLOW_OPTIONS)
def ingest_flow(
    sources: list[str],
    cohort: str,
    labels: str | None = None,
    config: str | None = None,
    overrides: list[str] | None = None,
    workspace: str | None = None,
) -> Result:
    """Turn scans into a cohort; run again, it takes in what is new.

    Args:
        sources: folders, files or archives of scans, or the address of a PACS with a query that names no patient.
        cohort: folder of the cohort.
        labels: folder of label maps, or a CSV table.
        config: path or name of the config whose labels are checked.
        overrides: `a.b=c`, as `--set` takes them.
        workspace: by default `MEDSEG_WORKSPACE`.
    """
    refuse_named(sources)
    place = workspace_folder(workspace)
    table = Path(labels) if labels else None

    def step() -> Result:
        return road.ingest(sources, Path(cohort), table, config, overrides or [], place)

    return leave_artifacts(call_step("ingest", place, step, restartable=True), place)


@flow(name="medseg-plan", flow_run_name=name_by_step, **FLOW_OPTIONS)
def plan_flow(config: str, cohort: str, overrides: list[str] | None = None, workspace: str | None = None) -> Result:
    """Plan a training on a cohort: spacing, patch, batch, measured memory, estimated time."""
    place = workspace_folder(workspace)

    def step() -> Result:
        return road.plan(road.load(config, overrides or []), Path(cohort), place)

    return leave_artifacts(call_step("plan", place, step), place)


@flow(name="medseg-train", flow_run_name=name_new_run, **FLOW_OPTIONS)
def train_flow(
    config: str,
    cohort: str,
    overrides: list[str] | None = None,
    workspace: str | None = None,
    resume: str | None = None,
    run_id: str | None = None,
) -> Result:
    """Train one network as one run; the name of the flow run is the id of the run.

    Args:
        config: path or name of the config.
        cohort: folder of the cohort.
        overrides: `a.b=c`, as `--set` takes them.
        workspace: by default `MEDSEG_WORKSPACE`.
        resume: id of the run to go on with.
        run_id: id for the new run; by default a new one.
    """
    return _learn("train", road.train, config, cohort, overrides, workspace, resume)


@flow(name="medseg-pretrain", flow_run_name=name_new_run, **FLOW_OPTIONS)
def pretrain_flow(
    config: str,
    cohort: str,
    overrides: list[str] | None = None,
    workspace: str | None = None,
    resume: str | None = None,
    run_id: str | None = None,
) -> Result:
    """Train an encoder on radiographs without labels as one run; `model.weights` of a training takes its weights.

    Args:
        config: path or name of the config.
        cohort: folder of the cohort.
        overrides: `a.b=c`, as `--set` takes them.
        workspace: by default `MEDSEG_WORKSPACE`.
        resume: id of the run to go on with.
        run_id: id for the new run; by default a new one.
    """
    return _learn("pretrain", road.pretrain, config, cohort, overrides, workspace, resume)


def _learn(
    name: str,
    learn: Callable[..., Result],
    config: str,
    cohort: str,
    overrides: list[str] | None,
    workspace: str | None,
    resume: str | None,
) -> Result:
    """A step that trains, as the run that this flow run is named after; from where it stopped, if it was begun."""
    place = workspace_folder(workspace)
    identity, tags = current_run_id(), prefect_tags()
    again = resume or (identity if can_go_on(place, identity) else None)

    def step() -> Result:
        resolved = road.load(config, overrides or [])
        return learn(resolved, Path(cohort), place, resume=again, run_id=identity, tags=tags)

    return leave_artifacts(call_step(name, place, step, gpu=True), place)


@flow(name="medseg-cross-validate", flow_run_name=name_new_run, **FLOW_OPTIONS)
def cross_validate_flow(
    config: str,
    cohort: str,
    overrides: list[str] | None = None,
    workspace: str | None = None,
    run_id: str | None = None,
    seeds: int = 1,
    pretrain_epochs: int = 0,
) -> Result:
    """Train every fold as a run of its own, one after another, then join them into one model.

    Started again, folds that are finished are taken as they are and an unfinished one goes on. To train folds side by
    side, start `medseg-train` once for each with `train.fold=0`, `1`, … and join their runs.

    Args:
        config: path or name of the config; `train.folds` says how many.
        cohort: folder of the cohort.
        overrides: `a.b=c`, as `--set` takes them.
        workspace: by default `MEDSEG_WORKSPACE`.
        run_id: id for the run of the joined model, from which those of the folds follow; by default a new one.
        seeds: how many networks each fold has, trained with the config's seed and those after it.
        pretrain_epochs: so long each network learns from its own training images without their labels first.
    """
    place, identity, sets = workspace_folder(workspace), current_run_id(), overrides or []
    settings, runs = road.load(config, sets), []
    for fold, more in product(range(settings.train.folds), range(seeds)):
        runs.append(f"{identity}-fold{fold}" + (f"-seed{settings.seed + more}" if more else ""))
        if not folds.is_measured(place, runs[-1]):
            mine = [*sets, f"train.fold={fold}", f"seed={settings.seed + more}"]
            if pretrain_epochs:
                before = f"{identity}-pretrain{runs[-1].removeprefix(identity)}"
                longer = [*mine, f"train.epochs={pretrain_epochs}"]
                encoder = pretrain_flow(config, cohort, longer, str(place), run_id=before)
                mine.append(f"model.weights={encoder.paths['weights']}")
            train_flow(config, cohort, mine, str(place), run_id=runs[-1])
    of = Path(cohort)
    joined = call_step("join", place, lambda: folds.join(runs, place, cohort=of, run_id=identity), restartable=True)
    return leave_artifacts(joined, place)


@flow(name="medseg-evaluate", flow_run_name=name_by_step, **FLOW_OPTIONS)
def evaluate_flow(model: str, cohort: str, split: str = "test", workspace: str | None = None) -> Result:
    """Measure a model on one split of a labelled cohort, in the run that trained it, and write its report.

    Args:
        model: bundle folder, run id, or `models:/NAME@ALIAS`.
        cohort: folder of the cohort.
        split: train, val or test.
        workspace: by default `MEDSEG_WORKSPACE`.
    """
    place = workspace_folder(workspace)

    def step() -> Result:
        return road.evaluate(model, Path(cohort), place, split=split)

    result = call_step("evaluate", place, step, gpu=True)
    take_name(result.run_id)
    return leave_artifacts(result, place)


@flow(name="medseg-audit", flow_run_name=name_by_step, **FLOW_OPTIONS)
def audit_flow(
    model: str,
    cohort: str,
    split: str = "test",
    overrides: list[str] | None = None,
    workspace: str | None = None,
) -> Result:
    """Ask a classifier what it really reads, item by item, in the run that trained it.

    Args:
        model: bundle folder, run id, or `models:/NAME@ALIAS`.
        cohort: folder of the cohort.
        split: train, val or test.
        overrides: `audit.field=value`: where lung fields come from, whether models are trained without one site.
        workspace: by default `MEDSEG_WORKSPACE`.
    """
    place = workspace_folder(workspace)

    def step() -> Result:
        return road.audit(model, Path(cohort), place, split=split, overrides=overrides or [])

    result = call_step("audit", place, step, gpu=True)
    take_name(result.run_id)
    return leave_artifacts(result, place)


@flow(name="medseg-predict", flow_run_name=name_new_run, **FLOW_OPTIONS)
def predict_flow(
    model: str, scans: list[str], out: str, workspace: str | None = None, run_id: str | None = None
) -> Result:
    """Segment or classify scans; the ledger in `out` says what became of each. Run again, it takes what is new.

    Args:
        model: bundle folder, run id, or `models:/NAME@ALIAS`.
        scans: whatever ingest takes, or the folder of one cohort.
        out: folder of the masks and the ledger.
        workspace: by default `MEDSEG_WORKSPACE`.
        run_id: id for the batch's run; by default a new one.
    """
    refuse_named(scans)
    place = workspace_folder(workspace)
    identity, tags = current_run_id(), prefect_tags()

    def step() -> Result:
        return road.predict(model, scans, Path(out), place, run_id=identity, tags=tags)

    return leave_artifacts(call_step("predict", place, step, restartable=True, gpu=True), place)


@flow(name="medseg-explain", flow_run_name=name_by_step, **FLOW_OPTIONS)
def explain_flow(model: str, scans: list[str], out: str, workspace: str | None = None) -> Result:
    """Make the activation maps that a prediction folder lacks; run again, it goes on.

    Args:
        model: bundle folder, run id, or `models:/NAME@ALIAS`.
        scans: what was predicted.
        out: the folder that `medseg-predict` wrote.
        workspace: by default `MEDSEG_WORKSPACE`.
    """
    place = workspace_folder(workspace)

    def step() -> Result:
        return road.explain(model, scans, Path(out), place)

    return leave_artifacts(call_step("explain", place, step, restartable=True, gpu=True), place)


@flow(name="medseg-report", flow_run_name=name_by_step, **FLOW_OPTIONS)
def report_flow(target: str, workspace: str | None = None) -> Result:
    """Write the pages of a run, a prediction folder or a cohort.

    Args:
        target: run id, or one of these folders.
        workspace: by default `MEDSEG_WORKSPACE`.
    """
    place = workspace_folder(workspace)

    def step() -> Result:
        return road.report(target, place)

    result = call_step("report", place, step)
    with suppress(UserError):  # the target is a folder that is no run's
        result = replace(result, run_id=find_run(place, target).id)
    take_name(result.run_id)
    return leave_artifacts(result, place)
