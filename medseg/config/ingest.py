"""How sources become cases, and cases splits."""

import re
from string import Formatter
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from medseg.config.fields import Count, Share, Strict

LabelValue = Annotated[int, Field(ge=0, le=65535)]
ExamUnit = Literal["order", "days", "months", "years"]


class SplitConfig(Strict):
    """Shares of val and test; whole patients or whole sites move together."""

    val: Share = 0.1
    test: Share = 0.2
    by: Literal["patient", "site"] = "patient"
    seed: int = 0


class TableConfig(Strict):
    """Column names of a labels CSV; an empty name means that the table has no such column.

    `annotated` lists the structures of which the label map tells, joined by `|`; an empty cell leaves that to
    `ingest.label_missing`.
    """

    image: str = "image"
    label: str = "label"
    target: str = "target"
    patient: str = "patient_id"
    site: str = "site"
    split: str = "split"
    exam: str = "exam"
    annotated: str = ""


FindingCode = Literal[
    "anisotropic", "burned_in_text", "chest_doubtful", "colour", "detector_spacing", "few_levels",
    "few_pixels", "few_voxels", "for_processing", "form_mismatch", "form_mirrored", "gantry_tilt", "implausible_extent",
    "implausible_spacing", "no_chest", "no_orientation", "not_frontal_chest", "not_hounsfield", "padding",
    "secondary_capture", "spacing_unknown", "view_unknown",
]  # fmt: skip


