"""Figures of merit: closed-form answers, parity with other implementations, conventions at the edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

from medseg.metrics import (
    compare_masks,
    confusion,
    dice,
    energy_in_mask,
    hd95_mm,
    pointing_hit,
    roc_auc,
    roc_curve,
    surface_dice,
    surface_distances_mm,
    volume_error_ml,
)

SPACING = (0.8, 1.5, 3.0)


def _cube(start: tuple[int, int, int], side: int = 6, shape: tuple[int, int, int] = (24, 20, 16)) -> np.ndarray:
    mask = np.zeros(shape, dtype=np.uint8)
    mask[tuple(slice(s, s + side) for s in start)] = 1
    return mask


def _ball(radius: float, shift: float = 0.0) -> np.ndarray:
    axes = np.indices((40, 40, 40)) - 19.5
    axes[0] -= shift
    return (axes**2).sum(axis=0) <= radius**2


def _random_masks(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random((12, 11, 9)) > rng.uniform(0.5, 0.95), rng.random((12, 11, 9)) > rng.uniform(0.5, 0.95)


def test_shifted_cubes_have_closed_form_answers() -> None:
    """Side 6, shifted by 2 voxels of 0.8 mm along the first axis."""
    pred, ref = _cube((6, 5, 4)), _cube((4, 5, 4))
    assert dice(pred, ref) == pytest.approx(2 * 4 * 36 / (2 * 216))
    assert hd95_mm(pred, ref, SPACING) == pytest.approx(1.6)  # the leading face, more than 5 % of the surface
    assert volume_error_ml(pred, ref, SPACING) == 0
    assert surface_dice(pred, ref, SPACING, 1.6) == 1
    # Without tolerance: 152 surface voxels each; shared are those of the four sides in the 4 common layers (4 * 20)
    assert surface_dice(pred, ref, SPACING, 0.0) == pytest.approx(4 * 20 / 152)


def test_concentric_balls_differ_by_their_radii() -> None:
    small, large = _ball(8), _ball(13)
    assert hd95_mm(small, large, (1, 1, 1)) == pytest.approx(5, abs=0.6)
    assert hd95_mm(small, large, (2, 2, 2)) == pytest.approx(10, abs=1.2)
    expected = 4 / 3 * math.pi * (8**3 - 13**3) / 1000
    assert volume_error_ml(small, large, (1, 1, 1)) == pytest.approx(expected, rel=0.02)
    assert dice(small, large) == pytest.approx(2 * 8**3 / (8**3 + 13**3), rel=0.02)


def test_a_mask_equals_itself() -> None:
    found = compare_masks(_ball(9), _ball(9), SPACING)
    assert (found.dice, found.hd95_mm, found.surface_dice, found.volume_error_ml) == (1, 0, 1, 0)


def test_empty_masks_follow_the_stated_conventions() -> None:
    full, empty = _cube((4, 5, 4)), _cube((0, 0, 0), side=0)
    both = compare_masks(empty, empty, SPACING)
    assert math.isnan(both.dice)
    assert math.isnan(both.hd95_mm)
    assert math.isnan(both.surface_dice)
    assert both.volume_error_ml == 0
    diagonal = math.hypot(24 * 0.8, 20 * 1.5, 16 * 3.0)
    for pred, ref in ((full, empty), (empty, full)):
        one = compare_masks(pred, ref, SPACING)
        assert (one.dice, one.surface_dice) == (0, 0)
        assert one.hd95_mm == pytest.approx(diagonal)
    assert compare_masks(full, empty, SPACING).volume_error_ml == pytest.approx(216 * 3.6 / 1000)


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_monai(seed: int) -> None:
    """MONAI's directed=False takes the larger of the two directed percentiles, as here."""
    pred, ref = _random_masks(seed)
    theirs = {"y_pred": torch.from_numpy(pred)[None, None], "y": torch.from_numpy(ref)[None, None]}
    assert dice(pred, ref) == pytest.approx(float(compute_dice(**theirs)))
    hausdorff = compute_hausdorff_distance(**theirs, include_background=True, percentile=95, spacing=SPACING)
    assert hd95_mm(pred, ref, SPACING) == pytest.approx(float(hausdorff), rel=1e-5)
    nsd = compute_surface_dice(**theirs, class_thresholds=[1.0], include_background=True, spacing=SPACING)
    assert surface_dice(pred, ref, SPACING, 1.0) == pytest.approx(float(nsd))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.permutations([0, 1, 2]), st.integers(0, 2))
def test_axis_order_flips_and_swapping_the_masks_change_nothing(seed: int, axes: list[int], flipped: int) -> None:
    pred, ref = _random_masks(seed)
    moved = [np.flip(np.transpose(mask, axes), flipped) for mask in (pred, ref)]
    expected = compare_masks(pred, ref, SPACING)
    for one, other in (moved, moved[::-1]):
        found = compare_masks(one, other, tuple(SPACING[a] for a in axes))
        assert found.dice == expected.dice
        assert found.hd95_mm == pytest.approx(expected.hd95_mm)
        assert found.surface_dice == pytest.approx(expected.surface_dice)
        assert abs(found.volume_error_ml) == pytest.approx(abs(expected.volume_error_ml))


