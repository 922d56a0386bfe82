"""Watch a PACS: each study that matches a rule is fetched, segmented and answered once, whatever happens in between.

Every study has a journal file, which is replaced as a whole after each stage:

    seen ─▶ fetched ─▶ predicted ─▶ storing ─▶ done       or failed, with the reason, and tried again a few times

A process killed anywhere leaves the last stage that was finished, and each stage may be done again without a second
effect: fetching brings what is missing, predicting keeps finished cases, storing asks the PACS first. A study that
gets new scans later has other content and is taken up again; results stored by this watch are no new scans.
"""

import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from medseg import road
from medseg.files import UserError, plain, read_json, write_json
from medseg.ingest import pacs
from medseg.ingest.pacs import Pacs, Series
from medseg.ingest.pacs_http import Unreachable
from medseg.ingest.pseudonyms import load_key, pseudonym
from medseg.result import Result
from medseg.runs import new_run_id
from medseg.tracking.failure import scrub

Stage = Literal["seen", "fetched", "predicted", "storing", "done", "failed"]
_MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class Entry:
    """What the journal knows of one study.

    Attributes:
        study: pseudonym; names the journal file and the folder of results.
        content: hash of which series and how many instances it had when last seen, without results stored here.
        since_s: when this content was first seen, in seconds since 1970.
        run_id: of the batch that segments this content.
        stored: pseudonyms of the series this watch stored or is about to store, which are no scans.
        attempts: failures with this content.
        reason: of the last failure, without paths.
    """

    study: str
    content: str
    since_s: float
    stage: Stage = "seen"
    run_id: str = ""
    stored: tuple[str, ...] = ()
    attempts: int = 0
    reason: str = ""

    @property
    def open(self) -> bool:
        """Whether something is left to do."""
        return self.stage != "done" and not (self.stage == "failed" and self.attempts >= _MAX_ATTEMPTS)


class Journal:
    """One file per study in a private folder; each is whole at any moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others out; a killed process lets go by itself. Raises UserError when another holds the journal."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.folder / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process watches with the journal {self.folder}; let it finish.") from None
            yield

    def read(self, study: str) -> Entry | None:
        """The entry of a study, None when it was never seen."""
        path = self.folder / f"{study}.json"
        if not path.exists():
            return None
        found = read_json(path)
        try:
            known = {f.name: found[f.name] for f in fields(Entry)}
            return Entry(**{**known, "stored": tuple(found["stored"])})
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is no journal of this version; move it away to take its study anew.") from error

    def write(self, entry: Entry) -> Entry:
        """Replace the file of a study."""
        write_json(self.folder / f"{entry.study}.json", plain(entry))
        return entry


def run(model: str, url: str, out: Path, workspace: Path, *, stable_s: float = 60.0) -> Result:
    """One round: look at every study that matches, and work through those that are complete.

    Args:
        model: bundle folder, run id, or `models:/NAME@ALIAS`.
        url: `dicomweb://HOST[:PORT]/PATH?RULE`, a rule that names no patient.
        out: results go to `out/<pseudonym of the study>/`.
        workspace: holds the key, the journal (`pacs/`) and, while they are needed, the scans (`spool/`).
        stable_s: how long a study must not have grown before it counts as complete.

    Returns:
        Figures: how many studies are `done` in this round, `waiting` to be complete, `known` from before, `failed`.
            `partial` when a study failed.

    Raises:
        UserError: the server cannot be used, the rule names a patient, or another process is at it.
    """
    pacs.refuse_named(url, "the rule of a watch is stored and shown")
    server, query = pacs.parse_address(url)
    key = load_key(workspace / "pseudonym.key")
    place = pseudonym(key, "watch", f"{server.base}\0{model}\0{out.absolute()}")
    journal, counts = Journal(workspace / "pacs" / place), dict.fromkeys(("done", "waiting", "known", "failed"), 0)
    with journal.locked(), Pacs(server) as connection:
        watch = _Watch(model, out, workspace, journal, connection, key)
        for series in connection.find(query):
            counts[watch.look_at(series, stable_s)] += 1 if series else 0
    return Result("watch_pacs", "partial" if counts["failed"] else "done", {"out": out}, counts)


@dataclass(frozen=True)
class _Watch:
    model: str
    out: Path
    workspace: Path
    journal: Journal
    pacs: Pacs
    key: bytes

    def look_at(self, found: Sequence[Series], stable_s: float) -> Literal["done", "waiting", "known", "failed"]:
        """Note a study, and work on it when it is complete and not finished."""
        if not found:
            return "known"
        study = pseudonym(self.key, "study", found[0].study_uid)
        entry = self.journal.read(study)
        own = entry.stored if entry else ()
        scans = [one for one in found if pseudonym(self.key, "series", one.uid) not in own]
        content, now = pacs.content_of(scans), time.time()
        if entry is None or entry.content != content:
            entry = self.journal.write(Entry(study, content, now, stored=own))
        if not entry.open:
            return "known" if entry.stage == "done" else "failed"
        if 0 <= now - entry.since_s < stable_s:  # a clock that was set back does not hold a study for ever
            return "waiting"
        return self._work(entry, scans)

    def _work(self, entry: Entry, scans: Sequence[Series]) -> Literal["done", "failed"]:
        """All stages that are left; one bad study never stops the others."""
        try:
            if entry.stage in ("seen", "failed"):
                run_id = entry.run_id or new_run_id(f"watch-{entry.study[-4:]}")
                entry = self.journal.write(replace(entry, stage="seen", run_id=run_id))
            self._finish(entry, scans)
        except Unreachable:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else type(error).__name__
            failed = replace(self.journal.read(entry.study) or entry, stage="failed", attempts=entry.attempts + 1)
            self.journal.write(replace(failed, reason=scrub(reason, self.workspace)))
            return "failed"
        return "done"

    def _finish(self, entry: Entry, scans: Sequence[Series]) -> None:
        spool, out = self.workspace / "spool" / self.journal.folder.name / entry.study, self.out / entry.study
        if entry.stage == "seen":
            self.pacs.fetch(scans, spool, self.key)
            entry = self.journal.write(replace(entry, stage="fetched"))
        if entry.stage == "fetched":
            road.predict(self.model, [str(spool)], out, self.workspace, run_id=entry.run_id)
            entry = self.journal.write(replace(entry, stage="predicted"))
        files = pacs.results_of(out)
        if entry.stage == "predicted":  # said before it is done: from now on these series are known as results
            entry = self.journal.write(replace(entry, stage="storing", stored=self._series(entry, scans, files)))
        for file in files:
            self.pacs.store(file)
        pacs.remove_spool(spool)
        self.journal.write(replace(entry, stage="done", reason=""))

    def _series(self, entry: Entry, scans: Sequence[Series], files: Sequence[Path]) -> tuple[str, ...]:
        """Pseudonyms of all series of results. Raises UserError when one would go elsewhere."""
        stored = set(entry.stored)
        for file in files:
            study, series = pacs.series_of(file)
            if study != scans[0].study_uid or series in {one.uid for one in scans}:
                raise UserError(f"{file} does not belong beside its scans; it is not stored.")
            stored.add(pseudonym(self.key, "series", series))
        return tuple(sorted(stored))
