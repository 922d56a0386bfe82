"""The simulated radiographs: a lesion where it is said to be, nothing else that gives it away, recorded parameters."""

import dataclasses
import json
from itertools import product

import numpy as np
import pytest
from scipy import ndimage

from medseg.data.phantom import (
    FIELD_MM,
    MAX_VALUE,
    SITES,
    RadiographParameters,
    draw_radiograph_parameters,
    draw_radiographs,
    render_radiograph,
)

SIZE_PX = 128


def _pair(index: int) -> tuple[RadiographParameters, RadiographParameters]:
    site = SITES[index % 2]
    with_lesion = draw_radiograph_parameters(5, index, has_lesion=True, site=site)
    return with_lesion, draw_radiograph_parameters(5, index, has_lesion=False, site=site)


@pytest.mark.parametrize("index", range(12))
def test_the_lesion_lies_inside_a_lung_field_as_a_whole(index: int) -> None:
    params = _pair(index)[0]
    radiograph = render_radiograph(params, SIZE_PX)
    assert not (radiograph.lesion_mask > radiograph.lung_mask).any()
    _, parts = ndimage.label(radiograph.lesion_mask)
    assert parts == 1
    area_mm2 = radiograph.lesion_mask.sum() * np.prod(radiograph.pixel_spacing_mm)
    assert area_mm2 == pytest.approx(np.pi * (params.lesion.radius_mm * params.zoom) ** 2, rel=0.15)


@pytest.mark.parametrize("index", range(6))
def test_the_lesion_is_the_only_difference(index: int) -> None:
    params, without = _pair(index)
    assert dataclasses.replace(params, has_lesion=False) == without
    ill, healthy = render_radiograph(params, SIZE_PX), render_radiograph(without, SIZE_PX)
    assert not healthy.lesion_mask.any()
    np.testing.assert_array_equal(ill.lung_mask, healthy.lung_mask)
    near = ndimage.binary_dilation(ill.lesion_mask, iterations=2)
    difference = ill.image.astype(int) - healthy.image.astype(int)
    assert not difference[~near].any()
    assert (difference >= 0).all()
    assert difference[ill.lesion_mask > 0].mean() > 0.03 * MAX_VALUE


def test_an_image_is_twelve_bits_of_the_asked_size() -> None:
    for params in draw_radiographs(1, 4):
        radiograph = render_radiograph(params, 96)
        assert radiograph.image.dtype == np.uint16
        assert radiograph.lung_mask.dtype == radiograph.lesion_mask.dtype == np.uint8
        assert radiograph.image.shape == radiograph.lung_mask.shape == radiograph.lesion_mask.shape == (96, 96)
        assert radiograph.image.max() <= MAX_VALUE
        assert np.ptp(radiograph.image) > 0.8 * MAX_VALUE  # uses its range
        assert radiograph.pixel_spacing_mm == (FIELD_MM / 96, FIELD_MM / 96)


def test_bright_is_dense() -> None:
    params = draw_radiograph_parameters(2, 0, has_lesion=False)
    radiograph = render_radiograph(params, SIZE_PX)
    lung = radiograph.image[radiograph.lung_mask > 0].mean()
    abdomen = radiograph.image[-SIZE_PX // 8 :, SIZE_PX // 3 : -SIZE_PX // 3].mean()
    assert lung < 0.6 * abdomen


def test_there_are_two_lungs_and_the_heart_makes_the_left_one_smaller() -> None:
    areas = []
    for index in range(6):
        mask = render_radiograph(draw_radiograph_parameters(3, index, has_lesion=False), SIZE_PX).lung_mask
        parts, count = ndimage.label(mask)
        assert count == 2
        left_to_right = sorted((1, 2), key=lambda part: np.argwhere(parts == part)[:, 1].mean())
        areas.append([(parts == part).sum() for part in left_to_right])
    right, left = np.mean(areas, axis=0)  # the patient's right lung is left in the image
    assert left < right


def test_the_same_parameters_give_the_same_radiograph_also_from_json() -> None:
    params = draw_radiograph_parameters(4, 9, has_lesion=True, site="south")
    again = RadiographParameters.from_json(json.loads(json.dumps(dataclasses.asdict(params))))
    assert again == params
    one, other = render_radiograph(params, SIZE_PX), render_radiograph(again, SIZE_PX)
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_array_equal(one.lesion_mask, other.lesion_mask)


@pytest.mark.parametrize("change", [{"tilt": 1.0}, {"thorax": {"seed": 1}}])
def test_other_records_are_refused(change: dict[str, object]) -> None:
    record = dataclasses.asdict(draw_radiograph_parameters(4, 9, has_lesion=True)) | change
    with pytest.raises(ValueError, match="not radiograph parameters"):
        RadiographParameters.from_json(record)


def test_the_anatomy_is_the_same_at_every_size() -> None:
    params = dataclasses.replace(draw_radiograph_parameters(6, 1, has_lesion=True), noise_sd=0.0)
    small, large = render_radiograph(params, 128), render_radiograph(params, 256)
    halved = large.image.reshape(128, 2, 128, 2).mean(axis=(1, 3))
    # The lead marker is drawn in whole pixels; elsewhere only edges may differ.
    assert np.median(np.abs(halved - small.image)) < 0.01 * MAX_VALUE
    assert small.lung_mask.mean() == pytest.approx(large.lung_mask.mean(), rel=0.02)


def test_a_cohort_is_balanced_by_lesion_within_each_site() -> None:
    cohort = draw_radiographs(0, 40)
    counts = dict.fromkeys(product(SITES, (False, True)), 0)
    for params in cohort:
        counts[params.site, params.has_lesion] += 1
    assert set(counts.values()) == {10}
    assert len({params.thorax for params in cohort}) == 40


def test_nothing_drawn_depends_on_the_lesion_but_the_lesion() -> None:
    """Without their lesions, the two groups of a cohort are alike in brightness."""
    images = [
        (params.has_lesion, render_radiograph(dataclasses.replace(params, has_lesion=False), 64).image.mean())
        for params in draw_radiographs(8, 80)
        if params.site == "north"
    ]
    ill, healthy = (np.array([mean for has, mean in images if has is group]) for group in (True, False))
    pooled = np.sqrt((ill.var(ddof=1) + healthy.var(ddof=1)) / len(ill))
    assert abs(ill.mean() - healthy.mean()) < 3 * pooled


def test_lesions_occur_in_both_lungs() -> None:
    sides = [np.sign(params.lesion.x) for params in draw_radiographs(9, 40)]
    assert 10 <= sides.count(-1.0) <= 34


def test_sites_differ_in_their_marks() -> None:
    north, south = (
        render_radiograph(draw_radiograph_parameters(7, 0, has_lesion=False, site=site), SIZE_PX).image
        for site in SITES
    )
    assert (south[0] < 0.05 * MAX_VALUE).all()  # collimated
    corner = np.s_[SIZE_PX // 16 : SIZE_PX // 6, : SIZE_PX // 6]
    assert north[corner].max() > 0.9 * MAX_VALUE > south[corner].max()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="site is 'west'"):
        draw_radiograph_parameters(0, 0, has_lesion=True, site="west")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size_px is 8"):
        render_radiograph(draw_radiograph_parameters(0, 0, has_lesion=True), 8)