def _brute_force(pred: np.ndarray, ref: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances between the two surfaces by comparing every pair; surfaces by looking at the six neighbours."""

    def surface(mask: np.ndarray) -> np.ndarray:
        padded = np.pad(mask.astype(bool), 1)
        inner = tuple(slice(1, -1) for _ in range(mask.ndim))
        enclosed = np.ones(mask.shape, bool)
        for axis in range(mask.ndim):
            for step in (-1, 1):
                enclosed &= np.roll(padded, step, axis)[inner]
        return np.argwhere(mask.astype(bool) & ~enclosed) * np.asarray(SPACING)

    apart = np.linalg.norm(surface(pred)[:, None] - surface(ref)[None], axis=2)
    return apart.min(axis=1), apart.min(axis=0)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_every_pair_of_surface_voxels_compared(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pred, ref = np.zeros((16, 14, 10), bool), np.zeros((16, 14, 10), bool)
    for mask in (pred, ref):
        for _ in range(3):  # boxes that overlap, touch the border or lie apart
            low = rng.integers(0, (12, 10, 7))
            mask[tuple(slice(a, a + n) for a, n in zip(low, rng.integers(1, 6, 3), strict=True))] = True
    to_ref, to_pred = _brute_force(pred, ref)
    hd95 = max(np.percentile(to_ref, 95), np.percentile(to_pred, 95))
    assert hd95_mm(pred, ref, SPACING) == pytest.approx(hd95)
    for tolerance in (0.0, 0.8, 2.0, 5.0):
        within = (to_ref <= tolerance + 1e-9).sum() + (to_pred <= tolerance + 1e-9).sum()
        expected = within / (len(to_ref) + len(to_pred))
        assert surface_dice(pred, ref, SPACING, tolerance) == pytest.approx(expected)


def test_cubes_that_lie_apart_are_as_far_as_they_lie() -> None:
    """Side 4, 10 voxels of 0.8 mm from one to the other along the first axis: the layers lie 7 to 10 voxels off."""
    pred, ref = _cube((2, 5, 4), side=4), _cube((12, 5, 4), side=4)
    found = compare_masks(pred, ref, SPACING, tolerance_mm=5.5)
    assert (found.dice, found.surface_dice, found.volume_error_ml) == (0, 0, 0)
    assert found.hd95_mm == pytest.approx(10 * 0.8), "of 56 surface voxels 16 are of the farthest layer"
    assert surface_dice(pred, ref, SPACING, 7 * 0.8) == pytest.approx(16 / 56), "the facing layers"


def test_radiographs_have_two_axes() -> None:
    pred, ref = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    pred[4:10, 4:10], ref[4:10, 7:13] = True, True
    to_ref, to_pred = surface_distances_mm(pred, ref, (0.5, 0.25))
    assert max(to_ref) == max(to_pred) == pytest.approx(0.75)
    assert dice(pred, ref) == 0.5


def test_auc_counts_pairs_and_half_of_the_ties() -> None:
    rng = np.random.default_rng(0)
    truth, score = rng.integers(0, 2, 80), rng.integers(0, 6, 80) / 5
    pairs = score[truth == 1][:, None] - score[truth == 0][None]
    assert roc_auc(truth, score) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert roc_auc(truth, -score) == pytest.approx(1 - roc_auc(truth, score))
    assert roc_auc([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]) == 1
    assert roc_auc([0, 1, 0, 1], [0.5] * 4) == 0.5


def test_a_weight_is_a_number_of_copies() -> None:
    rng = np.random.default_rng(1)
    truth, score, weights = rng.integers(0, 2, 40), rng.random(40).round(1), rng.integers(0, 4, 40)
    copies = np.repeat(np.arange(40), weights)
    assert roc_auc(truth, score, weights) == pytest.approx(roc_auc(truth[copies], score[copies]))


def test_roc_curve_ends_where_it_must_and_carries_its_thresholds() -> None:
    rng = np.random.default_rng(2)
    truth, score = rng.integers(0, 2, 50), rng.random(50).round(1)
    fpr, tpr, thresholds = roc_curve(truth, score)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert np.all(np.diff(fpr) >= 0)
    assert np.all(np.diff(tpr) >= 0)
    for rate, hit, threshold in zip(fpr, tpr, thresholds, strict=True):
        called = score >= threshold
        assert (hit, rate) == (pytest.approx(called[truth == 1].mean()), pytest.approx(called[truth == 0].mean()))


@pytest.mark.parametrize("truth", [[], [1, 1], [0, 0]])
def test_one_class_has_no_curve(truth: list[int]) -> None:
    with pytest.raises(ValueError, match="one class only"):
        roc_auc(truth, [0.5] * len(truth))


def test_confusion_has_truth_in_rows() -> None:
    assert confusion([0, 0, 1, 2], [0, 1, 1, 0], 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_energy_and_pointing() -> None:
    mask = np.zeros((10, 10), bool)
    mask[:5] = True
    flat = np.ones((10, 10), np.float32)
    assert energy_in_mask(flat, mask) == pointing_hit(flat, mask) == 0.5  # no knowledge: the mask's share
    inside = np.where(mask, 2.0, -5.0)  # negative values are evidence against, not energy
    assert energy_in_mask(inside, mask) == pointing_hit(inside, mask) == 1
    assert energy_in_mask(-flat, mask) == pointing_hit(-flat, mask) == 0
    peak_outside = np.where(mask, 1.0, 0.0)
    peak_outside[9, 9] = 2
    assert energy_in_mask(peak_outside, mask) == pytest.approx(50 / 52)
    assert pointing_hit(peak_outside, mask) == 0
