"""Models side by side: each held against the first of its kind on the cases of both."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from synthetic import tiny_radiograph_config

from medseg import comparison
from medseg.bundle import load_bundle
from medseg.bundle_writing import save_bundle
from medseg.cohort import Case, Cohort
from medseg.config import Config
from medseg.evaluate import step
from medseg.files import read_json, write_json
from medseg.images import write_png
from medseg.models import build_from_config
from medseg.plan import Plan
from medseg.runs import create_run


def write_model(place: Path, config: Config, run_id: str, **facts: Any) -> Path:
    torch.manual_seed(0)
    net = build_from_config(config.model, spatial_dims=2, in_channels=1, out_channels=2)
    folder = create_run(place, config.name, run_id).path
    plan = Plan(spatial_dims=2, patch_size=(32, 32), batch_size=1, size_px=(32, 32))
    about: dict[str, Any] = {"metrics": {}, "cohort_sha256": "c" * 64, **facts}
    weights = [net.state_dict()] * len(facts["members"]) if "members" in facts else net.state_dict()
    return save_bundle(folder / "bundle", state_dict=weights, config=config, plan=plan, run_id=run_id, **about)


def write_figures(folder: Path, config: Config, numbers: range, sharpness: float, sha256: str = "a" * 64) -> None:
    """What `evaluate` makes of predictions that are right the more often, the greater `sharpness` is."""
    cases = []
    for number in numbers:
        target = ("normal", "tb")[number % 2]
        cases.append(Case(f"c{number:02}", f"p{number}", (f"c{number:02}.png",), split="val", target=target))
        noise = np.random.default_rng(number).normal()
        p = float(1 / (1 + np.exp(-((1 if target == "tb" else -1) * sharpness + noise))))
        result = {"status": "done", "patient_id": f"p{number}", "probs": {"normal": 1 - p, "tb": p}}
        write_json(folder / "predictions" / cases[-1].case_id / "result.json", result)
        write_png(folder / "images" / f"{cases[-1].case_id}.png", np.zeros((4, 4), np.uint8))
    cohort = Cohort(folder / "images", tuple(cases), config.task.labels, ("image",), sha256)
    labels, facts = config.task.labels, {"name": "x"}
    step.run(
        cohort, folder / "predictions", folder, split="val", bundle_facts=facts, labels=labels, kind="classification"
    )


def test_differences_are_told_on_the_screen_in_the_table_and_on_the_page(tmp_path: Path) -> None:
    config = tiny_radiograph_config()
    guessed = {"train_loss": 0.693, "guessing_loss": 0.693}
    for run_id, sharpness, metrics in (("good", 1.5, {}), ("poor", 0.2, guessed), ("elsewhere", 0.1, {})):
        measured_on = ("b" if run_id == "elsewhere" else "a") * 64
        write_model(tmp_path, config, run_id, metrics=metrics, cohort_sha256=("d" if run_id == "poor" else "c") * 64)
        write_figures(tmp_path / "runs" / run_id / "evaluation" / "val", config, range(40), sharpness, measured_on)
    result = comparison.run(["good", "poor", "elsewhere"], tmp_path, tmp_path / "table", split="val")

    good, poor, elsewhere = read_json(result.paths["comparison"])["models"]
    assert poor["against"] == "good", "trained on another cohort, measured on one"
    assert "against" not in good | elsewhere, "cases of another cohort are not the same cases"
    auc = [line["figures"]["auc"]["value"] for line in (good, poor)]
    assert abs(poor["differences"]["auc"]["value"] - (auc[1] - auc[0])) < 1e-9
    assert poor["differences"]["auc"]["ci_high"] < 0
    assert [row["to_the_first"] for row in result.rows][::2] == ["", ""]
    assert str(result.rows[1]["to_the_first"]).startswith(f"auc {auc[1] - auc[0]:+.3f} (-")
    page = result.paths["report"].read_text()
    assert "Difference to good" in page
    assert "Not learned by poor." in page


def test_joined_folds_are_compared_case_by_case_as_long_as_their_runs_are_there(tmp_path: Path) -> None:
    config = tiny_radiograph_config()
    for joined, sharpness in (("one", 1.5), ("two", 0.2)):
        runs = [f"{joined}-{fold}" for fold in (0, 1)]
        for fold, run_id in enumerate(runs):
            write_model(tmp_path, config, run_id)
            numbers = range(fold * 20, fold * 20 + 20)
            write_figures(tmp_path / "runs" / run_id / "evaluation" / "val", config, numbers, sharpness)
        members = [{"run_id": run_id, "fold": fold, "seed": 0} for fold, run_id in enumerate(runs)]
        measured = read_json(tmp_path / "runs" / runs[0] / "evaluation" / "val" / "metrics.json")
        write_model(
            tmp_path,
            config,
            joined,
            members=members,
            evidence={"folds": 2, "cross_validation": measured | {"by_fold": {}}},
        )
        assert len(load_bundle(joined, tmp_path).members) == 2

    def lines() -> list[dict[str, Any]]:
        result = comparison.run(["one", "two"], tmp_path, tmp_path / "table", split="folds")
        return list(read_json(result.paths["comparison"])["models"])

    assert lines()[1]["differences"]["auc"]["n"] == 40
    (tmp_path / "runs" / "one-1" / "evaluation" / "val" / "cases.json").unlink()
    assert "differences" not in lines()[1]


def test_cases_of_one_class_give_no_difference_of_the_auc(tmp_path: Path) -> None:
    config = tiny_radiograph_config()
    for run_id, numbers in (("one", range(10)), ("two", range(0, 21, 2))):  # both hold even numbers only, all normal
        write_model(tmp_path, config, run_id)
        write_figures(tmp_path / "runs" / run_id / "evaluation" / "val", config, numbers, 1.0)
    result = comparison.run(["one", "two"], tmp_path, tmp_path / "table", split="val")
    assert [row.get("to_the_first") for row in result.rows] == ["", ""]
    differences = read_json(result.paths["comparison"])["models"][1]["differences"]
    assert differences["auc"]["value"] is None
    assert differences["specificity"]["n"] == 5
    assert "Difference to one" in result.paths["report"].read_text()
