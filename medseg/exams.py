"""The examinations of a patient in the order of time.

What tells when an examination was is a date, a number of days, months or years, or only its place in the order. Of
dates and numbers only the days since the patient's first examination in the cohort are kept.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import date
from typing import Protocol, TypeVar

from medseg.config import ExamUnit

DAYS_PER_YEAR = 365.25
_DAYS = {"days": 1.0, "months": DAYS_PER_YEAR / 12, "years": DAYS_PER_YEAR}
_LETTERS = {"d": "days", "m": "months", "y": "years"}
_DATE = re.compile(r"(\d{4})-?(\d{2})-?(\d{2})(?:[T ].*)?")
_NUMBER = re.compile(r"([a-zA-Z]{0,3})(\d{1,5})")


class Exam(Protocol):
    """What an examination is known by: a case of a cohort, or a scan to predict."""

    @property
    def case_id(self) -> str: ...
    @property
    def patient_id(self) -> str: ...
    @property
    def exam(self) -> str:
        """Date, number or place in the order, as text; empty when unknown."""

    @property
    def exam_day(self) -> int | None:
        """Days since the patient's first examination; None when unknown."""


Exam_ = TypeVar("Exam_", bound=Exam)


def read_exam(text: str, unit: ExamUnit = "order") -> tuple[str, float] | None:
    """On which scale an examination is named, and where on it.

    Args:
        text: a date (2006-04-18, 20060418, a time after it is passed over), or a number. A letter before the number
            says its unit: `d` days, `m` months, `y` years; with other letters (v2) it is a place in the order.
        unit: of a number without a letter.

    Returns:
        `date` or `elapsed` with days, or `order` with the number; None for anything else.
    """
    if found := _DATE.fullmatch(text):
        try:
            return "date", float(date(*map(int, found.groups())).toordinal())
        except ValueError:
            return None
    if (found := _NUMBER.fullmatch(text)) is None:
        return None
    letters, number = found[1].lower(), float(found[2])
    unit_name = _LETTERS.get(letters, "order") if letters else unit
    return ("order", number) if unit_name == "order" else ("elapsed", number * _DAYS[unit_name])


def exam_days(
    exams: Iterable[Exam], unit: ExamUnit = "order", shifts: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Whole days since the first examination of the same patient, by case_id; what cannot be dated is left out.

    Args:
        shifts: case_id to whose shift its date has (see `deidentify.shifted_date`), where that is known. Dates that
            were shifted differently cannot be compared, and such a patient's examinations get no day.
    """
    by_patient: dict[str, dict[str, tuple[str, float]]] = defaultdict(dict)
    for exam in exams:
        found = read_exam(exam.exam, unit)
        if found is not None and found[0] != "order":
            by_patient[exam.patient_id][exam.case_id] = found
    days: dict[str, int] = {}
    for found_days in by_patient.values():
        clocks = {(scale, (shifts or {}).get(name, "")) for name, (scale, _) in found_days.items()}
        if len(clocks) == 1:
            first = min(day for _, day in found_days.values())
            days |= {name: round(day - first) for name, (_, day) in found_days.items()}
    return days


def previous(exam: Exam_, exams: Iterable[Exam_]) -> Exam_ | None:
    """The latest earlier examination of the same patient, by day, else by order; of several at once the last by id.

    None where there is none, or nothing tells the order. Scans of the same day are no earlier ones of each other.
    """
    scale, time = _place(exam)
    if not scale or not exam.patient_id:
        return None
    earlier = []
    for other in exams:
        other_scale, then = _place(other)
        if (other.patient_id, other_scale) == (exam.patient_id, scale) and then < time:
            earlier.append((then, other.case_id, other))
    return max(earlier, key=lambda found: found[:2])[2] if earlier else None


def in_order(exams: Iterable[Exam_]) -> list[Exam_]:
    """Patient by patient, every examination after the earlier ones."""
    return sorted(exams, key=lambda exam: (exam.patient_id, *_place(exam), exam.case_id))


def _place(exam: Exam) -> tuple[str, float]:
    """The scale on which an examination is placed in time, and where on it; the scale is empty where it is not."""
    if exam.exam_day is not None:
        return "day", float(exam.exam_day)
    found = read_exam(exam.exam)
    return found if found is not None and found[0] == "order" else ("", 0.0)
