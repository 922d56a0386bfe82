"""The step `predict`: a bundle and scans in, a folder per case and a ledger out.

Killed at any moment and started again, it goes on where it was: finished cases are kept, failed ones tried again.
"""

import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from medseg.bundle import Bundle
from medseg.cohort import Cohort, Reject
from medseg.data.preprocess import Prepared
from medseg.exams import in_order
from medseg.files import DiskError, UserError, write_json, write_rows
from medseg.ingest.scan import Refused, Scan
from medseg.ledger import USABLE, Ledger, Row
from medseg.predict.changes import write_changes
from medseg.predict.jobs import Job, cohort_jobs, read_ahead, reject_id, source_jobs, write_behind
from medseg.predict.outputs import CaseFolder
from medseg.predict.predictor import Prediction, Predictor
from medseg.predict.priors import Prior, find_earlier, load_prior
from medseg.predict.trust import write_queue
from medseg.predict.windows import WorkingSet
from medseg.progress import progress
from medseg.result import Result
from medseg.tracking.failure import scrub


@dataclass(frozen=True)
class _Ready:
    """A case whose scan is in memory and prepared."""

    folder: CaseFolder
    scan: Scan
    prepared: Prepared
    seconds: float
    prior: Prior | None = None


_Read = Callable[[Job], _Ready | Row]
_Written = Callable[[], tuple[Row, bool]]
_Predict = Callable[[Callable[[], _Ready | Row]], _Written]


def run(
    bundle: Bundle,
    scans: Sequence[Path] | Cohort,
    out: Path,
    *,
    split: str | None = None,
    workspace: Path | None = None,
    predictor: Predictor | None = None,
) -> Result:
    """Predict every scan into `out/<case_id>/`; write `ledger.csv`, `review_queue.csv`, `summary.json`, `predict.json`.

    One bad case never stops the batch: its row of the ledger says why it was rejected (the scan cannot be used) or
    failed (an error). Inputs that never became a case are also listed in `rejects.csv`, with their file names.

    Args:
        scans: files, folders and archives as `ingest` takes them, or a cohort.
        split: only these cases of the cohort.
        workspace: holds the key of the pseudonyms for DICOM identifiers; see `source_jobs`.
        predictor: the bundle's network, when the caller has it in memory already.

    Returns:
        `partial` when a case was rejected or failed.

    Raises:
        UserError: no scan at all, the weights do not fit, or `out` cannot be written.
    """
    start, out = time.monotonic(), out.absolute()
    _check_out(out, scans)
    with tempfile.TemporaryDirectory(prefix="medseg-") as unpack_dir:
        rejects: list[Reject] = []
        if isinstance(scans, Cohort):
            jobs = cohort_jobs(scans, split)
        else:
            jobs, rejects = source_jobs(scans, bundle, workspace, Path(unpack_dir))
        predictor = predictor or Predictor(bundle)
        ledger = Ledger(out / "ledger.csv")
        _record_rejects(rejects, ledger, bundle)
        try:
            resumed, working_set_gb = _predict_all(jobs, predictor, ledger, out)
        finally:
            ledger.write()
            write_queue(out / "review_queue.csv", ledger.rows)
        write_changes(out / "changes.json", jobs, bundle)
    more = {"resumed": resumed, "working_set_gb": round(working_set_gb, 6)}
    return _summarise(ledger, bundle, out, more, time.monotonic() - start)


def _predict_all(jobs: Sequence[Job], predictor: Predictor, ledger: Ledger, out: Path) -> tuple[int, float]:
    """Work through the jobs.

    Returns:
        How many were finished before, and the largest working set announced, in GB.
    """
    read = partial(_read, predictor=predictor, jobs=jobs, out=out)
    resumed, working_sets = 0, [0.0]
    work_through = _in_turn if predictor.takes_prior else _overlapping
    with progress("Predicting", len(jobs)) as shown:

        def announce(found: WorkingSet) -> None:
            working_sets.append(found.total_gb)
            shown.advance(0, text=str(found))

        predict = partial(_predict, predictor=predictor, announce=announce)
        with closing(work_through(jobs, read, predict)) as work:
            for job, get in work:
                try:
                    row, again = get()
                except DiskError:
                    raise  # it would fail every case that follows
                except Refused as refused:
                    row, again = _folder(job, predictor, jobs, out).write_rejection(refused), False
                except Exception as error:  # one bad case never stops the batch; the cause is kept beside it
                    row, again = _folder(job, predictor, jobs, out).write_failure(error), False
                resumed += again
                ledger.add(row)
                shown.advance(text=f"{row.case_id} {row.status}")
    return resumed, max(working_sets)


