"""Labels that are not exclusive: the whole road on two independent marks, and every refusal on the way."""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from synthetic import tiny_config, tiny_radiograph_config, two_mark_radiographs

from medseg import calibrations, road, shelf
from medseg.bundle import load_bundle
from medseg.cohort import Case, Cohort, check_cases, read_cohort
from medseg.config import Config
from medseg.files import UserError, read_json, read_rows
from medseg.label_sets import call_labels, read_set, write_set
from medseg.predict.pyfunc import PathModel
from medseg.result import Result
from medseg.splits import assign_folds, assign_splits
from medseg.train.cohort_check import check_cohort

LABELS = {"lower": 0, "upper": 1}
TASK = "task={kind: classification, multi_label: true, labels: {lower: 0, upper: 1}, spatial_dims: 2}"
LOSS = "loss={name: binary_cross_entropy, balance: true}"
TABLE = "ingest.table={image: image, label: '', target: marks, site: site, split: ''}"
INGEST = ("ingest.names=kept", TABLE, "ingest.target_names={No mark: none}", "ingest.split={val: 0.2, test: 0.2}")


def config(*overrides: str) -> Config:
    return tiny_radiograph_config(
        TASK,
        LOSS,
        "verdict={}",
        "export={}",
        "train={epochs: 16, validate_every: 16, warmup_steps: 2, learning_rate: 0.01, ema_decay: 0.8, precision: fp32}",
        "augment={probability: 0}",
        "explain={max_cases: 1, cases: doubtful, rank: {cases: 1, methods: [gradcam]}}",
        "tracking={system_metrics: false, register_as: two_marks}",
        *overrides,
    )


Walked = tuple[Path, Cohort, Result, Result]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    """Workspace, cohort, and the results of training and evaluation; ingest guesses the labels from the table."""
    place = tmp_path_factory.mktemp("two marks")
    table = two_mark_radiographs(place / "scans")
    road.ingest([str(table.parent)], place / "cohort", table, None, ["task.multi_label=true", *INGEST], place)
    trained = road.train(config(), place / "cohort", place)
    return place, read_cohort(place / "cohort"), trained, road.evaluate(trained.run_id, place / "cohort", place)


def test_the_table_becomes_sets_in_the_order_of_the_labels(walked: Walked) -> None:
    place, cohort, _, _ = walked
    assert cohort.label_names == LABELS
    assert Counter(case.target for case in cohort.cases) == {"none": 10, "lower": 10, "upper": 10, "lower|upper": 10}
    given = {row["image"]: row["marks"] for row in read_rows(place / "scans" / "marks.csv")}
    for case in cohort.cases:
        assert case.target == given[f"{case.case_id}.png"].replace("No mark", "none")
    html = (place / "cohort" / "report" / "index.html").read_text()
    assert "A case counts under each of its labels." in html
    assert "lower|upper</td>" not in html


def test_both_marks_are_learnt_and_measured_each_on_its_own(walked: Walked) -> None:
    place, cohort, trained, evaluated = walked
    assert trained.figures["val_score"] == pytest.approx(
        (trained.figures["val_auc_lower"] + trained.figures["val_auc_upper"]) / 2  # type: ignore[operator]
    )
    out = place / "runs" / trained.run_id / "evaluation" / "test"
    metrics = read_json(out / "metrics.json")
    assert metrics["task"] == "multi_label"
    assert "confusion" not in metrics
    for name in LABELS:
        assert metrics["per_label"][name]["auc"]["value"] > 0.95, "chance is 0.5"
        assert metrics["per_label"][name]["n_positive"] == sum(name in c.target for c in cohort.split("test"))
    for figure in ("auc", "sensitivity", "specificity"):
        parts = [metrics["per_label"][name][figure]["value"] for name in LABELS]
        assert metrics[figure]["value"] == pytest.approx(sum(parts) / 2)
    assert evaluated.figures["auc_upper"] == pytest.approx(metrics["per_label"]["upper"]["auc"]["value"], abs=1e-5)
    assert "accuracy" not in evaluated.figures
    assert trained.figures["explain_method"] == "gradcam"
    cases = {entry["case_id"]: entry for entry in read_json(out / "cases.json")}
    for case in cohort.split("test"):
        assert cases[case.case_id]["target"] == case.target
    html = (place / "runs" / trained.run_id / "report" / "index.html").read_text()
    for words in ("Agreement with the known labels", "Mean of the labels", "Finds, each on its own, lower, upper"):
        assert words in html
    assert "Confusion" not in html


