"""The road: each verb as one function, called alike by the command line and by the Prefect flows.

A function here resolves names (configs, runs, models), opens the run in MLflow and calls the steps; it computes
nothing itself. Heavy rooms are imported where they are used, so that a verb loads only what it needs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.config import Config, dump_config, load_config
from medseg.files import UserError
from medseg.result import Result
from medseg.runs import RunFolder, create_run, find_run

if TYPE_CHECKING:
    from torch import nn

    from medseg.bundle import Bundle
    from medseg.cohort import Cohort
    from medseg.plan import Plan
    from medseg.tracking import Tracker

_FLAT_TYPES = (int, float)


def load(config: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration meant by a path or a name, with overrides."""
    return load_config(config, overrides)


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
    with _at_hand(sources, workspace) as scans:
        result = step.run(settings, scans, cohort_dir, labels=labels, key=key, lookup=lookup)
    page = report_step.run(settings.report, cohort_dir)
    paths = {**result.paths, **page.paths} | ({"true_names": lookup} if lookup.is_file() else {})
    return Result("ingest", result.status, paths, result.figures)


def plan(config: Config, cohort_dir: Path) -> Result:
    """Plan into `<cohort>/plans/<config name>/plan.yaml`, where `train` finds it, edited or not."""
    from medseg.cohort import read_cohort
    from medseg.folds import as_trained
    from medseg.train import planning

    cohort = as_trained(config, read_cohort(cohort_dir))
    return planning.run(config, cohort, _plan_folder(config, cohort))


def train(
    config: Config,
    cohort_dir: Path,
    workspace: Path,
    *,
    resume: str | None = None,
    run_id: str | None = None,
    tags: dict[str, str] | None = None,
) -> Result:
    """Train one network as one run; calibrate a classifier on its validation split; register the bundle.

    A fold is not registered, but measured on its own part.

    Args:
        resume: id of the run to go on with.
        run_id: identity given from outside (a flow run), for a new run.
        tags: more tags for the run in MLflow.

    Raises:
        UserError: the config to resume with differs from the run's.
    """
    from medseg.calibrations import add_verdict
    from medseg.cohort import read_cohort
    from medseg.folds import as_trained, fold_facts, measure_fold
    from medseg.tracking import track
    from medseg.train import step

    cohort, part = as_trained(config, read_cohort(cohort_dir)), fold_facts(config)
    if resume:
        folder = find_run(workspace, resume)
        if (folder.path / "plan.yaml").is_file():  # the run's config holds what the plan chose for the network
            config = step.with_plan(config, _read_plan(config, cohort, folder))
        _same_config(config, folder)
    else:
        step.check_cohort(config, cohort)
        facts = {"step": "train", "seed": config.seed, "cohort_sha256": cohort.sha256, **part}
        name = f"{config.name}-fold{part['fold']}" if part else config.name
        folder = create_run(workspace, name, run_id, **facts)
    chosen = _read_plan(config, cohort, folder)
    tags = {"medseg.step": "train", **{f"medseg.{name}": str(n) for name, n in part.items()}, **(tags or {})}
    with track(folder, config.tracking, tags=tags, resume=bool(resume)) as tracker:
        if not resume:
            tracker.log_params(config.model_dump(mode="json"))
            tracker.log_cohort(cohort, "train")
        result = step.run(config, cohort, chosen, folder, tracker, resume=bool(resume))
        verdict = add_verdict(result.paths["bundle"], cohort, tracker)
        tracker.log_artifact(result.paths["history"])
        tracker.log_bundle(result.paths["bundle"], "" if part else config.tracking.register_as)
        result = replace(result, figures={**result.figures, **verdict})
        if part:
            measured = measure_fold(result.paths["bundle"], cohort, folder, tracker)
            figures = {**result.figures, **part, "oof": measured.figures}
            result = replace(result, status=measured.status, figures=figures)
    return result.write(folder.path)


