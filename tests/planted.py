"""Scans with identifying marks planted wherever DICOM has room for words, and the search for them."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medseg.ingest.dicom_write import write_series
from medseg.volume import Volume

# One attribute of each VR that holds text, most of them in no list of what to remove.
PLANTED = {
    "AE": "StationAETitle", "AS": "PatientAge", "CS": "BodyPartExamined", "DA": "PatientBirthDate",
    "DS": "PatientWeight", "DT": "AcquisitionDateTime", "IS": "AcquisitionNumber", "LO": "Manufacturer",
    "LT": "ImageComments", "PN": "PatientName", "SH": "StationName", "ST": "InstitutionAddress",
    "TM": "StudyTime", "UC": "LongDeviceDescription", "UI": "StudyInstanceUID", "UR": "RetrieveURL",
    "UT": "TextValue",
}  # fmt: skip
MORE = ("PatientID", "InstitutionName", "StudyDescription", "SeriesDescription", "ProtocolName", "AccessionNumber",
        "ReferringPhysicianName", "ScanOptions")  # fmt: skip


def plant(folder: Path, count: int = 3, labels: Path | None = None, size: int = 10) -> list[str]:
    """DICOM series with a different mark in each of 30 places, and two damaged files and a picture; returns the marks.

    With `labels`, a label map (values 0 to 2) named like the folder of each series is written there.
    """
    marks: list[str] = []

    def mark() -> str:
        marks.append(f"ZQX{len(marks):02d}V")
        return marks[-1]

    words = {keyword: mark() for keyword in (*PLANTED.values(), *MORE)}
    digits = {"DS": "98765.4321", "IS": "987654321", "AS": "977Y", "DA": "18760213", "DT": "18760213101112.123456",
              "TM": "101112.987654", "UI": "1.2.3.987654321.55"}  # fmt: skip
    for vr, text in digits.items():
        marks[marks.index(words[PLANTED[vr]])] = text
        words[PLANTED[vr]] = text
    private, nested, deep, in_folder, in_file = mark(), mark(), mark(), mark(), mark()
    for n in range(count):
        array = np.random.default_rng(n).integers(0, 900, (size, size + 1, size)).astype(np.int16)
        affine = np.diag([-1.0, -1.0, 2.0, 1.0])
        series = folder / in_folder / f"{in_file}-{n}"
        files = write_series(Volume(array, affine), series, patient_id="p", seed_uid=str(n))
        if labels is not None:
            labels.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image((array // 301).astype(np.uint8), affine), labels / f"{in_file}-{n}.nii.gz")
        for path in files:
            data = pydicom.dcmread(path)
            for keyword, text in words.items():
                setattr(data, keyword, text)
            data.PatientID = f"{words['PatientID']}-{n}"
            data.private_block(0x0029, private, create=True).add_new(1, "LO", private)
            item, inner = Dataset(), Dataset()
            inner.PatientName, item.PatientID = deep, nested
            item.OtherPatientIDsSequence = Sequence([inner])
            data.RequestAttributesSequence = Sequence([item])
            data.save_as(path)
            path.rename(path.with_name(f"{in_file}-{path.name}"))
    (folder / f"{in_file}.dcm").write_bytes(b"\0" * 128 + b"DICM" + in_file.encode())  # damaged
    (folder / f"{in_file}.txt.dcm").write_text(in_file)
    pixels = np.random.default_rng(9).integers(0, 255, (70, 80)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{in_file}.png")
    return marks


def traces(folder: Path, marks: list[str]) -> list[tuple[str, str]]:
    """(mark, file) wherever a mark stands in a name or in the bytes."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        name = path.relative_to(folder).as_posix()
        found += [(mark, name) for mark in marks if mark.encode() in content or mark in name]
    return found
