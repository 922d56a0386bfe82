"""Expected Dice, bounds and temperatures against answers that are known beforehand."""

import math

import numpy as np
import pytest

from medseg.confidence import (
    ExpectedDice,
    Features,
    agreement_bound,
    calibration_error,
    compare,
    fit_expected_dice,
    fit_temperature,
    from_facts,
)
from medseg.metrics import dice


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cases whose Dice follows from their features by a known curve, with noise; five folds."""
    rng = np.random.default_rng(seed)
    soft, entropy = rng.uniform(0.5, 0.98, count), rng.uniform(0.02, 0.4, count)
    height = -0.5 + 0.8 * np.log(soft / (1 - soft)) - 2.0 * entropy
    reached = 1 / (1 + np.exp(-height)) + rng.normal(0, 0.03, count)
    return np.stack([soft, entropy], 1), np.clip(reached, 0, 1), np.arange(count) % 5


def test_a_known_curve_is_found_again_and_its_interval_holds_on_new_cases() -> None:
    fitted = fit_expected_dice(*drawn(200, 1))
    assert fitted is not None
    expected, held_out = fitted
    assert expected.coefficients == pytest.approx((-0.5, 0.8, 2.0), abs=0.2)
    x, y, _ = drawn(400, 2)
    said = [expected(Features(float(soft), float(entropy))) for soft, entropy in x]
    inside = np.mean([low <= reached <= high for (_, low, high), reached in zip(said, y, strict=True)])
    assert 0.85 <= inside <= 0.96, "nine of ten"
    assert compare([value for value, _, _ in said], y)["pearson"] > 0.9
    assert compare(held_out, drawn(200, 1)[1])["absolute_error"] < 0.035


def test_a_case_has_no_say_in_its_own_held_out_expectation() -> None:
    x, y, groups = drawn(40, 3)
    first = fit_expected_dice(x, y, groups)
    y[groups == 2] = 0.0
    second = fit_expected_dice(x, y, groups)
    assert first is not None
    assert second is not None
    assert np.allclose(first[1][groups == 2], second[1][groups == 2])
    assert not np.allclose(first[1][groups == 1], second[1][groups == 1])


def test_what_says_nothing_gives_no_correlation_and_the_mean() -> None:
    rng = np.random.default_rng(4)
    x = np.stack([rng.uniform(0.5, 0.98, 200), rng.uniform(0.02, 0.4, 200)], 1)
    y = rng.uniform(0.6, 0.9, 200)
    fitted = fit_expected_dice(x, y, np.arange(200) % 5)
    assert fitted is not None
    assert abs(compare(fitted[1], y)["spearman"]) < 0.25
    assert fitted[1] == pytest.approx(0.75, abs=0.05)


def test_expectation_never_falls_with_the_promise_nor_rises_with_the_entropy() -> None:
    x, y, groups = drawn(60, 5)
    backwards = fit_expected_dice(x, 1 - y, groups)
    assert backwards is not None
    expected = backwards[0]
    steps = [expected(Features(soft, 0.1))[0] for soft in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert steps == sorted(steps)
    assert expected(Features(0.8, 0.1))[0] >= expected(Features(0.8, 0.5))[0]


def test_disagreement_of_mirrored_passes_counts_where_it_is_known() -> None:
    """Dice that falls with the disagreement alone: the third feature finds it, and two features cannot."""
    x, _, groups = drawn(100, 8)
    disagree = np.random.default_rng(8).uniform(0, 0.5, 100)
    y = 1 / (1 + np.exp(-(2.5 - 6 * disagree)))
    with_it, without = fit_expected_dice(np.column_stack([x, disagree]), y, groups), fit_expected_dice(x, y, groups)
    assert with_it is not None
    assert without is not None
    errors = [compare(held_out, y)["absolute_error"] for _, held_out in (with_it, without)]
    assert errors[0] < 0.2 * errors[1]
    expected = from_facts({"coefficients": with_it[0].coefficients, "low": -0.1, "high": 0.1, "n": 100})
    said = [expected(Features(0.9, 0.1, mirrored=mirrored))[0] for mirrored in (1.0, 0.8, 0.5)]
    assert said == sorted(said, reverse=True)
    older = ExpectedDice((0.0, 1.0, 0.0), -0.1, 0.1, 30)
    assert older(Features(0.9, 0.1, mirrored=0.2))[0] == pytest.approx(0.9), "a fit without it stays as it was"


def test_few_cases_or_one_group_are_not_calibrated() -> None:
    x, y, groups = drawn(7, 6)
    assert fit_expected_dice(x, y, groups) is None
    x, y, _ = drawn(20, 6)
    assert fit_expected_dice(x, y, np.zeros(20)) is None


def test_a_bundle_gives_the_same_map_back() -> None:
    made = ExpectedDice((0.1, 0.9, 1.5), -0.1, 0.05, 30)
    facts = {"coefficients": [0.1, 0.9, 1.5], "low": -0.1, "high": 0.05, "n": 30, "held_out": {}}
    assert from_facts(facts) == made


def test_masks_that_disagree_cannot_both_be_right() -> None:
    """The bound holds for any truth, and is reached where one of two masks is the truth's inner half."""
    rng = np.random.default_rng(7)
    for _ in range(200):
        masks = [rng.random(30) < rng.uniform(0.2, 0.8) for _ in range(4)]
        truth, found = masks[0], masks[1:]
        pairs = [dice(a, b) for k, a in enumerate(found) for b in found[k + 1 :]]
        assert np.mean([dice(mask, truth) for mask in found]) <= agreement_bound(pairs) + 1e-12
    assert agreement_bound([1.0]) == 1
    assert agreement_bound([]) == 1
    assert agreement_bound([0.0]) == pytest.approx(2 / 3)
    expected = ExpectedDice((0.0, 1.0, 0.0), -0.1, 0.1, 30)
    value, low, high = expected(Features(0.95, 0.0, 0.0, agreement_bound([0.0])))
    assert value == high == pytest.approx(2 / 3)
    assert low == pytest.approx(2 / 3 - 0.1)


