"""One case from one source: read, checked against the task and written, its record last; or taken from its record."""

import hashlib
import hmac
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

from medseg.cohort import Case, Finding, Reject
from medseg.config import Config
from medseg.exams import exam_days
from medseg.files import UserError, dump_json, read_json, sha256_file, write_json
from medseg.images import write_nifti
from medseg.ingest import deidentify, duplicates, quality
from medseg.ingest.deidentify import Names
from medseg.ingest.dicom_headers import read_dataset
from medseg.ingest.duplicates import Fingerprint
from medseg.ingest.label_maps import annotated, label_inputs, read_label
from medseg.ingest.labels import Truth
from medseg.ingest.pseudonyms import pseudonym
from medseg.ingest.radiograph import write_radiograph_png
from medseg.ingest.scan import Refused, Scan, Source, stem_of
from medseg.ingest.sources import hash_source, read_source
from medseg.progress import progress
from medseg.volume import Volume, orientation_code

RECORD_VERSION = 4
_RULES = {
    *("modality", "refuse", "dates", "offset_hu", "orientation"),
    *("label_threshold", "label_files", "label_values", "label_grid", "label_missing"),
}
_WORKERS = 4


@dataclass
class CaseMaker:
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


def _claim(cohort_dir: Path) -> None:
    """Mark the folder as a cohort's before anything else is in it, so that an ingest killed early can go on."""
    try:
        (cohort_dir / "records").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--cohort {cohort_dir} cannot be written ({reason}); choose another folder.") from error
