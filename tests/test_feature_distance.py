"""The distance from a cohort: its rate on cases of the cohort, its order, its way to the disk and back."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from medseg.feature_distance import (
    CohortDistance,
    FeatureDistance,
    distance_limit,
    fit_distance,
    join_distances,
    read_distance,
    write_distance,
)
from medseg.files import UserError

FEATURES = 48


def draw(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Features as networks have them: correlated, of unlike scales, not negative, some nearly dead."""
    mixed = rng.normal(size=(count, 12)) @ np.random.default_rng(0).normal(size=(12, FEATURES))
    scales = np.random.default_rng(1).lognormal(-1, 1.5, FEATURES)
    return np.asarray(np.maximum(scales * (mixed + 0.5 * rng.normal(size=(count, FEATURES)) + 2), 0))


def fit(rng: np.random.Generator, train: int = 40, held_out: int = 16) -> FeatureDistance:
    fitted = fit_distance(draw(rng, train), draw(rng, held_out))
    assert fitted is not None
    return fitted


def test_new_cases_of_the_cohort_keep_to_the_limit_as_often_as_it_says() -> None:
    """Fewer cases than features, few unseen ones, many cohorts: the rate over all is the nominal one."""
    rng, beyond, total = np.random.default_rng(2), 0, 0
    for _ in range(60):
        fitted = fit(rng)
        limit = distance_limit(fitted.held_out, rate=0.05)
        assert limit is not None
        found = [fitted(row) for row in draw(rng, 100)]
        beyond, total = beyond + sum(distance > limit for distance in found), total + len(found)
    assert 0.03 < beyond / total < 0.07


def test_training_cases_lie_nearer_than_unseen_ones_so_the_limit_cannot_come_from_them() -> None:
    rng = np.random.default_rng(3)
    train = draw(rng, 40)
    fitted = fit_distance(train, draw(rng, 40))
    assert fitted is not None
    assert np.mean([fitted(row) for row in train]) < 0.8 * np.mean(fitted.held_out)


def test_what_no_case_of_the_cohort_shows_lies_beyond_the_limit() -> None:
    rng = np.random.default_rng(4)
    cohort = CohortDistance((fit(rng, 60, 30),))
    assert cohort.limit is not None
    for row in draw(rng, 20):
        assert cohort([row[::-1]]) > cohort.limit, "as large, but of other features"
        assert cohort([3 * row]) > cohort.limit


def test_with_many_cases_it_is_the_mahalanobis_distance_of_the_sample() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(20_000, 4)) @ (np.eye(4) + 0.2 * rng.normal(size=(4, 4)))
    fitted = fit_distance(x)
    assert fitted is not None
    probe = rng.normal(size=4) * 3 - x.mean(0)
    wanted = np.sqrt(probe @ np.linalg.inv(np.cov(x.T, bias=True)) @ probe / 4)
    assert fitted(probe + x.mean(0)) == pytest.approx(wanted, rel=1e-2)
    assert np.mean([fitted(row) ** 2 for row in x[:2000]]) == pytest.approx(1, abs=0.05)


def test_shrinkage_equals_that_of_the_full_matrices() -> None:
    """The whole covariance, written out, of fewer cases than features."""
    rng = np.random.default_rng(6)
    x = draw(rng, 20)
    fitted = fit_distance(x)
    assert fitted is not None
    scale = np.maximum(x.std(0), 0.01 * x.std(0).mean())
    centred = (x - x.mean(0)) / scale
    sample, n, p = centred.T @ centred / 20, 20, FEATURES
    target = np.trace(sample) / p
    error = sum(((np.outer(row, row) - sample) ** 2).sum() for row in centred) / n**2
    share = min(error / ((sample - target * np.eye(p)) ** 2).sum(), 1)
    shrunk = (1 - share) * sample + share * target * np.eye(p)
    probe = draw(rng, 1)[0]
    off = (probe - x.mean(0)) / scale
    wanted = np.sqrt(off @ np.linalg.inv(shrunk) @ off / p)
    assert 0 < share < 1
    assert fitted(probe) == pytest.approx(wanted, rel=1e-4)


def test_too_few_cases_say_nothing() -> None:
    rng = np.random.default_rng(7)
    assert fit_distance(draw(rng, 4)) is None
    assert fit_distance(np.ones((9, 3))) is None, "cases that do not differ"
    fitted = fit_distance(draw(rng, 20), draw(rng, 4))
    assert fitted is not None
    assert CohortDistance((fitted,)).limit is None


def test_joined_folds_average_their_distances_and_share_their_unseen_cases() -> None:
    rng = np.random.default_rng(8)
    folds = [CohortDistance((fit(rng, 40, 4),)) for _ in range(3)]
    assert all(fold.limit is None for fold in folds)
    joined = join_distances(folds)
    assert joined is not None
    assert joined.limit == distance_limit([d for fold in folds for d in fold.members[0].held_out])
    row = draw(rng, 1)[0]
    assert joined([row] * 3) == pytest.approx(np.mean([fold([row]) for fold in folds]))
    assert join_distances([folds[0], None]) is None


def test_it_comes_back_from_the_disk_as_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    known = CohortDistance((fit(rng), fit(rng, 90)))
    back = read_distance(write_distance(tmp_path / "distance.safetensors", known))
    row = draw(rng, 1)[0]
    assert back([row, row]) == known([row, row])
    assert back.limit == known.limit
    assert back.facts() == known.facts()
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "distance.safetensors").read_bytes()[:300])
    with pytest.raises(UserError, match=r"broken\.safetensors holds no feature distance"):
        read_distance(tmp_path / "broken.safetensors")
