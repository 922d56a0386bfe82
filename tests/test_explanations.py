"""The comparison of activation maps that a trained classifier carries, and the maps that follow from it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import radiograph_cohort, tiny_radiograph_config

from medseg import calibrations, road
from medseg.bundle import Bundle, load_bundle
from medseg.bundle_writing import save_bundle, with_explanation
from medseg.config import ExplainChecksConfig, ExplainConfig
from medseg.explain.hooks import captured, stage_layers
from medseg.explain.passmark import CHECKS
from medseg.explain.ranking import describe, rank_methods
from medseg.explanations import compare, pooled
from medseg.files import UserError, read_json
from medseg.folds import as_trained
from medseg.models import build_from_config, build_model
from medseg.plan import Plan
from medseg.predict import load_network
from medseg.report.run_page import _explanations

METHODS = "explain.rank={cases: 3, methods: [gradcam, hirescam, fullgrad], stages: 2}"


def _untrained(folder: Path, *sets: str) -> Bundle:
    config = tiny_radiograph_config(METHODS, *sets)
    torch.manual_seed(0)
    net = build_from_config(config.model, spatial_dims=2, in_channels=1, out_channels=2)
    plan = Plan(2, (32, 32), 4, size_px=(32, 32), normalise="zscore")
    facts = {"run_id": "r", "cohort_sha256": "c" * 64, "metrics": {}}
    made = save_bundle(folder, state_dict=net.state_dict(), config=config, plan=plan, **facts)  # type: ignore[arg-type]
    return load_bundle(made)


def test_stages_are_found_from_the_head_backwards() -> None:
    net = build_model("densenet", spatial_dims=2, in_channels=1, out_channels=2, block_config=(2, 2, 2, 2)).eval()
    x, sizes = torch.randn(1, 1, 64, 64), []
    found = stage_layers(net, x, 3)
    for name in found:
        with captured(net, name) as activation:
            net(x)
        assert activation.value is not None
        sizes.append(activation.value.shape[2])
    assert (found[0], sizes) == ("class_layers.relu", [2, 4, 8])
    assert stage_layers(net, x, 9)[:3] == found


def test_every_method_at_every_stage_is_measured_and_the_best_one_chosen(tmp_path: Path) -> None:
    bundle, cohort = _untrained(tmp_path / "b"), radiograph_cohort(tmp_path / "cohort", 24)
    found = compare(bundle, load_network(bundle), cohort)
    rows = found["candidates"]
    assert len(rows) == 2 * 2 + 1, "two methods at two layers, and one in which the layer plays no part"
    assert (found["n"], found["split"], found["cohort_sha256"]) == (3, "val", cohort.sha256)
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert np.mean(scores) == pytest.approx(0.5), "of two maps one wins, or both half"
    assert found["chosen"] == {"method": rows[0]["method"], "layer": rows[0]["layer"]}
    for row in rows:
        assert set(row["checks"]) == {"deletion", "insertion", "road", "randomisation", "stability"}
        for name, check in row["checks"].items():
            assert check["threshold"] == getattr(bundle.config.explain.checks, name)
            assert check["n"] + row["no_evidence"] <= 3
    made = load_bundle(with_explanation(bundle, tmp_path / "b", found))
    assert made.explanation == read_json(made.folder / "explanation.json")
    assert f"`{rows[0]['method']}` at the layer `{rows[0]['layer']}`" in (made.folder / "MODEL_CARD.md").read_text()
    settled = made.config.explain.settled(made.explanation["chosen"])
    assert (settled.method, settled.layer) == (rows[0]["method"], rows[0]["layer"])
    (made.folder / "explanation.json").write_text("{}")
    with pytest.raises(UserError, match=r"explanation\.json differs from its hash"):
        load_bundle(made.folder)


def test_folds_are_pooled_over_the_cases_that_each_has_not_seen(tmp_path: Path) -> None:
    """As one ranking over all cases; a second seed of a fold brings no new patients."""
    cohort, folds = radiograph_cohort(tmp_path / "cohort", 24), []
    for name, number in (("a", 0), ("b", 1), ("c", 1)):
        sets = (f"train.fold={number}", "train.folds=2", f"seed={len(folds)}")
        bundle = _untrained(tmp_path / name, *sets)
        found = compare(bundle, load_network(bundle), as_trained(bundle.config, cohort))
        folds.append(load_bundle(with_explanation(bundle, tmp_path / name, found)))
    told = pooled(folds)
    assert (told["n"], told["split"], told["patients"]) == (6, "folds", [0, 1, 2, 3, 2, 3])
    measured = {
        (row["method"], row["layer"]): [
            case
            for fold in folds
            for one in fold.explanation["candidates"]
            if (one["method"], one["layer"]) == (row["method"], row["layer"])
            for case in one["figures"]
        ]
        for row in told["candidates"]
    }
    best = rank_methods(measured)[0]
    assert told["chosen"] == {"method": best.method, "layer": best.layer}
    assert told["candidates"][0]["checks"]["insertion"]["n"] + told["candidates"][0]["no_evidence"] == 6
    assert pooled([*folds, _untrained(tmp_path / "older")]) == {}
    table = _explanations(told)
    assert table is not None
    assert "6 cases that the network of their fold had not seen" in table.note


def test_a_named_method_is_measured_and_stays(tmp_path: Path) -> None:
    bundle, cohort = _untrained(tmp_path / "b", "explain.method=layercam"), radiograph_cohort(tmp_path / "cohort", 24)
    found = compare(bundle, load_network(bundle), cohort)
    assert [row["method"] for row in found["candidates"]] == ["layercam"]
    assert bundle.config.explain.settled({"method": "gradcam", "layer": "x"}) == bundle.config.explain
    assert ExplainConfig().settled(None).method == "gradcam"
    off = _untrained(tmp_path / "off", f"explain.checks={{{', '.join(f'{name}: null' for name in CHECKS)}}}")
    assert compare(off, load_network(off), cohort) == {}


def test_passing_is_counted_as_in_a_prediction_folder() -> None:
    """Of four maps one has no evidence, two pass; of randomisation less is better."""
    checks = ExplainChecksConfig(road=0.1, randomisation=0.5)
    roads, kept = (0.2, 0.05, 0.1, None), (0.4, 0.6, 0.5, None)
    cases = [{"road": road, "randomisation": value} for road, value in zip(roads, kept, strict=True)]
    (row,) = describe(rank_methods({("a", "l"): cases}), {("a", "l"): cases}, list("pqrs"), checks)
    assert row["no_evidence"] == 1
    for check in row["checks"].values():
        assert (check["n"], check["share"]) == (3, pytest.approx(2 / 3))
        assert check["ci_low"] < check["share"] < check["ci_high"]
    assert row["checks"]["road"]["mean"] == pytest.approx(0.35 / 3)
    told = {"n": 4, "split": "val", "chosen": {"method": "a"}, "candidates": [row]}
    table = _explanations(told)
    assert table is not None
    assert [cell.text for cell in table.rows[0]] == ["a", "l", "1.00", "0.67", "0.67"], "shares, no means"


@pytest.mark.slow
def test_maps_are_made_by_the_method_that_measured_best_in_training(tmp_path: Path) -> None:
    radiograph_cohort(tmp_path / "cohort", 24)
    sets = ("train.epochs=2", "verdict={positive: tb, min_cases: 4, min_per_class: 2}", "explain.max_cases=2")
    trained = road.train(
        tiny_radiograph_config(METHODS, *sets, "tracking.register_as=''"), tmp_path / "cohort", tmp_path
    )
    bundle = load_bundle(trained.run_id or "", tmp_path)
    assert bundle.verdict is not None
    chosen = bundle.explanation["chosen"]
    assert {name: trained.figures[f"explain_{name}"] for name in chosen} == chosen
    made = road.evaluate(trained.run_id or "", tmp_path / "cohort", tmp_path)
    told = [read_json(path) for path in made.paths["metrics"].parent.glob("predictions/*/explanation/explanation.json")]
    assert len(told) == 2
    assert {(one["method"], one["layer"]) for one in told} == {(chosen["method"], chosen["layer"])}
    page = made.paths["report"].read_text()
    assert "Which activation maps explain best?" in page
    assert chosen["layer"] in page
    radiograph_cohort(tmp_path / "elsewhere", 24)
    calibrations.run(trained.run_id or "", tmp_path / "elsewhere", tmp_path, out=tmp_path / "new")
    after = load_bundle(tmp_path / "new")
    assert after.explanation == bundle.explanation
    assert after.facts["explained_by"] == {**chosen, "n": 3, "split": "val"}
