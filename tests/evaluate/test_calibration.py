"""Calibration and operating points against known answers."""

import math
from functools import partial

import numpy as np
import pytest
from scipy import stats

from medseg.cohort import Case, Cohort
from medseg.config import VerdictConfig
from medseg.evaluate import calibrate, calibration
from medseg.evaluate.subgroups import read_groups
from medseg.files import UserError, read_json, write_json
from medseg.statistics import bootstrap
from medseg.verdict import Verdict, margins, read_verdict, sigmoid, write_verdict


def _cases(temperature: float, shift: float = 0.0, n: int = 20000) -> tuple[np.ndarray, np.ndarray]:
    """Margins of a network that is `temperature` times too sure, off by `shift`, and classes drawn from the truth."""
    rng = np.random.default_rng(3)
    honest = rng.normal(0, 2, n)
    return temperature * (honest - shift), rng.random(n) < sigmoid(honest)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_planted_temperature_is_found(temperature: float) -> None:
    margin, truth = _cases(temperature)
    assert calibration.fit_temperature(margin, truth) == pytest.approx(temperature, rel=0.05)
    after = sigmoid(margin / calibration.fit_temperature(margin, truth))
    assert calibration.ece(after, truth) < 0.02
    if temperature == 3:
        before = sigmoid(margin)
        assert calibration.ece(before, truth) > 0.1
        assert calibration.nll(after, truth) < calibration.nll(before, truth)
        assert calibration.brier(after, truth) < calibration.brier(before, truth)


def test_a_few_separable_cases_do_not_make_every_probability_certain() -> None:
    margin = np.array([-3.0, -2.0, -4.0, 2.0, 3.0, 5.0])
    after = sigmoid(margin / calibration.fit_temperature(margin, margin > 0))
    assert after.max() < 0.95
    assert after.min() > 0.05


def test_slope_and_shift_are_found_where_the_prevalence_differs() -> None:
    margin, truth = _cases(2.0, shift=1.5)
    slope, shift = calibration.fit_platt(margin, truth)
    assert (slope, shift) == (pytest.approx(0.5, rel=0.05), pytest.approx(1.5, abs=0.08))
    with pytest.raises(ValueError, match="negative class"):
        calibration.fit_platt(-margin, truth)


def test_platt_stays_finite_on_separable_cases_with_the_smoothed_targets_as_limits() -> None:
    """With z = -1 and 1 the likelihood of Platt's targets 1/(n+2) and (n+1)/(n+2) is met exactly."""
    z, y = np.repeat([-1.0, 1.0], 8), np.repeat([0, 1], 8)
    slope, shift = calibration.fit_platt(z, y)
    assert sigmoid(slope + shift) == pytest.approx(9 / 10, abs=1e-4)
    assert sigmoid(-slope + shift) == pytest.approx(1 / 10, abs=1e-4)


def test_isotonic_pools_violators_and_keeps_off_zero_and_one() -> None:
    knots = calibration.fit_isotonic([1, 2, 3, 4, 5, 6], [0, 1, 0, 0, 1, 1])
    assert knots == ((1, pytest.approx(1 / 8)), (3, pytest.approx(1 / 3)), (5.5, pytest.approx(7 / 8)))
    verdict = Verdict("ill", "isotonic", 0.5, knots=knots)
    assert verdict.probability([-9, 2, 9]) == pytest.approx([1 / 8, (1 / 8 + 1 / 3) / 2, 7 / 8])
    margin, truth = _cases(3.0)
    fitted = Verdict("ill", "isotonic", 0.5, knots=calibration.fit_isotonic(margin, truth))
    assert calibration.ece(fitted.probability(margin), truth) < 0.02


def test_calibration_error_by_hand_and_with_weights() -> None:
    probs, truth = [0.1, 0.1, 0.9, 0.9], [0, 1, 1, 1]
    assert calibration.ece(probs, truth) == pytest.approx((abs(0.2 - 1) + abs(1.8 - 2)) / 4)
    assert calibration.ece(probs, truth, [1, 0, 1, 1]) == pytest.approx((0.1 + 0.2) / 3)
    assert calibration.brier(probs, truth) == pytest.approx((0.01 + 0.81 + 0.01 + 0.01) / 4)
    assert calibration.nll([0.5], [1]) == pytest.approx(math.log(2))
    assert calibration.ece([1.0], [1]) == 0, "a probability of 1 has a bin"


def test_the_threshold_is_the_highest_that_reaches_the_sensitivity() -> None:
    probs = np.array([0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.85, 0.15, 0.05])
    truth = np.array([1] * 10 + [0] * 3)
    for target, kept in ((0.9, 9), (0.91, 10), (0.5, 5), (1.0, 10)):
        threshold = calibration.choose_threshold(probs, truth, target)
        assert (probs[truth > 0] >= threshold).sum() == kept
        assert not np.isclose(probs, threshold).any()
    with pytest.raises(ValueError, match="no positive"):
        calibration.choose_threshold([0.5], [0], 0.9)


