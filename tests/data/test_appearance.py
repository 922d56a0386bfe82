"""Padding goes and every pixel keeps its place; what is matched to itself stays as it is."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from scipy import ndimage

from medseg.config import load_config
from medseg.data.appearance import (
    PERCENTILES,
    content_box,
    crop_to,
    detail_of,
    equalise_locally,
    landmarks_of,
    standardise,
)
from medseg.data.preprocess import prepare, restore_label
from medseg.explain.outputs import restore_map
from medseg.files import UserError
from medseg.plan import Appearance, Plan, read_plan, write_plan
from medseg.volume import Volume, world_of

CONTENT = (slice(9, 101), slice(14, 110))


def _scene(seed: int = 0) -> NDArray[np.float32]:
    """Smooth structure with fine texture, 92 × 96, values about 0 to 200."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(92, 96)), 6)
    fine = ndimage.gaussian_filter(rng.normal(size=(92, 96)), 0.7)
    scene = 100 + 30 * smooth / smooth.std() + 8 * fine / fine.std()
    return scene.astype(np.float32)


def _padded(scene: NDArray[np.float32], *, marker: bool = False) -> NDArray[np.float32]:
    image = np.zeros((112, 120), dtype=np.float32)
    image[CONTENT] = scene
    if marker:
        image[3:8, 40:43] = 200  # fewer than 5 % of each row that it lies in
    return image


def _plan(appearance: Appearance) -> Plan:
    return Plan(2, (48, 48), 1, size_px=(48, 48), appearance=appearance)


CROP = _plan(Appearance(crop_padding=True))


@pytest.mark.parametrize("marker", [False, True])
def test_padding_is_found_whatever_its_grey_value_and_despite_a_marker(marker: bool) -> None:
    image = _padded(_scene(), marker=marker)
    assert content_box(image) == CONTENT
    assert content_box(200 - image) == CONTENT
    assert content_box(image.T) == CONTENT[::-1]


def test_what_is_no_padding_stays() -> None:
    scene = _scene()
    assert content_box(scene) == (slice(0, 92), slice(0, 96))
    assert content_box(np.zeros((40, 30))) == (slice(0, 40), slice(0, 30))
    half_dark = scene.copy()
    half_dark[:60] = np.arange(96) % 2
    assert content_box(half_dark)[0] == slice(0, 92), "more than half of an axis is no padding"


def test_lines_without_any_contrast_are_left_out_however_many() -> None:
    image = np.full((112, 120), 3.0, dtype=np.float32)
    image[80:100, 30:50] = _scene()[:20, :20]
    assert content_box(image) == (slice(80, 100), slice(30, 50))


def test_a_cropped_pixel_keeps_its_place() -> None:
    image = Volume(_padded(_scene()), np.diag([0.3, 0.2, 1.0, 1.0]))
    part = crop_to(image, CONTENT)
    row, column = 17, 31
    assert part.array[row, column] == image.array[row + 9, column + 14]
    here, there = np.array([[row, column, 0]]), np.array([[row + 9, column + 14, 0]])
    assert np.allclose(world_of(part.affine, here), world_of(image.affine, there))


def test_padding_changes_nothing_that_the_network_sees() -> None:
    scene = _scene()
    bare = prepare([Volume(scene, np.eye(4))], CROP)
    padded = prepare([Volume(_padded(scene, marker=True), np.eye(4))], CROP)
    assert np.allclose(bare.image, padded.image, atol=1e-4)
    assert not np.allclose(prepare([Volume(_padded(scene), np.eye(4))], _plan(Appearance())).image, bare.image)


def test_labels_and_maps_return_to_the_padded_grid() -> None:
    label = np.zeros((112, 120), dtype=np.uint8)
    label[30:60, 50:90] = 1
    affine = np.diag([0.3, 0.2, 1.0, 1.0])
    prepared = prepare([Volume(_padded(_scene()), affine)], CROP, Volume(label, affine))
    assert prepared.covered_shape == (92, 96)
    assert prepared.label is not None
    back = restore_label(prepared.label, prepared)
    assert 2 * (back & label).sum() / (back.sum() + label.sum()) > 0.95
    found = restore_map(1 + prepared.label.astype(np.float32), prepared)
    assert found.shape == label.shape
    outside = np.ones_like(label, dtype=bool)
    outside[CONTENT] = False
    assert not found[outside].any()
    assert found[~outside].min() == 1
    centre = ndimage.center_of_mass(found > 1.5)
    assert np.allclose(centre, ndimage.center_of_mass(label), atol=0.7)


def test_no_appearance_is_the_image_itself() -> None:
    scene = _scene()
    assert standardise(scene, Appearance()) is scene
    flat = np.full((40, 40), 3, dtype=np.float32)
    for histogram in ("percentile", "landmarks", "clahe"):
        looks = Appearance(histogram=histogram, landmarks=tuple(landmarks_of(_scene())), detail_sd=(1.0,) * 5)
        assert standardise(flat, looks) is flat


