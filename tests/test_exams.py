"""The order of a patient's examinations, whatever tells it, and no absolute date."""

from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.cohort import Case
from medseg.exams import exam_days, in_order, previous, read_exam


def case(name: str, exam: str = "", day: int | None = None, patient: str = "p") -> Case:
    return Case(name, patient, (), exam=exam, exam_day=day)


@pytest.mark.parametrize(
    ("text", "unit", "found"),
    [
        ("2006-04-18", "order", ("date", date(2006, 4, 18).toordinal())),
        ("20060418", "days", ("date", date(2006, 4, 18).toordinal())),
        ("2006-04-18T10:20:30", "order", ("date", date(2006, 4, 18).toordinal())),
        ("d0129", "order", ("elapsed", 129)),
        ("M12", "order", ("elapsed", pytest.approx(365.25))),
        ("y2", "days", ("elapsed", pytest.approx(730.5))),
        ("07", "days", ("elapsed", 7)),
        ("07", "order", ("order", 7)),
        ("v2", "days", ("order", 2)),
        ("2006-13-40", "order", None),
        ("baseline", "order", None),
        ("", "days", None),
    ],
)
def test_what_tells_when_an_examination_was(text: str, unit: str, found: object) -> None:
    assert read_exam(text, unit) == found  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=6, unique=True), st.dates(date(1990, 1, 1)))
def test_days_are_intervals_and_forget_the_date(days: list[int], start: date) -> None:
    dated = [case(f"c{n}", (start + timedelta(days=n)).isoformat()) for n in days]
    counted = [case(f"c{n}", f"d{n}") for n in days]
    wanted = {f"c{n}": n - min(days) for n in days}
    assert exam_days(dated) == exam_days(counted) == wanted


def test_dates_that_were_shifted_differently_are_not_compared() -> None:
    cases = [case("a", "20200101"), case("b", "20200301"), case("c", "20200101", patient="q")]
    assert exam_days(cases, shifts={"a": "one", "b": "one", "c": "q"}) == {"a": 0, "b": 60, "c": 0}
    assert exam_days(cases, shifts={"a": "one", "b": "other", "c": "q"}) == {"c": 0}
    assert exam_days([case("a", "20200101"), case("b", "d30")]) == {}  # a date and a count have no common origin


def test_the_previous_examination_is_the_latest_earlier_one_of_the_same_patient() -> None:
    cases = [case("b", day=400), case("a", day=0), case("c", day=400), case("x", day=300, patient="q"), case("u")]
    assert previous(cases[0], cases) == cases[1]
    assert previous(cases[2], cases) == cases[1], "a scan of the same day is no earlier one"
    assert previous(cases[1], cases) is None
    assert previous(cases[4], cases) is None, "nothing tells when it was"
    assert [c.case_id for c in in_order(cases)] == ["u", "a", "b", "c", "x"]
    numbered = [case("a", "2"), case("b", "10"), case("c", "1")]
    assert previous(numbered[1], numbered) == numbered[0], "numbers, not words"
    nameless = [case("a", day=0, patient=""), case("b", day=9, patient="")]
    assert previous(nameless[1], nameless) is None, "scans of unknown patients belong to no one together"
