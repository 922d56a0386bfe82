"""The ingest step: scans in, a cohort out.

Each case is written image by image and its record last. A killed ingest that is started again takes the cases whose
records still fit their sources and settings, and reads the rest; the tables come last of all.
"""

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path

import medseg
from medseg.cohort import Case, Cohort, Reject, check_cases, write_cohort
from medseg.config import Config
from medseg.files import UserError, read_json, write_rows
from medseg.ingest.case_maker import CaseMaker
from medseg.ingest.deidentify import Names
from medseg.ingest.guess import Draft, check_declared
from medseg.ingest.labels import match
from medseg.ingest.pseudonyms import record_places
from medseg.ingest.sources import discover
from medseg.result import Result
from medseg.splits import assign_splits


def run(
    config: Config | Draft,
    sources: Sequence[Path],
    cohort_dir: Path,
    *,
    labels: Path | None = None,
    key: bytes,
    lookup: Path | None = None,
) -> Result:
    """Turn scans into a cohort.

    Args:
        config: `task` and `ingest` count. A draft leaves the task, or parts of it, to be guessed.
        sources: folders, files, archives, data sets.
        cohort_dir: new, or a cohort that this continues or replaces.
        labels: folder or CSV; None takes what the layout of the sources brings.
        key: for pseudonyms, kept outside the cohort.
        lookup: a CSV, readable by its owner alone, to which the place behind each pseudonym of a case or reject is
            added; it identifies patients and belongs beside the key. None writes nothing.

    Returns:
        Status `partial` when anything was rejected; figures `cases`, `rejects`, `resumed`, `seconds`, the
            `labels`, and whether the `task` was `given` or `guessed`.

    Raises:
        UserError: the input as a whole cannot be used, no case is left, or the disk refuses.
    """
    started = time.monotonic()
    cohort_dir = cohort_dir.absolute()
    task = "guessed" if isinstance(config, Draft) and config.guesses_labels else "given"
    _check_folder(cohort_dir, sources)
    with _unpacking(cohort_dir / ".unpacked") as unpack_dir:
        places: dict[str, Path] = {}
        found, rejects = discover(sources, config.ingest, key=key, unpack_dir=unpack_dir, places=places)
        names = Names(config.ingest.names == "keyed", key, config.ingest.dates)
        found = [names.source(source) for source in found]
        if isinstance(config, Draft):
            config = config.settle(found, labels)
        elif labels is None:
            check_declared(found, config.task, config.ingest)
        matched, unmatched = match(found, labels, config.ingest, config.task)
        rejects = [names.reject(reject) for reject in (*rejects, *unmatched)]
        if lookup is not None:
            record_places(lookup, {**places, **names.places})
        maker = CaseMaker(config, cohort_dir, key, names)
        cases, refused = maker.make_all(matched)
    rejects = sorted([*rejects, *refused], key=lambda r: (r.source, r.code))
    cohort = _finish(config, cohort_dir, cases, rejects, {"task": task, **maker.about()})
    return Result(
        step="ingest",
        status="partial" if rejects else "done",
        paths={"cohort": cohort_dir / "cohort.csv", "rejects": cohort_dir / "rejects.csv"},
        figures={
            "cases": len(cohort.cases),
            "rejects": len(rejects),
            "resumed": len(maker.resumed),
            "task": task,
            "labels": dict(cohort.label_names),
            "splits": dict(Counter(case.split for case in cohort.cases)),
            "sha256": cohort.sha256,
            "seconds": round(time.monotonic() - started, 2),
        },
    ).write(cohort_dir)


def _finish(
    config: Config, cohort_dir: Path, cases: list[Case], rejects: list[Reject], about: Mapping[str, object]
) -> Cohort:
    """Deal the splits and write the tables."""
    if not cases:
        write_rows(cohort_dir / "rejects.csv", [f.name for f in fields(Reject)], [asdict(r) for r in rejects])
        first = rejects[0]
        raise UserError(
            f"none of {len(rejects)} inputs became a case; {first.source}: {first.reason} "
            f"All reasons are in {cohort_dir / 'rejects.csv'}."
        )
    split = config.ingest.split
    check_cases([case for case in cases if case.split])  # the table's own splits must keep patients whole
    if split.by == "site" and (lost := [case.case_id for case in cases if not case.site]):
        raise UserError(f"ingest.split.by is 'site', but case {lost[0]!r} has none; add ingest.table.site.")
    dealt = assign_splits(cases, val=split.val, test=split.test, seed=split.seed, by=split.by)
    _remove_stale(cohort_dir, {case.case_id for case in dealt})
    cohort = Cohort(cohort_dir, dealt, dict(config.task.labels), config.task.channels)
    settings = config.ingest.model_dump(mode="json")
    facts = {"medseg": medseg.__version__, "simulated": config.ingest.simulated, "ingest": settings, **about}
    return write_cohort(cohort, rejects, facts)


def _check_folder(cohort_dir: Path, sources: Sequence[Path]) -> None:
    """Never write among files that are not ours, nor into what is being read."""
    if cohort_dir.is_file():
        raise UserError(f"--cohort {cohort_dir} is a file; name a folder.")
    for source in sources:
        if source.is_dir() and cohort_dir.resolve().is_relative_to(source.resolve()):
            raise UserError(f"--cohort {cohort_dir} lies inside the source {source}; choose a folder outside it.")
    if not cohort_dir.is_dir():
        return
    present = {path.name for path in cohort_dir.iterdir()}
    if present and not present & {"cohort.json", "records"}:
        raise UserError(
            f"--cohort {cohort_dir} holds files that are no cohort's ({sorted(present)[0]}); choose a new folder."
        )


@contextmanager
def _unpacking(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)  # of a killed run
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()  # only when nothing else came into it


def _remove_stale(cohort_dir: Path, case_ids: set[str]) -> None:
    """Remove records and files of cases that are no longer in the cohort, and what a killed writer left."""
    for part in cohort_dir.glob("**/.part-*"):  # first: a part of a record must not pass for a record
        part.unlink(missing_ok=True)
    for record in (cohort_dir / "records").glob("*.json"):
        if record.stem in case_ids:
            continue
        row = read_json(record)["case"]
        for name in (*row["images"].split("|"), row["label"]):
            if name.startswith(("images/", "labels/")) and ".." not in name:
                (cohort_dir / name).unlink(missing_ok=True)
        record.unlink()
