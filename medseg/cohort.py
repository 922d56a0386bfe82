"""Case and Cohort: the one contract between ingest and everything after it.

A cohort is a folder: `cohort.csv` (one row a case), `rejects.csv`, `cohort.json` (schema version, label names,
hashes) and the images. Paths in the table are relative to the folder, so a cohort can be moved.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from medseg.files import UserError, read_json, read_rows, sha256_file, write_json, write_rows
from medseg.label_sets import read_set

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")
Severity = Literal["info", "warning", "error"]
_PARSED = {"images", "shape", "spacing_mm", "findings", "kind", "exam_day"}


@dataclass(frozen=True)
class Finding:
    """One quality finding on a case: data, not prose. `number` and `threshold` share a unit named by `code`."""

    code: str
    severity: Severity
    message: str
    number: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Reject:
    """One input that did not become a case, with the code and the sentence that say why."""

    source: str
    code: str
    reason: str


@dataclass(frozen=True)
class Case:
    """One thing to segment or classify: the image channels of one study and its label, if any.

    Attributes:
        case_id: unique, safe as a folder name.
        patient_id: pseudonym that ties the cases of one patient together.
        site: where it was acquired; empty when unknown.
        exam: which of the patient's examinations: its order, or its date (shifted, unless names are kept); empty when
            unknown.
        exam_day: days since the patient's first examination in the cohort; None when unknown.
        split: train, val, test, or empty when not assigned.
        kind: `volume` (i, j, k; NIfTI) or `radiograph` (row, column; PNG).
        modality: DICOM modality (CT, MR, CR, DX), or empty when unknown.
        images: one path per channel, all on one grid, relative to the cohort folder.
        label: path of the integer label map on the grid of the images; empty when there is none.
        target: class name for classification, or the labels that are present, as `label_sets` writes them; empty when
            unknown.
        annotated: the structures of which the label map says where they are and where not, as `label_sets` writes them;
            empty when of all. Of any other it says nothing: its voxels lie in the background.
        shape, spacing_mm, orientation: the grid as stored; orientation is empty for radiographs.
        source_kind: dicom, nifti or png. source_sha256: hash of the source bytes.
        findings: quality findings.
    """

    case_id: str
    patient_id: str
    images: tuple[str, ...]
    kind: Literal["volume", "radiograph"] = "volume"
    site: str = ""
    split: str = ""
    modality: str = ""
    label: str = ""
    target: str = ""
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    orientation: str = ""
    source_kind: str = ""
    source_sha256: str = ""
    findings: tuple[Finding, ...] = ()
    exam: str = ""
    exam_day: int | None = None
    annotated: str = ""

    def to_row(self) -> dict[str, str]:
        """The case as one row of text cells."""
        row = {f.name: getattr(self, f.name) for f in fields(self)}
        row["images"] = "|".join(self.images)
        row["shape"] = "x".join(str(n) for n in self.shape)
        row["spacing_mm"] = "x".join(f"{s:.9g}" for s in self.spacing_mm)
        row["findings"] = json.dumps([asdict(f) for f in self.findings]) if self.findings else ""
        row["exam_day"] = "" if self.exam_day is None else str(self.exam_day)
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, str]) -> "Case":
        """Rebuild a case from `to_row`. Raises UserError naming the column that does not fit."""
        known = {f.name for f in fields(cls)}
        row = {"exam": "", "exam_day": "", "annotated": "", **row}  # cohorts of before have no such columns
        if missing := known - set(row):
            raise UserError(f"cohort.csv lacks column {sorted(missing)[0]!r}; ingest the cohort again.")
        try:
            return cls(
                **{name: row[name] for name in known - _PARSED},
                kind="radiograph" if row["kind"] == "radiograph" else "volume",
                images=tuple(filter(None, row["images"].split("|"))),
                shape=tuple(int(n) for n in row["shape"].split("x") if n),
                spacing_mm=tuple(float(s) for s in row["spacing_mm"].split("x") if s),
                findings=tuple(Finding(**f) for f in json.loads(row["findings"] or "[]")),
                exam_day=int(row["exam_day"]) if row["exam_day"] else None,
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"cohort.csv, case {row['case_id']!r}: {error}; ingest the cohort again.") from error


@dataclass(frozen=True)
class Cohort:
    """A table of cases in a folder.

    Attributes:
        folder: where `cohort.csv` lies.
        cases: the cases, in order of case_id.
        label_names: name to value of the integer labels, or class name to index; background (0) not listed for
            label maps.
        channels: names of the image channels, in the order of `Case.images`.
        sha256: hash over the table and the images' own hashes; names this cohort in runs and bundles.
    """

    folder: Path
    cases: tuple[Case, ...]
    label_names: Mapping[str, int] = field(default_factory=dict)
    channels: tuple[str, ...] = ("image",)
    sha256: str = ""

    def split(self, name: str) -> tuple[Case, ...]:
        """The cases of one split. Raises UserError when there are none."""
        chosen = tuple(case for case in self.cases if case.split == name)
        if not chosen:
            have = ", ".join(f"{k or 'unassigned'}: {n}" for k, n in Counter(c.split for c in self.cases).items())
            raise UserError(
                f"{self.folder / 'cohort.csv'}: no case in split {name!r} (it has {have}); change ingest.split."
            )
        return chosen

    def image_paths(self, case: Case) -> tuple[Path, ...]:
        """Absolute paths of a case's channels."""
        return tuple(self.folder / image for image in case.images)

    def label_path(self, case: Case) -> Path | None:
        """Absolute path of a case's label map, or None."""
        return self.folder / case.label if case.label else None

    def annotated(self, case: Case) -> frozenset[int]:
        """The values of the structures of which a case's label map tells; see `Case.annotated`.

        Raises:
            UserError: `cohort.csv` names a structure that the cohort does not have.
        """
        names = read_set(case.annotated) if case.annotated else self.label_names
        try:
            return frozenset(self.label_names[name] for name in names)
        except KeyError as error:
            known = ", ".join(self.label_names)
            raise UserError(
                f"cohort.csv, case {case.case_id!r}: annotated names {error.args[0]!r}, which is none of {known}; "
                "ingest the cohort again."
            ) from error


