"""The ledger: one row per case, whole on disk at any moment."""

from pathlib import Path

import pytest

from medseg.files import UserError, read_rows
from medseg.ledger import Ledger, Row, read_ledger

RESULT = {
    "case_id": "a",
    "status": "flagged",
    "reason": 'empty, "quoted"\nand, long',
    "source_kind": "dicom",
    "seconds": {"read": 0.5, "network": 1.25},
    "input_sha256": "i",
    "output_sha256": "o",
    "bundle": {"name": "n", "sha256": "b", "run_id": "r"},
}


def test_columns_are_the_contract(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.csv")
    ledger.write()
    header = (tmp_path / "ledger.csv").read_text().strip()
    columns = "case_id,status,reason,source_kind,seconds,input_sha256,output_sha256,bundle_sha256,expected_dice"
    assert header == f"{columns},verdict,probability,score,threshold,feature_distance,distance_limit,air_windows"


def test_rows_follow_from_results_and_survive_the_disk(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.csv")
    ledger.add(Row.from_result(RESULT))
    ledger.add(Row("b", "rejected", "no scan"))
    ledger.write()
    assert read_ledger(tmp_path / "ledger.csv") == ledger.rows
    assert ledger.rows[0] == Row("a", "flagged", RESULT["reason"], "dicom", 1.75, "i", "o", "b")
    assert ledger.counts() == {"done": 0, "flagged": 1, "rejected": 1, "failed": 0}


def test_a_case_has_one_row_and_rows_lie_in_order(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.csv", every_s=0)
    for case_id, status in (("b", "failed"), ("a", "done"), ("b", "done")):
        ledger.add(Row(case_id, status))  # type: ignore[arg-type]
        assert len(read_rows(tmp_path / "ledger.csv")) == len(ledger.rows)
    assert [(row.case_id, row.status) for row in ledger.rows] == [("a", "done"), ("b", "done")]


def test_another_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("case,dice\n1,2\n")
    with pytest.raises(UserError, match="no ledger"):
        read_ledger(tmp_path / "x.csv")
