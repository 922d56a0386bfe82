"""What all DICOM objects made from a source share: its patient and study, who made them, codes, and quiet writing.

The objects themselves are made by the export modules of `medseg.predict` (segmentation, measurement report) and
`medseg.explain` (secondary capture).
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medseg.bundle_writing import package_version
from medseg.config import CodeConfig
from medseg.files import replacing
from medseg.ingest.dicom_headers import read_dataset
from medseg.ingest.dicom_write import derived_uid

MAX_TEXT = 64  # characters of a DICOM long string
SERIES_NUMBERS = {"SEG": 900, "SR": 901, "SC": 902}
RESEARCH_ONLY = "Made by software for research; not reviewed"
# The standard wants these present, if empty, in every image; exporters and de-identifiers drop them all the same.
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)
_STUDY_TIMES = ("StudyDate", "StudyTime")
_CHECKED_FORMS = ("AS", "CS", "DA", "DS", "DT", "IS", "TM")  # text is kept, since it says whose image this is


def read_source_headers(files: Sequence[Path]) -> list[Any]:
    """The headers of the source's files, without pixels, made fit to be inherited by other objects.

    What these need is added, empty, where it is missing; ages, dates and numbers about the patient and the study that
    no reader could parse are left out; all text is brought to UTF-8, since some declared character sets cannot be
    written again.
    """
    return [_complete(read_dataset(file, stop_before_pixels=True)) for file in files]


def maker(bundle: Mapping[str, str]) -> dict[str, Any]:
    """The attributes that name medseg and the model in any object.

    Args:
        bundle: `name`, `sha256` and `run_id` of the model, as `Bundle.identity` gives them.
    """
    return {
        "manufacturer": "medseg",
        "manufacturer_model_name": bundle["name"][:MAX_TEXT],
        "software_versions": package_version()[:MAX_TEXT],
        "device_serial_number": bundle["sha256"][:16],
    }


def algorithm(bundle: Mapping[str, str]) -> dict[str, Any]:
    """Name, version and parameters by which objects identify the model that made a segment or measurement."""
    return {
        "name": f"medseg {bundle['name']}"[:MAX_TEXT],
        "version": package_version()[:MAX_TEXT],
        "parameters": {"bundle_sha256": bundle["sha256"], "run_id": bundle["run_id"]},
    }


def series_description(bundle: Mapping[str, str], what: str = "") -> str:
    """Text for the series list of a viewer, which has to say at once that this is research."""
    return f"medseg {bundle['name']}{what} (research only)"[:MAX_TEXT]


def coded(code: CodeConfig) -> Any:
    """A code of the config as highdicom and pydicom take it."""
    from pydicom.sr.coding import Code

    return Code(code.value, code.scheme, code.meaning)


def why_not(error: Exception) -> str:
    """Why no object could be made of a source, without quoting it: an error's own words may name the patient."""
    if isinstance(error, AttributeError) and error.name:
        return f"the source has no {error.name}"
    return f"the source's header does not allow it, {type(error).__name__}"


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """As `files.replacing`, with the warnings of the DICOM libraries held back: they quote the patient's name."""
    logging.getLogger("highdicom").setLevel(logging.ERROR)
    with warnings.catch_warnings(), replacing(path) as temporary:
        warnings.simplefilter("ignore")
        yield temporary


def _complete(dataset: Any) -> Any:
    dataset.decode()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    for element in [*dataset.group_dataset(0x0010), *(dataset[name] for name in _STUDY_TIMES if name in dataset)]:
        if element.VR in _CHECKED_FORMS and not _is_valid(element):
            del dataset[element.tag]
    for keyword in _MAY_BE_EMPTY:
        if keyword not in dataset:
            setattr(dataset, keyword, "")
    if "ImagePositionPatient" in dataset and not dataset.get("FrameOfReferenceUID"):
        # A series without one still shares one frame among its slices.
        dataset.FrameOfReferenceUID = derived_uid(f"{dataset.SeriesInstanceUID}/frame")
    if "PerFrameFunctionalGroupsSequence" in dataset:
        _share_plane(dataset)
    return dataset


def _share_plane(dataset: Any) -> None:
    """State spacing and orientation once where scanners repeat them in each frame; those of the first frame count."""
    shared, first = dataset.SharedFunctionalGroupsSequence[0], dataset.PerFrameFunctionalGroupsSequence[0]
    for keyword in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
        if keyword not in shared and keyword in first:
            setattr(shared, keyword, first[keyword].value)


def _is_valid(element: Any) -> bool:
    from pydicom.config import RAISE
    from pydicom.valuerep import validate_value

    values = element.value if element.VM > 1 else [element.value]
    try:
        for value in values:
            # Numbers are checked as they were written.
            validate_value(element.VR, getattr(value, "original_string", None) or str(value or ""), RAISE)
    except ValueError:
        return False
    return True
