"""The ingest step: scans in, a cohort out.

Each case is written image by image and its record last. A killed ingest that is started again takes the cases whose
records still fit their sources and settings, and reads the rest; the tables come last of all.
"""

import hashlib
import hmac
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import medseg
from medseg.cohort import Case, Cohort, Finding, Reject, assign_splits, check_cases, write_cohort
from medseg.config import Config
from medseg.exams import exam_days
from medseg.files import UserError, dump_json, read_json, sha256_file, write_json, write_rows
from medseg.images import write_nifti
from medseg.ingest import deidentify, duplicates, quality
from medseg.ingest.deidentify import Names
from medseg.ingest.dicom_headers import read_dataset
from medseg.ingest.duplicates import Fingerprint
from medseg.ingest.guess import Draft, check_declared
from medseg.ingest.label_maps import annotated, label_inputs, read_label
from medseg.ingest.labels import Truth, match
from medseg.ingest.pseudonyms import pseudonym, record_places
from medseg.ingest.radiograph import write_radiograph_png
from medseg.ingest.scan import Refused, Scan, Source, stem_of
from medseg.ingest.sources import discover, hash_source, read_source
from medseg.progress import progress
from medseg.result import Result
from medseg.volume import Volume, orientation_code

RECORD_VERSION = 4
_RULES = {
    *("modality", "refuse", "dates", "offset_hu", "orientation"),
    *("label_threshold", "label_files", "label_values", "label_grid", "label_missing"),
}
_WORKERS = 4


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
        maker = _CaseMaker(config, cohort_dir, key, names)
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


