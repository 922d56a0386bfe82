"""Intervals: known values, right coverage, the patient as unit."""

import math

import numpy as np
import pytest

from medseg.metrics import roc_auc
from medseg.statistics import bootstrap, bootstrap_auc, proportion, summarise, wilson


def test_wilson_has_its_textbook_values() -> None:
    found = wilson(8, 10)
    assert (found.value, found.n) == (0.8, 10)
    assert (found.ci_low, found.ci_high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 20).ci_low == 0
    assert wilson(20, 20).ci_low == pytest.approx(20 / (20 + 1.959964**2))  # z^2 / (n + z^2) below 1
    assert math.isnan(wilson(0, 0).value)


def test_wilson_solves_its_own_equation() -> None:
    """At each bound p the observed share lies exactly 1.96 standard errors away."""
    for hits, n in ((1, 7), (30, 64), (99, 100)):
        found = wilson(hits, n)
        for p in (found.ci_low, found.ci_high):
            assert abs(hits / n - p) == pytest.approx(1.959963984540054 * math.sqrt(p * (1 - p) / n))


def test_mean_interval_is_about_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(0.9, 0.05, 200).tolist()
    found = summarise(values, [f"p{i}" for i in range(200)])
    assert found.mean == pytest.approx(np.mean(values))
    assert found.sd == pytest.approx(np.std(values, ddof=1))
    half = 1.96 * found.sd / math.sqrt(200)
    assert found.ci_low == pytest.approx(found.mean - half, abs=0.15 * half)
    assert found.ci_high == pytest.approx(found.mean + half, abs=0.15 * half)


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(3)
    patients = [str(i) for i in range(40)]
    found = [summarise(rng.normal(0, 1, 40).tolist(), patients, seed=i) for i in range(150)]
    assert 0.88 <= np.mean([f.ci_low <= 0 <= f.ci_high for f in found]) <= 0.99


def test_copies_of_a_patient_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0, 1, 30)
    patients = [str(i) for i in range(30)]
    once = summarise(values.tolist(), patients)
    copied = summarise(np.repeat(values, 8).tolist(), np.repeat(patients, 8).tolist())
    naive = summarise(np.repeat(values, 8).tolist(), [str(i) for i in range(240)])
    width = once.ci_high - once.ci_low
    assert copied.ci_high - copied.ci_low == pytest.approx(width, rel=0.01)
    assert naive.ci_high - naive.ci_low < 0.5 * width
    hits = (values > 0).tolist()
    assert proportion(np.repeat(hits, 8), np.repeat(patients, 8).tolist()).ci_low == pytest.approx(
        wilson(sum(hits), 30).ci_low, abs=0.06
    )


def test_same_seed_same_interval_and_undefined_values_are_left_out() -> None:
    values, patients = [0.2, math.nan, 0.4, 0.9], ["a", "b", "c", "d"]
    assert summarise(values, patients) == summarise(values, patients)
    assert summarise(values, patients) == summarise([0.2, 0.4, 0.9], ["a", "c", "d"])
    assert summarise(values, patients).n == 3
    assert summarise([math.nan], ["a"]).n == 0


def test_one_patient_gives_a_value_and_no_interval() -> None:
    found = summarise([0.5, 0.7], ["a", "a"])
    assert found.mean == pytest.approx(0.6)
    assert math.isnan(found.ci_low)
    alone = bootstrap(lambda weights: float(weights.sum()), ["a", "a"])
    assert (alone.value, alone.n) == (2, 2)
    assert math.isnan(alone.ci_high)


def test_auc_interval_contains_the_auc_and_skips_draws_of_one_class() -> None:
    rng = np.random.default_rng(5)
    truth = np.array([0] * 20 + [1] * 2)
    score = truth + rng.normal(0, 0.8, 22)
    found = bootstrap(lambda weights: roc_auc(truth, score, weights), [str(i) for i in range(22)])
    assert found.value == roc_auc(truth, score)
    assert found.ci_low <= found.value <= found.ci_high
    never = bootstrap(lambda weights: roc_auc(np.ones(4), np.ones(4), weights), list("abcd"))
    assert math.isnan(never.value)
    assert math.isnan(never.ci_low)


def test_areas_of_all_draws_at_once_are_those_one_by_one() -> None:
    """With ties, patients of several cases, and draws that lack a class."""
    rng = np.random.default_rng(4)
    truth, score = rng.random(14) < 0.3, np.round(rng.random(14), 1)
    patients = [f"p{i // 2}" for i in range(14)]
    together = bootstrap_auc(truth, score, patients, seed=3)
    one_by_one = bootstrap(lambda weights: roc_auc(truth, score, weights), patients, seed=3)
    assert together.value == pytest.approx(one_by_one.value)
    assert (together.ci_low, together.ci_high) == pytest.approx((one_by_one.ci_low, one_by_one.ci_high))
    alone = bootstrap_auc(np.ones(4), np.arange(4.0), ["a", "b", "c", "d"])
    assert math.isnan(alone.value)
    assert math.isnan(alone.ci_low)
