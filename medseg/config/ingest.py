"""How sources become cases, and cases splits."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from medseg.config.fields import Count, Share, Strict


class SplitConfig(Strict):
    """Shares of val and test; whole patients or whole sites move together."""

    val: Share = 0.1
    test: Share = 0.2
    by: Literal["patient", "site"] = "patient"
    seed: int = 0


class TableConfig(Strict):
    """Column names of a labels CSV; an empty name means that the table has no such column."""

    image: str = "image"
    label: str = "label"
    target: str = "target"
    patient: str = "patient_id"
    site: str = "site"
    split: str = "split"


FindingCode = Literal[
    "anisotropic", "burned_in_text", "chest_doubtful", "colour", "detector_spacing", "few_levels",
    "few_pixels", "few_voxels", "for_processing", "form_mismatch", "form_mirrored", "gantry_tilt", "implausible_extent",
    "implausible_spacing", "no_orientation", "not_frontal_chest", "not_hounsfield", "padding", "secondary_capture",
    "spacing_unknown", "view_unknown",
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

    `label_threshold` turns a grey mask into a binary one (values above it are 1); `target_names` maps the table's
    class cells to names of `task.labels` (with `task.multi_label` each name in a cell, and to `none` what means that
    there is no label); `simulated` says so on every page.

    `refuse` lists the findings that keep a scan out; all others travel with the case. `radiograph_window` applies
    the VOI look-up table or window of DICOM radiographs instead of keeping every level the detector stored.

    `names` says what becomes of the names of NIfTI, PNG and JPEG files, and of sites in a table: `keyed` replaces them
    by pseudonyms, as those of DICOM always are; `kept` states that they identify no one, as in a public dataset.
    `dates` of examinations are shifted, by one number of days for all of a patient, or dropped.
    """

    modality: tuple[str, ...] = ()
    description: str = ""
    min_slices: Count = 3
    plane: tuple[Literal["axial", "coronal", "sagittal"], ...] = ()
    volumes: Literal["all", "first"] = "all"
    tilt: Literal["correct", "refuse"] = "correct"
    channels: dict[str, str] = Field(default={})
    label_name: str = ""
    table: TableConfig = TableConfig()
    target_names: dict[str, str] = Field(default={})
    label_threshold: int | None = None
    simulated: bool = False
    refuse: tuple[FindingCode, ...] = ("not_frontal_chest", "not_hounsfield", "implausible_extent", "form_mirrored")
    radiograph_window: Literal["none", "voi"] = "none"
    names: Literal["keyed", "kept"] = "keyed"
    dates: Literal["shift", "drop"] = "shift"
    split: SplitConfig = SplitConfig()

    @field_validator("description", "label_name")
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
        return self
