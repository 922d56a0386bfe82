"""What is to be predicted: every scan of the sources, or every case of a cohort, as jobs that can be read."""

import hashlib
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from medseg.bundle import Bundle
from medseg.cohort import Case, Cohort, Reject
from medseg.config import IngestConfig
from medseg.exams import exam_days
from medseg.files import sha256_file, sha256_files
from medseg.images import read_image
from medseg.ingest import quality
from medseg.ingest.deidentify import Names
from medseg.ingest.pseudonyms import load_key, record_places
from medseg.ingest.scan import Kind, Refused, Scan, Source, SourceKind
from medseg.ingest.sources import discover, read_source

Job_ = TypeVar("Job_")
Read = TypeVar("Read")
Written = TypeVar("Written")
_PSEUDONYM = re.compile(r"case-[0-9a-z-]+")


@dataclass(frozen=True)
class Job:
    """One scan to predict.

    Attributes:
        files: whose bytes the result follows from.
        images: the channels' paths when the scan is a case of a cohort, else empty.
        read: reads the pixels; raises Refused when they are unusable.
        exam, exam_day: when it was, as in `Case`; the text may be a date that identifies, and is written nowhere.
    """

    case_id: str
    patient_id: str
    kind: Kind
    source_kind: str
    files: tuple[Path, ...]
    images: tuple[Path, ...]
    read: Callable[[], Scan]
    exam: str = field(default="", repr=False)
    exam_day: int | None = None

    @property
    def dicom_radiograph(self) -> Path | None:
        """The file, where the scan is a radiograph that comes as DICOM."""
        from_dicom = (self.kind, self.source_kind) == ("radiograph", "dicom") and not self.images
        return self.files[0] if from_dicom else None

    def input_sha256(self) -> str:
        """Hash of the input's bytes. Raises Refused when a file cannot be read."""
        try:
            return sha256_file(self.files[0]) if len(self.files) == 1 else sha256_files(self.files)
        except OSError as error:
            raise Refused("unreadable", f"A file cannot be read ({error.strerror or 'I/O error'}).") from error


def cohort_jobs(cohort: Cohort, split: str | None) -> list[Job]:
    """One job per case. Raises UserError when the split has none."""
    cases = cohort.cases if split is None else cohort.split(split)
    return [_cohort_job(case, cohort.image_paths(case)) for case in cases]


def source_jobs(
    paths: Sequence[Path], bundle: Bundle, workspace: Path | None, unpack_dir: Path
) -> tuple[list[Job], list[Reject]]:
    """One job per scan found, and what cannot be used.

    Args:
        workspace: holds the key of the pseudonyms that stand for DICOM identifiers; without it ids are plain hashes
            of UIDs, and patients have no id. Its `pseudonyms.csv`, private, says where each case and reject lies.

    Raises:
        UserError: a path does not exist, or holds no image at all.
    """
    key = load_key(workspace / "pseudonym.key") if workspace is not None else b""
    config = bundle.config.ingest.for_use()
    places: dict[str, Path] = {}
    found, rejects = discover(paths, config, key=key, unpack_dir=unpack_dir, places=places)
    names = Names.of_scans(found, rejects, key)
    sources, rejects = [names.source(source) for source in found], [names.reject(reject) for reject in rejects]
    if workspace is not None:
        record_places(workspace / "pseudonyms.csv", {**places, **names.places})
    jobs = [
        Job(
            source.case_id,
            source.patient_id,
            source.kind,
            source.source_kind,
            source.files,
            (),
            partial(read_checked, source, config),
            exam=true.exam or true.study_date,
        )
        for source, true in zip(sources, found, strict=True)
    ]
    days = exam_days((job for job in jobs if job.patient_id), config.exam_unit)
    return [replace(job, exam_day=days.get(job.case_id)) for job in jobs], rejects


def reject_id(reject: Reject) -> str:
    """What the ledger calls a rejected source: its case id, or a hash where only a file name, which may name the
    patient, is known."""
    if found := _PSEUDONYM.match(reject.source):
        return found[0]
    return f"file-{hashlib.sha256(reject.source.encode(errors='surrogateescape')).hexdigest()[:12]}"


def read_ahead(jobs: Sequence[Job_], read: Callable[[Job_], Read]) -> Generator[tuple[Job_, Callable[[], Read]]]:
    """Each job in order with a function that returns what was read or raises what reading raised.

    The next job is read while the caller works on this one; never more than one ahead.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="read")
    try:
        futures = [pool.submit(read, job) for job in jobs[:1]]
        for at, job in enumerate(jobs):
            current = futures.pop()
            current.exception()  # waits, so that two reads never run or lie ready at once
            futures += [pool.submit(read, later) for later in jobs[at + 1 : at + 2]]
            yield job, current.result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def write_behind(
    work: Iterable[tuple[Job_, Callable[[], Written]]],
) -> Generator[tuple[Job_, Callable[[], Written]]]:
    """Each job in order with a function that returns what its writing returned or raises what it raised.

    A job is written while `work` makes the next one, and is yielded once its writing has ended; never more than one is
    being written, and never more than one waits for that.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="write")
    under_way: list[tuple[Job_, Future[Written]]] = []
    try:
        for job, write in work:
            while under_way:
                earlier, future = under_way.pop()
                future.exception()
                yield earlier, future.result
            under_way.append((job, pool.submit(write)))
            del write  # what it writes is freed as soon as it is written
        for earlier, future in under_way:
            future.exception()
            yield earlier, future.result
    finally:
        pool.shutdown(wait=True)


def read_checked(source: Source, config: IngestConfig | None = None) -> Scan:
    """Read a source; what its pixels show joins its findings. Raises Refused when it is unusable."""
    scan = read_source(source)
    return replace(scan, findings=quality.check(scan, config))


def _cohort_job(case: Case, images: tuple[Path, ...]) -> Job:
    absolute = tuple(path.absolute() for path in images)
    read = partial(_read_case, case, images)
    return Job(
        case.case_id, case.patient_id, case.kind, case.source_kind, images, absolute, read, case.exam, case.exam_day
    )


def _read_case(case: Case, images: tuple[Path, ...]) -> Scan:
    kinds: dict[str, SourceKind] = {"dicom": "dicom", "png": "png"}
    return Scan(
        case_id=case.case_id,
        patient_id=case.patient_id,
        channels=tuple(read_image(path) for path in images),
        modality=case.modality,
        kind=case.kind,
        source_kind=kinds.get(case.source_kind, "nifti"),
        source_files=(),  # a cohort keeps no DICOM to refer to
        source_sha256=case.source_sha256,
        findings=case.findings,
    )
