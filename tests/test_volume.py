"""One geometry law: whatever the affine, every voxel keeps its place in the world. Checked along two ways."""

from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medseg.volume import (
    Volume,
    from_canonical,
    orientation_code,
    resample,
    resampled_grid,
    sampled,
    spacing_of,
    to_canonical,
    world_of,
)

SPACINGS = st.floats(0.3, 6.0)
SIZES = st.integers(2, 6)


@st.composite
def affines(draw: Any) -> np.ndarray:
    """Any rotation, any spacing, left- or right-handed, axes in any order and sign; optionally axis-aligned."""
    quaternion = np.array([draw(st.integers(-100, 100)) / 100 for _ in range(4)])  # ITK fails on subnormals
    assume(np.linalg.norm(quaternion) > 0.1)
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    if draw(st.booleans()):
        rotation = np.eye(3)
    order = draw(st.permutations([0, 1, 2]))
    signs = np.array([draw(st.sampled_from([-1.0, 1.0])) for _ in range(3)])
    spacing = np.array([draw(SPACINGS) for _ in range(3)])
    affine = np.eye(4)
    affine[:3, :3] = rotation[:, order] * signs * spacing
    affine[:3, 3] = [draw(st.floats(-300, 300)) for _ in range(3)]
    return affine


@st.composite
def volumes(draw: Any) -> Volume:
    """Every voxel has its own value."""
    shape = (draw(SIZES), draw(SIZES), draw(SIZES))
    return Volume(np.arange(np.prod(shape), dtype=np.int32).reshape(shape), draw(affines()))


def positions_by_value(volume: Volume) -> np.ndarray:
    """World positions in the order of the voxels' values."""
    index = np.argwhere(np.ones(volume.array.shape, dtype=bool))
    order = np.argsort(volume.array.reshape(-1))
    return world_of(volume.affine, index[order].astype(float))


