"""Earlier segmentations as channels: where they lie, what is unknown, and how training makes them up."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg.cohort import Case, Cohort, write_cohort
from medseg.config import AugmentConfig, PriorConfig
from medseg.data.alignment import align
from medseg.data.batches import BatchSource
from medseg.data.cache import Example, load_examples
from medseg.data.prior import PriorParameters, as_channels, draw_prior, make_up, move_codes
from medseg.images import write_nifti
from medseg.plan import Plan
from medseg.volume import Volume, world_of


def blob(shape: tuple[int, ...] = (20, 22, 18)) -> np.ndarray:
    label = np.zeros(shape, np.uint8)
    label[6:14, 7:15, 5:12] = 1
    label[8:11, 9:12, 7:10] = 2
    return label


def moved(angle_deg: float, shift_mm: tuple[float, float, float]) -> np.ndarray:
    turn = np.deg2rad(angle_deg)
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    matrix[:3, 3] = shift_mm
    return matrix


def test_codes_keep_their_place_in_the_world_and_know_where_the_earlier_scan_ends() -> None:
    affine = np.array([[-1.0, 0, 0, 30], [0, 0, 1.2, -9], [0, 1.5, 0, 4], [0, 0, 0, 1]])
    mask, to_later = Volume(blob(), affine), moved(20, (3, -2, 5))
    shape, grid = (40, 44, 50), np.diag([1.0, 1.0, 1.0, 1.0])
    grid[:3, 3] = world_of(to_later @ affine, np.array([[9.5, 10.5, 8.5]]))[0] - (20, 22, 25)
    codes = move_codes(mask, to_later, shape, grid)
    index = world_of(np.linalg.inv(to_later @ affine), world_of(grid, np.argwhere(np.ones(shape)).astype(float)))
    nearest = np.round(index).astype(int).reshape(*shape, 3)
    inside = ((nearest >= 0) & (nearest < mask.array.shape)).all(-1)
    clear = (np.abs(index - np.floor(index) - 0.5).min(1) > 1e-3).reshape(shape)  # not half-way between two voxels
    wanted = np.where(inside, mask.array[tuple(np.clip(nearest, 0, np.array(mask.array.shape) - 1).reshape(-1, 3).T)]
                      .reshape(shape) + 1, 0)  # fmt: skip
    assert np.array_equal(codes[clear], wanted[clear])
    assert set(np.unique(codes)) == {0, 1, 2, 3}


def test_channels_are_one_where_something_is_known() -> None:
    codes = torch.tensor([0, 1, 2, 3, 0]).view(1, 1, 5, 1, 1)
    channels = as_channels(codes, 3)
    assert channels.shape == (1, 3, 5, 1, 1)
    assert channels.sum(1).flatten().tolist() == [0, 1, 1, 1, 0]
    assert channels.argmax(1).flatten().tolist()[1:4] == [0, 1, 2]


def test_a_made_up_prior_without_displacement_is_the_label_and_a_whole_shift_is_exact() -> None:
    codes = blob() + 1
    assert np.array_equal(make_up(codes, PriorParameters(True, (0, 0, 0), 0.0, 1)), codes)
    shifted = make_up(codes, PriorParameters(True, (2, -1, 0), 0.0, 1))
    assert np.array_equal(shifted[:-2, 1:], codes[2:, :-1])
    assert not shifted[-2:].any()
    assert not shifted[:, :1].any()
    warped = make_up(codes, PriorParameters(True, (0, 0, 0), 1.5, 7))
    assert 0.5 < 2 * ((warped == 2) & (codes == 2)).sum() / ((warped == 2).sum() + (codes == 2).sum()) < 1
    assert np.array_equal(warped, make_up(codes, PriorParameters(True, (0, 0, 0), 1.5, 7)))


def test_as_many_items_as_asked_for_have_no_prior() -> None:
    rng = np.random.default_rng(0)
    draws = [draw_prior(PriorConfig(dropout=0.3), rng) for _ in range(2000)]
    assert 0.27 < np.mean([not draw.shown for draw in draws]) < 0.33


def source(earlier: np.ndarray | None, prior_classes: int = 3, **config: object) -> BatchSource:
    label = blob()
    image = label[None].astype(np.float32)
    points = tuple(np.argwhere(label == value).astype(np.int32) for value in (1, 2))
    example = Example(Case("c", "p", ("x",)), image, label, points, -1, prior=earlier)
    settings = AugmentConfig.model_validate(config)
    return BatchSource([example] * 2, (16, 16, 16), 2, settings, foreground_share=1.0, seed=5,
                       prior_classes=prior_classes)  # fmt: skip


def test_a_batch_shows_the_earlier_label_and_moves_it_with_the_image() -> None:
    earlier = blob() + 1
    still = {"dropout": 0.0}
    config = {"probability": 1.0, "flip_axes": (0, 1, 2), "brightness": 0, "contrast": 0, "gamma": 0, "noise_sd": 0}
    made = source(earlier, **config, prior=still)
    for batch in made.stream(0, 3):
        assert batch.image.shape == (2, 1 + 3, 16, 16, 16)
        assert batch.target.shape == (2, 1, 16, 16, 16)
        known = batch.image[:, 1:].sum(1) > 0
        shown = batch.image[:, 1:].argmax(1)
        assert torch.equal(shown[known], batch.target[:, 0][known].long()), "here the earlier label is the label"
        assert known.float().mean() > 0.5


def test_without_a_prior_a_batch_is_what_it_was() -> None:
    for step in range(3):
        plain, more = source(None, 0), source(None, 3)
        one, other = plain.make(plain.draw(step)), more.make(more.draw(step))
        assert torch.equal(one.image, other.image[:, :1])
        assert torch.equal(one.target, other.target)


def test_where_a_partial_label_shows_nothing_nothing_is_known() -> None:
    made = source(None, prior={"dropout": 0.0, "shift_voxels": 0, "warp_voxels": 0}, probability=0)
    made.examples = [replace(made.examples[0], annotated=(True, True, False))]
    batch = made.make(made.draw(0))
    shown = batch.image[:, 1:]
    assert not shown[:, 0].any()
    assert torch.equal(shown[:, 1], (batch.target[:, 0] == 1).float())


def test_a_dropped_prior_is_unknown_everywhere() -> None:
    made = source(blob() + 1, prior={"dropout": 1.0})
    assert not made.make(made.draw(0)).image[:, 1:].any()


@pytest.mark.parametrize("shift_mm", [(4.0, -6.0, 5.0), (60.0, 20.0, -30.0)])
def test_a_rigid_movement_is_found_again(shift_mm: tuple[float, float, float]) -> None:
    """Two scans of one body in other positions, on other grids; the second start is needed where they do not meet."""
    centre = np.array([30.0, -10, 20])
    true = moved(12, shift_mm)

    def scan(affine: np.ndarray, pose: np.ndarray, shape: tuple[int, ...], gain: float) -> Volume:
        at = world_of(np.linalg.inv(pose) @ affine, np.argwhere(np.ones(shape)).astype(float)) - centre
        body = np.exp(-((at / (26, 34, 22)) ** 4).sum(1)) + 0.8 * np.exp(-(((at - (9, 14, -6)) / 7) ** 2).sum(1))
        return Volume((gain * 100 * body).reshape(shape).astype(np.float32), affine)

    first = np.diag([3.0, 3.0, 3.5, 1.0])
    first[:3, 3] = centre - (42, 48, 42)
    second = np.array([[-2.5, 0, 0, 0], [0, 0, 3.0, 0], [0, 3.0, 0, 0], [0, 0, 0, 1.0]])
    second[:3, 3] = world_of(true, centre[None])[0] - second[:3, :3] @ (18, 14, 17)
    earlier, later = scan(first, np.eye(4), (28, 32, 24), 1.0), scan(second, true, (36, 28, 34), 1.7)
    found = align(earlier, later)
    points = centre + np.array([[25, 0, 0], [0, 30, 0], [0, 0, -20], [-20, -20, 15.0]])
    error_mm = np.linalg.norm(world_of(found.to_later, points) - world_of(true, points), axis=1)
    assert found.similarity > 0.99
    assert error_mm.max() < 1.0
    assert np.allclose(found.to_later[:3, :3] @ found.to_later[:3, :3].T, np.eye(3), atol=1e-6), "rigid"
    assert np.array_equal(align(earlier, later).to_later, found.to_later), "the same scans, the same movement"


def test_a_later_case_is_given_the_label_of_the_earlier_where_the_two_align(tmp_path: Path) -> None:
    """The later scan lies 3 voxels further along the first axis: so does the earlier label on its grid."""
    texture = np.random.default_rng(1).normal(0, 4, (20, 22, 18))
    label = blob()
    image = (40.0 * (label > 0) + 30 * label + texture).astype(np.float32)
    cases = []
    for name, day, shift_mm in (("later", 300, 9.0), ("first", 0, 0.0), ("noise", 500, 0.0)):
        affine = np.diag([3.0, 3.0, 3.0, 1.0])
        affine[0, 3] = shift_mm
        shown = np.random.default_rng(9).normal(0, 1, label.shape).astype(np.float32) if name == "noise" else image
        write_nifti(tmp_path / "c" / "images" / f"{name}.nii.gz", Volume(shown, affine))
        write_nifti(tmp_path / "c" / "labels" / f"{name}.nii.gz", Volume(label, affine))
        cases.append(Case(name, "p", (f"images/{name}.nii.gz",), label=f"labels/{name}.nii.gz", exam_day=day))
    cohort = write_cohort(Cohort(tmp_path / "c", tuple(cases), {"a": 1, "b": 2}), [], {})
    plan = Plan(3, (16, 16, 16), 1, spacing_mm=(3.0, 3.0, 3.0))
    for _ in range(2):  # the second time from the cache
        first, later, noise = load_examples(cohort, cohort.cases, plan, tmp_path / "cache", min_similarity=0.7)
        assert first.prior is None
        assert later.prior is not None
        assert np.array_equal(later.prior > 0, np.ones_like(label, bool))
        assert np.array_equal(later.prior - 1, label)
        assert noise.prior is not None
        assert not noise.prior.any(), "nothing is known where the two do not align"
    assert [e.prior for e in load_examples(cohort, cohort.cases, plan, tmp_path / "cache")] == [None] * 3


def test_noise_is_not_similar() -> None:
    rng = np.random.default_rng(0)
    one, other = (Volume(rng.normal(0, 1, (16, 16, 16)).astype(np.float32), np.diag([3.0, 3, 3, 1])) for _ in "ab")
    assert align(one, other).similarity < 0.5