def _overlapping(jobs: Sequence[Job], read: _Read, predict: _Predict) -> Generator[tuple[Job, _Written]]:
    """One job is read while the network sees another and a third is written."""
    with closing(read_ahead(jobs, read)) as ahead, closing(write_behind((j, predict(get)) for j, get in ahead)) as work:
        yield from work


def _in_turn(jobs: Sequence[Job], read: _Read, predict: _Predict) -> Generator[tuple[Job, _Written]]:
    """One job after the other, the earlier examinations of a patient first: each may be shown the mask of the last."""
    for job in in_order(jobs):
        yield job, predict(partial(read, job))


def _folder(job: Job, predictor: Predictor, jobs: Sequence[Job], out: Path, digest: str | None = None) -> CaseFolder:
    if digest is None:
        try:
            digest = job.input_sha256()
        except Refused:
            digest = ""
    earlier = find_earlier(job, jobs, out) if predictor.takes_prior else None
    return CaseFolder(out / job.case_id, job, predictor.bundle, digest, earlier)


def _read(job: Job, predictor: Predictor, jobs: Sequence[Job], out: Path) -> _Ready | Row:
    """Read and prepare one case, unless it is finished. Runs beside the network, unless that takes a prior."""
    start = time.monotonic()
    folder = _folder(job, predictor, jobs, out, job.input_sha256())
    if (row := folder.finished()) is not None:
        return row
    scan = job.read()
    prepared, prior = predictor.prepare(scan), None
    if folder.earlier is not None:
        prior = load_prior(folder.earlier, scan, prepared, predictor.bundle.config.predict.min_similarity)
    return _Ready(folder, scan, prepared, time.monotonic() - start, prior)


def _predict(get: Callable[[], _Ready | Row], predictor: Predictor, announce: Callable[[WorkingSet], None]) -> _Written:
    """Let the network see a case.

    Returns:
        A function that writes the prediction, and returns the case's row and whether it was finished before. What
        went wrong up to here it raises, so that errors of reading, network and writing meet at one place.

    Raises:
        DiskError: at once.
    """
    try:
        ready = get()
        if isinstance(ready, Row):
            return partial(_finished, ready)
        start = time.monotonic()
        prediction = predictor.predict(ready.scan, ready.prepared, announce, ready.prior)
        seconds = {"read": round(ready.seconds, 3), "network": round(time.monotonic() - start, 3)}
        return partial(_write, ready, prediction, seconds)
    except DiskError:
        raise
    except Exception as error:
        return partial(_fail, error)


def _finished(row: Row) -> tuple[Row, bool]:
    return row, True


def _write(ready: _Ready, prediction: Prediction, seconds: dict[str, float]) -> tuple[Row, bool]:
    return ready.folder.write(ready.scan, prediction, seconds, ready.prior), False


def _fail(error: Exception) -> tuple[Row, bool]:
    raise error


def _record_rejects(rejects: Sequence[Reject], ledger: Ledger, bundle: Bundle) -> None:
    rows = []
    for reject in rejects:
        case_id = reject_id(reject)
        rows.append({"case_id": case_id, **asdict(reject)})
        reason = scrub(reject.reason.replace(reject.source, "<file>"), ledger.path.parent)
        ledger.add(Row(case_id, "rejected", reason, bundle_sha256=bundle.sha256))
    write_rows(ledger.path.with_name("rejects.csv"), ["case_id", "source", "code", "reason"], rows)


def _summarise(ledger: Ledger, bundle: Bundle, out: Path, more: Mapping[str, object], seconds: float) -> Result:
    counts = ledger.counts()
    figures: dict[str, object] = {"cases": len(ledger.rows), **counts, **more, "seconds": round(seconds, 1)}
    status = "done" if sum(counts[name] for name in USABLE) == len(ledger.rows) else "partial"
    model = {**bundle.identity(), "simulated": bundle.config.ingest.simulated}
    summary = write_json(out / "summary.json", {"status": status, **figures, "bundle": model})
    paths = {"out": out, "ledger": ledger.path, "review_queue": out / "review_queue.csv", "summary": summary}
    if counts["rejected"]:
        paths["rejects"] = out / "rejects.csv"
    return Result("predict", "done" if status == "done" else "partial", paths, figures).write(out)


def _check_out(out: Path, scans: Sequence[Path] | Cohort) -> None:
    """Never write among what is being read: the masks would be the next run's scans."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--out {out} cannot be made ({reason}); name a folder you may write to.") from error
    for part in out.glob(".part-*"):  # of a killed job
        part.unlink(missing_ok=True)
    for source in () if isinstance(scans, Cohort) else scans:
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise UserError(f"--out {out} lies inside the scans {source}; choose a folder outside them.")
