"""Write volumes and radiographs as DICOM: simulated scans for demo and tests, which then enter by the front door.

Single-frame MR, CT and DX objects with the modules their definitions require. All UIDs follow from `seed_uid`, so
that the same scan written twice is the same DICOM.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.files import UserError, replacing
from medseg.volume import Volume, spacing_of

_SOP_CLASSES = {"MR": "1.2.840.10008.5.1.4.1.1.4", "CT": "1.2.840.10008.5.1.4.1.1.2"}
_DX_FOR_PRESENTATION = "1.2.840.10008.5.1.4.1.1.1.1"
_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
_ORTHOGONAL_TOLERANCE = 1e-4  # of cosines


def write_series(
    volume: Volume,
    folder: Path,
    *,
    modality: str = "MR",
    patient_id: str,
    series_description: str = "",
    seed_uid: str = "",
) -> list[Path]:
    """Write a volume as one series, one file per slice along k, into a new `folder`, which appears when complete.

    Args:
        volume: (i, j, k); i becomes the column and j the row of a slice. Integers that fit 16 bits are stored as
            they are, all else is quantised to 16 bits with a rescale slope and intercept common to the series.
        folder: must not exist, or be empty.
        modality: `MR` or `CT`.
        patient_id: stored as Patient ID and Patient's Name.
        series_description: free text.
        seed_uid: what the UIDs follow from; `patient_id`, description and affine when empty.

    Returns:
        The files in the order of k.

    Raises:
        UserError: `folder` is in use.
        ValueError: the affine is sheared (slices cannot be stored upright), or the array is no finite volume.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; a series is written to a folder of its own.")
    stored, slope, intercept = _sixteen_bits(volume.array)
    row, column = _directions(volume)
    seed = seed_uid or f"{patient_id}/{series_description}/{volume.affine.tolist()}/{volume.array.shape}"
    temporary = folder.with_name(f".part-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        names = []
        for k in range(stored.shape[2]):
            data = _dataset(_SOP_CLASSES[modality], modality, patient_id, seed, number=k + 1)
            data.SeriesDescription = series_description[:64]
            (_add_mr if modality == "MR" else _add_ct)(data)
            _add_plane(data, volume, row, column, k)
            _add_pixels(data, stored[:, :, k].T)
            if modality == "CT" or (slope, intercept) != (1.0, 0.0):
                data.RescaleSlope, data.RescaleIntercept = _ds(slope), _ds(intercept)
                data.RescaleType = "HU" if modality == "CT" else "US"
            names.append(f"{k + 1:04d}.dcm")
            data.save_as(temporary / names[-1], enforce_file_format=True)
        if folder.exists():
            folder.rmdir()
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [folder / name for name in names]


def write_radiograph(
    array: NDArray[Any],
    spacing_mm: tuple[float, float],
    path: Path,
    *,
    patient_id: str,
    seed_uid: str = "",
    view_position: str = "PA",
) -> Path:
    """Write a chest radiograph as Digital X-Ray Image, for presentation, MONOCHROME2; atomic.

    Args:
        array: (row, column) uint8 or uint16, bright is dense.
        spacing_mm: (between rows, between columns) at the detector.
        path: the file.
        patient_id: stored as Patient ID and Patient's Name.
        seed_uid: what the UIDs follow from; `patient_id` and the file's name when empty.
        view_position: `PA`, `AP`, `LL`, ….
    """
    if array.ndim != 2 or array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"a radiograph is (row, column) uint8 or uint16, not {array.shape} {array.dtype}")
    data = _dataset(_DX_FOR_PRESENTATION, "DX", patient_id, seed_uid or f"{patient_id}/{path.name}", number=1)
    _add_dx(data, view_position)
    data.ImagerPixelSpacing = [_ds(spacing) for spacing in spacing_mm]
    data.RescaleSlope, data.RescaleIntercept, data.RescaleType = "1", "0", "US"
    _add_pixels(data, array)
    data.WindowCenter, data.WindowWidth = _ds((int(array.max()) + 1) / 2), str(int(array.max()) + 1)
    with replacing(path) as temporary:
        data.save_as(temporary, enforce_file_format=True)
    return path


def derived_uid(seed: str) -> str:
    """A UID under the root for UUIDs (2.25), made of the first 128 bits of the SHA-256 of `seed`."""
    return f"2.25.{int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], 'big')}"


def _sixteen_bits(array: NDArray[Any]) -> tuple[NDArray[Any], float, float]:
    """Stored values with slope and intercept: value = stored · slope + intercept."""
    if array.ndim != 3 or 0 in array.shape or not np.isfinite(array).all():
        raise ValueError(f"a series is made of a finite (i, j, k) volume, not of shape {array.shape}")
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind in "iub":
        for dtype in (np.int16, np.uint16):
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return array.astype(dtype), 1.0, 0.0
    slope, intercept = float(_ds((high - low) / 65535 or 1.0)), float(_ds(low))
    stored = np.rint((array.astype(np.float64) - intercept) / slope)
    return np.clip(stored, 0, 65535).astype(np.uint16), slope, intercept


