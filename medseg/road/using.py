"""A trained model on scans: predict, explain, store in a PACS."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.bundle import Bundle, load_bundle
from medseg.cohort import Cohort, read_cohort
from medseg.result import Result
from medseg.road.sources import at_hand
from medseg.runs import RunFolder, create_run, find_run

if TYPE_CHECKING:
    from torch import nn


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
    from medseg.ingest.pacs_http import parse_server
    from medseg.tracking import track

    if store_in:
        parse_server(store_in)  # a wrong address is told before the work
    bundle = load_bundle(model, workspace)
    config = bundle.config
    with at_hand(scans, workspace) as paths:
        given = _given(paths)
        folder, again = _batch_run(bundle, workspace, run_id)
        with track(folder, config.tracking, tags={"medseg.step": "predict", **(tags or {})}, resume=again) as tracker:
            result = predict_and_explain(bundle, given, out, workspace)
            tracker.log_metrics(result.numbers(), step=0)
            tracker.log_artifact(
                _nameless_ledger(result.paths["ledger"], folder.path, workspace, isinstance(given, Cohort))
            )
            tracker.log_artifact(result.paths["summary"])
    sent = store(out, store_in).figures if store_in else {}
    return Result("predict", result.status, {**result.paths, "run": folder.path}, {**result.figures, **sent}, folder.id)


def explain(model: str, scans: Sequence[str], out: Path, workspace: Path) -> Result:
    """Make the activation maps of a prediction folder that lacks them, or lacks some.

    Args:
        scans: what `predict` was given.
        out: the folder that `predict` wrote.
    """
    from medseg.predict import Predictor

    bundle = load_bundle(model, workspace)
    with at_hand(scans, workspace) as paths:
        return _explain(bundle, Predictor(bundle).net, _given(paths), out)


def store(out: Path, url: str) -> Result:
    """Store the DICOM results of a prediction folder beside their scans in a PACS; again, it sends what is missing."""
    from medseg.ingest import pacs
    from medseg.ingest.pacs_http import parse_server

    with pacs.Pacs(parse_server(url)[0]) as server:
        sent = [server.store(file) for file in pacs.results_of(out)]
    return Result("store", "done", {"out": out}, {"stored": sum(sent), "present": len(sent) - sum(sent)})


def predict_and_explain(
    bundle: Bundle, scans: Cohort | Sequence[Path], out: Path, workspace: Path, split: str | None = None
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
    told = {"explain_seconds": maps.figures["seconds"], "maps": maps.figures["maps"]}
    told["maps_that_fail_a_check"] = maps.figures["failed_checks"]
    return replace(
        result,
        status="partial" if partial else "done",
        paths={**result.paths, **maps.paths},
        figures={**result.figures, **told},
    )


def _given(paths: list[Path]) -> Cohort | list[Path]:
    """The one cohort that the paths name, else the paths of scans."""
    is_cohort = len(paths) == 1 and (paths[0] / "cohort.json").is_file()
    return read_cohort(paths[0]) if is_cohort else paths


def _explain(
    bundle: Bundle, net: "nn.Module", scans: Cohort | Sequence[Path], out: Path, split: str | None = None
) -> Result:
    from medseg.explain import step

    config, ingest = bundle.config.explain.settled(bundle.explanation.get("chosen")), bundle.config.ingest.for_use()
    return step.run(
        config,
        net,
        bundle.plan,
        bundle.labels,
        scans,
        split,
        predictions=out,
        ingest=ingest,
        lungs=bundle.config.lungs,
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


def _batch_run(bundle: Bundle, workspace: Path, run_id: str | None) -> tuple[RunFolder, bool]:
    """A new run for a batch, and False; where `run_id` names a batch that was stopped, its run, and True."""
    if run_id and (workspace / "runs" / run_id / "run.json").is_file():
        return find_run(workspace, run_id), True
    facts = {"step": "predict", "seed": bundle.config.seed, "bundle_sha256": bundle.sha256}
    return create_run(workspace, f"predict-{bundle.config.name}", run_id, **facts), False