def test_an_expected_threshold_moves_with_the_cases_and_not_with_those_it_borrows_from() -> None:
    rng = np.random.default_rng(0)
    margin, truth, earlier = rng.normal(0, 1, 20), np.repeat([0, 1], 10), rng.normal(2, 1.5, 100)
    at = calibration.expected_threshold(margin, truth, earlier, 0.9, 20)
    assert calibration.expected_threshold(margin + 3, truth, earlier, 0.9, 20) == pytest.approx(at + 3)
    assert calibration.expected_threshold(margin, truth, earlier - 7, 0.9, 20) == pytest.approx(at)
    assert calibration.expected_threshold(margin, truth, earlier, 0.8, 20) > at
    wide = calibration.expected_threshold(margin, truth, 2 * earlier, 0.9, 20)
    assert wide < at, "what is borrowed is how far positive cases spread"
    with pytest.raises(ValueError, match="no spread"):
        calibration.expected_threshold([0, 1], [0, 1], earlier, 0.9, 20)


def test_an_expected_threshold_keeps_its_sensitivity_and_varies_less_than_one_of_the_cases_alone() -> None:
    """A site whose margins lie 2 lower, 9 positive cases, 2,000 draws; sensitivities are those of normal margins."""
    rng = np.random.default_rng(0)
    earlier, truth = rng.normal(2, 1.5, 300), np.repeat([0, 1], [11, 9])
    alone, expected = [], []
    for _ in range(2000):
        margin = np.concatenate([rng.normal(-2, 1.5, 11), rng.normal(0, 1.5, 9)])
        p = calibration.choose_threshold(sigmoid(margin), truth, 0.9)
        alone.append(1 - stats.norm.cdf(math.log(p / (1 - p)) / 1.5))
        expected.append(1 - stats.norm.cdf(calibration.expected_threshold(margin, truth, earlier, 0.9, 20) / 1.5))
    assert np.mean(expected) == pytest.approx(0.9, abs=0.01)
    assert np.std(expected) < 0.8 * np.std(alone)
    assert np.mean(np.array(expected) < 0.75) < 0.7 * np.mean(np.array(alone) < 0.75)


def test_with_many_cases_their_own_spread_decides() -> None:
    rng = np.random.default_rng(0)
    margin, truth = rng.normal(0, 1, 4000), np.ones(4000)
    truth[:10] = 0
    at = calibration.expected_threshold(margin, truth, rng.normal(0, 5, 100), 0.9, 20)
    assert at == pytest.approx(np.quantile(margin[10:], 0.1), abs=0.03)


def test_clopper_pearson_has_its_exact_values() -> None:
    """0 of n and n of n have closed forms; 4 of 20 and 7 of 10 are tabulated (e.g. Brown, Cai, DasGupta 2001)."""
    assert calibration.clopper_pearson(0, 10).ci_high == pytest.approx(1 - 0.025 ** (1 / 10))
    assert calibration.clopper_pearson(10, 10).ci_low == pytest.approx(0.025 ** (1 / 10))
    found = calibration.clopper_pearson(4, 20)
    assert (found.ci_low, found.ci_high) == (pytest.approx(0.05733, abs=1e-5), pytest.approx(0.43661, abs=1e-5))
    assert math.isnan(calibration.clopper_pearson(0, 0).value)


def test_yield_is_bayes_rule() -> None:
    """Of 1000 people with 100 ill, 90 of these and 270 of 900 others are referred."""
    found = calibration.yield_at(0.9, 0.7, 0.1)
    assert found.referral_rate == pytest.approx(360 / 1000)
    assert (found.ppv, found.npv) == (pytest.approx(90 / 360), pytest.approx(630 / 640))
    assert math.isnan(calibration.yield_at(0.0, 1.0, 0.1).ppv)


def test_the_cases_that_halve_an_interval_do_halve_it() -> None:
    for hits, n in ((18, 20), (30, 60), (10, 10)):
        more = calibration.cases_to_halve(hits, n)
        wide, narrow = (calibration.clopper_pearson(round(hits / n * m), m) for m in (n, n + more))
        assert narrow.ci_high - narrow.ci_low <= (wide.ci_high - wide.ci_low) / 2
        assert n < more < 5 * n


def test_margins_of_several_classes_are_log_odds_and_the_others_share_the_rest() -> None:
    logits = np.array([[1.0, 2.0, 0.5]])
    softmax = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert sigmoid(margins(logits, 1))[0] == pytest.approx(softmax[1])
    found = Verdict("b", "temperature", 0.5, scale=0.5).probabilities(dict(zip("abc", logits[0], strict=True)))
    assert sum(found.values()) == pytest.approx(1)
    assert found["b"] < softmax[1]
    assert found["a"] / found["c"] == pytest.approx(softmax[0] / softmax[2])
    same = Verdict("b", "temperature", 0.5).probabilities(dict(zip("abc", logits[0], strict=True)))
    assert list(same.values()) == pytest.approx(softmax.tolist())