def evaluate(
    model: str,
    cohort_dir: Path,
    workspace: Path,
    *,
    split: str = "test",
    lesions: Path | None = None,
    audit: bool = False,
    overrides: Sequence[str] = (),
) -> Result:
    """Predict a labelled split, compare with its labels, explain some cases, audit if asked, write the report; all in
    the run that trained the model, where that run is at hand, else in a new one.

    Args:
        lesions: folder of `<case_id>.png` masks: the share of each activation map inside them is reported.
        audit: also run the audit of a classifier. overrides: its settings, `audit.field=value`.
    """
    if overrides and not audit:
        raise UserError(f"--set {overrides[0]!r}: only an audit takes settings; add --audit, or leave it out.")
    from medseg.cohort import read_cohort
    from medseg.evaluate import step
    from medseg.folds import as_trained
    from medseg.report import step as report_step
    from medseg.tracking import track

    bundle = _bundle(model, workspace)
    config = bundle.config
    cohort = as_trained(config, read_cohort(cohort_dir))
    cohort.split(split)
    if bundle.members and split != "test":
        raise UserError(f"--split {split}: the joined networks have seen it; its honest figures are those of the card.")
    folder, known = _run_of(bundle, workspace)
    out = folder.path / "evaluation" / split
    with track(folder, config.tracking, tags={"medseg.evaluated": split}, resume=known) as tracker:
        tracker.log_cohort(cohort, split)
        predicted = _predict(bundle, cohort, out / "predictions", workspace, split)
        facts = {**bundle.identity(), "operating_point": bundle.facts["operating_point"]}
        result = step.run(
            cohort,
            out / "predictions",
            out,
            split=split,
            bundle_facts=facts,
            labels=config.task.labels,
            kind=config.task.kind,
            lesions=lesions,
        )
        audited = _audit(bundle, cohort, folder, tracker, split, overrides) if audit else Result("audit", "done")
        page = report_step.run(config.report, folder.path)
        _log_evaluation(tracker, result, page, out, split)
    partial = "partial" in (predicted.status, result.status)
    paths = {**result.paths, **audited.paths, "report": page.paths["report"], "run": folder.path}
    figures = {**audited.figures, **result.figures}
    return Result("evaluate", "partial" if partial else "done", paths, figures, folder.id, rows=audited.rows)


def audit(
    model: str, cohort_dir: Path, workspace: Path, *, split: str = "test", overrides: Sequence[str] = ()
) -> Result:
    """Audit a classifier without evaluating it again, in the run that trained it, and write the report."""
    from medseg.cohort import read_cohort
    from medseg.report import step as report_step
    from medseg.tracking import track

    bundle, cohort = _bundle(model, workspace), read_cohort(cohort_dir)
    folder, known = _run_of(bundle, workspace)
    with track(folder, bundle.config.tracking, tags={"medseg.audited": split}, resume=known) as tracker:
        result = _audit(bundle, cohort, folder, tracker, split, overrides)
        page = report_step.run(bundle.config.report, folder.path)
        tracker.log_artifact(page.paths["report"], "report")
        tracker.log_artifact(folder.path / "audit", "audit")
    return replace(result, paths={**result.paths, "report": page.paths["report"], "run": folder.path})


def predict(
    model: str,
    scans: Sequence[str],
    out: Path,
    workspace: Path,
    *,
    run_id: str | None = None,
    tags: dict[str, str] | None = None,
    store_in: str | None = None,
) -> Result:
    """Segment or classify scans into `out`, explain, and keep the batch as a run. Run again, it goes on.

    Args:
        store_in: address of the PACS that gets the DICOM results; see `store`.
    """
    from medseg.cohort import read_cohort
    from medseg.ingest.pacs_http import parse_server
    from medseg.tracking import track

    if store_in:
        parse_server(store_in)  # a wrong address is told before the work
    bundle = _bundle(model, workspace)
    config = bundle.config
    with _at_hand(scans, workspace) as paths:
        is_cohort = len(paths) == 1 and (paths[0] / "cohort.json").is_file()
        given: Cohort | list[Path] = read_cohort(paths[0]) if is_cohort else paths
        folder, again = _batch_run(bundle, workspace, run_id)
        with track(folder, config.tracking, tags={"medseg.step": "predict", **(tags or {})}, resume=again) as tracker:
            result = _predict(bundle, given, out, workspace)
            tracker.log_metrics(_numbers(result), step=0)
            tracker.log_artifact(_nameless_ledger(result.paths["ledger"], folder.path, workspace, is_cohort))
            tracker.log_artifact(result.paths["summary"])
    sent = store(out, store_in).figures if store_in else {}
    return Result("predict", result.status, {**result.paths, "run": folder.path}, {**result.figures, **sent}, folder.id)


