"""Cross-validation: folds that share nothing, runs of their own, and one model joined from them."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import radiograph_cohort, segmentation_cohort, tiny_config, tiny_radiograph_config

from medseg import calibrations, folds, road
from medseg.bundle import load_bundle
from medseg.cohort import Case, Cohort, read_cohort
from medseg.files import UserError, read_json, read_rows
from medseg.ledger import read_ledger
from medseg.models.ensemble import Ensemble
from medseg.plan import read_plan
from medseg.predict import Predictor, load_network
from medseg.predict import step as predict_step
from medseg.report import step as report_step
from medseg.result import Result
from medseg.runs import find_run, read_run
from medseg.splits import assign_folds, take_fold
from medseg.volume import Volume

SETS = ("train.folds=2", "train.epochs=8", "train.learning_rate=0.02", "train.ema_decay=0.9", "explain.max_cases=1")


def many_cases() -> tuple[Case, ...]:
    """Sixty cases of forty patients on three sites; every sixth patient is tested."""
    cases = []
    for number in range(60):
        patient = number % 40
        split = "test" if patient % 6 == 0 else "val" if patient % 5 == 0 else "train"
        cases.append(Case(f"c{number:02d}", f"p{patient:02d}", (), site=f"s{patient % 3}", split=split))
    return tuple(cases)


def test_folds_share_no_patient_hold_every_case_once_and_leave_the_test_split_alone() -> None:
    cases = many_cases()
    chosen = assign_folds(cases, 5, seed=3)
    assert set(chosen) == {case.case_id for case in cases if case.split != "test"}
    folds_of: dict[str, set[int]] = {}
    for case in cases:
        if case.case_id in chosen:
            folds_of.setdefault(case.patient_id, set()).add(chosen[case.case_id])
    assert all(len(found) == 1 for found in folds_of.values())
    sizes = Counter(chosen.values())
    assert max(sizes.values()) - min(sizes.values()) <= 2
    by_site = Counter((case.site, chosen[case.case_id]) for case in cases if case.case_id in chosen)
    for site in ("s0", "s1", "s2"):
        share = [by_site[site, fold] for fold in range(5)]
        assert max(share) - min(share) <= 2, "a stratum is spread over the folds"


def test_folds_follow_from_the_seed_and_not_from_the_order_of_cases() -> None:
    cases = many_cases()
    assert assign_folds(cases, 4, seed=3) == assign_folds(cases[::-1], 4, seed=3)
    assert assign_folds(cases, 4, seed=3) != assign_folds(cases, 4, seed=4)


def test_folds_by_site_share_no_site() -> None:
    cases = many_cases()
    chosen = assign_folds(cases, 3, seed=0, by="site")
    found = {(case.site, chosen[case.case_id]) for case in cases if case.case_id in chosen}
    assert len(found) == 3
    with pytest.raises(UserError, match="3 sites only"):
        assign_folds(cases, 4, seed=0, by="site")
    with pytest.raises(UserError, match="has no site"):
        assign_folds([replace(case, site="") for case in cases], 2, seed=0, by="site")


def test_over_all_folds_each_case_is_validated_once(tmp_path: Path) -> None:
    cohort = Cohort(tmp_path, many_cases())
    seen: Counter[str] = Counter()
    for fold in range(5):
        dealt = take_fold(cohort, fold, 5, seed=0)
        assert [c.case_id for c in dealt.cases if c.split == "test"] == [
            c.case_id for c in cohort.cases if c.split == "test"
        ]
        assert {c.patient_id for c in dealt.split("val")}.isdisjoint(c.patient_id for c in dealt.split("train"))
        seen.update(case.case_id for case in dealt.split("val"))
    assert set(seen.values()) == {1}
    assert len(seen) == sum(case.split != "test" for case in cohort.cases)


def test_a_fold_outside_the_folds_is_refused_with_its_field() -> None:
    with pytest.raises(UserError, match=r"train.*fold 5 is none of the train\.folds 5"):
        tiny_config("train.fold=5")
    with pytest.raises(UserError, match="lets a fold choose the network that it measures"):
        tiny_config("train.fold=1", "train.select=best")


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str], Result]:
    """Workspace, cohort folder, the runs of two folds, and what joining them gave."""
    folder = tmp_path_factory.mktemp("folds")
    cohort = segmentation_cohort(folder / "cohort", 15)
    runs = []
    for fold in (1, 0):
        config = tiny_config(*SETS, f"train.fold={fold}", "tracking.register_as=tiny")
        runs.append(road.train(config, cohort.folder, folder / "ws").run_id)
    return folder / "ws", cohort.folder, runs, folds.join(runs, folder / "ws", out=folder / "out")


def test_a_fold_is_a_run_of_its_own_measured_on_the_cases_it_has_not_seen(
    joined: tuple[Path, Path, list[str], Result],
) -> None:
    workspace, cohort_dir, runs, _ = joined
    about = [read_run(find_run(workspace, run)) for run in runs]
    assert [(found["fold"], found["folds"], found["status"]) for found in about] == [
        (1, 2, "FINISHED"),
        (0, 2, "FINISHED"),
    ]
    cohort = read_cohort(cohort_dir)
    for run, fold in zip(runs, (1, 0), strict=True):
        out = find_run(workspace, run).path / "evaluation" / "val"
        val = {case.case_id for case in take_fold(cohort, fold, 2, seed=0).split("val")}
        assert {row["case_id"] for row in read_rows(out / "cases.csv")} == val
        assert {path.parent.name for path in out.glob("predictions/*/mask.nii.gz")} == val
        bundle = load_bundle(run, workspace)
        assert bundle.plan == read_plan(cohort_dir / "plans" / "hippocampus-folds" / "plan.yaml"), "one plan for all"
        assert bundle.plan.fingerprint["cases"] == sum(case.split != "test" for case in cohort.cases)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{workspace / 'mlflow.db'}")
    tags = client.get_run(about[0]["mlflow_run_id"]).data.tags
    assert (tags["medseg.fold"], tags["medseg.folds"]) == ("1", "2")
    versions = client.search_model_versions("name = 'tiny'")
    assert len(versions) == 1, "the joined model is registered, its folds are not"


def test_joined_folds_predict_the_mean_of_their_logits(joined: tuple[Path, Path, list[str], Result]) -> None:
    workspace, _, runs, result = joined
    bundle = load_bundle(result.run_id, workspace)
    assert [member["fold"] for member in bundle.members] == [0, 1]
    assert {member["run_id"] for member in bundle.members} == set(runs)
    net, image = load_network(bundle), torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        parts = [load_network(load_bundle(run, workspace))(image) for run in runs]
        assert torch.allclose(net(image), (parts[0] + parts[1]) / 2, atol=1e-6)
        assert not torch.allclose(parts[0], parts[1], atol=1e-3)


def test_the_table_of_the_cross_validation_travels_with_the_bundle(
    joined: tuple[Path, Path, list[str], Result],
) -> None:
    workspace, _, runs, result = joined
    bundle = load_bundle(result.paths["bundle"])
    dice: dict[str, float] = {}
    for run in runs:
        for row in read_rows(find_run(workspace, run).path / "evaluation" / "val" / "cases.csv"):
            dice[row["case_id"]] = float(row["dice_anterior"])
    table = bundle.evidence["cross_validation"]
    found = table["classes"]["anterior"]["dice"]
    assert found["n"] == len(dice) == table["n_cases"]
    assert found["mean"] == pytest.approx(np.mean(list(dice.values())), abs=1e-5)
    assert found["ci_low"] <= found["mean"] <= found["ci_high"]
    means = [fold["anterior"] for fold in table["by_fold"].values()]
    assert table["fold_means"]["anterior"]["mean"] == pytest.approx(np.mean(means))
    rows = {row["case_id"]: row for row in read_rows(bundle.folder / "out_of_fold.csv")}
    assert {case_id: float(row["dice_anterior"]) for case_id, row in rows.items()} == pytest.approx(dice, abs=1e-5)
    card = (bundle.folder / "MODEL_CARD.md").read_text()
    assert "Cross-validation" in card
    assert f"{found['mean']:.3f}" in card


def test_a_joined_bundle_that_was_changed_is_noticed(
    joined: tuple[Path, Path, list[str], Result], tmp_path: Path
) -> None:
    for name in ("weights-1.safetensors", "out_of_fold.csv"):
        copy = shutil.copytree(joined[3].paths["bundle"], tmp_path / name)
        content = bytearray((copy / name).read_bytes())
        content[-3] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} differs from its hash"):
            load_bundle(copy)
    (copy / "weights-0.safetensors").unlink()
    with pytest.raises(UserError, match=r"weights-0\.safetensors"):
        load_bundle(copy)


def test_a_joined_model_is_evaluated_on_the_test_split_only_and_explains(
    joined: tuple[Path, Path, list[str], Result],
) -> None:
    workspace, cohort_dir, _, result = joined
    found = road.evaluate(result.run_id, cohort_dir, workspace)
    assert found.status == "done"
    assert found.figures["mean_dice"] > 0.3
    test = find_run(workspace, result.run_id).path / "evaluation" / "test"
    assert len(list(test.glob("predictions/*/explanation/explanation.json"))) == 1
    with pytest.raises(UserError, match="--split val: the joined networks have seen it"):
        road.evaluate(result.run_id, cohort_dir, workspace, split="val")


def test_predictions_of_the_joined_model_say_how_far_to_trust_them(
    joined: tuple[Path, Path, list[str], Result], tmp_path: Path
) -> None:
    workspace, cohort_dir, _, result = joined
    cohort, bundle = read_cohort(cohort_dir), load_bundle(result.run_id, workspace)
    for label in ("anterior", "posterior"):
        known = bundle.evidence["expected_dice"][label]
        assert known["n"] == bundle.evidence["volumes_ml"][label]["n"] == 11
        assert known["held_out"]["n"] == 11
    assert all(member["temperature"] != 1 for member in bundle.members)
    assert bundle.facts["calibration"]["ece_after"] <= bundle.facts["calibration"]["ece_before"] + 0.02
    assert len(bundle.distance.members) == 2
    assert bundle.facts["feature_distance"]["held_out"] == 11, "each case of train and val once"
    predict_step.run(bundle, cohort, tmp_path / "out", split="test")
    rows = read_ledger(tmp_path / "out" / "ledger.csv")
    for row in rows:
        assert row.feature_distance > 0
        assert row.distance_limit == pytest.approx(bundle.distance.limit, abs=1e-4)
        said = read_json(tmp_path / "out" / row.case_id / "result.json")["confidence"]
        for figures in said.values():
            low, high = figures["interval"]
            assert 0 <= low <= figures["expected_dice"] <= high <= 1
            assert 0 < figures["agreement"] <= 1
            assert 0 < figures["mirrored"] <= 1
        assert row.expected_dice == min(figures["expected_dice"] for figures in said.values())
    queue = read_rows(tmp_path / "out" / "review_queue.csv")
    assert {row["case_id"] for row in queue} == {row.case_id for row in rows}
    page = report_step.run(bundle.config.report, tmp_path / "out").paths["report"].read_text()
    assert "To be reviewed, in this order" in page


def test_post_processing_that_the_bundle_speaks_for_is_applied_and_no_other(
    joined: tuple[Path, Path, list[str], Result],
) -> None:
    bundle = load_bundle(joined[3].run_id, joined[0])
    array = np.zeros((12, 12, 12), np.uint8)
    array[2:6, 2:6, 2:6], array[9, 9, 9], array[8, 2, 2] = 1, 1, 2
    choice = {"label": "anterior", "operation": "largest_component", "min_ml": None}
    for used, left in ((True, 64), (False, 65)):
        facts = {**bundle.facts, "evidence": {**bundle.evidence, "postprocessing": [{**choice, "used": used}]}}
        cleaned = Predictor(replace(bundle, facts=facts))._cleaned(Volume(array, np.eye(4))).array
        assert ((cleaned == 1).sum(), (cleaned == 2).sum()) == (left, 1)


def test_a_fold_of_two_seeds_is_measured_by_the_mean_of_its_networks(
    joined: tuple[Path, Path, list[str], Result],
) -> None:
    workspace, cohort_dir, runs, _ = joined
    config = tiny_config(*SETS, "train.fold=0", "seed=1", "tracking.register_as=tiny")
    runs = [*runs, road.train(config, cohort_dir, workspace).run_id]
    with pytest.raises(UserError, match="name the folds' cohort by --cohort"):
        folds.join(runs, workspace)
    result = folds.join(runs, workspace, cohort=cohort_dir)
    assert (result.figures["folds"], result.figures["networks"]) == (2, 3)
    bundle = load_bundle(result.run_id, workspace)
    assert [(member["fold"], member["seed"]) for member in bundle.members] == [(0, 0), (0, 1), (1, 0)]

    pool = find_run(workspace, result.run_id).path / "folds"
    assert [path.name for path in pool.iterdir()] == ["0"], "a fold of one network is taken as it was measured"
    both, image = load_network(load_bundle(pool / "0" / "bundle")), torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        parts = [load_network(load_bundle(run, workspace))(image) for run in (runs[1], runs[2])]
        assert torch.allclose(both(image), (parts[0] + parts[1]) / 2, atol=1e-5)
    measured = {row["case_id"]: row for row in read_rows(pool / "0" / "evaluation" / "val" / "cases.csv")}
    unseen = {case.case_id for case in take_fold(read_cohort(cohort_dir), 0, 2, seed=0).split("val")}
    assert set(measured) == unseen
    table = {row["case_id"]: row for row in read_rows(bundle.folder / "out_of_fold.csv")}
    assert len(table) == bundle.evidence["cross_validation"]["n_cases"] == 11, "each case once"
    alone = read_rows(find_run(workspace, runs[1]).path / "evaluation" / "val" / "cases.csv")
    for case_id in unseen:
        assert float(table[case_id]["dice_anterior"]) == pytest.approx(
            float(measured[case_id]["dice_anterior"]), abs=1e-5
        )
    assert any(row["dice_anterior"] != measured[row["case_id"]]["dice_anterior"] for row in alone)
    assert "3 networks" in (bundle.folder / "MODEL_CARD.md").read_text()
    predict_step.run(bundle, read_cohort(cohort_dir), pool / "test", split="test")
    assert {row.status for row in read_ledger(pool / "test" / "ledger.csv")} <= {"done", "flagged"}


@pytest.mark.slow
def test_only_folds_of_one_cross_validation_are_joined(
    joined: tuple[Path, Path, list[str], Result], tmp_path: Path
) -> None:
    workspace, cohort_dir, runs, result = joined
    with pytest.raises(UserError, match="fold 1 is named twice with the seed 0"):
        folds.join([runs[0], runs[0]], workspace)
    with pytest.raises(UserError, match="is no fold of a cross-validation"):
        folds.join([result.run_id, runs[0]], workspace)
    other = tiny_config(*SETS, "train.fold=0", "train.epochs=1", "train.weight_decay=0.1")
    stranger = road.train(other, cohort_dir, workspace).run_id
    with pytest.raises(UserError, match=r"differs from that of .* in more than train\.fold and seed: in train\.epochs"):
        folds.join([stranger, runs[0]], workspace)
    alone = folds.join([runs[0]], workspace)
    assert alone.figures["missing_folds"] == [0]


def _out_of_fold(run: Path) -> list[Path]:
    return sorted((run / "evaluation" / "val" / "predictions").glob("*/result.json"))


@pytest.mark.slow
def test_folds_of_a_classifier_join_too(tmp_path: Path) -> None:
    cohort = radiograph_cohort(tmp_path / "cohort")
    sets = ("train.folds=2", "train.epochs=1", "verdict.min_cases=4", "verdict.min_per_class=2")
    sets += ("explain.rank={cases: 2, methods: [gradcam, layercam]}",)
    runs = [
        road.train(tiny_radiograph_config(*sets, f"train.fold={fold}"), cohort.folder, tmp_path / "ws").run_id
        for fold in range(2)
    ]
    assert load_bundle(runs[0], tmp_path / "ws").verdict is None, "it is measured on the cases that would choose it"
    result = folds.join(runs, tmp_path / "ws")
    bundle = load_bundle(result.run_id, tmp_path / "ws")
    assert bundle.verdict is not None, "each case was seen by a network that had not learnt it"
    assert bundle.facts["calibration"] == {"method": "temperature", "id": bundle.verdict.id}
    assert (bundle.explanation["split"], bundle.explanation["n"]) == ("folds", 2)
    assert bundle.facts["explained_by"].items() >= bundle.explanation["chosen"].items()
    said = [read_json(path) for run in runs for path in _out_of_fold(find_run(tmp_path / "ws", run).path)]
    assert bundle.verdict.fitted["n"] == len(said) == sum(case.split != "test" for case in cohort.cases)
    truth = {case.case_id: case.target == "tb" for case in cohort.cases}
    margin = np.array([np.log(one["probs"]["tb"] / one["probs"]["normal"]) for one in said])
    sick = np.array([truth[one["case_id"]] for one in said])
    referred = bundle.verdict.probability(margin) >= bundle.verdict.threshold
    assert bundle.verdict.point["sensitivity"]["value"] == pytest.approx(referred[sick].mean())
    assert bundle.verdict.point["specificity"]["value"] == pytest.approx((~referred[~sick]).mean())
    assert referred[sick].mean() >= 0.9
    for model in (runs[0], result.run_id):
        with pytest.raises(UserError, match="were trained on its val split"):
            calibrations.run(model, cohort.folder, tmp_path / "ws")
    elsewhere = radiograph_cohort(tmp_path / "elsewhere", 30)
    made = load_bundle(calibrations.run(result.run_id, elsewhere.folder, tmp_path / "ws").run_id, tmp_path / "ws")
    assert made.verdict is not None
    assert (made.members, made.evidence) == (bundle.members, bundle.evidence)
    assert 0 <= result.figures["oof_auc"] <= 1
    picture = cohort.image_paths(cohort.split("test")[0])[0]
    probs = bundle.predict(picture).probs
    assert sum(probs.values()) == pytest.approx(1, abs=1e-6)
    verdict = bundle.verdict
    logits = [load_bundle(run, tmp_path / "ws").predict(picture).probs for run in runs]
    mean = np.mean([np.log(found["tb"] / found["normal"]) for found in logits])
    assert probs["tb"] == pytest.approx(float(verdict.probability([mean])[0]), abs=1e-5)


def test_an_ensemble_of_one_changes_nothing() -> None:
    net = torch.nn.Conv3d(1, 2, 1)
    image = torch.randn(1, 1, 4, 4, 4)
    assert torch.equal(Ensemble([net])(image), net(image))
    with pytest.raises(ValueError, match="at least"):
        Ensemble([])
