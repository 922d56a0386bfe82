"""To the network's grid and back: identity where nothing changes, and the label returns to the scan's own grid."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from medseg.data.preprocess import network_grid, prepare, restore_label
from medseg.images import read_image, write_png
from medseg.plan import Plan
from medseg.volume import Volume, to_canonical, world_of


def _plan(spacing: tuple[float, ...] = (), size: tuple[int, ...] = ()) -> Plan:
    return Plan(3 if spacing or not size else 2, (8, 8, 8), 1, spacing_mm=spacing, size_px=size)


ORIENTATIONS = [
    (p, s) for p in itertools.permutations(range(3)) for s in itertools.product((1, -1), repeat=3)
]  # all 48


@pytest.mark.parametrize(("permutation", "signs"), ORIENTATIONS)
def test_same_spacing_is_lossless_for_all_48_orientations(permutation: tuple[int, ...], signs: tuple[int, ...]) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, permutation] * np.asarray(signs) * 1.5
    affine[:3, 3] = (10, -20, 30)
    array = np.random.default_rng(0).integers(0, 5, (5, 6, 7)).astype(np.uint8)
    volume = Volume(array, affine)
    prepared = prepare([volume], _plan((1.5, 1.5, 1.5)), label=volume)
    assert prepared.label is not None
    assert np.array_equal(restore_label(prepared.label, prepared), array)


def test_object_keeps_its_world_position_through_resampling() -> None:
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([1.0, 1.3, 3.0])
    affine[:3, 3] = (5, 6, 7)
    array = np.zeros((40, 36, 18), dtype=np.uint8)
    array[12:24, 10:22, 6:12] = 1
    native = world_of(affine, np.argwhere(array).astype(float)).mean(0)
    prepared = prepare([Volume(array, affine)], _plan((1.5, 1.5, 1.5)), label=Volume(array, affine))
    assert prepared.label is not None
    moved = world_of(prepared.affine, np.argwhere(prepared.label).astype(float)).mean(0)
    assert np.linalg.norm(moved - native) < 0.5
    back = restore_label(prepared.label, prepared)
    assert 2 * (back & array).sum() / (back.sum() + array.sum()) > 0.95
    assert back.shape == array.shape


def test_network_grid_covers_the_same_field_of_view() -> None:
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    volume = to_canonical(Volume(np.zeros((30, 20, 10)), affine))
    shape, new = network_grid(volume, _plan((2.0, 2.0, 2.0)))
    low = world_of(new, np.array([[-0.5] * 3]))
    high = world_of(new, np.array([shape], dtype=float) - 0.5)
    assert np.allclose(low, world_of(affine, np.array([[-0.5] * 3])))
    assert np.allclose(high, world_of(affine, np.array([[29.5, 19.5, 9.5]])))


def test_zscore_and_constant_images() -> None:
    image = prepare([Volume(np.random.default_rng(0).normal(5, 3, (8, 8, 8)), np.eye(4))], _plan()).image
    assert abs(float(image.mean())) < 1e-5
    assert abs(float(image.std()) - 1) < 1e-4
    assert not prepare([Volume(np.full((4, 4, 4), 7.0), np.eye(4))], _plan()).image.any()


def test_ct_intensities_are_clipped_then_standardised() -> None:
    plan = Plan(
        3, (4, 4, 4), 1, normalise="ct", intensity_low=-100, intensity_high=300, intensity_mean=100, intensity_sd=50
    )
    array = np.array([-1000, -100, 100, 300, 3000], dtype=np.int16).reshape(5, 1, 1)
    image = prepare([Volume(array, np.eye(4))], plan).image
    assert np.allclose(image.ravel(), [-4, -4, 0, 4, 4])


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_the_bit_depth_of_a_radiograph_makes_no_difference(bits: int, tmp_path: Path) -> None:
    share = np.random.default_rng(0).random((64, 48)).cumsum(1) / 48
    stored = (share * (2**bits - 1)).round().astype(np.uint8 if bits == 8 else np.uint16)
    read = read_image(write_png(tmp_path / "x.png", stored))
    image = prepare([read], _plan(size=(32, 32))).image[0]
    exact = prepare([Volume(share, np.eye(4))], _plan(size=(32, 32))).image[0]
    step = 1 / (2**bits - 1) / share.std()  # one grey level, in standard deviations
    assert np.abs(image - exact).max() < step


def test_radiographs_are_resized_to_the_plan() -> None:
    array = np.random.default_rng(0).integers(0, 4095, (300, 200)).astype(np.uint16)
    prepared = prepare([Volume(array, np.eye(4))], _plan(size=(64, 64)))
    assert prepared.image.shape == (1, 64, 64)
    assert restore_label(np.ones((64, 64), dtype=np.uint8), prepared).shape == (300, 200)
