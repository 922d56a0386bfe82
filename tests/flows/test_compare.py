from pathlib import Path

import pytest
from synthetic import radiograph_cohort
from test_flows import artifacts, flow_runs

from flows.compare import compare_flow
from medseg.comparison import NETWORKS
from medseg.config import load_config
from medseg.files import read_json

NETWORK = "model={name: densenet, init_features: 8, growth_rate: 4, block_config: [2, 2]}"
SETS = [
    "plan={size_px: 32, batch_size: 4}",
    "train={epochs: 1, validate_every: 1, warmup_steps: 1, precision: fp32}",
    "explain.max_cases=0",
    "tracking={system_metrics: false}",
]


@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_network_of_the_paper_fits_the_config(name: str) -> None:
    config = load_config("tb_radiograph", NETWORKS[name])
    assert config.model.classifies
    assert config.plan.size_px in (224, 299)


@pytest.mark.slow
def test_configs_and_networks_are_put_into_one_table_and_measured_once(prefect_server: Path, tmp_path: Path) -> None:
    radiograph_cohort(tmp_path / "cohort", 24)
    networks = {"narrow": [NETWORK], "wide": [NETWORK.replace("growth_rate: 4", "growth_rate: 6")]}
    given = {"configs": ["tb_radiograph"], "networks": networks, "overrides": SETS, "workspace": str(tmp_path)}
    result = compare_flow(str(tmp_path / "cohort"), run_id="c-1", **given)  # type: ignore[arg-type]
    lines = read_json(result.paths["comparison"])["models"]
    assert [line["run_id"] for line in lines] == ["c-1-tb_radiograph-narrow", "c-1-tb_radiograph-wide"]
    for line in lines:
        metrics = read_json(tmp_path / "runs" / line["run_id"] / "evaluation" / "test" / "metrics.json")
        assert line["figures"]["auc"] == metrics["auc"]
    assert "medseg-comparison" in artifacts(flow_runs("c-1")["medseg-compare"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/bundle/bundle.json")}
    compare_flow(str(tmp_path / "cohort"), run_id="c-1", **given)  # type: ignore[arg-type]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/bundle/bundle.json")}