def test_each_image_gets_its_own_set(walked: Walked, tmp_path: Path) -> None:
    place, _, trained, _ = walked
    table = two_mark_radiographs(tmp_path / "scans", 4)
    road.predict(trained.run_id, [str(table.parent)], tmp_path / "out", place)
    found = {name: read_json(tmp_path / "out" / f"marks-0{name}" / "result.json") for name in range(4)}
    assert {name: result["predicted"] for name, result in found.items()} == {
        0: [], 1: ["upper"], 2: ["lower"], 3: ["lower", "upper"]
    }  # fmt: skip
    assert sum(found[3]["probs"].values()) > 1 > sum(found[0]["probs"].values()), "they do not add up to 1"
    assert found[3]["verdict"] is None
    html = road.report(str(tmp_path / "out"), place).paths["report"].read_text()
    assert "lower, upper</td>" in html
    assert "none</td>" in html
    served = PathModel(load_bundle(trained.run_id, place)).predict(
        pd.DataFrame({"path": [str(table.parent)]}), {"out": str(tmp_path / "served")}
    )
    assert list(served["predicted"]) == ["none", "upper", "lower", "lower|upper"]


def test_a_map_explains_one_label(walked: Walked) -> None:
    place, _, trained, _ = walked
    predictions = place / "runs" / trained.run_id / "evaluation" / "test" / "predictions"
    results = {path.parent.name: read_json(path) for path in predictions.glob("*/result.json")}
    (explained,) = predictions.glob("*/explanation/explanation.json")
    doubts = {name: min(max(p, 1 - p) for p in result["probs"].values()) for name, result in results.items()}
    case_id = explained.parent.parent.name
    assert case_id == min(doubts, key=lambda name: (doubts[name], name))
    probs = results[case_id]["probs"]
    assert read_json(explained)["target"] == max(probs, key=lambda name: probs[name])