class IngestConfig(Strict):
    """How sources become cases.

    `modality`, `description` (a regular expression, found anywhere, in any case), `min_slices` and `plane` choose DICOM
    series; of a series with several volumes (echoes, b-values, time points) `volumes` takes all or the first. Gantry
    `tilt` is corrected by resampling, or such series are refused. A single modality is also taken to be that of NIfTI
    files, which name none.

    `channels` names the channels that lie in files or series of their own, each with a regular expression (found
    anywhere, in any case; the longest match counts) for the name of its NIfTI file or its Series Description: files in
    one folder whose names are otherwise alike, or the series of one study, are one case. `label_name` picks the label
    map among such files in the same way. Both are empty where one file or series holds a whole case.

    `image_path` says which files are images, by a regular expression for their whole path, found anywhere, in any case
    and with `/` between folders; all others are passed over. Its named groups say what the path tells: `case` (files of
    one case share it, whatever folders they lie in), `patient`, `exam` (order or date, which tells apart a patient's
    examinations), and any other that `label_path` needs. `label_path` is where a case's label lies, with such groups
    in braces, from the folder of `--labels`, else from the folder of the image. Prediction takes what it is given.

    `label_files`: a case's label is one integer `map`, or a folder with a binary mask `one_per_label`, each named like
    its label in `task.labels`; other masks in it are passed over. `label_values` gives another number to values of a
    label map ({4: 3}), all at once. `label_grid: image` takes the voxels of a label for those of its image, whatever
    its header says, for labels that were published with a header that is not true. `label_missing` says what it means
    that a label map has no voxel of a structure (or a folder of masks no file of it): the scan does not show it, or it
    was not contoured, so that nothing is known of it and no case is trained or measured on it.

    `offset_hu` is added to the voxels of NIfTI files, for CT that is stored with an offset (-1024 where air is 0).
    `orientation` says to where the axes of NIfTI files point (LPI: first axis to the left, second to the posterior,
    third to the inferior side), for files whose header holds a spacing but no true orientation; it needs
    `label_grid: image`. Scans that a trained model is given are taken as their headers have them.

    `label_threshold` turns a grey mask into a binary one (values above it are 1); `target_names` maps the table's
    class cells to names of `task.labels` (with `task.multi_label` each name in a cell, and to `none` what means that
    there is no label); `simulated` says so on every page.

    `refuse` lists the findings that keep a scan out; all others travel with the case. `radiograph_window` applies
    the VOI look-up table or window of DICOM radiographs instead of keeping every level the detector stored.

    `names` says what becomes of the names of NIfTI, PNG and JPEG files, and of sites in a table: `keyed` replaces them
    by pseudonyms, as those of DICOM always are; `kept` states that they identify no one, as in a public dataset.
    `dates` of examinations are shifted, by one number of days for all of a patient, or dropped. `exam_unit` is what the
    number of an examination without a letter counts (d129 is days, m12 months, y2 years, whatever it says).
    """

    modality: tuple[str, ...] = ()
    description: str = ""
    min_slices: Count = 3
    plane: tuple[Literal["axial", "coronal", "sagittal"], ...] = ()
    volumes: Literal["all", "first"] = "all"
    tilt: Literal["correct", "refuse"] = "correct"
    channels: dict[str, str] = Field(default={})
    label_name: str = ""
    image_path: str = ""
    label_path: str = ""
    label_files: Literal["map", "one_per_label"] = "map"
    label_values: dict[LabelValue, LabelValue] = Field(default={})
    label_grid: Literal["header", "image"] = "header"
    label_missing: Literal["absent", "not_contoured"] = "absent"
    offset_hu: float = 0.0
    orientation: Annotated[str, Field(pattern=r"^([RLAPSI]{3})?$")] = ""
    table: TableConfig = TableConfig()
    target_names: dict[str, str] = Field(default={})
    label_threshold: int | None = None
    simulated: bool = False
    refuse: tuple[FindingCode, ...] = ("not_frontal_chest", "not_hounsfield", "implausible_extent", "form_mirrored")
    radiograph_window: Literal["none", "voi"] = "none"
    names: Literal["keyed", "kept"] = "keyed"
    dates: Literal["shift", "drop"] = "shift"
    exam_unit: ExamUnit = "order"
    split: SplitConfig = SplitConfig()

    @field_validator("description", "label_name", "image_path")
    @classmethod
    def _check_pattern(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
        return pattern

    @field_validator("channels")
    @classmethod
    def _check_channels(cls, channels: dict[str, str]) -> dict[str, str]:
        for name, pattern in channels.items():
            if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
                raise ValueError(f"{name!r} becomes part of file names; use letters, digits, '.', '_' and '-'")
            if not pattern:
                raise ValueError(f"{name!r} needs a regular expression")
            cls._check_pattern(pattern)
        return channels

    @model_validator(mode="after")
    def _check_label_name(self) -> "IngestConfig":
        if self.label_name and not self.channels:
            raise ValueError("label_name picks among the files of ingest.channels, which is empty")
        if self.label_name and self.label_path:
            raise ValueError("label_name and label_path both say where the label map is; give one of them")
        return self

    @model_validator(mode="after")
    def _check_label_path(self) -> "IngestConfig":
        try:
            wanted = {name for _, name, _, _ in Formatter().parse(self.label_path) if name is not None}
        except ValueError as error:
            raise ValueError(f"label_path {self.label_path!r} cannot be read ({error})") from error
        if unknown := sorted(wanted - set(re.compile(self.image_path).groupindex)):
            raise ValueError(f"label_path names {{{unknown[0]}}}, which is no named group of image_path")
        return self

    @model_validator(mode="after")
    def _check_stored(self) -> "IngestConfig":
        if self.offset_hu and self.modality != ("CT",):
            raise ValueError(f"offset_hu {self.offset_hu:g} is for CT alone; set modality to [CT]")
        if self.orientation and self.label_grid != "image":
            raise ValueError(f"orientation {self.orientation!r} would part labels from images; set label_grid to image")
        return self

    @field_validator("orientation")
    @classmethod
    def _check_orientation(cls, codes: str) -> str:
        if codes and {frozenset(pair) & set(codes) for pair in ("RL", "AP", "SI")} != {
            frozenset(code) for code in codes
        }:
            raise ValueError(f"{codes!r} must name each of the directions R or L, A or P, S or I once")
        return codes

    def for_use(self) -> "IngestConfig":
        """The settings without those that describe where a training set keeps its files, and how it stores them."""
        return self.model_copy(update={"image_path": "", "label_path": "", "offset_hu": 0.0, "orientation": ""})