def _directions(volume: Volume) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors (LPS) along i and j; raises ValueError unless the three axes are at right angles."""
    cosines = volume.affine[:3, :3] / np.asarray(spacing_of(volume.affine))
    off = np.abs(cosines.T @ cosines - np.eye(3)).max()
    if off > _ORTHOGONAL_TOLERANCE:
        raise ValueError(f"the affine is sheared (cosine {off:.2g} between its axes); resample the volume first")
    return _RAS_TO_LPS * cosines[:, 0], _RAS_TO_LPS * cosines[:, 1]


def _dataset(sop_class: str, modality: str, patient_id: str, seed: str, number: int) -> Any:
    """Patient, study, series and equipment; dates are left empty, as in a de-identified object."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = sop_class
    data.SOPInstanceUID = derived_uid(f"{seed}/instance/{number}")
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.StudyInstanceUID = derived_uid(f"{seed}/study")
    data.SeriesInstanceUID = derived_uid(f"{seed}/series")
    data.FrameOfReferenceUID = derived_uid(f"{seed}/frame")
    data.Modality, data.PatientID, data.PatientName = modality, patient_id, patient_id
    for keyword in ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "StudyID"):
        setattr(data, keyword, "")
    for keyword in ("ReferringPhysicianName", "PositionReferenceIndicator", "Laterality"):
        setattr(data, keyword, "")
    data.PatientPosition = "HFS"
    data.Manufacturer, data.ManufacturerModelName = "medseg", "simulation"
    data.SeriesNumber, data.InstanceNumber = 1, number
    data.ImageType = ["DERIVED", "SECONDARY"] if modality == "DX" else ["ORIGINAL", "PRIMARY", "AXIAL"]
    return data


def _add_mr(data: Any) -> None:
    data.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    data.ScanningSequence, data.SequenceVariant, data.ScanOptions = "GR", "NONE", ""
    data.MRAcquisitionType, data.EchoTime, data.EchoTrainLength = "3D", "", ""
    data.RepetitionTime = ""


def _add_ct(data: Any) -> None:
    data.KVP, data.AcquisitionNumber = "", 1


def _add_dx(data: Any, view_position: str) -> None:
    from pydicom.sr.codedict import codes

    for keyword in ("FrameOfReferenceUID", "PositionReferenceIndicator", "Laterality", "PatientPosition"):
        delattr(data, keyword)
    data.ImageType = ["ORIGINAL", "PRIMARY", ""]
    data.PresentationIntentType = "FOR PRESENTATION"
    data.PixelIntensityRelationship, data.PixelIntensityRelationshipSign = "LOG", -1
    data.PresentationLUTShape, data.LossyImageCompression, data.BurnedInAnnotation = "IDENTITY", "00", "NO"
    data.BodyPartExamined, data.ViewPosition, data.ImageLaterality = "CHEST", view_position, "U"
    data.PatientOrientation = ["L", "F"]
    data.DetectorType, data.PositionerType = "", "NONE"
    data.AnatomicRegionSequence = [_code(codes.SCT.Chest)]
    views = {"PA": codes.SCT.PosteroAnterior, "AP": codes.SCT.AnteroPosterior, "LL": codes.SCT.LeftLateral}
    data.ViewCodeSequence = [_code(views[view_position])] if view_position in views else []
    data.AcquisitionContextSequence = []
    data.AcquisitionDate, data.AcquisitionTime, data.ContentDate, data.ContentTime = "", "", "", ""


def _code(code: Any) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item


def _add_plane(data: Any, volume: Volume, row: NDArray[np.float64], column: NDArray[np.float64], k: int) -> None:
    across_mm, down_mm, between_mm = spacing_of(volume.affine)
    position = _RAS_TO_LPS * (volume.affine[:3, 3] + k * volume.affine[:3, 2])
    data.ImagePositionPatient = [_ds(number) for number in position]
    data.ImageOrientationPatient = [_ds(number) for number in (*row, *column)]
    data.PixelSpacing = [_ds(down_mm), _ds(across_mm)]
    data.SliceThickness = data.SpacingBetweenSlices = _ds(between_mm)


def _add_pixels(data: Any, stored: NDArray[Any]) -> None:
    data.Rows, data.Columns = stored.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = stored.dtype.itemsize * 8
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    content = np.ascontiguousarray(stored).astype(stored.dtype.newbyteorder("<"), copy=False).tobytes()
    data.PixelData = content + b"\0" * (len(content) % 2)
    data["PixelData"].VR = "OW" if bits == 16 else "OB"


def _ds(number: float) -> str:
    """A decimal string of at most 16 characters, as exact as that allows."""
    from pydicom.valuerep import format_number_as_ds

    return str(format_number_as_ds(float(number)))