def test_a_verdict_is_refer_or_not_or_withheld() -> None:
    verdict = Verdict("ill", "temperature", 0.4, withhold=("few_pixels",), point={"sensitivity": {"value": 0.9}})
    assert [verdict.call(p) for p in (0.4, 0.39)] == ["refer", "do not refer"]
    told = verdict.as_result(0.734)
    assert (told["call"], told["score"], told["calibration"]) == ("refer", 73, verdict.id)
    withheld = verdict.as_result(0.734, {"few_pixels"})
    assert (withheld["call"], withheld["score"], withheld["probability"]) == ("not assessable", None, None)
    assert verdict.as_result(None)["call"] == "not assessable"
    assert verdict.id != Verdict("ill", "temperature", 0.41, withhold=("few_pixels",)).id
    assert verdict.id == Verdict("ill", "temperature", 0.4, withhold=("few_pixels",)).id, "what it decides by names it"


def test_a_fitted_verdict_says_how_sure_it_is_and_survives_the_disk(tmp_path) -> None:  # type: ignore[no-untyped-def]
    margin, truth = _cases(2.0, n=300)
    config = VerdictConfig(prevalence=0.05)
    patients, sites = [f"p{i}" for i in range(300)], ["a", "b"] * 150
    verdict = calibrate.fit(
        margin, truth, patients, "ill", "temperature", config, groups={"site": sites}, facts={"split": "val"}
    )
    point = verdict.point
    assert point["sensitivity"]["value"] >= 0.9
    assert point["sensitivity"]["ci_low"] < 0.9
    assert (point["sensitivity"]["n"], point["specificity"]["n"]) == (truth.sum(), 300 - truth.sum())
    exact = calibration.yield_at(point["sensitivity"]["value"], point["specificity"]["value"], 0.05)
    assert point["ppv"]["value"] == pytest.approx(exact.ppv)
    assert point["ppv"]["ci_low"] < exact.ppv < point["ppv"]["ci_high"]
    assert point["referral_rate"]["ci_low"] < exact.referral_rate < point["referral_rate"]["ci_high"]
    assert verdict.quality["after"]["nll"]["value"] < verdict.quality["before"]["nll"]["value"]
    assert [(row["group"], row["n"]) for row in verdict.subgroups] == [("a", 150), ("b", 150)]
    again = read_verdict(write_verdict(tmp_path / "verdict.json", verdict))
    assert (again.id, again.threshold, again.fitted["n"]) == (verdict.id, verdict.threshold, 300)
    assert again.probability(margin) == pytest.approx(verdict.probability(margin))
    assert again.positives == verdict.positives
    assert len(again.positives) == 100
    assert np.mean(again.positives) == pytest.approx(margin[truth].mean(), abs=0.05)
    older = {name: value for name, value in read_json(tmp_path / "verdict.json").items() if name != "positives"}
    assert read_verdict(write_json(tmp_path / "older.json", older)).positives == ()
    (tmp_path / "verdict.json").write_text((tmp_path / "verdict.json").read_text().replace('"temperature"', '"magic"'))
    with pytest.raises(UserError, match="magic"):
        read_verdict(tmp_path / "verdict.json")


def test_which_mapping_is_taken() -> None:
    assert calibrate.choose_method("auto", 60, new_site=False) == "temperature"
    assert calibrate.choose_method("auto", 60, new_site=True) == "platt"
    assert calibrate.choose_method("auto", 500, new_site=True) == "isotonic"
    with pytest.raises(UserError, match="isotonic needs 100"):
        calibrate.choose_method("isotonic", 60, new_site=True)


def test_groups_come_from_the_cohort_and_the_table_beside_it(tmp_path) -> None:  # type: ignore[no-untyped-def]
    cases = [Case(f"c{i}", f"p{i}", (), site="one", modality="DX") for i in range(4)]
    cohort = Cohort(tmp_path, tuple(cases))
    assert read_groups(cohort, cases) == {}
    (tmp_path / "attributes.csv").write_text("case_id,sex,age\nc0,F,17.5\nc1,M,18\nc2,F,60\n")
    groups = read_groups(cohort, cases)
    assert groups == {"sex": ["F", "M", "F", ""], "age": ["under 18", "18 to 39", "60 and over", ""]}
    (tmp_path / "attributes.csv").write_text("case_id,age\nc0,old\nc1,18\n")
    with pytest.raises(UserError, match="'old'"):
        read_groups(cohort, cases)


def test_the_interval_of_a_calibration_error_contains_it() -> None:
    """A draw's noise only adds to it, so that percentiles of the draws alone may lie above the figure."""
    rng, above = np.random.default_rng(0), 0
    for _ in range(10):
        probs = rng.uniform(size=100)
        truth = rng.uniform(size=100) < probs
        patients = [str(i) for i in range(100)]
        found = calibration.quality(probs, truth, patients)["ece"]
        assert 0 <= found["ci_low"] <= found["value"] <= found["ci_high"]
        above += bootstrap(partial(calibration.ece, probs, truth), patients).ci_low > found["value"]
    assert above > 0
