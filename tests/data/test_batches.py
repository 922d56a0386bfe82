"""Batches are a function of (seed, step); crops and augmentations keep image and label together."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.cohort import Case
from medseg.config import AugmentConfig, load_config
from medseg.data.augment import AugmentParameters, augment, draw_augment, neutral
from medseg.data.batches import BatchSource, crop
from medseg.data.cache import Example
from medseg.files import UserError

STILL = AugmentConfig(probability=0)


def _examples(count: int, shape: tuple[int, ...] = (9, 10, 11)) -> list[Example]:
    rng = np.random.default_rng(0)
    examples = []
    for number in range(count):
        label = np.zeros(shape, dtype=np.uint8)
        label[2:4, 3:5, 5:7] = 1
        image = rng.normal(size=(1, *shape)).astype(np.float32) + number
        points = (np.argwhere(label == 1).astype(np.int32),)
        examples.append(Example(Case(f"c{number}", f"p{number}", ("x",)), image, label, points, -1))
    return examples


def _source(examples: list[Example], config: AugmentConfig = STILL, seed: int = 0, **options: float) -> BatchSource:
    return BatchSource(examples, (8, 8, 8), 2, config, foreground_share=options.get("foreground_share", 0.5), seed=seed)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    examples = _examples(5)
    config = AugmentConfig()
    first = list(_source(examples, config).stream(0, 6))
    later = list(_source(examples, config).stream(3, 6))
    for one, other in zip(first[3:], later, strict=True):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.target, other.target)
        assert one.parameters == other.parameters
    assert _source(examples, config).draw(0) != _source(examples, config, seed=1).draw(0)


def test_every_case_is_seen_once_a_pass() -> None:
    source = _source(_examples(7))
    seen = [item.index for step in range(7) for item in source.draw(step)]
    assert sorted(seen[:7]) == list(range(7))
    assert sorted(seen[7:14]) == list(range(7))
    assert seen[:7] != seen[7:14]


def test_foreground_share_of_one_always_hits_the_label() -> None:
    source = _source(_examples(3), foreground_share=1.0)
    assert all(batch.target.amax(dim=(1, 2, 3, 4)).min() == 1 for batch in source.stream(0, 8))


def test_a_class_that_few_cases_have_is_centred_on_more_often() -> None:
    """Label 3 is in one case of six. Drawn evenly within a case, it would get a sixth of a third of the patches."""
    examples = []
    for number, example in enumerate(_examples(6)):
        labels = [1, 2, 3] if number == 0 else [1, 2]
        points = tuple(
            np.array([[4, 4, place]] if place + 1 in labels else [], np.int32).reshape(-1, 3) for place in range(3)
        )
        examples.append(replace(example, points=points))
    source = BatchSource(examples, (1, 1, 1), 6, STILL, foreground_share=1.0, seed=0)
    centres = [item.centre[2] for step in range(500) for item in source.draw(step)]
    shares = np.bincount(centres, minlength=3) / len(centres)
    # the case with all three draws the third with odds of 1 against 1/6 and 1/6
    assert shares == pytest.approx([(5 / 2 + 1 / 8) / 6, (5 / 2 + 1 / 8) / 6, 3 / 4 / 6], abs=0.025)
    assert shares[2] > 2 / 18


def test_a_batch_says_of_which_classes_its_labels_tell() -> None:
    whole = _examples(4)
    assert all(batch.annotated is None for batch in _source(whole).stream(0, 4))
    mixed = [replace(example, annotated=(True, False)) if n == 2 else example for n, example in enumerate(whole)]
    for plain, batch in zip(_source(whole).stream(0, 4), _source(mixed).stream(0, 4), strict=True):
        indices = [item.index for item in batch.parameters]
        if 2 in indices:
            assert batch.annotated is not None
            assert batch.annotated.tolist() == [[True, index != 2] for index in indices]
        else:
            assert batch.annotated is None
        assert torch.equal(batch.image, plain.image)


@given(st.tuples(*[st.integers(1, 12)] * 3), st.tuples(*[st.integers(1, 12)] * 3), st.tuples(*[st.integers(0, 11)] * 3))
@settings(max_examples=60, deadline=None)
def test_crop_equals_padding_first_then_slicing(
    shape: tuple[int, ...], size: tuple[int, ...], centre: tuple[int, ...]
) -> None:
    array = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(1, *shape)
    padded = np.pad(array, [(0, 0)] + [(24, 24)] * 3)
    window = tuple(slice(24 + c - s // 2, 24 + c - s // 2 + s) for c, s in zip(centre, size, strict=True))
    assert np.array_equal(crop(array, centre, size), padded[(slice(None), *window)])


@pytest.mark.parametrize("ndim", [2, 3])
def test_neutral_parameters_change_nothing(ndim: int) -> None:
    image = torch.randn(2, 1, *[6] * ndim)
    label = torch.randint(0, 3, image.shape).float()
    out, out_label = augment(image, label, [neutral(ndim)] * 2)
    assert torch.equal(out, image)
    assert out_label is not None
    assert torch.equal(out_label, label)


@pytest.mark.parametrize(("ndim", "axis"), [(2, 0), (3, 0), (3, 1), (3, 2)])
def test_quarter_turns_are_exact_permutations(ndim: int, axis: int) -> None:
    image = torch.arange(7.0**ndim).reshape(1, 1, *[7] * ndim)
    angles = [0.0] * (3 if ndim == 3 else 1)
    angles[axis if ndim == 3 else 0] = np.pi / 2
    still = neutral(ndim)
    turned, _ = augment(image, None, [AugmentParameters(tuple(angles), still.scale, still.translation)])
    plane = [d + 2 for d in range(ndim) if ndim == 2 or d != axis]
    candidates = [torch.rot90(image, k, plane) for k in (1, -1)]
    assert any(torch.allclose(turned, candidate, atol=1e-2) for candidate in candidates)


def test_rotation_of_an_anisotropic_patch_keeps_distances() -> None:
    label = torch.zeros(1, 1, 33, 65, 17)
    label[..., 16, 20:45, 8] = 1
    params = AugmentParameters((0.0, 0.0, np.pi / 6), (1.0,) * 3, (0.0,) * 3)
    _, turned = augment(label, label, [params])
    assert turned is not None
    points = torch.nonzero(turned[0, 0]).float()
    span = (points.max(0).values - points.min(0).values).norm()
    assert abs(float(span) - 24) < 2


def test_image_and_label_move_together() -> None:
    rng = np.random.default_rng(3)
    label = torch.zeros(4, 1, 24, 24, 24)
    label[:, :, 8:16, 6:14, 10:18] = 1
    config = AugmentConfig(probability=1, flip_axes=(0, 1, 2), brightness=0, contrast=0, gamma=0, noise_sd=0)
    parameters = [draw_augment(config, 3, rng) for _ in range(4)]
    image, moved = augment(label.clone(), label, parameters)
    assert moved is not None
    dice = 2 * ((image > 0.5) * moved).sum() / ((image > 0.5).sum() + moved.sum())
    assert float(dice) > 0.95


@pytest.mark.parametrize("axis", range(3))
def test_turned_about_one_axis_what_lies_across_it_stays(axis: int) -> None:
    limits = [0.0, 0.0, 0.0]
    limits[axis] = 40.0
    config = AugmentConfig(probability=1, rotate_deg=tuple(limits), scale=0, translate=0)
    place = torch.arange(24.0).view([24 if other == axis else 1 for other in range(3)]).expand(24, 24, 24)
    for seed in range(3):
        params = draw_augment(config, 3, np.random.default_rng(seed))
        assert [bool(angle) for angle in params.rotation_rad] == [other == axis for other in range(3)]
        _, moved = augment(place[None, None], place[None, None].clone(), [params])
        assert moved is not None
        inside = moved[0, 0] != 0
        assert torch.equal(moved[0, 0][inside], place[inside])
        assert inside.float().mean() > 0.7


def test_a_radiograph_is_turned_about_one_axis() -> None:
    with pytest.raises(UserError, match=r"augment\.rotate_deg \[5\.0, 0\.0, 0\.0\] is for volumes"):
        load_config("tb_radiograph", ["augment.rotate_deg=[5, 0, 0]"])


def test_noise_follows_its_recorded_seed() -> None:
    still = neutral(2)
    params = AugmentParameters(still.rotation_rad, still.scale, still.translation, noise_sd=0.3, noise_seed=7)
    image = torch.zeros(1, 1, 64, 64)
    first, _ = augment(image, None, [params])
    second, _ = augment(image, None, [params])
    assert torch.equal(first, second)
    assert abs(float(first.std()) - 0.3) < 0.03


def test_golden_draw() -> None:
    """What seed 3 draws at step 7; a change here changes every training and must be meant."""
    item = _source(_examples(5), AugmentConfig(flip_axes=(0,)), seed=3).draw(7)[1]
    assert (item.index, item.centre, item.augment.flips) == (0, (4, 4, 7), ())
    assert item.augment.rotation_rad == pytest.approx((0.16302749267, -0.10385012655, 0.03138519172))
    assert item.augment.gamma == pytest.approx(1.02787484503)
    assert item.augment.noise_seed == 1465934884


def test_batches_are_augmented_on_the_device_and_no_value_comes_back() -> None:
    """A meta tensor has no values: whatever read one on the host would raise, and would make a GPU wait."""
    changing = AugmentConfig(probability=1.0, flip_axes=(0,), noise_sd=0.1)
    source = BatchSource(
        _examples(3), (8, 8, 8), 2, changing, foreground_share=0.5, seed=0, device=torch.device("meta")
    )
    batch = source.make(source.draw(0))
    assert batch.image.device.type == batch.target.device.type == "meta"
    assert batch.image.shape == batch.target.shape == (2, 1, 8, 8, 8)
