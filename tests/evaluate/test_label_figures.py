"""Labels that are not exclusive, measured: figures worked out by hand, no case lost, maps held against own labels."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.cohort import Case, Cohort
from medseg.evaluate import cross_validation, localisation, multi_label
from medseg.evaluate.outcomes import Outcome, read_outcomes
from medseg.evaluate.step import run
from medseg.files import UserError, read_json, write_json
from medseg.images import write_png

LABELS = {"b": 1, "a": 0}
KNOWN = (  # target, p(a), p(b)
    ("a", 0.9, 0.2),
    ("a|b", 0.4, 0.8),
    ("none", 0.6, 0.1),
    ("b", 0.1, 0.3),
    ("none", 0.2, 0.25),
)


def cases_of(folder: Path, known: tuple[tuple[str, float, float], ...] = KNOWN) -> Cohort:
    cases = []
    for number, (target, a, b) in enumerate(known):
        site = "x" if number < 3 else "y"
        cases.append(Case(f"c{number}", f"p{number}", (f"c{number}.png",), split="test", target=target, site=site))
        write_png(folder / "cohort" / f"c{number}.png", np.zeros((4, 4), np.uint8))
        result = {"status": "done", "patient_id": f"p{number}", "probs": {"a": a, "b": b}}
        write_json(folder / "predictions" / f"c{number}" / "result.json", result)
    return Cohort(folder / "cohort", tuple(cases), LABELS, ("image",), "0" * 64)


def evaluate(folder: Path, cohort: Cohort) -> dict[str, Any]:
    facts = {"name": "x"}
    run(cohort, folder / "predictions", folder, split="test", bundle_facts=facts, labels=LABELS, kind="multi_label")
    metrics = read_json(folder / "metrics.json")
    assert isinstance(metrics, dict)
    return metrics


def test_each_label_has_its_own_figures_and_the_means_are_over_labels(tmp_path: Path) -> None:
    """Of label a 5 of 6 pairs are in order, of b all 6 (0.8 and 0.3 exceed 0.25, 0.2 and 0.1); each finds 1 of 2."""
    metrics = evaluate(tmp_path, cases_of(tmp_path))
    a, b = metrics["per_label"]["a"], metrics["per_label"]["b"]
    assert list(metrics["per_label"]) == ["a", "b"], "in the order of their values"
    assert (a["n_positive"], b["n_positive"]) == (2, 2)
    assert (a["auc"]["value"], b["auc"]["value"]) == (pytest.approx(5 / 6), 1)
    assert (a["sensitivity"]["value"], b["sensitivity"]["value"]) == (0.5, 0.5)
    assert (a["specificity"]["value"], b["specificity"]["value"]) == (pytest.approx(2 / 3), 1)
    assert (a["sensitivity"]["n"], a["specificity"]["n"], a["auc"]["n"]) == (2, 3, 5)
    assert metrics["auc"]["value"] == pytest.approx((5 / 6 + 1) / 2)
    assert metrics["specificity"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["auc"]["ci_low"] <= metrics["auc"]["value"] <= metrics["auc"]["ci_high"]
    assert metrics["sites"]["y"]["n"] == 2
    assert metrics["sites"]["y"]["sensitivity"]["value"] == 0, "of b alone, since no case there has a"
    assert metrics["sites"]["y"]["auc"]["value"] == 1
    worst = read_json(tmp_path / "cases.json")[0]
    assert (worst["case_id"], worst["target"], worst["predicted"]) == ("c3", "b", "none")
    assert worst["score"] == pytest.approx(0.3), "the truth about b got 0.3, that about a 0.9"


def test_a_label_without_cases_has_no_figures_and_takes_none_from_the_mean(tmp_path: Path) -> None:
    metrics = evaluate(tmp_path, cases_of(tmp_path, (("a", 0.9, 0.6), ("none", 0.2, 0.1))))
    b = metrics["per_label"]["b"]
    assert (b["n_positive"], b["auc"]["value"], b["sensitivity"]["value"]) == (0, None, None)
    assert b["specificity"]["value"] == 0.5
    assert metrics["auc"]["value"] == metrics["sensitivity"]["value"] == 1
    assert metrics["specificity"]["value"] == 0.75


def test_no_case_gets_lost(tmp_path: Path) -> None:
    cohort = cases_of(tmp_path)
    write_json(tmp_path / "predictions" / "c1" / "result.json", {"status": "done", "probs": {"a": 0.5}})
    cases = (replace(cohort.cases[0], target="a|c"), *cohort.cases[1:4], replace(cohort.cases[4], target=""))
    metrics = evaluate(tmp_path, replace(cohort, cases=cases))
    reasons = {failed["case_id"]: failed["reason"] for failed in metrics["failed"]}
    assert set(reasons) == {"c0", "c1", "c4"}
    assert "no probability of 'b'" in reasons["c1"]
    assert "gives no labels among a, b" in reasons["c0"]
    assert metrics["n_measured"] == metrics["n"] == 2
    with pytest.raises(UserError, match="none of the 1 cases"):
        evaluate(tmp_path, replace(cohort, cases=cases[:1]))


def test_folds_are_pooled(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    evaluate(tmp_path / "e", cases_of(tmp_path / "e"))
    outcomes = read_outcomes(tmp_path / "e")
    assert {outcome.target for outcome in outcomes} == {target for target, _, _ in KNOWN}
    evidence = cross_validation.total({0: outcomes[:3], 1: outcomes[3:]}, LABELS, "multi_label")
    assert evidence["auc"]["value"] == pytest.approx((5 / 6 + 1) / 2)
    assert set(cross_validation.headline(evidence)) == {"oof_auc", "oof_sensitivity", "oof_specificity"}
    assert len(cross_validation.rows({"cross_validation": evidence})) == 3
    assert set(evidence["by_fold"]) == {"0", "1"}


@pytest.mark.parametrize(("target", "explained", "held"), [("a|b", "b", True), ("a", "b", False), ("none", "a", False)])
def test_a_map_counts_where_it_explains_a_label_of_the_case(
    tmp_path: Path, target: str, explained: str, held: bool
) -> None:
    outcome = Outcome(Case("c", "p", ()), target=target)
    mask, activation = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.float32)
    mask[:4], activation[2:6] = 1, 1
    write_png(tmp_path / "lesions" / "c.png", mask)
    folder = tmp_path / "predictions" / "c" / "explanation"
    write_json(folder / "explanation.json", {"target": explained, "withheld": False})
    np.save(folder / "map.npy", activation)
    found = localisation.locate(outcome, tmp_path / "predictions", tmp_path / "lesions")
    assert found.get("energy_in_mask", math.nan) == (0.5 if held else pytest.approx(math.nan, nan_ok=True))


def test_the_interval_of_a_mean_is_that_of_its_label_where_there_is_one(tmp_path: Path) -> None:
    """With two labels that are copies of each other the mean is each of them, and so is its interval."""
    outcomes = []
    rng = np.random.default_rng(1)
    for number in range(40):
        present, p = number % 3 == 0, float(rng.uniform(0.3, 1) if number % 3 == 0 else rng.uniform(0, 0.7))
        case = Case(f"c{number}", f"p{number // 2}", ())
        outcomes.append(Outcome(case, target="a|b" if present else "none", probs={"a": p, "b": p}))
    found: Any = multi_label.total(outcomes, LABELS, seed=4)
    for bound in ("value", "ci_low", "ci_high"):
        assert found["auc"][bound] == pytest.approx(found["per_label"]["a"]["auc"][bound], abs=1e-9)
    assert found["auc"]["ci_high"] - found["auc"]["ci_low"] > 0.05
