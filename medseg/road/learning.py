"""From scans to a trained model: ingest, plan, train."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.cohort import Cohort, read_cohort
from medseg.config import Config, dump_config, load_config
from medseg.files import DiskError, UserError
from medseg.plan import Plan, read_plan, write_plan
from medseg.result import Result
from medseg.road.sources import at_hand
from medseg.runs import RunFolder, create_run, find_run, read_run

if TYPE_CHECKING:
    from medseg.data.lung_view import LungView


def ingest(
    sources: Sequence[str],
    cohort_dir: Path,
    labels: Path | None,
    config: str | None,
    overrides: Sequence[str],
    workspace: Path,
) -> Result:
    """Scans into a cohort, and its page. Without a config the task is guessed from the scans and their labels."""
    from medseg.ingest import step
    from medseg.ingest.guess import draft_config
    from medseg.ingest.pseudonyms import load_key
    from medseg.report import step as report_step

    settings = load_config(config, overrides) if config else draft_config(overrides)
    key = load_key(workspace / "pseudonym.key")
    lookup = workspace / "pseudonyms.csv"
    with at_hand(sources, workspace) as scans:
        result = step.run(settings, scans, cohort_dir, labels=labels, key=key, lookup=lookup)
    page = report_step.run(settings.report, cohort_dir)
    paths = {**result.paths, **page.paths} | ({"true_names": lookup} if lookup.is_file() else {})
    return Result("ingest", result.status, paths, result.figures)


def plan(config: Config, cohort_dir: Path, workspace: Path) -> Result:
    """Plan into `<cohort>/plans/<config name>/plan.yaml`, where `train` finds it, edited or not.

    Raises:
        UserError: `lungs.model` names no lung model of the workspace.
    """
    from medseg.data.lung_view import load_lung_model
    from medseg.folds import as_trained
    from medseg.predict import lung_view
    from medseg.train import planning

    cohort = as_trained(config, read_cohort(cohort_dir))
    lungs = None
    if planning.matches_lungs(config) and config.lungs is not None:
        named = config.lungs.model
        lungs = lung_view(config.lungs, load_lung_model(named, workspace, "lungs.model") if named else None)
    return planning.run(config, cohort, _plan_folder(config, cohort), lungs=lungs)


def train(
    config: Config,
    cohort_dir: Path,
    workspace: Path,
    *,
    resume: str | None = None,
    run_id: str | None = None,
    tags: dict[str, str] | None = None,
) -> Result:
    """Train one network as one run; register the bundle. A classifier is calibrated on its validation split, and there
    it is compared how its activation maps are best made.

    A fold is not registered, but measured on its own part.

    Args:
        resume: id of the run to go on with.
        run_id: identity given from outside (a flow run), for a new run, or one that ended before its first checkpoint.
        tags: more tags for the run in MLflow.

    Raises:
        UserError: the config to resume with differs from the run's; `lungs.model` names no lung model.
    """
    from medseg.calibrations import add_verdict
    from medseg.data.lung_view import load_lung_model
    from medseg.explanations import add_ranking
    from medseg.folds import as_trained, fold_facts, measure_fold
    from medseg.tracking import track
    from medseg.train import step
    from medseg.train.cohort_check import check_cohort

    cohort, part = as_trained(config, read_cohort(cohort_dir)), fold_facts(config)
    if resume:
        folder = find_run(workspace, resume)
        if (folder.path / "plan.yaml").is_file():  # the run's config holds what the plan chose for the network
            config = step.with_plan(config, _read_plan(config, cohort, folder))
        _same_config(config, folder)
    else:
        check_cohort(config, cohort)
        if config.lungs is not None and config.lungs.model:
            load_lung_model(config.lungs.model, workspace, "lungs.model")  # a wrong name is told before there is a run
        facts = {"step": "train", "seed": config.seed, "cohort_sha256": cohort.sha256, **part}
        name = f"{config.name}-fold{part['fold']}" if part else config.name
        folder = _begun(workspace, run_id, facts) or create_run(workspace, name, run_id, **facts)
    again = bool(resume) or "mlflow_run_id" in read_run(folder)
    lungs = lungs_for(config, folder)
    chosen = _read_plan(config, cohort, folder, lungs)
    tags = {"medseg.step": "train", **{f"medseg.{name}": str(n) for name, n in part.items()}, **(tags or {})}
    with track(folder, config.tracking, tags=tags, resume=again) as tracker:
        if not again:
            tracker.log_params(config.model_dump(mode="json"))
            tracker.log_cohort(cohort, "train")
        result = step.run(config, cohort, chosen, folder, tracker, resume=bool(resume), lungs=lungs)
        verdict = add_verdict(result.paths["bundle"], cohort, tracker)
        explained = add_ranking(result.paths["bundle"], cohort, tracker)
        tracker.log_artifact(result.paths["history"])
        tracker.log_bundle(result.paths["bundle"], "" if part else config.tracking.register_as)
        result = replace(result, figures={**result.figures, **verdict, **explained})
        if part:
            measured = measure_fold(result.paths["bundle"], cohort, folder, tracker)
            figures = {**result.figures, **part, "oof": measured.figures}
            result = replace(result, status=measured.status, figures=figures)
    return result.write(folder.path)


def pretrain(
    config: Config,
    cohort_dir: Path,
    workspace: Path,
    *,
    resume: str | None = None,
    run_id: str | None = None,
    tags: dict[str, str] | None = None,
) -> Result:
    """Train the encoder of a config on the cohort's training images without their labels, as a run of its own.

    With `train.fold` these are the training images of that fold: what measures it is not looked at.

    Args:
        resume: id of the run to go on with.
        run_id, tags: as in `train`.

    Raises:
        UserError: the config to resume with differs from the run's, or cannot be pretrained.
    """
    from medseg.folds import as_trained, fold_facts
    from medseg.tracking import track
    from medseg.train import pretrain as step
    from medseg.train.planning import make_plan

    cohort, part = as_trained(config, read_cohort(cohort_dir)), fold_facts(config)
    if resume:
        folder = find_run(workspace, resume)
        _same_config(config, folder)
    else:
        facts = {"step": "pretrain", "seed": config.seed, "cohort_sha256": cohort.sha256, **part}
        name = f"pretrain-{config.name}" + (f"-fold{part['fold']}" if part else "")
        folder = _begun(workspace, run_id, facts) or create_run(workspace, name, run_id, **facts)
    again = bool(resume) or "mlflow_run_id" in read_run(folder)
    lungs = lungs_for(config, folder)
    made = folder.path / "plan.yaml"
    chosen = read_plan(made) if made.is_file() else make_plan(config, cohort, lungs)
    tags = {"medseg.step": "pretrain", **(tags or {})}
    with track(folder, config.tracking, tags=tags, resume=again) as tracker:
        if not again:
            tracker.log_params(config.model_dump(mode="json"))
            tracker.log_cohort(cohort, "pretrain")
        result = step.run(config, cohort, chosen, folder, tracker, resume=bool(resume), lungs=lungs)
        tracker.log_artifact(result.paths["history"])
    return result


def _begun(workspace: Path, run_id: str | None, facts: Mapping[str, object]) -> RunFolder | None:
    """The run of that id, where one of the same facts was ended before it had anything to go on from."""
    if run_id is None or not (workspace / "runs" / run_id / "run.json").is_file():
        return None
    found = find_run(workspace, run_id)
    about, checkpoints = read_run(found), found.path / "checkpoints"
    same = all(about.get(name) == value for name, value in facts.items())
    kept = (found.path / "bundle").exists() or (checkpoints.is_dir() and any(checkpoints.iterdir()))
    return found if same and not kept else None


def lungs_for(config: Config, folder: RunFolder) -> "LungView | None":
    """What a classifier of radiographs sees. Its lung model is copied into the run first: a run that goes on must not
    meet another model under the same name."""
    from medseg.bundle import load_bundle
    from medseg.bundle_files import LUNGS
    from medseg.bundle_writing import copy_bundle
    from medseg.data.lung_view import load_lung_model
    from medseg.predict import lung_view

    if config.lungs is None or config.task.kind != "classification":
        return None
    if not config.lungs.model:
        return lung_view(config.lungs, None)
    kept = folder.path / LUNGS
    if not kept.is_dir():
        copy_bundle(load_lung_model(config.lungs.model, folder.workspace, "lungs.model").folder, kept)
    return lung_view(config.lungs, load_bundle(kept))


def _plan_folder(config: Config, cohort: Cohort) -> Path:
    return cohort.folder / "plans" / (config.name if config.train.fold is None else f"{config.name}-folds")


def _read_plan(config: Config, cohort: Cohort, folder: RunFolder, lungs: "LungView | None" = None) -> Plan:
    """The run's own plan, else the cohort's plan for this config if it still fits, else a new one."""
    from medseg.train.planning import plan_key, plan_to_train

    if (folder.path / "plan.yaml").is_file():
        return read_plan(folder.path / "plan.yaml")
    made = _plan_folder(config, cohort) / "plan.yaml"
    if made.is_file():
        found = read_plan(made)
        if found.fingerprint.get("key") == plan_key(config, cohort):
            return found
    chosen = plan_to_train(config, cohort, lungs)
    if config.train.fold is not None:
        with suppress(DiskError):  # the other folds take it too: measured again, theirs might differ
            write_plan(made, chosen)
    return chosen


def _same_config(config: Config, folder: RunFolder) -> None:
    if not (folder.path / "config.yaml").is_file():
        raise UserError(f"--resume {folder.id}: the run ended before it wrote a config; start a new run.")
    theirs = load_config(folder.path / "config.yaml")
    if dump_config(theirs) == dump_config(config):
        return
    mine, old = config.model_dump(), theirs.model_dump()
    field = next(name for name in mine if mine[name] != old[name])
    raise UserError(
        f"--resume {folder.id}: field {field!r} of the config differs from the run's; "
        f"resume with {folder.path / 'config.yaml'}, or start a new run."
    )