def explain(model: str, scans: Sequence[str], out: Path, workspace: Path) -> Result:
    """Make the activation maps of a prediction folder that lacks them, or lacks some.

    Args:
        scans: what `predict` was given.
        out: the folder that `predict` wrote.
    """
    from medseg.cohort import read_cohort
    from medseg.predict import Predictor

    bundle = _bundle(model, workspace)
    with _at_hand(scans, workspace) as paths:
        is_cohort = len(paths) == 1 and (paths[0] / "cohort.json").is_file()
        return _explain(bundle, Predictor(bundle).net, read_cohort(paths[0]) if is_cohort else paths, out)


def store(out: Path, url: str) -> Result:
    """Store the DICOM results of a prediction folder beside their scans in a PACS; again, it sends what is missing."""
    from medseg.ingest import pacs
    from medseg.ingest.pacs_http import parse_server

    with pacs.Pacs(parse_server(url)[0]) as server:
        sent = [server.store(file) for file in pacs.results_of(out)]
    return Result("store", "done", {"out": out}, {"stored": sum(sent), "present": len(sent) - sum(sent)})


def report(target: str, workspace: Path) -> Result:
    """The pages of a run (by folder or id), a prediction folder or a cohort."""
    from medseg.config import ReportConfig
    from medseg.report import step

    folder = Path(target)
    if not folder.is_dir():
        folder = find_run(workspace, target).path
    settings = ReportConfig()
    if (folder / "config.yaml").is_file():
        settings = load_config(folder / "config.yaml").report
    return step.run(settings, folder)


def _bundle(model: str, workspace: Path) -> "Bundle":
    from medseg.bundle import load_bundle

    return load_bundle(model, workspace)


def _predict(
    bundle: "Bundle", scans: "Cohort | Sequence[Path]", out: Path, workspace: Path, split: str | None = None
) -> Result:
    """Masks, then activation maps, with the network loaded once; `partial` when either lacks a case."""
    from medseg.predict import Predictor
    from medseg.predict import step as predict_step

    predictor = Predictor(bundle)
    result = predict_step.run(bundle, scans, out, split=split, workspace=workspace, predictor=predictor)
    if not bundle.config.explain.max_cases:
        return result
    maps = _explain(bundle, predictor.net, scans, out, split)
    partial = "partial" in (result.status, maps.status)
    return replace(result, status="partial" if partial else "done", paths={**result.paths, **maps.paths})


def _audit(
    bundle: "Bundle", cohort: "Cohort", folder: RunFolder, tracker: "Tracker", split: str, overrides: Sequence[str]
) -> Result:
    from medseg import audits

    return audits.run(bundle, cohort, folder, tracker, split=split, overrides=overrides)


def _explain(
    bundle: "Bundle", net: "nn.Module", scans: "Cohort | Sequence[Path]", out: Path, split: str | None = None
) -> Result:
    from medseg.explain import step

    config = bundle.config
    return step.run(
        config.explain, net, bundle.plan, bundle.labels, scans, split, predictions=out, ingest=config.ingest
    )


def _nameless_ledger(ledger: Path, run_folder: Path, workspace: Path, is_cohort: bool) -> Path:
    """The ledger as MLflow may have it: names of files, which may name patients, stay in the prediction folder."""
    from medseg.ingest.pseudonyms import is_pseudonym, load_key, pseudonym
    from medseg.ledger import read_ledger, write_ledger

    rows = read_ledger(ledger)
    if not is_cohort:
        key = load_key(workspace / "pseudonym.key")
        rows = tuple(
            row if is_pseudonym(row.case_id) else replace(row, case_id=pseudonym(key, "case", row.case_id))
            for row in rows
        )
    return write_ledger(run_folder / "ledger.csv", rows)


