"""The demonstration at a small size: the whole road twice, on scans it makes itself."""

from pathlib import Path

import pytest

from medseg import demo
from medseg.files import read_json

SMALL = (
    "train={epochs: 1, steps_per_epoch: 3, validate_every: 1}",
    "tracking={system_metrics: false}",
    "explain.max_cases=2",
    "report={max_cases: 2, viewer_cases: 1}",
)


@pytest.mark.slow
def test_the_demo_walks_both_roads_twice_in_a_folder_with_a_space(tmp_path: Path) -> None:
    workspace = tmp_path / "work space"
    first = demo.run(workspace, brains=8, radiographs=48, sets=SMALL)
    second = demo.run(workspace, brains=8, radiographs=48, sets=SMALL)
    assert first.status == second.status == "done"
    assert first.figures["tissue_run"] != second.figures["tissue_run"]
    for name in ("dice_csf", "dice_grey_matter", "dice_white_matter", "lesion_auc", "map_energy_in_lesion"):
        assert first.figures[name] == second.figures[name], f"{name} is not reproduced"
    page = first.paths["tissue_report"].read_text(encoding="utf-8")
    assert "Simulated subjects" in page
    ledger = (first.paths["masks"] / "ledger.csv").read_text().splitlines()
    assert len(ledger) == 1 + demo.UNSEEN_BRAINS
    for name in read_json(workspace / "demo" / "scans" / "brains" / "done.json")["parameters"]:
        assert "seed" in name
    assert not list(workspace.rglob(".part-*"))
