"""The simulated brains: exact identity, diffeomorphic deformation, labels that stay true, recorded parameters."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import ndimage

from medseg.data.simulate import (
    PEAK_INTENSITY,
    TISSUES,
    Anatomy,
    SubjectParameters,
    apply_parameters,
    displacement_field,
    draw_parameters,
    load_anatomy,
)
from medseg.volume import spacing_of, world_of

SPACING_MM = 4.0


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return load_anatomy(SPACING_MM)


@pytest.fixture(scope="module")
def fine_anatomy() -> Anatomy:
    return load_anatomy(2.5)


def _jacobian_determinant(u: np.ndarray, spacing_mm: float) -> np.ndarray:
    gradient = np.stack(np.gradient(u, spacing_mm, axis=(1, 2, 3)), axis=1)
    return np.linalg.det(np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3))


def _volume_ml(label: np.ndarray, spacing_mm: float = SPACING_MM) -> np.ndarray:
    return np.bincount(label.ravel(), minlength=len(TISSUES) + 1) * spacing_mm**3 / 1000


def _centre_of_mass_mm(label: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return world_of(affine, np.argwhere(label > 0)).mean(axis=0)


def test_the_template_is_a_whole_brain_in_the_middle_of_its_grid(anatomy: Anatomy) -> None:
    assert anatomy.t1.dtype == np.float32
    assert anatomy.label.dtype == np.uint8
    assert anatomy.t1.shape == anatomy.label.shape
    assert 0 <= anatomy.t1.min() < anatomy.t1.max() <= PEAK_INTENSITY
    assert spacing_of(anatomy.affine) == pytest.approx((SPACING_MM,) * 3)
    _, csf, grey, white = _volume_ml(anatomy.label)
    assert 35 < csf < 100  # ventricles, cisterns, wide sulci
    assert 900 < grey < 1300
    assert 500 < white < 750
    means = [anatomy.t1[anatomy.label == value].mean() for value in (1, 2, 3)]
    assert means == sorted(means)  # T1 weighting: CSF dark, white matter bright
    for axis in range(3):
        assert not np.take(anatomy.label, (0, -1), axis=axis).any()


def test_the_left_right_axis_runs_towards_the_right_and_zero_is_the_midline(anatomy: Anatomy) -> None:
    assert np.linalg.det(anatomy.affine) > 0
    assert abs(_centre_of_mass_mm(anatomy.label, anatomy.affine)[0]) < 1.0  # the template is symmetric


def test_brain_volume_hardly_depends_on_the_spacing(anatomy: Anatomy, fine_anatomy: Anatomy) -> None:
    fine = _volume_ml(fine_anatomy.label, 2.5)[1:].sum()
    assert _volume_ml(anatomy.label)[1:].sum() == pytest.approx(fine, rel=0.03)


def test_anisotropic_spacing_is_kept_exactly() -> None:
    assert spacing_of(load_anatomy((3.0, 3.0, 5.0)).affine) == pytest.approx((3.0, 3.0, 5.0), abs=1e-12)


@pytest.mark.parametrize("spacing_mm", [0.5, 20.0, (2.0, 2.0, 0.9)])
def test_a_spacing_the_template_cannot_give_is_refused(spacing_mm: float) -> None:
    with pytest.raises(ValueError, match="choose 1 to 10 mm"):
        load_anatomy(spacing_mm)


def test_default_parameters_change_nothing(anatomy: Anatomy) -> None:
    subject = apply_parameters(anatomy, SubjectParameters(seed=7))
    np.testing.assert_array_equal(subject.t1, anatomy.t1)
    np.testing.assert_array_equal(subject.label, anatomy.label)
    np.testing.assert_array_equal(subject.affine, anatomy.affine)


def test_the_same_parameters_give_the_same_subject_also_from_json(anatomy: Anatomy) -> None:
    params = draw_parameters(3, 5)
    again = SubjectParameters.from_json(json.loads(json.dumps(dataclasses.asdict(params))))
    assert again == params == draw_parameters(3, 5)
    one, other = apply_parameters(anatomy, params), apply_parameters(anatomy, again)
    np.testing.assert_array_equal(one.t1, other.t1)
    np.testing.assert_array_equal(one.label, other.label)
    np.testing.assert_array_equal(one.affine, other.affine)


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="no field 'tilt'"):
        SubjectParameters.from_json({"tilt": 1.0})


def test_subjects_of_other_indices_and_seeds_differ(anatomy: Anatomy) -> None:
    drawn = [draw_parameters(0, 0), draw_parameters(0, 1), draw_parameters(1, 0)]
    labels = [apply_parameters(anatomy, params).label for params in drawn]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert drawn[a] != drawn[b]
        assert (labels[a] != labels[b]).mean() > 0.01


@pytest.mark.parametrize("index", range(4))
def test_the_deformation_is_a_diffeomorphism_of_visible_size(anatomy: Anatomy, index: int) -> None:
    u, lattice = displacement_field(anatomy, draw_parameters(11, index))
    determinant = _jacobian_determinant(u, lattice[0, 0])
    assert determinant.min() > 0
    assert 3.5 < np.sqrt((u**2).sum(axis=0).mean()) < 6.5


def test_the_deformation_folds_nowhere_between_lattice_points(anatomy: Anatomy) -> None:
    """The scan samples u by linear interpolation, which must not undo what holds at the lattice points."""
    u, lattice = displacement_field(anatomy, draw_parameters(11, 0))
    fine = ndimage.zoom(u[:, 5:-5, 5:-5, 5:-5], (1, 3, 3, 3), order=1, mode="nearest")
    spacing_mm = lattice[0, 0] * (u.shape[1] - 11) / (fine.shape[1] - 1)
    assert _jacobian_determinant(fine, spacing_mm).min() > 0


def test_no_velocity_is_no_displacement(anatomy: Anatomy) -> None:
    u, _ = displacement_field(anatomy, SubjectParameters(deformation=((24.0, 0.0),)))
    assert not u.any()


@pytest.mark.parametrize("index", range(3))
def test_every_tissue_survives_inside_the_image_at_a_plausible_volume(anatomy: Anatomy, index: int) -> None:
    subject = apply_parameters(anatomy, draw_parameters(2, index))
    assert set(np.unique(subject.label)) == {0, 1, 2, 3}
    ratio = _volume_ml(subject.label)[1:] / _volume_ml(anatomy.label)[1:]
    assert (ratio > 0.6).all()
    assert (ratio < 1.5).all()
    for axis in range(3):
        assert not np.take(subject.label, (0, -1), axis=axis).any()
    assert subject.t1.min() >= 0
    assert subject.t1.max() < 4096


def test_labels_move_with_the_image(anatomy: Anatomy) -> None:
    """With geometry alone, the tissues keep their T1 intensities at their new places."""
    params = draw_parameters(4, 0)
    still = SubjectParameters(
        seed=params.seed,
        deformation=params.deformation,
        ventricle_mm=params.ventricle_mm,
        head_rotation_deg=params.head_rotation_deg,
        head_translation_mm=params.head_translation_mm,
    )
    moved = apply_parameters(anatomy, still)
    assert (moved.label != anatomy.label).mean() > 0.02
    for value in (1, 2, 3):
        own = moved.t1[moved.label == value].mean()
        assert own == pytest.approx(anatomy.t1[anatomy.label == value].mean(), rel=0.06)


def test_shape_does_not_depend_on_the_spacing(anatomy: Anatomy, fine_anatomy: Anatomy) -> None:
    params = draw_parameters(6, 0)
    coarse, fine = apply_parameters(anatomy, params), apply_parameters(fine_anatomy, params)
    distance = _centre_of_mass_mm(coarse.label, coarse.affine) - _centre_of_mass_mm(fine.label, fine.affine)
    assert np.abs(distance).max() < 1.0
    brain = [_volume_ml(coarse.label)[1:].sum(), _volume_ml(fine.label, 2.5)[1:].sum()]
    assert brain[0] == pytest.approx(brain[1], rel=0.03)


def test_wider_ventricles_hold_more_csf_and_leave_the_brain_its_size(anatomy: Anatomy) -> None:
    narrow, wide = (_volume_ml(apply_parameters(anatomy, SubjectParameters(ventricle_mm=v)).label) for v in (-2.0, 5.0))
    assert wide[1] > narrow[1] + 8
    assert wide[1:].sum() == pytest.approx(narrow[1:].sum(), rel=0.005)


def test_head_scale_and_translation_do_what_they_say(anatomy: Anatomy) -> None:
    rest = apply_parameters(anatomy, SubjectParameters())
    scaled = apply_parameters(anatomy, SubjectParameters(head_scale=(1.1, 1.0, 0.95)))
    ratio = _volume_ml(scaled.label)[1:].sum() / _volume_ml(rest.label)[1:].sum()
    assert ratio == pytest.approx(1.1 * 0.95, rel=0.01)
    shifted = apply_parameters(anatomy, SubjectParameters(head_translation_mm=(3.0, -5.0, 2.0)))
    shift = _centre_of_mass_mm(shifted.label, shifted.affine) - _centre_of_mass_mm(rest.label, rest.affine)
    np.testing.assert_allclose(shift, (3.0, -5.0, 2.0), atol=0.3)


def test_an_oblique_scan_shows_the_same_head_at_the_same_place(anatomy: Anatomy) -> None:
    """The grid turns, the patient does not: the world position of the brain stays."""
    tilted = apply_parameters(anatomy, SubjectParameters(scan_rotation_deg=(9.0, -7.0, 5.0)))
    assert np.abs(tilted.affine[:3, :3] - anatomy.affine[:3, :3]).max() > 0.3
    assert spacing_of(tilted.affine) == pytest.approx((SPACING_MM,) * 3)
    before, after = (_centre_of_mass_mm(s.label, s.affine) for s in (anatomy, tilted))
    np.testing.assert_allclose(after, before, atol=0.3)


def test_head_and_grid_turned_alike_leave_the_array_as_it_was(anatomy: Anatomy) -> None:
    angles = (4.0, -3.0, 6.0)
    turned = apply_parameters(anatomy, SubjectParameters(head_rotation_deg=angles, scan_rotation_deg=angles))
    np.testing.assert_array_equal(turned.label, anatomy.label)
    np.testing.assert_allclose(turned.t1, anatomy.t1, atol=1e-3)


def test_noise_is_rician_with_the_given_level(anatomy: Anatomy) -> None:
    noisy = apply_parameters(anatomy, SubjectParameters(noise_sd=20.0)).t1
    air = noisy[anatomy.t1 == 0]
    assert air.mean() == pytest.approx(20 * np.sqrt(np.pi / 2), rel=0.02)  # Rayleigh, where there is no signal
    bright = anatomy.t1 > 500
    assert (noisy - anatomy.t1)[bright].std() == pytest.approx(20, rel=0.03)


def test_contrast_gain_and_bias_are_factors(anatomy: Anatomy) -> None:
    gain = apply_parameters(anatomy, SubjectParameters(gain=1.5)).t1
    np.testing.assert_allclose(gain, 1.5 * anatomy.t1, rtol=1e-5)
    bias = apply_parameters(anatomy, SubjectParameters(bias_coefficients=(0.2, *(0.0,) * 8))).t1
    x = np.linspace(-1, 1, anatomy.t1.shape[0])[:, None, None]
    np.testing.assert_allclose(bias, anatomy.t1 * np.exp(0.2 * x), rtol=1e-5)
    dark = apply_parameters(anatomy, SubjectParameters(tissue_contrast=(0.5, 1.0, 1.0))).t1
    assert (dark <= anatomy.t1 + 1e-3).all()
    csf, white = anatomy.label == 1, anatomy.label == 3
    assert dark[csf].mean() < 0.8 * anatomy.t1[csf].mean()
    assert dark[white].mean() == pytest.approx(anatomy.t1[white].mean(), rel=0.01)


def test_the_cached_anatomy_cannot_be_changed_by_accident(anatomy: Anatomy) -> None:
    with pytest.raises(ValueError, match="read-only"):
        anatomy.t1[0, 0, 0] = 1