@pytest.mark.parametrize("count", [1, 7, 60, 1000])
def test_sampled_values_do_not_depend_on_the_order_in_memory(count: int) -> None:
    array = np.arange(60).reshape(3, 4, 5)
    expected = array.reshape(-1)[:: max(1, 60 // count)]
    for same in (array, np.asfortranarray(array), np.flip(np.flip(array, 1).copy(), 1)):
        np.testing.assert_array_equal(sampled(same, count), expected)
    assert sampled(array, count).size >= min(count, 60)


@given(volumes())
@settings(max_examples=150, deadline=None)
def test_to_canonical_keeps_the_world_position_of_every_voxel(volume: Volume) -> None:
    canonical = to_canonical(volume)
    np.testing.assert_allclose(positions_by_value(canonical), positions_by_value(volume), atol=1e-9)
    assert orientation_code(canonical.affine) == "RAS"
    assert np.linalg.det(canonical.affine[:3, :3]) != 0


@given(volumes())
@settings(max_examples=100, deadline=None)
def test_from_canonical_undoes_to_canonical(volume: Volume) -> None:
    back = from_canonical(to_canonical(volume).array, volume.affine)
    np.testing.assert_array_equal(back, volume.array)


@given(volumes())
@settings(max_examples=100, deadline=None)
def test_canonical_orientation_agrees_with_nibabel(volume: Volume) -> None:
    ours = to_canonical(volume)
    cosines = np.abs(volume.affine[:3, :3] / np.asarray(spacing_of(volume.affine)))
    assume((cosines.max(axis=1) > 0.75).all())  # near 45 degrees nibabel settles ties greedily, we globally
    theirs = nib.as_closest_canonical(nib.Nifti1Image(volume.array, volume.affine))
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-9)
    np.testing.assert_array_equal(ours.array, np.asarray(theirs.dataobj))


@given(affines(), st.tuples(SIZES, SIZES, SIZES), st.tuples(SPACINGS, SPACINGS, SPACINGS))
@settings(max_examples=100, deadline=None)
def test_resampled_grid_covers_the_same_box(affine: np.ndarray, shape: Any, spacing_mm: Any) -> None:
    new_shape, new_affine = resampled_grid(shape, affine, spacing_mm)
    for corner in np.ndindex(2, 2, 2):
        old = np.array(corner) * shape - 0.5
        new = np.array(corner) * new_shape - 0.5
        np.testing.assert_allclose(world_of(new_affine, new[None]), world_of(affine, old[None]), atol=1e-8)


@given(affines(), st.tuples(SPACINGS, SPACINGS, SPACINGS))
@settings(max_examples=60, deadline=None)
def test_a_linear_field_is_the_same_in_the_world_after_resampling(affine: np.ndarray, spacing_mm: Any) -> None:
    """Values that are a linear function of the world position stay that function, wherever there is no edge."""
    shape = (6, 5, 7)
    slope = np.array([0.7, -1.3, 0.4])
    index = np.argwhere(np.ones(shape, dtype=bool)).astype(float)
    field = (world_of(affine, index) @ slope).reshape(shape)
    new_shape, new_affine = resampled_grid(shape, affine, spacing_mm)
    result = resample(field, affine, new_shape, new_affine, order=1)
    world = world_of(new_affine, np.argwhere(np.ones(new_shape, dtype=bool)).astype(float))
    inside = world_of(np.linalg.inv(affine), world)
    keep = ((inside >= 0) & (inside <= np.array(shape) - 1)).all(axis=1)
    scale = np.abs(field).max() + 1
    np.testing.assert_allclose(result.reshape(-1)[keep], (world @ slope)[keep], atol=2e-6 * scale, rtol=0)


@given(affines(), st.tuples(SPACINGS, SPACINGS, SPACINGS), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_resampling_agrees_with_simpleitk(affine: np.ndarray, spacing_mm: Any, seed: int) -> None:
    shape = (6, 5, 4)
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    new_shape, new_affine = resampled_grid(shape, affine, spacing_mm)
    ours = resample(array, affine, new_shape, new_affine, order=1)
    theirs = sitk.Resample(
        as_sitk(array, affine), as_sitk(np.zeros(new_shape, np.float32), new_affine),
        sitk.Transform(3, sitk.sitkIdentity), sitk.sitkLinear, 0.0, sitk.sitkFloat32, True,
    )  # fmt: skip
    index = np.argwhere(np.ones(new_shape, dtype=bool)).astype(float)
    source = world_of(np.linalg.inv(affine), world_of(new_affine, index))
    keep = ((source >= 1e-3) & (source <= np.array(shape) - 1 - 1e-3)).all(axis=1).reshape(new_shape)
    np.testing.assert_allclose(ours[keep], sitk.GetArrayFromImage(theirs).T[keep], atol=2e-4)


@given(affines(), st.tuples(SPACINGS, SPACINGS, SPACINGS))
@settings(max_examples=60, deadline=None)
def test_a_label_that_fills_the_field_of_view_still_fills_it_after_resampling(affine: np.ndarray, spacing: Any) -> None:
    shape = (5, 4, 6)
    new_shape, new_affine = resampled_grid(shape, affine, spacing)
    result = resample(np.full(shape, 3, np.uint8), affine, new_shape, new_affine, order=0)
    assert result.dtype == np.uint8
    assert (result == 3).all()


def test_resampling_to_the_same_grid_changes_nothing() -> None:
    array = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    np.testing.assert_array_equal(resample(array, affine, array.shape, affine, order=1), array)


@pytest.mark.parametrize(("signs", "code"), [((1, 1, 1), "RAS"), ((-1, -1, 1), "LPS"), ((-1, 1, -1), "LAI")])
def test_orientation_code_of_aligned_axes(signs: tuple[int, int, int], code: str) -> None:
    assert orientation_code(np.diag([*signs, 1.0])) == code


def test_voxel_volume_in_millilitres() -> None:
    assert Volume(np.zeros((1, 1, 1)), np.diag([-2.0, 5.0, 10.0, 1.0])).voxel_ml == pytest.approx(0.1)


def as_sitk(array: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """The same grid in SimpleITK's words: LPS, axes reversed in memory. A left-handed frame is allowed there too."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    spacing = np.asarray(spacing_of(affine))
    flip = np.diag([-1.0, -1.0, 1.0])
    image.SetSpacing(spacing.tolist())
    image.SetDirection((flip @ affine[:3, :3] / spacing).reshape(-1).tolist())
    image.SetOrigin((flip @ affine[:3, 3]).tolist())
    return image
