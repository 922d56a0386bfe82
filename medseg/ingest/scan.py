"""What passes between the readers: a Source (where a case lies), a Scan (what was read), a Refused (why not)."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from medseg.cohort import Finding, Reject
from medseg.files import UserError
from medseg.volume import Affine, Volume

if TYPE_CHECKING:
    from medseg.ingest.dicom_plain import Plain

Kind = Literal["volume", "radiograph"]
SourceKind = Literal["dicom", "nifti", "png"]


class Refused(UserError):
    """One input cannot become a case. Carries a code for machines and a sentence, with the numbers, for people."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason

    def reject(self, name: str) -> Reject:
        """The row of `rejects.csv` for the input called `name`."""
        return Reject(name, self.code, self.reason)


@dataclass(frozen=True)
class Source:
    """One thing that should become a case: found, its headers checked, its pixels not yet read.

    Attributes:
        case_id: unique among the sources found together, safe as a file name. A pseudonym for DICOM, else made of
            the file's own name.
        kind: `volume` or `radiograph`.
        source_kind: `dicom`, `nifti` or `png` (JPEG too).
        files: the files, each once; for a DICOM series in the order of their first slices along the k axis.
        name: what messages and `rejects.csv` call it; identifies no patient when the source is DICOM.
        patient_id: pseudonym, or empty when unknown.
        site: pseudonym of the institution, or empty when unknown.
        modality: DICOM modality, or empty when unknown.
        label_dir: the folder that holds the labels of the data set this belongs to, when its layout says so.
        match_names: names under which a label may be found: stems, folders, the patient's ID. May identify.
        affine: (4, 4) of a DICOM series, column, row and slice indices to RAS+ world mm; None for other kinds. It is
            sheared where the gantry was tilted.
        slices: (index in `files`, frame within that file) of each slice of a DICOM series along the k axis.
        plain: for each of `files` what reading its pixels takes, where its header told all of it; else empty.
        windowed: a radiograph's VOI look-up table or window is to be applied.
        offset_hu, orientation: of NIfTI files, as `IngestConfig` has them; 0 and empty leave them as they are.
        parts: the series of a case whose channels are series of their own, in order of `task.channels`; `files` then
            holds the files of all.
        label: the label map that lies beside the channels, where `ingest.label_name` picks it.
        label_path: `ingest.label_path` with the groups of this case's path filled in.
        exam: order or date of the examination among those of its patient, as the path says; may identify.
        study_date: of a DICOM header (YYYYMMDD), not shifted: it may order a batch, and is written nowhere.
    """

    case_id: str
    kind: Kind
    source_kind: SourceKind
    files: tuple[Path, ...] = field(repr=False)
    name: str
    patient_id: str = ""
    site: str = ""
    modality: str = ""
    label_dir: Path | None = field(default=None, repr=False)
    match_names: tuple[str, ...] = field(default=(), repr=False)
    affine: Affine | None = field(default=None, repr=False, compare=False)
    slices: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    plain: tuple["Plain | None", ...] = field(default=(), repr=False)
    windowed: bool = False
    offset_hu: float = 0.0
    orientation: str = ""
    parts: tuple["Source", ...] = field(default=(), repr=False)
    label: Path | None = field(default=None, repr=False)
    label_path: str = field(default="", repr=False)
    exam: str = field(default="", repr=False)
    study_date: str = field(default="", repr=False)


@dataclass(frozen=True)
class Scan:
    """A case as read from its source, on the source's own grid.

    Attributes:
        case_id, patient_id, modality, kind, source_kind: as in `Source`.
        channels: one volume per channel, all on one grid: (i, j, k) integer or float32 with an affine to RAS+ world
            mm, or (row, column) uint8 or uint16 with diag(row_mm, column_mm, 1, 1).
        source_files: the files, of the first channel where channels are series of their own; for a DICOM series of
            single-frame files `source_files[k]` is the slice `array[:, :, k]`, whose rows and columns are axes j and
            i (after the correction of gantry tilt, the same plane on another grid).
        source_sha256: hash of their bytes.
        findings: what the reader noticed; `medseg.ingest.quality` adds what the pixels show.
    """

    case_id: str
    patient_id: str
    channels: tuple[Volume, ...]
    modality: str
    kind: Kind
    source_kind: SourceKind
    source_files: tuple[Path, ...] = field(repr=False)
    source_sha256: str
    findings: tuple[Finding, ...] = ()


def safe_name(text: str) -> str:
    """`text` as a file name that every system accepts: letters, digits, `.`, `_` and `-`, at most 100 of them."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")[:100] or "case"


def stem_of(path: Path) -> str:
    """The file name without its suffix, `.nii.gz` counting as one suffix."""
    name = path.name
    for suffix in (".nii.gz", ".nii"):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return path.stem
