"""A style changes what it says and nothing else, and is a function of what was drawn."""

import numpy as np
import pytest
import torch
from torch import Tensor

from medseg.cohort import Case
from medseg.config import AugmentConfig, StyleConfig
from medseg.data.augment import augment, draw_augment, neutral
from medseg.data.batches import BatchSource
from medseg.data.cache import Example
from medseg.data.style import AS_IS, Style, draw_style, restyle

EVERYTHING = StyleConfig(amplitude_mix=1, random_convolution=1, resolution=0.5, sharpness=0.5)


def _images(count: int = 3, shape: tuple[int, ...] = (24, 30)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((count, 1, *shape), generator=generator).cumsum(-1) / 4


def _detail(image: Tensor) -> float:
    return float(image.diff(dim=-1).std() / image.std())


def test_strength_zero_changes_no_pixel_and_no_other_draw() -> None:
    images = _images()
    assert restyle(images, [AS_IS] * 3) is images
    drawn = [draw_augment(AugmentConfig(probability=1), 2, rng := np.random.default_rng(1)), rng.random()]
    again = np.random.default_rng(1)
    plain = draw_augment(AugmentConfig(probability=1, style=StyleConfig()), 2, again)
    assert [plain, again.random()] == drawn
    assert plain.style == AS_IS
    assert draw_style(StyleConfig(), again, 8) == AS_IS
    styled = draw_augment(AugmentConfig(probability=1, style=EVERYTHING), 2, np.random.default_rng(1), batch_size=4)
    assert styled.style != AS_IS
    assert (styled.gamma, styled.noise_seed) == (plain.gamma, plain.noise_seed)


@pytest.mark.parametrize("shape", [(24, 30), (15, 21), (8, 10, 12)])
def test_mixing_takes_the_amplitude_and_keeps_the_phase(shape: tuple[int, ...]) -> None:
    images = _images(2, shape)
    mixed = restyle(images, [Style(mix_share=1, mix_with=1), Style(mix_share=1, mix_with=0)])
    axes = tuple(range(2, images.ndim))
    before, after = torch.fft.fftn(images, dim=axes), torch.fft.fftn(mixed, dim=axes)
    assert torch.allclose(after.abs(), before.abs().flip(0), atol=1e-3), "both are mixed with the image as it was"
    turned = (after * before.conj()).angle().abs()
    assert float(turned[before.abs() > 1].max()) < 1e-2
    half = restyle(images, [Style(mix_share=0.5, mix_with=1), AS_IS])
    amplitude = torch.fft.fftn(half[:1], dim=axes).abs()
    assert torch.allclose(amplitude, before.abs().mean(0, keepdim=True), atol=1e-3)
    assert torch.equal(half[1], images[1])


def test_mixing_with_itself_is_the_image() -> None:
    images = _images(1)
    assert torch.allclose(restyle(images, [Style(mix_share=0.7, mix_with=0)]), images, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 30), (8, 10, 12)])
def test_a_random_convolution_keeps_mean_spread_and_sign(shape: tuple[int, ...]) -> None:
    images = _images(2, shape)
    for seed in range(5):
        style = Style(convolved_share=1, kernel_size=3, kernel_seed=seed)
        found = restyle(images, [style] * 2)
        assert torch.equal(found, restyle(images, [style] * 2))
        for old, new in zip(images, found, strict=True):
            assert float(new.mean()) == pytest.approx(float(old.mean()), abs=1e-4)
            assert float(new.std()) == pytest.approx(float(old.std()), rel=1e-3)
            assert float(((new - new.mean()) * (old - old.mean())).sum()) > 0
    little = restyle(images, [Style(convolved_share=1e-6, kernel_size=3)] * 2)
    assert torch.allclose(little, images, atol=1e-4)


def test_resolution_and_detail_do_what_they_say() -> None:
    images = _images(1)
    coarse = restyle(images, [Style(kept_resolution=0.4)])
    soft, sharp = (restyle(images, [Style(detail_gain=gain)]) for gain in (0.5, 2.0))
    assert _detail(coarse) < _detail(images)
    assert _detail(soft) < _detail(images) < _detail(sharp)
    flat = torch.full((1, 1, 20, 20), 3.0)
    assert torch.allclose(restyle(flat, [Style(detail_gain=2.0, kept_resolution=0.5)]), flat)


def test_labels_are_left_alone() -> None:
    images, still = _images(2), neutral(2)
    label = (images > 0).float()
    styled = type(still)(still.rotation_rad, still.scale, still.translation, style=Style(mix_share=1, mix_with=1))
    found, same = augment(images, label, [styled, still])
    assert not torch.allclose(found[0], images[0])
    assert same is not None
    assert torch.equal(same, label)


def test_styled_batches_are_a_function_of_seed_and_step() -> None:
    examples = [
        Example(Case(f"c{n}", f"p{n}", ("x",)), image.numpy(), None, (), n % 2) for n, image in enumerate(_images(6))
    ]
    config = AugmentConfig(probability=1, style=EVERYTHING)
    whole, later = (
        list(BatchSource(examples, (24, 30), 4, config, foreground_share=0, seed=2).stream(first, 5))
        for first in (0, 3)
    )
    for one, other in zip(whole[3:], later, strict=True):
        assert torch.equal(one.image, other.image)
        assert one.parameters == other.parameters
    partners = {item.augment.style.mix_with for batch in whole for item in batch.parameters}
    assert partners <= set(range(4))
    assert len(partners) > 1
