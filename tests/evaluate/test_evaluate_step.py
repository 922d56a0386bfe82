"""The step `evaluate`: known predictions give known figures, and no case gets lost."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medseg.cohort import Case, Cohort
from medseg.evaluate.outcomes import read_outcomes
from medseg.evaluate.step import run
from medseg.files import UserError, read_json, read_rows, write_json
from medseg.images import write_nifti, write_png
from medseg.volume import Volume

LABELS = {"core": 1, "shell": 2}
CLASSES = {"normal": 0, "lesion": 1}
AFFINE = np.array([[0, -1.5, 0, 10], [2.0, 0, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])
SHAPE = (12, 10, 8)


def _label() -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[2:10, 2:8, 1:7] = 2
    label[4:8, 3:7, 2:6] = 1
    return label


def _volume_cohort(tmp_path: Path, count: int = 4) -> tuple[Cohort, Path]:
    """Cases a, b, … whose predictions are the label itself."""
    folder, predictions = tmp_path / "cohort", tmp_path / "predictions"
    cases = []
    for name in "abcdef"[:count]:
        write_nifti(folder / "images" / f"{name}.nii.gz", Volume(np.zeros(SHAPE, np.int16), AFFINE))
        write_nifti(folder / "labels" / f"{name}.nii.gz", Volume(_label(), AFFINE))
        _predict(predictions, name, _label())
        case = Case(name, f"patient-{name}", (f"images/{name}.nii.gz",), label=f"labels/{name}.nii.gz")
        cases.append(replace(case, split="test", shape=SHAPE, site="north" if name in "ab" else "south"))
    return Cohort(folder, tuple(cases), LABELS, ("image",), "0" * 64), predictions


def _predict(predictions: Path, name: str, mask: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    write_nifti(predictions / name / "mask.nii.gz", Volume(mask, affine))
    write_json(predictions / name / "result.json", {"case_id": name, "status": "done"})


def _evaluate(cohort: Cohort, predictions: Path, out: Path, **more: object):  # type: ignore[no-untyped-def]
    arguments = {"split": "test", "bundle_facts": {"name": "x"}, "labels": LABELS, "kind": "segmentation"}
    return run(cohort, predictions, out, **(arguments | more))


def test_perfect_predictions(tmp_path: Path) -> None:
    cohort, predictions = _volume_cohort(tmp_path)
    result = _evaluate(cohort, predictions, tmp_path / "out")
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert result.status == "done"
    assert result.figures["mean_dice"] == metrics["mean_dice"] == 1
    assert metrics["classes"]["core"]["hd95_mm"]["mean"] == 0
    assert metrics["classes"]["shell"]["dice"] == {
        "mean": 1, "sd": 0, "median": 1, "ci_low": 1, "ci_high": 1, "n": 4
    }  # fmt: skip
    assert metrics["sites"]["north"]["n"] == 2
    assert read_json(tmp_path / "out" / "evaluate.json")["status"] == "done"


def test_what_a_case_does_not_annotate_has_no_figures_whatever_was_predicted(tmp_path: Path) -> None:
    """The reference of c lacks the core; where it does not tell of it, that is no false alarm and no missed core."""
    cohort, predictions = _volume_cohort(tmp_path)
    bare = np.where(_label() == 1, 0, _label()).astype(np.uint8)
    for name in "cd":
        write_nifti(cohort.folder / "labels" / f"{name}.nii.gz", Volume(bare, AFFINE))
    _predict(predictions, "d", bare)
    cases = [replace(case, annotated="shell" if case.case_id in "cd" else "") for case in cohort.cases]
    result = _evaluate(replace(cohort, cases=tuple(cases)), predictions, tmp_path / "out")
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert result.figures["mean_dice"] == 1
    assert metrics["annotated"] == {"core": 2, "shell": 4}
    assert {name: found["n"] for name, found in metrics["classes"]["core"].items()} == dict.fromkeys(
        ("dice", "hd95_mm", "surface_dice", "volume_error_ml"), 2
    )
    assert metrics["classes"]["shell"]["dice"]["n"] == 4
    cells = {row["case_id"]: row for row in read_rows(tmp_path / "out" / "cases.csv")}
    assert all(
        cells[name][f"{figure}_core"] == "" for name in "cd" for figure in ("dice", "hd95_mm", "volume_error_ml")
    )
    told = {outcome.case.case_id: outcome.not_annotated for outcome in read_outcomes(tmp_path / "out")}
    assert told == {"a": (), "b": (), "c": ("core",), "d": ("core",)}
    _evaluate(cohort, predictions, tmp_path / "whole")
    whole = read_json(tmp_path / "whole" / "metrics.json")
    assert "annotated" not in whole
    assert whole["classes"]["core"]["dice"]["mean"] == pytest.approx(2 / 3), "c counts as a false alarm"


def test_a_shifted_prediction_has_its_known_figures_and_comes_first(tmp_path: Path) -> None:
    """Case c is shifted by one voxel along the first array axis, 2 mm in the world."""
    cohort, predictions = _volume_cohort(tmp_path)
    _predict(predictions, "c", np.roll(_label(), 1, axis=0))
    smaller = _label()
    smaller[smaller == 1] = 0
    smaller[4:8, 3:7, 2:4] = 1  # half of the core, 32 voxels of 9 mm3 missing
    _predict(predictions, "d", smaller)
    _evaluate(cohort, predictions, tmp_path / "out")
    cases = read_json(tmp_path / "out" / "cases.json")
    by_id = {case["case_id"]: case for case in cases}
    assert by_id["c"]["metrics"]["dice_core"] == pytest.approx(0.75)
    assert by_id["c"]["metrics"]["hd95_mm_core"] == pytest.approx(2)
    assert by_id["d"]["metrics"]["volume_error_ml_core"] == pytest.approx(-32 * 9 / 1000)
    assert by_id["d"]["metrics"]["dice_core"] == pytest.approx(2 / 3)
    assert [case["case_id"] for case in cases][2:] == ["a", "b"]
    assert [case["score"] for case in cases] == sorted(case["score"] for case in cases)
    assert Path(by_id["c"]["pred"]).is_absolute()
    assert [row["case_id"] for row in read_rows(tmp_path / "out" / "cases.csv")] == ["a", "b", "c", "d"]
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["classes"]["core"]["dice"]["mean"] == pytest.approx((1 + 1 + 0.75 + 2 / 3) / 4)


def test_cases_that_cannot_be_measured_are_listed_first_and_enter_no_mean(tmp_path: Path) -> None:
    cohort, predictions = _volume_cohort(tmp_path, 6)
    (predictions / "b" / "result.json").unlink()
    write_json(predictions / "c" / "result.json", {"status": "failed", "reason": "out of memory"})
    _predict(predictions, "d", _label()[:-1])
    _predict(predictions, "e", _label(), AFFINE @ np.diag([-1, 1, 1, 1]))
    (predictions / "f" / "mask.nii.gz").write_bytes(b"broken")
    _predict(predictions, "a", np.zeros(SHAPE, np.uint8))  # score 0 too, but measured
    result = _evaluate(cohort, predictions, tmp_path / "out")
    metrics = read_json(tmp_path / "out" / "metrics.json")
    reasons = {case["case_id"]: case["reason"] for case in metrics["failed"]}
    assert (result.status, result.exit_code, result.figures["failed"]) == ("partial", 3, 5)
    assert (metrics["n_cases"], metrics["n_measured"], metrics["classes"]["core"]["dice"]["n"]) == (6, 1, 1)
    for name, word in {"b": "no prediction", "c": "memory", "d": "shape", "e": "affine", "f": "cannot be read"}.items():
        assert word in reasons[name]
    assert str(tmp_path) not in (tmp_path / "out" / "cases.csv").read_text(), "the table leaves the machine"
    cases = read_json(tmp_path / "out" / "cases.json")
    assert [case["case_id"] for case in cases] == ["b", "c", "d", "e", "f", "a"]
    assert {row["status"] for row in read_rows(tmp_path / "out" / "cases.csv")} == {"failed", "measured"}


def test_a_label_absent_from_case_and_prediction_is_left_out_an_invented_one_counts(tmp_path: Path) -> None:
    cohort, predictions = _volume_cohort(tmp_path, 3)
    no_core = np.where(_label() == 1, 2, _label()).astype(np.uint8)
    for name in "ab":
        write_nifti(cohort.folder / "labels" / f"{name}.nii.gz", Volume(no_core, AFFINE))
    _predict(predictions, "a", no_core)
    _evaluate(cohort, predictions, tmp_path / "out")
    core = read_json(tmp_path / "out" / "metrics.json")["classes"]["core"]
    assert (core["dice"]["n"], core["dice"]["mean"]) == (2, 0.5)
    assert core["hd95_mm"]["n"] == 2
    by_id = {row["case_id"]: row for row in read_rows(tmp_path / "out" / "cases.csv")}
    assert by_id["a"]["dice_core"] == ""
    assert (float(by_id["a"]["score"]), float(by_id["b"]["dice_core"])) == (1, 0)


def test_processes_give_the_same_figures(tmp_path: Path) -> None:
    cohort, predictions = _volume_cohort(tmp_path, 2)
    _predict(predictions, "a", np.roll(_label(), 1, axis=1))
    for workers in (1, 2):
        _evaluate(cohort, predictions, tmp_path / str(workers), workers=workers)
    assert (tmp_path / "1" / "metrics.json").read_bytes() == (tmp_path / "2" / "metrics.json").read_bytes()


def test_nothing_measurable_is_an_error_that_says_why(tmp_path: Path) -> None:
    cohort, _ = _volume_cohort(tmp_path, 2)
    with pytest.raises(UserError, match="a: no prediction"):
        _evaluate(cohort, tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="val"):
        _evaluate(cohort, tmp_path / "nowhere", tmp_path / "out", split="val")


def _radiographs(tmp_path: Path, probs: dict[str, float]) -> tuple[Cohort, Path]:
    """Cases named `<class>-<n>` with the given probability of a lesion; sites alternate."""
    folder, predictions = tmp_path / "cohort", tmp_path / "predictions"
    cases = []
    for at, (name, p) in enumerate(probs.items()):
        write_png(folder / "images" / f"{name}.png", np.zeros((8, 6), np.uint8))
        write_json(
            predictions / name / "result.json",
            {"status": "flagged", "probs": {"normal": 1 - p, "lesion": p}, "predicted": "normal"},
        )
        case = Case(name, name, (f"images/{name}.png",), "radiograph", target=name.split("-")[0], split="test")
        cases.append(replace(case, site=("north", "south")[at % 2], shape=(8, 6)))
    return Cohort(folder, tuple(sorted(cases, key=lambda c: c.case_id)), CLASSES, ("image",), "0" * 64), predictions


PROBS = {"lesion-1": 0.9, "lesion-2": 0.7, "lesion-3": 0.35, "normal-1": 0.1, "normal-2": 0.4, "normal-3": 0.2}


def _classify(cohort: Cohort, predictions: Path, out: Path, **more: object):  # type: ignore[no-untyped-def]
    return _evaluate(cohort, predictions, out, **({"labels": CLASSES, "kind": "classification"} | more))


def test_classification_figures(tmp_path: Path) -> None:
    cohort, predictions = _radiographs(tmp_path, PROBS)
    result = _classify(cohort, predictions, tmp_path / "out")
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert result.figures["auc"] == pytest.approx(8 / 9, abs=1e-5)
    assert metrics["auc"]["ci_low"] < metrics["auc"]["value"] <= metrics["auc"]["ci_high"]
    assert metrics["confusion"] == [[3, 0], [1, 2]]
    assert metrics["sensitivity"]["value"] == pytest.approx(2 / 3)
    assert metrics["sensitivity"]["n"] == 3
    assert metrics["specificity"]["value"] == 1
    assert metrics["accuracy"]["value"] == pytest.approx(5 / 6)
    assert (metrics["roc"]["fpr"][0], metrics["roc"]["tpr"][-1]) == (0, 1)
    assert metrics["sites"]["north"]["n"] == 3
    cases = read_json(tmp_path / "out" / "cases.json")
    assert (cases[0]["case_id"], cases[0]["predicted"], cases[0]["target"]) == ("lesion-3", "normal", "lesion")


def test_the_operating_point_of_the_model_replaces_one_half(tmp_path: Path) -> None:
    cohort, predictions = _radiographs(tmp_path, PROBS)
    facts = {"operating_point": {"target": "lesion", "threshold": 0.3}}
    _classify(cohort, predictions, tmp_path / "out", bundle_facts=facts)
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["confusion"] == [[2, 1], [0, 3]]
    assert (metrics["positive"], metrics["threshold"]) == ("lesion", 0.3)
    facts = {"operating_point": {"target": "normal", "threshold": 0.85}}
    _classify(cohort, predictions, tmp_path / "out", bundle_facts=facts)
    turned = read_json(tmp_path / "out" / "metrics.json")
    assert turned["confusion"] == [[1, 2], [0, 3]]
    assert turned["positive"] == "normal"
    assert turned["sensitivity"]["value"] == pytest.approx(1 / 3)
    assert turned["auc"]["value"] == pytest.approx(metrics["auc"]["value"])
    for point in (0.3, {"target": "lesion", "threshold": 30}, {"target": "liver", "threshold": 0.5}):
        with pytest.raises(UserError, match="operating_point"):
            _classify(cohort, predictions, tmp_path / "out", bundle_facts={"operating_point": point})


def test_one_class_only_has_no_auc_but_an_accuracy(tmp_path: Path) -> None:
    cohort, predictions = _radiographs(tmp_path, {"lesion-1": 0.9, "lesion-2": 0.2})
    result = _classify(cohort, predictions, tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["auc"]["value"] is None
    assert metrics["roc"] is None
    assert "auc" not in result.figures
    assert result.figures["accuracy"] == 0.5


def test_three_classes_are_each_held_against_the_rest(tmp_path: Path) -> None:
    labels = {"normal": 0, "lesion": 1, "other": 2}
    names = ["normal-1", "normal-2", "lesion-1", "lesion-2", "other-1", "other-2"]
    cohort, predictions = _radiographs(tmp_path, dict.fromkeys(names, 0.0))
    for name in names:
        probs = {label: 0.8 if name.startswith(label) else 0.1 for label in labels}
        write_json(predictions / name / "result.json", {"status": "done", "probs": probs})
    wrong = {"normal": 0.1, "lesion": 0.1, "other": 0.8}
    write_json(predictions / "lesion-2" / "result.json", {"status": "done", "probs": wrong})
    _classify(cohort, predictions, tmp_path / "out", labels=labels)
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["confusion"] == [[2, 0, 0], [0, 1, 1], [0, 0, 2]]
    assert metrics["sensitivity"]["value"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert metrics["specificity"]["value"] == pytest.approx((1 + 1 + 0.75) / 3)
    # lesion: one of two beats all four others, the other ties with them (8 pairs: 4 + 4 / 2)
    assert metrics["per_class"]["lesion"]["auc"]["value"] == pytest.approx(0.75)
    areas = [found["auc"]["value"] for found in metrics["per_class"].values()]
    assert metrics["auc"]["value"] == pytest.approx(np.mean(areas))
    assert [metrics["per_class"][name]["sensitivity"]["value"] for name in labels] == [1, 0.5, 1]
    other = metrics["per_class"]["other"]
    assert (other["n"], other["precision"]["value"], other["specificity"]["value"]) == (2, pytest.approx(2 / 3), 0.75)
    assert 0 < other["precision"]["ci_low"] < other["precision"]["ci_high"] < 1
    assert metrics["positive"] is None
    assert "roc" not in metrics


def test_the_operating_point_of_one_class_of_three_rules_its_figures(tmp_path: Path) -> None:
    """Called from its threshold on, though another is more probable; below it the most probable other class is."""
    labels = {"normal": 0, "lesion": 1, "other": 2}
    given = {"normal-1": (0.7, 0.2, 0.1), "normal-2": (0.5, 0.4, 0.1), "lesion-1": (0.6, 0.35, 0.05)}
    given |= {"lesion-2": (0.1, 0.29, 0.61), "other-1": (0.1, 0.1, 0.8), "other-2": (0.25, 0.2, 0.55)}
    cohort, predictions = _radiographs(tmp_path, dict.fromkeys(given, 0.0))
    for name, probs in given.items():
        write_json(
            predictions / name / "result.json", {"status": "done", "probs": dict(zip(labels, probs, strict=True))}
        )
    facts = {"operating_point": {"target": "lesion", "threshold": 0.3}}
    result = _classify(cohort, predictions, tmp_path / "out", labels=labels, bundle_facts=facts)
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["confusion"] == [[1, 1, 0], [0, 1, 1], [0, 0, 2]]
    lesion = metrics["per_class"]["lesion"]
    assert (lesion["sensitivity"]["value"], lesion["specificity"]["value"]) == (0.5, 0.75)
    assert result.figures["sensitivity_lesion"] == 0.5
    # of the class of the operating point: of its 8 pairs 0.35 loses to 0.4 and 0.29 as well
    assert lesion["auc"]["value"] == pytest.approx(6 / 8)
    assert np.trapezoid(metrics["roc"]["tpr"], metrics["roc"]["fpr"]) == pytest.approx(6 / 8)
    truth = np.array([0, 0, 1, 1, 0, 0])
    p = np.array([probs[1] for probs in given.values()])
    assert metrics["calibration"]["brier"]["value"] == pytest.approx(((p - truth) ** 2).mean())


def test_maps_are_held_against_the_lesions(tmp_path: Path) -> None:
    cohort, predictions = _radiographs(tmp_path, PROBS)
    lesions = tmp_path / "lesions"
    mask = np.zeros((8, 6), np.uint8)
    mask[:2, :3] = 255
    found = {"lesion-1": ("lesion", (mask > 0) * 4.0), "lesion-2": ("lesion", np.zeros((8, 6)))}
    found |= {"lesion-3": ("normal", (mask > 0) * 4.0), "normal-1": ("normal", np.ones((8, 6)))}
    for name, (target, activation) in found.items():
        write_png(lesions / f"{name}.png", mask if name.startswith("lesion") else np.zeros((8, 6), np.uint8))
        folder = predictions / name / "explanation"
        folder.mkdir()
        np.save(folder / "map.npy", activation.astype(np.float32))
        write_json(folder / "explanation.json", {"target": target})
    result = _classify(cohort, predictions, tmp_path / "out", lesions=lesions)
    located = read_json(tmp_path / "out" / "metrics.json")["localisation"]
    assert located["n"] == 2  # not the map that explains "normal", not the case without a lesion
    assert located["energy_in_mask"]["mean"] == located["pointing_hit"]["mean"] == located["evidence"]["mean"] == 0.5
    assert located["mask_share"]["mean"] == pytest.approx(6 / 48)
    assert result.figures["map_energy_in_lesion"] == 0.5
    cases = {case["case_id"]: case for case in read_json(tmp_path / "out" / "cases.json")}
    assert cases["lesion-1"]["metrics"]["energy_in_mask"] == 1
    assert cases["lesion-1"]["explanation"].endswith("lesion-1/explanation")
    assert cases["normal-2"]["explanation"] is None


def test_radiograph_masks_have_no_volume_and_distances_only_with_a_pixel_spacing(tmp_path: Path) -> None:
    cohort, predictions = _radiographs(tmp_path, {"lung-1": 0.5, "lung-2": 0.5})
    label = np.zeros((8, 6), np.uint8)
    label[2:6, 2:4] = 1
    for name in ("lung-1", "lung-2"):
        write_png(cohort.folder / "labels" / f"{name}.png", label)
        write_png(predictions / name / "mask.png", np.roll(label, 1, axis=0))
    cases = [replace(case, label=f"labels/{case.case_id}.png") for case in cohort.cases]
    cases[0] = replace(cases[0], spacing_mm=(0.5, 0.5))
    _evaluate(replace(cohort, cases=tuple(cases)), predictions, tmp_path / "out", labels={"lung": 1})
    lung = read_json(tmp_path / "out" / "metrics.json")["classes"]["lung"]
    assert lung["dice"]["mean"] == pytest.approx(0.75)
    assert (lung["hd95_mm"]["n"], lung["hd95_mm"]["mean"]) == (1, 0.5)
    assert lung["volume_error_ml"]["n"] == 0
    assert not math.isnan(lung["dice"]["ci_low"])