def _plan_folder(config: Config, cohort: "Cohort") -> Path:
    return cohort.folder / "plans" / (config.name if config.train.fold is None else f"{config.name}-folds")


def _read_plan(config: Config, cohort: "Cohort", folder: RunFolder) -> "Plan":
    """The run's own plan, else the cohort's plan for this config if it still fits, else a new one."""
    from medseg.plan import read_plan
    from medseg.train.planning import plan_key, plan_to_train

    if (folder.path / "plan.yaml").is_file():
        return read_plan(folder.path / "plan.yaml")
    made = _plan_folder(config, cohort) / "plan.yaml"
    if made.is_file():
        found = read_plan(made)
        if found.fingerprint.get("key") == plan_key(config, cohort):
            return found
    return plan_to_train(config, cohort)


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


def _run_of(bundle: "Bundle", workspace: Path) -> tuple[RunFolder, bool]:
    """The run that trained the bundle, and True; a new run, and False, when it is not in this workspace."""
    try:
        return find_run(workspace, bundle.run_id), True
    except UserError:
        facts = {"step": "evaluate", "seed": bundle.config.seed, "bundle_sha256": bundle.sha256}
        return create_run(workspace, f"evaluate-{bundle.config.name}", None, **facts), False


def _batch_run(bundle: "Bundle", workspace: Path, run_id: str | None) -> tuple[RunFolder, bool]:
    """A new run for a batch, and False; where `run_id` names a batch that was stopped, its run, and True."""
    if run_id and (workspace / "runs" / run_id / "run.json").is_file():
        return find_run(workspace, run_id), True
    facts = {"step": "predict", "seed": bundle.config.seed, "bundle_sha256": bundle.sha256}
    return create_run(workspace, f"predict-{bundle.config.name}", run_id, **facts), False


def _log_evaluation(tracker: "Tracker", result: Result, page: Result, out: Path, split: str) -> None:
    tracker.log_metrics({f"{split}_{name}": value for name, value in _numbers(result).items()}, step=0)
    for name in ("metrics.json", "cases.csv"):
        tracker.log_artifact(out / name, f"evaluation/{split}")
    for overlay in sorted((out / "overlays").glob("*.png")):
        tracker.log_artifact(overlay, f"evaluation/{split}/overlays")
    tracker.log_artifact(page.paths["report"], "report")
    if (out.parent.parent / "audit").is_dir():
        tracker.log_artifact(out.parent.parent / "audit", "audit")


def _listed(source: str) -> list[str]:
    if not source.startswith("@"):
        return [source]
    try:
        lines = Path(source[1:]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list {source[1:]} cannot be read ({error}); give a UTF-8 text file.") from error
    if not (listed := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"the list {source[1:]} is empty; write one folder, file or address a line.")
    return listed


def _numbers(result: Result) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in result.figures.items()
        if isinstance(value, _FLAT_TYPES) and not isinstance(value, bool)
    }


@contextmanager
def _at_hand(sources: Sequence[str], workspace: Path) -> Iterator[list[Path]]:
    """The sources as paths. What an address asks for is fetched first, and removed once it has been used.

    `@FILE` stands for the sources that the lines of a text file name, which so stay out of Prefect's parameters.
    """
    from medseg.ingest import pacs
    from medseg.ingest.pseudonyms import load_key

    sources = [source for given in sources for source in _listed(given)]
    asked = [source for source in sources if pacs.is_address(source)]
    paths = {source: Path(source) for source in sources if source not in asked}
    for path in paths.values():
        if not path.exists() and "://" not in str(path):
            raise UserError(f"{path} does not exist; check the path of the scans.")
    for url in asked:
        paths[url] = pacs.fetch(url, workspace / "spool", load_key(workspace / "pseudonym.key"))
    yield [paths[source] for source in sources]
    for url in asked:  # not after an error: what has come is kept for the next attempt
        pacs.remove_spool(paths[url])
