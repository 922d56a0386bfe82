"""Where a cohort's `exam_day` comes from: BIDS sessions, DICOM dates, the labels table; no date comes along."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from test_ingest_step import KEY, ingest, save, seg, volume

from medseg.cohort import Cohort, check_cases
from medseg.ingest.dicom_write import write_series
from medseg.ingest.step import run
from medseg.volume import Volume

SESSIONS = {"ses-b": "2019-05-02T11:20:00", "ses-a": "2021-05-02", "ses-c": "2019-05-01"}


def days(cohort: Cohort) -> list[tuple[str, int | None]]:
    return sorted((case.patient_id, case.exam_day) for case in cohort.cases)


def bids(root: Path, table: str | None) -> Path:
    for subject in ("sub-01", "sub-02"):
        for n, session in enumerate(SESSIONS):
            save(root / subject / session / "anat" / f"{subject}_{session}_T1w.nii.gz", volume(n + 7 * len(subject)))
    if table is not None:
        (root / "sub-01" / "sub-01_sessions.tsv").write_text(table)
    return root


@pytest.mark.parametrize("names", ["kept", "keyed"])
def test_a_table_of_bids_sessions_dates_them(names: str, tmp_path: Path) -> None:
    table = "session_id\tacq_time\n" + "".join(f"{name}\t{when}\n" for name, when in SESSIONS.items())
    result, cohort = ingest(seg(names=names), bids(tmp_path / "d", table), tmp_path / "out")
    assert result.status == "done"
    found = days(cohort)
    known = [pair for pair in found if pair[1] is not None]
    assert sorted(day for _, day in known) == [0, 1, 732]
    assert len({patient for patient, _ in known}) == 1
    assert len(found) == 6, "the other subject has no table, and its sessions have names without an order"
    text = (tmp_path / "out" / "cohort.csv").read_text()
    assert ("2019-05-02" in text) == (names == "kept")
    assert not any(Path(tmp_path / "out").rglob("*.tsv"))


def test_a_table_that_dates_only_some_sessions_is_passed_over(tmp_path: Path) -> None:
    table = "session_id\tacq_time\nses-a\t2019-05-02\nses-b\tn/a\nses-c\t2019-05-01\n"
    _, cohort = ingest(seg(), bids(tmp_path / "d", table), tmp_path / "out")
    assert {case.exam_day for case in cohort.cases} == {None}
    assert {case.exam for case in cohort.cases} == {"a", "b", "c"}


def series(folder: Path, patient: str, date: str) -> None:
    rng = np.random.default_rng(len(folder.name) + int(date))
    image = Volume(rng.integers(0, 900, (12, 12, 6)).astype(np.int16), np.diag([-1.0, -1.0, 2.0, 1.0]))
    write_series(image, folder, modality="MR", patient_id=patient, seed_uid=f"{patient}{date}")
    for file in folder.glob("*"):
        data = pydicom.dcmread(file)
        data.StudyDate = date
        data.save_as(file)


def test_dicom_dates_become_days_and_a_second_ingest_keeps_them(tmp_path: Path) -> None:
    for patient, date in (("Doe", "20200110"), ("Doe", "20190110"), ("Roe", "20200505")):
        series(tmp_path / "d" / f"{patient}{date}", patient, date)
    _, cohort = ingest(seg(), tmp_path / "d", tmp_path / "out")
    assert sorted(day for _, day in days(cohort)) == [0, 0, 365]
    again, resumed = ingest(seg(), tmp_path / "d", tmp_path / "out")
    assert again.figures["resumed"] == 3
    assert resumed.sha256 == cohort.sha256
    text = "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.suffix in (".csv", ".json"))
    assert not any(date in text for date in ("20200110", "20190110", "20200505"))
    _, dropped = ingest(seg(dates="drop"), tmp_path / "d", tmp_path / "dropped")
    assert {case.exam_day for case in dropped.cases} == {None}


def test_two_dicom_patients_that_a_table_makes_one_are_not_dated(tmp_path: Path) -> None:
    """Each was shifted by a number of days of its own, so their dates cannot be compared."""
    for patient, date in (("Doe", "20200110"), ("Do", "20190110")):
        series(tmp_path / "d" / patient, patient, date)
    table = tmp_path / "labels.csv"
    lines = [f"{tmp_path / 'd' / name},one" for name in ("Doe", "Do")]
    table.write_text("image,patient_id\n" + "\n".join(lines) + "\n")
    config = seg(table={"label": ""})
    run(config, [tmp_path / "d"], tmp_path / "out", labels=table, key=KEY)
    from medseg.cohort import read_cohort

    cohort = read_cohort(tmp_path / "out")
    assert len({case.patient_id for case in cohort.cases}) == 1
    assert {case.exam_day for case in cohort.cases} == {None}


@pytest.mark.parametrize(("unit", "wanted"), [("days", [0, 5, 12]), ("order", [None] * 3)])
def test_the_labels_table_tells_when(unit: str, wanted: list[int | None], tmp_path: Path) -> None:
    for n in range(3):
        save(tmp_path / "d" / f"c{n}.nii.gz", volume(n))
    table = tmp_path / "labels.csv"
    table.write_text("image,patient_id,exam\n" + "".join(f"c{n}.nii.gz,p,{e}\n" for n, e in enumerate((15, 3, 8))))
    config = seg(exam_unit=unit, table={"label": ""})
    _, cohort = ingest(config, tmp_path / "d", tmp_path / "out", table)
    assert sorted((case.exam_day for case in cohort.cases), key=lambda day: day or 0) == wanted
    assert [case.exam for case in cohort.cases] == ["15", "3", "8"]
    check_cases(cohort.cases)
    assert len({case.split for case in cohort.cases}) == 1, "one patient, one split"