def test_there_is_neither_a_verdict_nor_an_audit(walked: Walked) -> None:
    place, cohort, trained, _ = walked
    bundle = load_bundle(trained.run_id, place)
    assert bundle.verdict is None
    assert "Multi-label classification in 2D of lower, upper" in (bundle.folder / "MODEL_CARD.md").read_text()
    with pytest.raises(UserError, match=r"task\.multi_label true, and a verdict is about one class"):
        calibrations.run(trained.run_id, cohort.folder, place)
    with pytest.raises(UserError, match=r"task\.multi_label true, and an audit is about one class"):
        road.audit(trained.run_id, cohort.folder, place)
    with pytest.raises(UserError, match=r"does not become 'champion': sites \(not audited\)"):
        shelf.promote_model(trained.run_id, "champion", place)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loss={name: cross_entropy}", "'cross_entropy' does not fit task.multi_label true; set it to 'binary_cross"),
        ("task.multi_label=false", "'binary_cross_entropy' does not fit task.multi_label false; set it to 'cross_ent"),
        (
            "task={kind: segmentation, multi_label: true, labels: {organ: 1, lesion: 2}}",
            "multi_label is for task.kind 'classification', not 'segmentation'",
        ),
        ("task.labels={lower: 0}", "multi_label needs two or more labels"),
        ("task.labels={lower: 0, none: 1}", "label 'none' cannot stand in a cell with several labels"),
        ("task.labels={lower: 0, 'a|b': 1}", r"label 'a\|b' cannot stand in a cell"),
        ("verdict.positive=lower", "verdict.positive 'lower': with task.multi_label there is no verdict"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(override)


def test_segmentation_keeps_its_own_loss() -> None:
    with pytest.raises(UserError, match=r"'binary_cross_entropy' does not fit task\.kind 'segmentation'"):
        tiny_config("loss={name: binary_cross_entropy}")


@pytest.mark.parametrize(
    ("cell", "code"),
    [("", "no_target"), ("middle", "unknown_target"), ("lower|", "unknown_target"), ("none|lower", "unknown_target")],
)
def test_a_cell_that_does_not_fit_is_a_reject(tmp_path: Path, cell: str, code: str) -> None:
    table = two_mark_radiographs(tmp_path / "scans", 3)
    rows = read_rows(table)
    rows[1]["marks"], rows[2]["marks"] = cell, "upper | lower|upper"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    result = road.ingest([str(table.parent)], tmp_path / "cohort", table, None, [TASK, *INGEST], tmp_path)
    assert [row["code"] for row in read_rows(result.paths["rejects"])] == [code]
    assert [case.target for case in read_cohort(tmp_path / "cohort").cases] == ["none", "lower|upper"]


def cohort_of(folder: Path, *targets: str) -> Cohort:
    cases = tuple(
        Case(f"{split}-{n}", f"{split}-{n}", ("i",), kind="radiograph", split=split, target=target)
        for split in ("train", "val")
        for n, target in enumerate(targets)
    )
    return Cohort(folder, cases, LABELS)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("none", "lower"), "class 'upper' is missing from split 'train'"),
        (("upper", "lower|upper"), "label 'upper' is present in every case of split 'train'"),
        (("none", "lower", "middle|upper"), r"case 'train-2' has the target 'middle\|upper', which does not fit"),
        (("none", "lower", ""), "case 'train-2' of split 'train' has no label"),
    ],
)
def test_a_cohort_that_cannot_be_learnt_is_refused(tmp_path: Path, targets: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_cohort(config(), cohort_of(tmp_path, *targets))


def test_sets_are_no_classes_but_classes_are_sets(tmp_path: Path) -> None:
    check_cohort(config(), cohort_of(tmp_path, "lower", "upper"))
    single = config("task.multi_label=false", "loss={name: cross_entropy}")
    with pytest.raises(UserError, match=r"has the target 'lower\|upper', which does not fit task\.labels"):
        check_cohort(single, cohort_of(tmp_path, "lower", "upper", "lower|upper"))


def test_cells_survive_a_round_trip_and_name_each_label_once() -> None:
    assert write_set(read_set("upper| lower|upper"), LABELS) == "lower|upper"
    assert [read_set(cell) for cell in ("none", "upper", "lower|upper")] == [(), ("upper",), ("lower", "upper")]
    assert write_set((), LABELS) == "none"
    assert call_labels({"lower": 0.5, "upper": 0.49999}) == ("lower",)


def test_splits_and_folds_stay_balanced_in_every_label() -> None:
    targets = ("none", "lower", "upper", "lower|upper", "none", "none", "upper")
    cases = [Case(f"c{n:03d}", f"p{n // 2}", ("i",), target=targets[n // 2 % 7]) for n in range(280)]
    dealt = assign_splits(cases, val=0.2, test=0.3, seed=3)
    check_cases(dealt)
    parts = [[c for c in dealt if c.split == name] for name in ("train", "val", "test")]
    folds = assign_folds([replace(case, split="train") for case in cases], 5, seed=3)
    parts += [[case for case in cases if folds[case.case_id] == fold] for fold in range(5)]
    for part in parts:
        for name, share in (("lower", 2 / 7), ("upper", 3 / 7)):
            assert sum(name in case.target for case in part) / len(part) == pytest.approx(share, abs=0.08)
