"""Lungs first, on the road: a lung model from grey masks, classifiers that see what it leaves, one table of both."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from medseg import comparison, road
from medseg.bundle import load_bundle
from medseg.data.phantom import draw_radiographs, render_radiograph
from medseg.files import UserError, read_json, read_rows, write_rows
from medseg.images import write_png
from medseg.plan import read_plan

COUNT, SIZE = 28, 96
SPLIT = "ingest.split={val: 0.25, test: 0.3}"
QUIET = ("train.precision=fp32", "tracking.system_metrics=false", "tracking.register_as=''")
LUNGS = (
    "model={name: unetpp, depth: 2, features: [8, 16, 32]}",
    "plan={size_px: 48, batch_size: 4}",
    "train={epochs: 20, steps_per_epoch: 6, validate_every: 20, warmup_steps: 5, learning_rate: 0.01}",
    *QUIET,
)
CLASSIFIER = (
    "model={name: densenet, init_features: 8, growth_rate: 4, block_config: [2, 2]}",
    "plan={size_px: 48, batch_size: 4}",
    "train={epochs: 2, validate_every: 2, warmup_steps: 2}",
    "verdict={positive: tb, min_cases: 4, min_per_class: 2}",
    "explain.max_cases=4",
    "explain.checks={deletion: null, insertion: null, road: null, randomisation: null, agreement: null}",
    *QUIET,
)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Radiographs with grey lung masks as published sets have them, the last one without; and their table."""
    folder, rows = tmp_path_factory.mktemp("scans"), []
    for number, params in enumerate(draw_radiographs(9, COUNT)):
        drawn, name = render_radiograph(params, SIZE), f"chest-{number:02d}.png"
        write_png(folder / "images" / name, (drawn.image // 16).astype(np.uint8))
        row = {"image": f"images/{name}", "lung_mask": "", "patient_id": f"p{number}", "site": params.site}
        if number < COUNT - 1:
            grey = np.random.default_rng(number).integers(0, 60, drawn.lung_mask.shape) + 190 * drawn.lung_mask
            write_png(folder / "lung_masks" / name, grey.astype(np.uint8))
            row["lung_mask"] = f"lung_masks/{name}"
        rows.append({**row, "tb": int(params.has_lesion)})
    write_rows(folder / "cases.csv", list(rows[0]), rows)
    return folder


@pytest.mark.slow
def test_lungs_are_learnt_and_what_they_leave_is_classified(scans: Path, tmp_path: Path) -> None:
    place, cohorts = tmp_path / "workspace", {}
    for config in ("lungs", "tb_lungs_convex"):
        cohorts[config] = place / "cohorts" / config
        made = road.ingest([str(scans)], cohorts[config], scans / "cases.csv", config, [SPLIT], place)
        assert made.figures["rejects"] == (config == "lungs"), "a lung model needs a mask, a classifier does not"
    lungs = road.train(road.load("lungs", [SPLIT, *LUNGS]), cohorts["lungs"], place, run_id="lungs-1")
    measured = road.evaluate(lungs.run_id, cohorts["lungs"], place)
    assert float(str(measured.figures["dice_lung"])) > 0.85
    for row in read_rows(measured.paths["cases_csv"]):
        dice = float(row["dice_lung"])
        assert float(row["iou_lung"]) == pytest.approx(dice / (2 - dice), abs=1e-5)
    sites = read_json(measured.paths["metrics"])["sites"]
    assert set(sites) == {"north", "south"}
    assert all(set(found) == {"n", "dice_lung", "iou_lung"} for found in sites.values())

    seen = {}
    for name in ("tb_radiograph", "tb_lungs_convex"):
        config = road.load(name, [SPLIT, *CLASSIFIER, "lungs.model=lungs-1"])
        seen[name] = road.train(config, cohorts["tb_lungs_convex"], place, run_id=name).run_id
    with pytest.raises(UserError, match="has no figures of 'test'"):
        comparison.run(["lungs-1", *seen], place, place / "table")
    shutil.move(place / "runs" / "lungs-1" / "bundle", tmp_path / "kept")
    for run_id in seen:
        assert road.evaluate(run_id, cohorts["tb_lungs_convex"], place).status == "done", "the lung model is its own"
        assert load_bundle(run_id, place).lungs is not None
    shutil.move(tmp_path / "kept", place / "runs" / "lungs-1" / "bundle")

    result = comparison.run(["lungs-1", *seen], place, place / "table")
    first, whole, convex = read_json(result.paths["comparison"])["models"]
    assert first["figures"]["iou_lung"] == read_json(measured.paths["metrics"])["classes"]["lung"]["iou"]
    assert (whole["sees"], convex["sees"]) == ("whole images", "lungs, convex mask")
    metrics = read_json(place / "runs" / "tb_lungs_convex" / "evaluation" / "test" / "metrics.json")
    assert {name: convex["figures"][name] for name in ("auc", "f1")} == {name: metrics[name] for name in ("auc", "f1")}
    change = convex["figures"]["auc"]["value"] - whole["figures"]["auc"]["value"]
    assert (convex["against"], "against" in whole) == (whole["run_id"], False)
    assert convex["differences"]["auc"]["value"] == pytest.approx(change)
    energies = [line["figures"]["energy"] for line in (whole, convex)]
    assert 1 <= sum(energy["n"] for energy in energies) <= 8, "of 4 maps each, those that hold evidence"
    assert all(0 < energy["value"] < 1 for energy in energies if energy["n"])
    matched = "plan.appearance={crop_padding: true, histogram: clahe, match_sharpness: true}"
    boxed = road.load("tb_lungs_box", [SPLIT, *CLASSIFIER, matched, "lungs.model=lungs-1"])
    planned = read_plan(road.plan(boxed, cohorts["tb_lungs_convex"], place).paths["plan"])
    assert len(planned.appearance.detail_sd) == 5
    box = load_bundle(road.train(boxed, cohorts["tb_lungs_convex"], place, run_id="box").paths["bundle"])
    assert box.plan == planned, "sharpness was measured on what the lung model leaves"
    assert road.evaluate("box", cohorts["tb_lungs_convex"], place).status == "done"

    page = result.paths["report"].read_text()
    for words in ("lungs, convex mask", "IoU lung", "Energy in the lungs", "Specificity", "Difference to"):
        assert words in page
