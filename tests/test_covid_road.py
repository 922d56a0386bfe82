"""Three classes along the whole road: simulated chests in the layout of the public set, one class of them referred."""

from pathlib import Path

import numpy as np
import pytest
from synthetic import pneumonia_radiographs

from medseg import calibrations, road
from medseg.bundle import load_bundle
from medseg.cohort import Cohort, read_cohort, write_cohort
from medseg.config import load_config
from medseg.files import read_json, read_rows
from medseg.ingest.fetch import case_rows, write_case_table
from medseg.ingest.manifests import find_manifest
from medseg.result import Result
from medseg.verdict import margins

CLASSES = ("normal", "viral_pneumonia", "covid")
DENSENET = "{name: densenet, init_features: 8, growth_rate: 8, block_config: [2, 2, 2]}"
TWO_STAGE = f"{{name: two_stage, backbones: [{DENSENET}], hidden: 64, code: 16, classifier: [16]}}"
SETTINGS = (
    "plan={size_px: 64, batch_size: 8}",
    "ingest.split={val: 0.25, test: 0.35, seed: 0}",
    "train={epochs: 14, validate_every: 14, warmup_steps: 4, learning_rate: 0.01, ema_decay: 0.9, precision: fp32}",
    "verdict={positive: covid, min_cases: 12, min_per_class: 4, prevalence: 0.2}",
    "audit={probe_size: 32, probe_epochs: 2, probe_folds: 2, min_group: 2}",
    "explain={max_cases: 4, cases: random, rank: {cases: 3, methods: [gradcam, hirescam]}}",
    "report={max_cases: 4, viewer_cases: 0}",
    "tracking={system_metrics: false, register_as: ''}",
)


def _ingest(place: Path, count: int) -> Path:
    """A cohort by the way that the manifest describes."""
    root = pneumonia_radiographs(place / "data", count)
    layout = find_manifest("covid19_radiography").layout
    table = write_case_table(layout, case_rows(layout, root), root)
    sets = [*SETTINGS, "ingest.image_path=/(COVID|Normal|Viral Pneumonia)/images/", "ingest.simulated=true"]
    made = road.ingest([str(root)], place / "cohort", table, "covid_radiograph", sets, place)
    assert made.status == "done"
    return place / "cohort"


def _train(place: Path, cohort_dir: Path, model: str) -> Result:
    return road.train(load_config("covid_radiograph", [*SETTINGS, f"model={model}"]), cohort_dir, place)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, Result]:
    """A workspace, a training, and its evaluation with an audit."""
    place = tmp_path_factory.mktemp("covid")
    cohort_dir = _ingest(place, 26)
    trained = _train(place, cohort_dir, DENSENET)
    return place, trained, road.evaluate(trained.run_id or "", cohort_dir, place, audit=True)


@pytest.mark.slow
def test_one_class_is_referred_against_the_rest(walked: tuple[Path, Result, Result]) -> None:
    place, trained, measured = walked
    verdict = load_bundle(trained.run_id or "", place).verdict
    assert verdict is not None
    val = [case for case in read_cohort(place / "cohort").cases if case.split == "val"]
    assert (verdict.positive, verdict.fitted["n"]) == ("covid", len(val))
    assert verdict.fitted["n_positive"] == sum(case.target == "covid" for case in val)
    for path in measured.paths["metrics"].parent.glob("predictions/*/result.json"):
        result = read_json(path)
        assert sum(result["probs"].values()) == pytest.approx(1)
        assert result["verdict"]["probability"] == pytest.approx(result["probs"]["covid"])
        assert (result["verdict"]["call"] == "refer") == (result["predicted"] == "covid")
        assert (result["probs"]["covid"] >= verdict.threshold) == (result["predicted"] == "covid")


@pytest.mark.slow
def test_every_class_has_its_figures_and_its_place_on_the_page(walked: tuple[Path, Result, Result]) -> None:
    _, _, measured = walked
    metrics = read_json(measured.paths["metrics"])
    assert metrics["classes"] == list(CLASSES)
    confusion = np.array(metrics["confusion"])
    assert confusion.sum() == metrics["n_measured"]
    assert metrics["per_class"]["covid"]["auc"]["value"] > 0.9
    for k, name in enumerate(CLASSES):
        found = metrics["per_class"][name]
        assert found["n"] == confusion[k].sum()
        assert found["sensitivity"]["value"] == pytest.approx(confusion[k, k] / confusion[k].sum())
        assert found["sensitivity"]["ci_low"] <= found["sensitivity"]["value"] <= found["sensitivity"]["ci_high"]
    assert set(metrics["calibration"]) == {"reliability", "ece", "brier", "nll"}
    page = measured.paths["report"].read_text(encoding="utf-8")
    for words in ("Each class against all others", "Confusion", "called viral pneumonia", "referred for covid"):
        assert words in page
    audit = read_json(measured.paths["audit_json"])
    states = {item["name"]: item["status"] for item in audit["items"]}
    assert states["sites"] == "not assessable", "the set names no sites"
    assert next(item for item in audit["items"] if item["name"] == "borders")["value"] is not None


@pytest.mark.slow
def test_another_class_can_be_explained_and_referred_elsewhere(
    walked: tuple[Path, Result, Result], tmp_path: Path
) -> None:
    place, trained, measured = walked
    told = [read_json(path) for path in measured.paths["metrics"].parent.glob("predictions/*/explanation/*.json")]
    predicted = {row["case_id"]: row["predicted"] for row in read_rows(measured.paths["cases_csv"])}
    assert {one["target"] for one in told} <= set(predicted.values())
    cohort = read_cohort(place / "cohort")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "images").symlink_to(place / "cohort" / "images")
    write_cohort(Cohort(tmp_path / "elsewhere", cohort.cases[::2], cohort.label_names), [], {})
    made = calibrations.run(
        trained.run_id or "", tmp_path / "elsewhere", place, out=tmp_path / "new",
        overrides=["verdict.positive=viral_pneumonia"],
    )  # fmt: skip
    after = load_bundle(tmp_path / "new")
    assert after.operating_point is not None
    assert after.operating_point[0] == "viral_pneumonia"
    assert "have viral_pneumonia" in made.text
    logits = {"normal": 0.2, "viral_pneumonia": 1.0, "covid": -0.4}
    assert after.verdict is not None
    probs = after.verdict.probabilities(logits)
    assert list(probs) == list(logits)
    assert probs["viral_pneumonia"] == pytest.approx(after.verdict.probability(margins([list(logits.values())], 1))[0])
    assert probs["normal"] / probs["covid"] == pytest.approx(np.exp(0.6)), "the others share the rest as before"


@pytest.mark.slow
def test_the_two_stage_network_walks_the_same_road(walked: tuple[Path, Result, Result]) -> None:
    place, _, _ = walked
    trained = _train(place, place / "cohort", TWO_STAGE)
    assert "train_reconstruction_loss" in trained.figures
    measured = road.evaluate(trained.run_id or "", place / "cohort", place)
    metrics = read_json(measured.paths["metrics"])
    assert metrics["per_class"]["covid"]["auc"]["value"] > 0.8
    told = [read_json(path) for path in measured.paths["metrics"].parent.glob("predictions/*/explanation/*.json")]
    assert len(told) == 4
    chosen = load_bundle(trained.run_id or "", place).explanation["chosen"]
    assert {one["layer"] for one in told} == {chosen["layer"]}
    assert chosen["layer"].startswith("backbones.0")
