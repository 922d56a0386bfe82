"""A cohort says the same after a round trip, never splits a patient, and refuses what does not hold together."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.cohort import Case, Cohort, Finding, Reject, check_cases, read_cohort, verify_cohort, write_cohort
from medseg.files import UserError
from medseg.splits import assign_splits

CASE = Case(
    case_id="a",
    patient_id="p",
    images=("images/a_t1.nii.gz", "images/a_t2.nii.gz"),
    site="x",
    split="train",
    modality="MR",
    label="labels/a.nii.gz",
    shape=(3, 4, 5),
    spacing_mm=(0.123456789, 1.0, 2.5),
    orientation="LPS",
    source_kind="dicom",
    source_sha256="0" * 64,
    findings=(Finding("few_voxels", "warning", 'A "short" axis, has\n3 voxels.', 3, 8),),
)


def make_cohort(folder: Path, *cases: Case) -> Cohort:
    for case in cases:
        for name in filter(None, (*case.images, case.label)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(name.encode())
    return write_cohort(Cohort(folder, cases, {"tumour": 1}, ("t1", "t2")), [Reject("s", "c", "why, so")], {"n": 1})


def test_round_trip(tmp_path: Path) -> None:
    written = make_cohort(tmp_path, replace(CASE, case_id="b", patient_id="q", findings=()), CASE)
    back = read_cohort(tmp_path)
    assert back == written
    assert [case.case_id for case in back.cases] == ["a", "b"]
    assert back.cases[0] == CASE
    assert (tmp_path / "rejects.csv").read_text() == 'source,code,reason\ns,c,"why, so"\n'
    verify_cohort(back)


def test_the_hash_follows_table_and_pixels(tmp_path: Path) -> None:
    first = make_cohort(tmp_path / "1", CASE).sha256
    assert make_cohort(tmp_path / "2", CASE).sha256 == first
    assert make_cohort(tmp_path / "3", replace(CASE, split="val")).sha256 != first


def test_a_changed_image_is_noticed(tmp_path: Path) -> None:
    cohort = make_cohort(tmp_path, CASE)
    (tmp_path / CASE.images[0]).write_bytes(b"changed")
    with pytest.raises(UserError, match="a_t1"):
        verify_cohort(cohort)


def test_an_unfinished_cohort_is_refused(tmp_path: Path) -> None:
    make_cohort(tmp_path, CASE)
    (tmp_path / "cohort.json").unlink()
    with pytest.raises(UserError, match="not a finished cohort"):
        read_cohort(tmp_path)


@pytest.mark.parametrize(
    ("cases", "words"),
    [
        ([CASE, CASE], "stands 2 times"),
        ([CASE, replace(CASE, case_id="b", split="test")], "patient 'p' lies in splits test, train"),
        ([replace(CASE, split="holdout")], "'holdout'"),
    ],
)
def test_cases_that_do_not_hold_together(cases: list[Case], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_cases(cases)


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no case in split 'test'"):
        make_cohort(tmp_path, CASE).split("test")


@st.composite
def case_lists(draw: Any) -> list[Case]:
    count = draw(st.integers(1, 60))
    patients = [draw(st.integers(0, 25)) for _ in range(count)]
    site = {p: draw(st.sampled_from(["x", "y"])) for p in set(patients)}
    return [Case(f"c{n:03d}", f"p{p}", ("i",), site=site[p], target="ab"[p % 2]) for n, p in enumerate(patients)]


@given(case_lists(), st.integers(0, 5), st.sampled_from(["patient", "site"]))
@settings(max_examples=80, deadline=None)
def test_no_patient_and_no_site_is_ever_divided(cases: list[Case], seed: int, by: Any) -> None:
    dealt = assign_splits(cases, val=0.2, test=0.3, seed=seed, by=by)
    check_cases(dealt)
    assert [replace(case, split="") for case in dealt] == cases
    assert all(case.split for case in dealt)
    groups = {(case.patient_id if by == "patient" else case.site, case.split) for case in dealt}
    assert len(groups) == len({group for group, _ in groups})


def test_splits_follow_the_seed_alone_not_the_order_of_cases() -> None:
    cases = [Case(f"c{n}", f"p{n}", ("i",)) for n in range(40)]

    def key(case: Case) -> str:
        return case.case_id

    first = sorted(assign_splits(cases, val=0.1, test=0.2, seed=3), key=key)
    second = sorted(assign_splits(cases[::-1], val=0.1, test=0.2, seed=3), key=key)
    assert first == second
    assert first != sorted(assign_splits(cases, val=0.1, test=0.2, seed=4), key=key)
    assert Counter(case.split for case in first) == {"train": 28, "test": 8, "val": 4}


def test_each_stratum_is_dealt_in_the_same_shares() -> None:
    cases = [Case(f"c{n}", f"p{n}", ("i",), target="ill" if n < 20 else "well") for n in range(100)]
    dealt = assign_splits(cases, val=0.1, test=0.2, seed=0)
    assert Counter(case.split for case in dealt if case.target == "ill") == {"train": 14, "test": 4, "val": 2}


def test_given_splits_stay_and_take_the_rest_of_the_patient_along() -> None:
    cases = [Case("a", "p", ("i",), split="test"), Case("b", "p", ("i",)), Case("c", "q", ("i",))]
    dealt = assign_splits(cases, val=0.0, test=0.0, seed=0)
    assert [case.split for case in dealt] == ["test", "test", "train"]
