"""Change over time and its noise, against closed forms, and against what simulation says the band must cover."""

import math

import numpy as np
import pytest

from medseg.change import Retest, known_retests, measure_change, measure_retest


def test_two_examinations_give_the_textbook_difference_and_repeatability() -> None:
    retest = Retest(cv_percent=2.0)
    found = measure_change([0, 731], [10.0, 9.0], retest, min_days=90)
    years = 731 / 365.25
    assert found.difference_ml == pytest.approx(-1)
    assert found.difference_percent == pytest.approx(-10)
    assert found.per_year_ml == pytest.approx(-1 / years)
    assert found.per_year_percent == pytest.approx(-10 / years)
    assert found.band_ml == pytest.approx(1.96 * math.sqrt(2) * 0.02 * 9.5, rel=1e-4)
    assert found.per_year_band_ml == pytest.approx(found.band_ml / years), "one law for two examinations and for many"
    assert found.verdict == "beyond the noise"
    assert measure_change([0, 731], [10.0, 9.6], retest, min_days=90).verdict == "within the noise"
    assert measure_change([0, 731], [10.0, 9.0], None, min_days=90).verdict == "unknown"


def test_the_rate_is_the_line_through_all_examinations() -> None:
    days = [0, 100, 400, 900]
    volumes = [20 - 0.5 * day / 365.25 for day in days]
    found = measure_change(days, volumes, Retest(1.0), min_days=90)
    assert found.per_year_ml == pytest.approx(-0.5)
    assert found.per_year_percent == pytest.approx(-2.5)


def test_a_short_interval_has_a_difference_and_no_rate() -> None:
    found = measure_change([0, 30], [10.0, 9.0], Retest(1.0), min_days=90)
    assert found.per_year_ml is None
    assert found.per_year_band_ml is None
    assert found.verdict == "beyond the noise"
    gone = measure_change([0, 400], [0.0, 1.0], Retest(1.0), min_days=90)
    assert (gone.difference_percent, gone.per_year_percent) == (None, None)


@pytest.mark.parametrize("days", [[0, 365], [0, 0, 365], [0, 180, 365, 540, 730]])
def test_unchanged_structures_exceed_the_band_in_one_case_of_twenty(days: list[int]) -> None:
    rng = np.random.default_rng(3)
    volumes = 8 * (1 + 0.02 * rng.standard_normal((4000, len(days))))
    beyond = [measure_change(days, v, Retest(2.0), min_days=90).verdict == "beyond the noise" for v in volumes]
    assert 0.04 < np.mean(beyond) < 0.06


def test_the_noise_is_found_again_from_repeated_measurements() -> None:
    rng = np.random.default_rng(4)
    sizes = rng.uniform(2, 40, 300)
    groups = [size * (1 + 0.03 * rng.standard_normal(2 + n % 2)) for n, size in enumerate(sizes)]
    found = measure_retest(groups)
    assert found is not None
    assert found.cv_percent == pytest.approx(3, rel=0.1)
    assert found.cv_low < 3 < found.cv_high
    assert (found.patients, found.scans) == (300, 750)
    assert found.repeatability_percent == pytest.approx(2.772 * found.cv_percent, rel=1e-3)


def test_noise_is_not_made_of_nothing() -> None:
    assert measure_retest([[5.0], []]) is None
    assert measure_retest([[0.0, 5.0]]) is None, "a structure that was missed once tells nothing in percent"
    pair = measure_retest([[99.0, 101.0]])
    assert pair is not None
    assert pair.cv_percent == pytest.approx(math.sqrt(2))
    assert pair.cv_high > 10 * pair.cv_percent, "one pair says nearly nothing, and the interval says so"


def test_what_was_measured_goes_before_what_is_stated() -> None:
    found = known_retests({"a": {"cv_percent": 1.5, "scans": 4, "patients": 2}}, {"a": 9.0, "b": 3.0})
    assert (found["a"].cv_percent, found["b"].cv_percent, found["b"].scans) == (1.5, 3.0, 0)