def write_cohort(cohort: Cohort, rejects: Sequence[Reject], provenance: Mapping[str, object]) -> Cohort:
    """Write the three tables (images must be there already); `cohort.json` last, so its presence means whole.

    Returns:
        The cohort in order of case_id with its `sha256`.

    Raises:
        UserError: two cases share an id, or one patient lies in two splits.
    """
    cases = tuple(sorted(cohort.cases, key=lambda case: case.case_id))
    check_cases(cases)
    columns = [f.name for f in fields(Case)]
    folder = cohort.folder
    (folder / "cohort.json").unlink(missing_ok=True)
    write_rows(folder / "rejects.csv", [f.name for f in fields(Reject)], [asdict(r) for r in rejects])
    write_rows(folder / "cohort.csv", columns, [case.to_row() for case in cases])
    files = {p: sha256_file(folder / p) for case in cases for p in (*case.images, case.label) if p}
    digest = hashlib.sha256(json.dumps([sha256_file(folder / "cohort.csv"), sorted(files.items())]).encode())
    written = replace(cohort, cases=cases, sha256=digest.hexdigest())
    write_json(
        folder / "cohort.json",
        {
            "schema_version": SCHEMA_VERSION,
            "sha256": written.sha256,
            "cases": len(cases),
            "rejects": len(rejects),
            "splits": Counter(case.split or "unassigned" for case in cases),
            "label_names": dict(cohort.label_names),
            "channels": list(cohort.channels),
            "provenance": dict(provenance),
            "files": files,
        },
    )
    return written


def read_cohort(folder: Path) -> Cohort:
    """Read a cohort folder; image hashes are not checked here (see `verify_cohort`).

    Raises:
        UserError: not a cohort, unfinished, or of another schema version.
    """
    if not (folder / "cohort.json").is_file():
        raise UserError(f"{folder} is not a finished cohort (no cohort.json); run `medseg ingest … --cohort {folder}`.")
    about = read_json(folder / "cohort.json")
    if about.get("schema_version") != SCHEMA_VERSION:
        version = about.get("schema_version")
        raise UserError(f"{folder}/cohort.json has schema_version {version}, not {SCHEMA_VERSION}; ingest it again.")
    cases = tuple(Case.from_row(row) for row in read_rows(folder / "cohort.csv"))
    check_cases(cases)
    return Cohort(folder, cases, about["label_names"], tuple(about["channels"]), about["sha256"])


def verify_cohort(cohort: Cohort) -> None:
    """Compare every image with its recorded hash. Raises UserError naming the first file that differs."""
    for name, digest in read_json(cohort.folder / "cohort.json")["files"].items():
        path = cohort.folder / name
        if not path.is_file() or sha256_file(path) != digest:
            raise UserError(f"{path} is missing or changed since it was ingested; ingest the cohort again.")


def check_cases(cases: Sequence[Case]) -> None:
    """Ids are unique and no patient lies in two splits; raises UserError naming the offender."""
    for case_id, count in Counter(case.case_id for case in cases).items():
        if count > 1:
            raise UserError(f"cohort.csv: case_id {case_id!r} stands {count} times; give each case its own id.")
    splits: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        splits[case.patient_id].add(case.split)
        if case.split not in ("", *SPLITS):
            raise UserError(f"cohort.csv, case {case.case_id!r}: split {case.split!r} is none of {', '.join(SPLITS)}.")
    for patient, found in splits.items():
        if len(found) > 1:
            names = ", ".join(sorted(found))
            raise UserError(f"cohort.csv: patient {patient!r} lies in splits {names}; a patient may be in one only.")