def test_an_image_matched_to_itself_stays_as_it_is() -> None:
    scene = _scene()
    sharp = standardise(scene, Appearance(detail_sd=tuple(detail_of(scene))))
    assert np.allclose(sharp, scene, atol=1e-3)
    low, high = np.percentile(scene, (PERCENTILES[0], PERCENTILES[-1]))
    matched = standardise(scene, Appearance(histogram="landmarks", landmarks=tuple(landmarks_of(scene))))
    assert np.allclose(matched, np.clip((scene - low) / (high - low), 0, 1), atol=1e-4)


def test_landmarks_undo_what_a_gamma_curve_did() -> None:
    scene = _scene()
    looks = Appearance(histogram="landmarks", landmarks=tuple(landmarks_of(_scene(1))))
    span = (scene - scene.min()) / (scene.max() - scene.min())
    before = np.abs(landmarks_of(scene) - landmarks_of(span**2.2)).max()
    one, other = standardise(scene, looks), standardise((span**2.2).astype(np.float32), looks)
    assert before > 0.1
    assert np.abs(one - other).max() < 0.05, "piecewise linear, so nearly"
    assert np.allclose(landmarks_of(one), looks.landmarks, atol=0.01)


@pytest.mark.parametrize("sigma", [0.6, 1.0])
def test_sharpness_of_a_blurred_image_comes_closer(sigma: float) -> None:
    scene, reference = _scene(), detail_of(_scene(1))
    blurred = ndimage.gaussian_filter(scene, sigma)
    matched = standardise(blurred, Appearance(detail_sd=tuple(reference)))
    distance = [np.abs(np.log(detail_of(image)[1:4] / reference[1:4])).sum() for image in (blurred, matched)]
    assert distance[1] < 0.5 * distance[0]
    assert np.corrcoef(matched.ravel(), scene.ravel())[0, 1] > np.corrcoef(blurred.ravel(), scene.ravel())[0, 1]


def test_one_tile_without_a_limit_is_the_share_of_darker_pixels() -> None:
    image = np.arange(256, dtype=np.float32).reshape(16, 16)[::-1].copy()
    equalised = equalise_locally(image, tiles=1, limit=1e9)
    assert np.allclose(equalised, (image + 1) / 256)


def test_local_equalisation_equals_its_definition_pixel_by_pixel() -> None:
    image, tiles, limit = _scene()[:50, :43], 4, 2.0
    level = np.round((image - image.min()) / (image.max() - image.min()) * 255).astype(int)
    edges = [np.linspace(0, n, tiles + 1).round().astype(int) for n in image.shape]

    def share(row: int, column: int, grey: int) -> float:
        tile = level[edges[0][row] : edges[0][row + 1], edges[1][column] : edges[1][column + 1]]
        cap = limit * tile.size / 256
        counts = [min((tile == g).sum(), cap) for g in range(256)]
        return float(sum(counts[: grey + 1]) + (grey + 1) / 256 * (tile.size - sum(counts))) / tile.size

    def place(axis: int, at: int) -> tuple[int, int, float]:
        centres = [(a + b - 1) / 2 for a, b in zip(edges[axis][:-1], edges[axis][1:], strict=True)]
        after = next((t for t, centre in enumerate(centres) if centre >= at), tiles)
        if after in (0, tiles):
            return (max(after - 1, 0), max(after - 1, 0), 0.0)
        return after - 1, after, (at - centres[after - 1]) / (centres[after] - centres[after - 1])

    found = equalise_locally(image, tiles, limit)
    for row, column in ((0, 0), (7, 30), (25, 21), (49, 42), (13, 5), (31, 38)):
        (r0, r1, down), (c0, c1, right), grey = place(0, row), place(1, column), level[row, column]
        upper = (1 - right) * share(r0, c0, grey) + right * share(r0, c1, grey)
        lower = (1 - right) * share(r1, c0, grey) + right * share(r1, c1, grey)
        assert found[row, column] == pytest.approx((1 - down) * upper + down * lower, abs=1e-5)


def test_a_plan_keeps_its_appearance_and_older_plans_have_none(tmp_path: Path) -> None:
    plan = _plan(Appearance(True, "landmarks", landmarks=(0.0, 0.5, 1.0), detail_sd=(0.1, 0.2)))
    path = write_plan(tmp_path / "plan.yaml", plan)
    assert read_plan(path) == plan
    tree = yaml.safe_load(path.read_text())
    del tree["appearance"]
    path.write_text(yaml.safe_dump(tree))
    assert read_plan(path).appearance == Appearance()


def test_the_config_refuses_what_volumes_cannot_have() -> None:
    with pytest.raises(UserError, match=r"plan\.appearance is for radiographs"):
        load_config("hippocampus", ["plan.appearance.crop_padding=true"])
    with pytest.raises(UserError, match=r"plan\.appearance\.clahe_limit"):
        load_config("tb_radiograph", ["plan.appearance.clahe_limit=0.5"])
