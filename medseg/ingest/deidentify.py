"""What of a scan's identity may enter a cohort: an allow-list, so that what is not named here is not kept.

The Basic Profile of DICOM PS3.15 Annex E lists what to remove and keeps everything else, because what it makes is
still a DICOM object. A cohort holds none, so the rule can be the stricter one: pixels and geometry, numbers that
describe the acquisition, words from closed lists, keyed pseudonyms and shifted dates. Private elements, nested
sequences and free text are never read.
"""

import hashlib
import hmac
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal

from medseg.cohort import Finding, Reject
from medseg.ingest.pseudonyms import is_pseudonym, pseudonym
from medseg.ingest.scan import Source

MODALITIES = frozenset({
    *("CR", "CT", "DX", "ES", "IO", "KO", "MG", "MR", "NM", "OP", "OPT", "OT", "PR", "PT", "PX", "REG", "RF", "RG"),
    *("RTDOSE", "RTIMAGE", "RTPLAN", "RTSTRUCT", "SC", "SEG", "SM", "SR", "US", "XA", "XC", "DOC", "FID"),
})  # fmt: skip
KEPT_NUMBERS = (
    *("MagneticFieldStrength", "EchoTime", "RepetitionTime", "InversionTime", "FlipAngle", "EchoTrainLength"),
    *("KVP", "XRayTubeCurrent", "ExposureTime", "Exposure", "SliceThickness", "BitsStored"),
    *("DistanceSourceToDetector", "DistanceSourceToPatient", "SeriesNumber"),
)
KEPT_WORDS: Mapping[str, frozenset[str]] = {
    "Modality": MODALITIES,
    "PatientSex": frozenset({"F", "M", "O"}),
    "PatientPosition": frozenset({"HFS", "HFP", "HFDL", "HFDR", "FFS", "FFP", "FFDL", "FFDR"}),
    "ViewPosition": frozenset({"PA", "AP", "LL", "RL", "LLD", "RLD", "LLO", "RLO", "LAO", "RAO", "LPO", "RPO"}),
    "PresentationIntentType": frozenset({"FOR PRESENTATION", "FOR PROCESSING"}),
    "BurnedInAnnotation": frozenset({"YES", "NO"}),
    "LossyImageCompression": frozenset({"00", "01"}),
}
VENDORS = ("Agfa", "Canon", "Carestream", "Fujifilm", "GE", "Hitachi", "Hologic", "Konica", "medseg", "Philips",
           "Samsung", "Shimadzu", "Siemens", "Toshiba", "UIH", "Varian")  # fmt: skip
KEPT_UIDS = {"StudyInstanceUID": "study", "SeriesInstanceUID": "series", "FrameOfReferenceUID": "frame"}
KEPT_DATES = ("StudyDate", "AcquisitionDate")
READ_TAGS = [*KEPT_NUMBERS, *KEPT_WORDS, *KEPT_UIDS, *KEPT_DATES, "Manufacturer", "PatientID", "PatientAge",
             "SOPClassUID", "ConversionType"]  # fmt: skip

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_MAX_SHIFT_DAYS = 3650
_OLDEST_AGE_YEARS = 89

NOT_KEPT = (
    "names, addresses, institutions, device serial numbers, comments and all other free text; "
    "private elements; nested sequences; times of day; file and folder names of DICOM"
)


def known_modality(value: object) -> str:
    """A modality that DICOM defines, or empty: the field could hold anything."""
    text = str(value or "").strip().upper()
    return text if text in MODALITIES else ""


def burned_in(data: Any) -> Iterator[Finding]:
    """Whether the pixels may show names, which no rule for headers removes.

    Yields:
        `burned_in_text` when the header says so; `secondary_capture` for photographs of screens and scanned films.
    """
    if str(data.get("BurnedInAnnotation") or "").strip().upper() == "YES":
        message = "The header declares burnt-in text, which may name the patient."
        yield Finding("burned_in_text", "warning", message)
    kind = str(data.get("SOPClassUID") or "")
    if kind == _SECONDARY_CAPTURE or kind.startswith(f"{_SECONDARY_CAPTURE}.") or data.get("ConversionType"):
        message = "The image is a secondary capture (a screen or a film): its pixels may show names."
        yield Finding("secondary_capture", "warning", message)


def acquisition(data: Any, key: bytes, dates: Literal["shift", "drop"]) -> dict[str, object]:
    """What a cohort keeps of a DICOM header, by keyword.

    Args:
        data: header; damaged values are left out.
        key: from `load_key`.
        dates: what becomes of the dates of examination.

    Returns:
        Finite numbers, words of closed lists, the vendor's known name, pseudonyms of study, series and frame of
        reference, the age in whole years (all above 89 are 90), and dates shifted by a number of days that is one
        patient's own, so that intervals between the examinations of a patient hold.
    """
    kept: dict[str, object] = {}
    for keyword in KEPT_NUMBERS:
        if (number := _number(data.get(keyword))) is not None:
            kept[keyword] = number
    for keyword, known in KEPT_WORDS.items():
        if (word := str(data.get(keyword) or "").strip().upper()) in known:
            kept[keyword] = word
    vendor = str(data.get("Manufacturer") or "").lower()
    if found := [name for name in VENDORS if re.search(rf"\b{name.lower()}\b", vendor)]:
        kept["Manufacturer"] = found[0]
    if (age := _age_years(str(data.get("PatientAge") or ""))) is not None:
        kept["PatientAgeYears"] = min(age, _OLDEST_AGE_YEARS + 1)
    for keyword, kind in KEPT_UIDS.items():
        if uid := str(data.get(keyword) or ""):
            kept[keyword] = pseudonym(key, kind, uid)
    if dates == "shift":
        patient = str(data.get("PatientID") or "").strip() or str(data.get("StudyInstanceUID") or "")
        for keyword in KEPT_DATES:
            if shifted := shifted_date(str(data.get(keyword) or ""), key, patient):
                kept[keyword] = shifted
    return kept