def test_the_temperature_that_spoiled_probabilities_is_found() -> None:
    rng = np.random.default_rng(8)
    right = rng.normal(0, 2, (20000, 3))
    probs = np.exp(right - np.logaddexp.reduce(right, axis=1, keepdims=True))
    labels = (probs.cumsum(1) > rng.random((20000, 1))).argmax(1)
    assert fit_temperature(3.0 * right, labels) == pytest.approx(3.0, rel=0.05)
    assert calibration_error(3.0 * right, labels) > 0.1
    assert calibration_error(3.0 * right, labels, 3.0) < 0.02


def test_what_is_not_annotated_counts_as_background_when_a_temperature_is_fitted() -> None:
    """Class 2 is not annotated in half of the voxels and stands as background there: merged probabilities are as true
    as they were, while taking those labels at their word finds another temperature."""
    rng = np.random.default_rng(9)
    right = rng.normal(0, 2, (20000, 3))
    probs = np.exp(right - np.logaddexp.reduce(right, axis=1, keepdims=True))
    labels = (probs.cumsum(1) > rng.random((20000, 1))).argmax(1)
    annotated = np.ones((20000, 3), bool)
    annotated[::2, 2] = False
    told = np.where(~annotated[:, 2] & (labels == 2), 0, labels)
    assert fit_temperature(3.0 * right, told, annotated) == pytest.approx(3.0, rel=0.05)
    assert fit_temperature(3.0 * right, told) > 4
    assert calibration_error(3.0 * right, told, 3.0, annotated=annotated) < 0.02
    assert calibration_error(3.0 * right, told, 3.0) > 0.05
    whole = np.ones((20000, 3), bool)
    assert fit_temperature(3.0 * right, labels, whole) == fit_temperature(3.0 * right, labels)


def test_calibration_error_by_hand() -> None:
    """Four voxels called with 0.8, of which two are right; one called with 0.6, wrong."""
    strong, weak = math.log(4), math.log(1.5)
    logits = np.array([[strong, 0]] * 4 + [[weak, 0]])
    assert calibration_error(logits, [0, 0, 1, 1, 1]) == pytest.approx(0.8 * 0.3 + 0.2 * 0.6)


def test_comparison_by_hand() -> None:
    found = compare([0.9, 0.8, 0.7, math.nan], [0.8, 0.8, 0.5, 0.1], bins=1)
    assert found["n"] == 3
    assert found["mean_error"] == pytest.approx(0.1)
    assert found["absolute_error"] == pytest.approx(0.1)
    assert found["calibration_error"] == pytest.approx(0.1)
    assert compare([], []) == {"n": 0}