@dataclass
class _CaseMaker:
    """Makes cases of one cohort in a few threads; each holds one case in memory at a time."""

    config: Config
    folder: Path
    key: bytes = field(repr=False)
    names: Names
    resumed: list[str] = field(default_factory=list)
    prints: dict[str, Fingerprint] = field(default_factory=dict, repr=False)
    shifts: dict[str, str] = field(default_factory=dict, repr=False)

    def make_all(self, pairs: Sequence[tuple[Source, Truth]]) -> tuple[list[Case], list[Reject]]:
        """Case or reject of every source. A UserError (disk full) or Ctrl-C stops the rest."""
        cases: list[Case] = []
        rejects: list[Reject] = []
        _claim(self.folder)
        pool = ThreadPoolExecutor(max_workers=_WORKERS)
        try:
            with progress("Reading scans", len(pairs)) as shown:
                for future in as_completed([pool.submit(self.make, *pair) for pair in pairs]):
                    made = future.result()
                    if isinstance(made, Case):
                        cases.append(made)
                    else:
                        rejects.append(made)
                    shown.advance()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        days = exam_days(cases, self.config.ingest.exam_unit, self.shifts)
        placed = [replace(case, exam_day=days.get(case.case_id)) for case in sorted(cases, key=lambda c: c.case_id)]
        return list(duplicates.find(placed, self.prints)), rejects

    def about(self) -> dict[str, object]:
        """What `cohort.json` tells of de-identification, and the percentiles of every image for the cohort's page."""
        settings = self.config.ingest
        return {
            "deidentification": deidentify.provenance(self.names, settings.dates, settings.refuse),
            "percentiles": {name: list(found.percentiles) for name, found in sorted(self.prints.items())},
        }

    def make(self, source: Source, truth: Truth) -> Case | Reject:
        """Read, check and write one case, or take what an earlier ingest left."""
        try:
            sha256 = hash_source(source)
            digest = self._inputs_digest(source, sha256, truth)
            case = self._resume(source.case_id, digest)
            if case is None:
                case = self._write(source, sha256, truth, digest)
            else:
                self.resumed.append(source.case_id)
        except Refused as error:
            return error.reject(source.name)
        patient = pseudonym(self.key, "patient", truth.patient) or source.patient_id or source.case_id
        site = self.names.site(truth.site) or source.site
        told = self.names.exam(truth.exam, truth.patient or source.patient_id)
        exam = told or source.exam or case.exam  # else the date of a DICOM study, as the record has it
        if self.names.keyed or source.source_kind == "dicom":
            self.shifts[source.case_id] = (told and truth.patient) or source.patient_id or source.case_id
        return replace(case, patient_id=patient, site=site, exam=exam, split=truth.split, target=truth.target)

    def _write(self, source: Source, sha256: str, truth: Truth, digest: str) -> Case:
        scan = read_source(source, sha256)
        self._check_task(scan)
        findings = quality.check(scan, self.config.ingest)
        label, told = None, ""
        if truth.label is not None:
            label, found = read_label(truth.label, scan.channels[0], self.config.task, self.config.ingest)
            told = annotated(truth.label, label, truth.annotated, self.config.task, self.config.ingest)
            findings += found
        (self.folder / "cohort.json").unlink(missing_ok=True)  # the tables no longer tell the truth
        self._record(source.case_id).unlink(missing_ok=True)
        images = self._write_images(scan)
        label_name = self._write_label(scan, label)
        case = replace(_case(scan, images, label_name, findings), annotated=told)
        self.prints[case.case_id] = found_print = duplicates.fingerprint(scan.channels[0])
        record: dict[str, object] = {"version": RECORD_VERSION, "inputs": digest, "image": found_print.to_json()}
        if scan.source_kind == "dicom":
            header = read_dataset(scan.source_files[0], stop_before_pixels=True, specific_tags=deidentify.READ_TAGS)
            record["acquisition"] = kept = deidentify.acquisition(header, self.key, self.config.ingest.dates)
            case = replace(case, exam=str(kept.get("StudyDate", "")))
        write_json(self._record(case.case_id), {**record, "case": case.to_row()})
        return case

    def _check_task(self, scan: Scan) -> None:
        task = self.config.task
        if (scan.kind == "radiograph") != (task.spatial_dims == 2):
            wanted = "radiographs" if task.spatial_dims == 2 else "volumes"
            raise Refused("wrong_kind", f"It is a {scan.kind}, but task.spatial_dims asks for {wanted}.")
        if len(scan.channels) != len(task.channels):
            names = ", ".join(task.channels)
            raise Refused("channels", f"It has {len(scan.channels)} channels, task.channels names: {names}.")

    def _write_images(self, scan: Scan) -> tuple[str, ...]:
        names = []
        for channel_name, channel in zip(self.config.task.channels, scan.channels, strict=True):
            ending = f"_{channel_name}" if len(scan.channels) > 1 else ""
            if scan.kind == "volume":
                names.append(f"images/{scan.case_id}{ending}.nii.gz")
                write_nifti(self.folder / names[-1], channel)
            else:
                names.append(f"images/{scan.case_id}{ending}.png")
                picture = scan.source_files[0] if scan.source_kind == "png" else None
                write_radiograph_png(self.folder / names[-1], channel.array, picture)
        return tuple(names)

    def _write_label(self, scan: Scan, label: Volume | None) -> str:
        if label is None:
            return ""
        if scan.kind == "volume":
            name = f"labels/{scan.case_id}.nii.gz"
            write_nifti(self.folder / name, label)
        else:
            name = f"labels/{scan.case_id}.png"
            write_radiograph_png(self.folder / name, label.array, None)
        return name

    def _inputs_digest(self, source: Source, sha256: str, truth: Truth) -> str:
        """Hash of all that the written files follow from: the bytes of image and label, the settings."""
        settings = {
            "version": RECORD_VERSION,
            "task": self.config.task.model_dump(mode="json"),
            "modality": source.modality,
            "rules": self.config.ingest.model_dump(mode="json", include=_RULES),
            "windowed": source.windowed,
            "annotated": truth.annotated,
        }
        try:
            masks = label_inputs(truth.label, self.config.task, self.config.ingest) if truth.label else []
            inputs = [sha256, [[stem_of(mask), sha256_file(mask)] for mask in masks]]
        except OSError as error:
            raise Refused("unreadable", f"A file cannot be read ({error.strerror or 'I/O error'}).") from error
        text = dump_json([settings, inputs, [path.suffix for path in source.files[:1]]])
        return hmac.new(self.key, text.encode(), hashlib.sha256).hexdigest()

    def _record(self, case_id: str) -> Path:
        return self.folder / "records" / f"{case_id}.json"

    def _resume(self, case_id: str, digest: str) -> Case | None:
        path = self._record(case_id)
        if not path.is_file():
            return None
        record = read_json(path)
        if record.get("version") != RECORD_VERSION or record.get("inputs") != digest:
            return None
        case = Case.from_row(record["case"])
        written = [*case.images, *filter(None, [case.label])]
        if not all((self.folder / name).is_file() for name in written):
            return None
        self.prints[case_id] = Fingerprint.from_json(record["image"])
        return case


def _case(scan: Scan, images: tuple[str, ...], label: str, findings: tuple[Finding, ...]) -> Case:
    first = scan.channels[0]
    no_scale = any(finding.code == "spacing_unknown" for finding in findings)
    return Case(
        case_id=scan.case_id,
        patient_id="",  # set from the labels on every ingest, like site, split and target
        images=images,
        kind=scan.kind,
        modality=scan.modality,
        label=label,
        shape=first.array.shape,
        spacing_mm=() if no_scale else first.spacing_mm,
        orientation=orientation_code(first.affine) if scan.kind == "volume" else "",
        source_kind=scan.source_kind,
        source_sha256=scan.source_sha256,
        findings=findings,
    )


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


def _claim(cohort_dir: Path) -> None:
    """Mark the folder as a cohort's before anything else is in it, so that an ingest killed early can go on."""
    try:
        (cohort_dir / "records").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--cohort {cohort_dir} cannot be written ({reason}); choose another folder.") from error


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