def shifted_date(text: str, key: bytes, patient: str) -> str:
    """A date (YYYYMMDD) moved back by 1 to 3650 days, the same number for all dates of a patient.

    Empty when `text` is no date, or no patient is known to tie the shift to.
    """
    if not patient or not re.fullmatch(r"\d{8}", text):
        return ""
    digest = hmac.new(key, f"date\0{patient}".encode(errors="surrogateescape"), hashlib.sha256).digest()
    days = 1 + int.from_bytes(digest[:8], "big") % _MAX_SHIFT_DAYS
    try:
        return (date(int(text[:4]), int(text[4:6]), int(text[6:])) - timedelta(days=days)).strftime("%Y%m%d")
    except (ValueError, OverflowError):
        return ""


@dataclass
class Names:
    """What the files are called in the cohort, in messages and in tables.

    Attributes:
        keyed: whether the names of NIfTI, PNG and JPEG files are replaced by pseudonyms.
        key: from `load_key`.
        dates: what becomes of dates in paths.
        places: filled with the true path behind each pseudonym that was given.
    """

    keyed: bool
    key: bytes = field(repr=False)
    dates: Literal["shift", "drop"] = "shift"
    places: dict[str, Path] = field(default_factory=dict, repr=False)

    @classmethod
    def of_scans(cls, found: Iterable[Source], rejects: Iterable[Reject], key: bytes) -> "Names":
        """For results that stay beside their scans: replaced where DICOM is among the sources, picked or not."""
        dicom = any(source.source_kind == "dicom" for source in found) or any(
            is_pseudonym(reject.source) for reject in rejects
        )
        return cls(dicom, key)

    def source(self, source: Source) -> Source:
        """The source under the name it has in the cohort; labels are still found by its true names."""
        if not self.keyed:
            return source
        if source.source_kind == "dicom":
            return replace(source, exam="")  # its header says it better, and identifies no one
        case_id = pseudonym(self.key, "case", source.case_id)
        self.places[case_id] = source.files[0]
        patient = source.patient_id if source.patient_id != source.case_id else ""
        return replace(
            source,
            case_id=case_id,
            name=f"{case_id} ({source.source_kind})",
            patient_id=pseudonym(self.key, "patient", patient),
            exam=self.exam(source.exam, patient),
            match_names=(source.case_id, *source.match_names),
        )

    def exam(self, text: str, patient: str) -> str:
        """What the cohort says of when an examination was.

        With keyed names: a date shifted as the patient's others are; a number of order, months or days as it is; else
        a pseudonym.
        """
        if not self.keyed:
            return text
        if day := re.match(r"(\d{4})-?(\d{2})-?(\d{2})(?![-\d])", text):
            return shifted_date("".join(day.groups()), self.key, patient) if self.dates == "shift" else ""
        return text if re.fullmatch(r"[a-zA-Z]{0,3}\d{1,4}", text) else pseudonym(self.key, "exam", text)

    def site(self, name: str) -> str:
        """The site as a table names it, or its pseudonym, which is the one of a DICOM institution of that name."""
        return pseudonym(self.key, "site", name) if self.keyed else name

    def reject(self, reject: Reject) -> Reject:
        """The reject with a pseudonym for the file it names, and no word of that name in its reason."""
        if not self.keyed or is_pseudonym(reject.source):
            return reject
        name = pseudonym(self.key, "file", reject.source)
        self.places[name] = Path(reject.source)
        reason = reject.reason
        if reject.code == "archive_refused":  # the sentence quotes members of the archive
            reason = "The archive could not be unpacked safely; unpack it and give the folder."
        return Reject(name, reject.code, reason)


def provenance(names: Names, dates: str, refuse: Sequence[str]) -> dict[str, object]:
    """What was done, for `cohort.json`: the profile and options by their codes in DICOM PS3.16 CID 7050."""
    options = [
        {"code": "113100", "scheme": "DCM", "meaning": "Basic Application Confidentiality Profile"},
        {"code": "113105", "scheme": "DCM", "meaning": "Clean Descriptors Option"},
        {"code": "113108", "scheme": "DCM", "meaning": "Retain Patient Characteristics Option"},
    ]
    if dates == "shift":
        meaning = "Retain Longitudinal Temporal Information Modified Dates Option"
        options.append({"code": "113107", "scheme": "DCM", "meaning": meaning})
    return {
        "method": "allow-list, stricter than the profiles named; pixels are not searched for text",
        "profiles": options,
        "kept": [*KEPT_NUMBERS, *KEPT_WORDS, "Manufacturer", "PatientAgeYears"],
        "keyed": [*KEPT_UIDS, "PatientID", "InstitutionName", "SOPInstanceUID"],
        "dates": dates,
        "names_of_files": "keyed" if names.keyed else "kept (NIfTI, PNG, JPEG)",
        "burned_in_text": "refused" if "burned_in_text" in refuse else "flagged",
        "not_kept": NOT_KEPT,
    }


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and abs(number) < 1e9 else None


def _age_years(text: str) -> int | None:
    found = re.fullmatch(r"(\d{3})([DWMY])", text.strip())
    if not found:
        return None
    return int(int(found[1]) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}[found[2]])
