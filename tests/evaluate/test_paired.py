"""Differences of two models: equal to the difference of their own figures, and surer than either, since in pairs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from medseg.cohort import Case
from medseg.evaluate import classification, multi_label, segmentation
from medseg.evaluate.outcomes import Outcome
from medseg.evaluate.paired import differences

LABELS = {"normal": 0, "tb": 1}


def classified(noise: float, seed: int, count: int = 80, names: Sequence[str] = ("normal", "tb")) -> list[Outcome]:
    """Two images of each patient; what is hard of a case is the same for all models, `noise` is a model's own."""
    hard, own = np.random.default_rng(0), np.random.default_rng(seed)
    found = []
    for number in range(count):
        target = names[number % len(names)]
        scores = {name: float(name == target) + float(hard.normal()) + noise * float(own.normal()) for name in names}
        total = sum(math.exp(score) for score in scores.values())
        probs = {name: math.exp(score) / total for name, score in scores.items()}
        called = max(probs, key=lambda name: probs[name])
        case = Case(f"c{number:03}", f"p{number // 2}", ())
        found.append(Outcome(case, target=target, predicted=called, probs=probs, score=probs[target]))
    return found


def segmented(shift: float, seed: int) -> list[Outcome]:
    """Structure b is not annotated in every third case."""
    hard, own = np.random.default_rng(0), np.random.default_rng(seed)
    found = []
    for number in range(60):
        base = 0.8 + 0.1 * hard.normal()
        figures = {name: base + shift + 0.01 * own.normal() for name in ("dice_a", "iou_a", "dice_b", "iou_b")}
        figures |= {f"{name}_{label}": 1.0 for name in ("hd95_mm", "surface_dice", "volume_error_ml") for label in "ab"}
        if number % 3 == 0:
            figures |= {"dice_b": math.nan, "iou_b": math.nan}
        found.append(Outcome(Case(f"c{number:02}", f"p{number}", ()), figures=figures))
    return found


def totals(found: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The figures of each model by itself, the second way to a difference."""
    return list(found)


def test_a_model_does_not_differ_from_itself() -> None:
    for model in (classified(0.5, 1), segmented(0, 1)):
        for found in differences(model, model).values():
            assert (found["value"], found["ci_low"], found["ci_high"]) == (0, 0, 0)


@pytest.mark.parametrize("names", [("normal", "tb"), ("normal", "bacterial", "viral")])
def test_rates_differ_by_what_the_figures_of_each_say(names: Sequence[str]) -> None:
    first, other = classified(0.3, 1, names=names), classified(1.5, 2, names=names)
    labels = {name: number for number, name in enumerate(names)}
    a, b = totals(classification.total(model, labels) for model in (first, other))
    found = differences(first, other, positive="tb" if len(names) == 2 else None)
    assert set(found) == {"auc", "accuracy", "sensitivity", "specificity"}
    for name, about in found.items():
        assert about["value"] == pytest.approx(b[name]["value"] - a[name]["value"], abs=1e-12)
        assert about["n"] == len(first)


def test_rates_of_labels_that_are_not_exclusive() -> None:
    def model(seed: int) -> list[Outcome]:
        rng = np.random.default_rng(seed)
        found = []
        for number, target in enumerate(["a", "b", "a|b", "none"] * 8):
            probs = {name: float(np.clip((name in target) * 0.4 + rng.random() * 0.6, 0, 1)) for name in "ab"}
            called = "|".join(name for name, p in probs.items() if p >= 0.5) or "none"
            found.append(Outcome(Case(f"c{number}", f"p{number}", ()), target=target, predicted=called, probs=probs))
        return found

    first, other = model(1), model(2)
    a, b = totals(multi_label.total(found, {"a": 0, "b": 1}) for found in (first, other))
    for name, about in differences(first, other).items():
        if name != "accuracy":  # of the whole set; the total has none
            assert about["value"] == pytest.approx(b[name]["value"] - a[name]["value"], abs=1e-12)


def test_overlaps_differ_by_what_the_figures_of_each_say() -> None:
    first, other = segmented(0, 1), segmented(-0.01, 2)
    a, b = totals(segmentation.total(model, {"a": 1, "b": 2}) for model in (first, other))
    found = differences(first, other)
    assert list(found) == ["mean_dice", "dice_a", "iou_a", "dice_b", "iou_b"]
    assert found["mean_dice"]["value"] == pytest.approx(b["mean_dice"] - a["mean_dice"], abs=1e-12)
    for label, n in (("a", 60), ("b", 40)):
        dice_a, dice_b = (total["classes"][label]["dice"] for total in (a, b))
        about = found[f"dice_{label}"]
        assert about["value"] == pytest.approx(dice_b["mean"] - dice_a["mean"], abs=1e-12)
        assert about["n"] == n
        assert about["ci_high"] < 0, "a loss of 0.01 shows"
        assert dice_b["ci_high"] > dice_a["ci_low"], "though the intervals of the two overlap"


def test_what_is_hard_for_both_cancels_out() -> None:
    first, other = classified(0.1, 1), classified(0.1, 2)
    (whole,) = totals([classification.total(first, LABELS)])
    alone = whole["auc"]
    about = differences(first, other, positive="tb")["auc"]
    width = alone["ci_high"] - alone["ci_low"]
    assert about["ci_high"] - about["ci_low"] < width / 2


def test_cases_that_one_model_lacks_are_left_out_of_both() -> None:
    first, other = classified(0.3, 1), classified(1.5, 2)
    failed = Outcome(other[0].case, reason="no prediction was made for this case; predict it again.", target="normal")
    about = differences(first[:-1], [failed, *other[1:]], positive="tb")["auc"]
    a, b = (found["auc"]["value"] for found in totals(classification.total(m[1:-1], LABELS) for m in (first, other)))
    assert (about["n"], about["value"]) == (78, pytest.approx(b - a, abs=1e-12))
    assert differences(first[:3], other[3:]) == {}
