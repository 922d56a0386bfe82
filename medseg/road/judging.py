"""What a trained model is worth: evaluate, audit, report."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.bundle import Bundle, load_bundle
from medseg.cohort import Cohort, read_cohort
from medseg.config import ReportConfig, load_config
from medseg.files import UserError
from medseg.result import Result
from medseg.road.using import predict_and_explain
from medseg.runs import RunFolder, create_run, find_run

if TYPE_CHECKING:
    from medseg.tracking import Tracker


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

    Returns:
        The figures of the comparison; `seconds` are those of all of it, prediction and maps included.
    """
    if overrides and not audit:
        raise UserError(f"--set {overrides[0]!r}: only an audit takes settings; add --audit, or leave it out.")
    from medseg.evaluate import step
    from medseg.report import step as report_step
    from medseg.tracking import track

    started = time.monotonic()
    bundle = load_bundle(model, workspace)
    config = bundle.config
    cohort = _unseen(bundle, cohort_dir, split)
    folder, known = _run_of(bundle, workspace)
    out = folder.path / "evaluation" / split
    with track(folder, config.tracking, tags={"medseg.evaluated": split}, resume=known) as tracker:
        tracker.log_cohort(cohort, split)
        predicted = predict_and_explain(bundle, cohort, out / "predictions", workspace, split)
        facts = {**bundle.identity(), "operating_point": bundle.facts["operating_point"]}
        result = step.run(
            cohort,
            out / "predictions",
            out,
            split=split,
            bundle_facts=facts,
            labels=config.task.labels,
            kind=config.task.measured_as,
            lesions=lesions,
        )
        audited = _audit(bundle, cohort, folder, tracker, split, overrides) if audit else Result("audit", "done")
        page = report_step.run(config.report, folder.path)
        _log_evaluation(tracker, result, page, out, split)
    partial = "partial" in (predicted.status, result.status)
    paths = {**result.paths, **audited.paths, "report": page.paths["report"], "run": folder.path}
    figures = {**audited.figures, **result.figures, "seconds": round(time.monotonic() - started, 1)}
    return Result("evaluate", "partial" if partial else "done", paths, figures, folder.id, rows=audited.rows)


def audit(
    model: str, cohort_dir: Path, workspace: Path, *, split: str = "test", overrides: Sequence[str] = ()
) -> Result:
    """Audit a classifier without evaluating it again, in the run that trained it, and write the report."""
    from medseg.report import step as report_step
    from medseg.tracking import track

    bundle = load_bundle(model, workspace)
    cohort = _unseen(bundle, cohort_dir, split)
    folder, known = _run_of(bundle, workspace)
    with track(folder, bundle.config.tracking, tags={"medseg.audited": split}, resume=known) as tracker:
        result = _audit(bundle, cohort, folder, tracker, split, overrides)
        page = report_step.run(bundle.config.report, folder.path)
        tracker.log_artifact(page.paths["report"], "report")
        tracker.log_artifact(folder.path / "audit", "audit")
    return replace(result, paths={**result.paths, "report": page.paths["report"], "run": folder.path})


def report(target: str, workspace: Path) -> Result:
    """The pages of a run (by folder or id), a prediction folder or a cohort."""
    from medseg.report import step

    folder = Path(target)
    if not folder.is_dir():
        folder = find_run(workspace, target).path
    settings = ReportConfig()
    if (folder / "config.yaml").is_file():
        settings = load_config(folder / "config.yaml").report
    return step.run(settings, folder)


def _unseen(bundle: Bundle, cohort_dir: Path, split: str) -> Cohort:
    """The cohort with the splits of the model's training. Raises UserError for a split that is empty, or that joined
    networks have seen."""
    from medseg.folds import as_trained

    cohort = as_trained(bundle.config, read_cohort(cohort_dir))
    cohort.split(split)
    if bundle.members and split != "test":
        raise UserError(f"--split {split}: the joined networks have seen it; its honest figures are those of the card.")
    return cohort


def _audit(
    bundle: Bundle, cohort: Cohort, folder: RunFolder, tracker: "Tracker", split: str, overrides: Sequence[str]
) -> Result:
    from medseg import audits

    return audits.run(bundle, cohort, folder, tracker, split=split, overrides=overrides)


def _run_of(bundle: Bundle, workspace: Path) -> tuple[RunFolder, bool]:
    """The run that trained the bundle, and True; a new run, and False, when it is not in this workspace."""
    try:
        return find_run(workspace, bundle.run_id), True
    except UserError:
        facts = {"step": "evaluate", "seed": bundle.config.seed, "bundle_sha256": bundle.sha256}
        return create_run(workspace, f"evaluate-{bundle.config.name}", None, **facts), False


def _log_evaluation(tracker: "Tracker", result: Result, page: Result, out: Path, split: str) -> None:
    tracker.log_metrics({f"{split}_{name}": value for name, value in result.numbers().items()}, step=0)
    for name in ("metrics.json", "cases.csv"):
        tracker.log_artifact(out / name, f"evaluation/{split}")
    for overlay in sorted((out / "overlays").glob("*.png")):
        tracker.log_artifact(overlay, f"evaluation/{split}/overlays")
    tracker.log_artifact(page.paths["report"], "report")
    if (out.parent.parent / "audit").is_dir():
        tracker.log_artifact(out.parent.parent / "audit", "audit")
