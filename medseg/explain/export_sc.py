"""Write an activation map over its radiograph as DICOM Secondary Capture, a series in the same study, for the PACS."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.ingest.dicom_derived import (
    RESEARCH_ONLY,
    SERIES_NUMBERS,
    maker,
    read_source_headers,
    series_description,
    writing,
)
from medseg.ingest.dicom_write import derived_uid

OVERLAY = "overlay.dcm"

_PERCENTILES = (0.5, 99.5)
_SHADE, _MAX_ALPHA = 0.62, 0.85  # the radiograph is dimmed, so that colour is seen and anatomy too
_COLOURS = "inferno"
_COPIED = ("BodyPartExamined", "Laterality", "ImageLaterality")
_SPACING = ("PixelSpacing", "PixelSpacingCalibrationType", "PixelSpacingCalibrationDescription")
_LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")


def write_sc(
    path: Path,
    radiograph: Path,
    image: NDArray[Any],
    map_scan: NDArray[np.float32],
    about: Mapping[str, Any],
    result: Mapping[str, Any],
) -> Path:
    """Write the picture of `draw_overlay` with the patient, the study and a reference of the radiograph; atomic.

    Args:
        radiograph: the DICOM file that was explained.
        image: its pixels, (row, column), bright is dense.
        map_scan: raw map, (row, column), same shape.
        about: `explanation.json`, of which `method`, `layer`, `target`, `raw_max` and `evidence` are told.
        result: `result.json` of the case, for the model, the probability and the hash of the input.

    Raises:
        ValueError, AttributeError, …: whatever highdicom finds wrong with the headers of the source.
    """
    import highdicom

    (source,) = read_source_headers([radiograph])
    bundle = {name: str(result["bundle"].get(name, "")) for name in ("name", "sha256", "run_id")}
    kind = "/".join(str(about[name]) for name in ("method", "layer", "target"))
    seed = f"{result.get('input_sha256')}/{bundle['sha256']}/explanation/{kind}"
    with writing(path) as temporary:
        capture = highdicom.sc.SCImage(
            pixel_array=draw_overlay(image, map_scan, about, caption(about, result)),
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=("L", "F"),  # replaced below by what the source says
            study_instance_uid=source.StudyInstanceUID,
            series_instance_uid=derived_uid(f"{seed}/series"),
            series_number=SERIES_NUMBERS["SC"],
            sop_instance_uid=derived_uid(f"{seed}/instance"),
            instance_number=1,
            study_id=source.StudyID,
            study_date=source.StudyDate,
            study_time=source.StudyTime,
            accession_number=source.AccessionNumber,
            series_description=series_description(bundle, f" {about['method']}"),
            specific_character_set=source.SpecificCharacterSet,
            **maker(bundle),
        )
        _relate(capture, source, about)
        capture.save_as(temporary)
    return path


def caption(about: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """One line that says what is seen, by which model, and that it is research. Names no one."""
    target = str(about["target"])
    prob = (result.get("probs") or {}).get(target)
    shown = f"'{target}'" if prob is None else f"'{target}' (probability {prob:.2f})"
    scale = f"black 0 to yellow {about['raw_max']:.3g}" if about["evidence"] else "no evidence: the map is empty"
    checks = f" Failed checks: {', '.join(about['failed_checks'])}." if about.get("failed_checks") else ""
    return f"medseg {result['bundle'].get('name', '')}: {about['method']} for {shown}, {scale}.{checks} Research only."


def draw_overlay(
    image: NDArray[Any], map_scan: NDArray[np.float32], about: Mapping[str, Any], text: str
) -> NDArray[np.uint8]:
    """The radiograph with the map in colour, opaque where it is strong, and below them a strip with `text`.

    Pixel (row, column) of the picture is pixel (row, column) of the radiograph. A map without evidence is not drawn.

    Returns:
        (row, column, 3) uint8, with more rows than the image.
    """
    from matplotlib import colormaps

    step = tuple(slice(None, None, max(1, size // 512)) for size in image.shape)
    low, high = np.percentile(image[step], _PERCENTILES)
    grey = np.clip((image.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1) * _SHADE
    picture = np.repeat((grey * 255).astype(np.uint8)[..., None], 3, axis=2)
    if about["evidence"]:
        table = (np.asarray(colormaps[_COLOURS](np.arange(256)))[:, :3] * 255).astype(np.float32)
        share = np.clip(map_scan / np.float32(about["raw_max"]), 0, 1)
        for row, strength in enumerate(share):  # row by row, since a radiograph as floats in colour is large
            alpha = (_MAX_ALPHA * np.sqrt(strength))[:, None]
            colour = table[(strength * 255).astype(np.uint8)]
            picture[row] = (1 - alpha) * picture[row] + alpha * colour
    return np.concatenate([picture, _strip(text, picture.shape[1])])


def _strip(text: str, width: int) -> NDArray[np.uint8]:
    """White text on black, in as many lines as it takes."""
    import textwrap

    from PIL import Image, ImageDraw, ImageFont

    size = max(10, width // 64)
    font = ImageFont.load_default(size)
    per_line = max(8, int(width / (0.52 * size)))
    lines = "\n".join(textwrap.wrap(text, per_line))
    height = round((lines.count("\n") + 1.6) * size * 1.3)
    strip = Image.new("RGB", (width, height))
    ImageDraw.Draw(strip).multiline_text((size // 2, size // 4), lines, fill="white", font=font, spacing=size * 0.2)
    return np.asarray(strip)


def _relate(capture: Any, source: Any, about: Mapping[str, Any]) -> None:
    """Patient and study of the source, a reference to it, and what was done to it."""
    from pydicom.dataset import Dataset
    from pydicom.sr.codedict import codes

    capture.copy_patient_and_study_information(source)
    capture.PatientOrientation = source.get("PatientOrientation") or ""
    copied = list(_COPIED)
    if min(source.get("PixelSpacing") or [0]) > 0:
        copied += _SPACING
    if source.get("LossyImageCompression") == "01":
        copied += _LOSSY
    for keyword in copied:
        if source.get(keyword) not in (None, ""):
            setattr(capture, keyword, source.get(keyword))
    capture.ConversionType = "WSD"  # made by a workstation
    capture.BurnedInAnnotation = "NO"  # the text in the picture identifies no one
    capture.ImageComments = RESEARCH_ONLY
    capture.DerivationDescription = f"Activation map ({about['method']}, layer {about['layer']}) over the radiograph"
    purpose, item = Dataset(), Dataset()
    code = codes.DCM.SourceImageForImageProcessingOperation
    purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning = code.value, "DCM", code.meaning
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    item.PurposeOfReferenceCodeSequence = [purpose]
    capture.SourceImageSequence = [item]
