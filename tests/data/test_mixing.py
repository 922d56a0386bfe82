"""Mixup mixes images and targets alike, with what was drawn for the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic import tiny_config, tiny_radiograph_config

from medseg.cohort import Case
from medseg.config import AugmentConfig, CrossEntropyConfig
from medseg.data.batches import BatchSource
from medseg.data.cache import Example
from medseg.data.mixing import Mixed, draw_mixing, mix
from medseg.files import UserError
from medseg.losses import build_loss

STILL = AugmentConfig(probability=0)


def _source(mixup: float, targets: list[int] | list[tuple[int, ...]], seed: int = 0) -> BatchSource:
    rng = np.random.default_rng(0)
    examples = [
        Example(Case(f"c{n}", f"p{n}", ("x",)), rng.normal(size=(1, 6, 7)).astype(np.float32), None, (), target)
        for n, target in enumerate(targets)
    ]
    config = STILL.model_copy(update={"mixup": mixup})
    return BatchSource(examples, (6, 7), 4, config, foreground_share=0.0, seed=seed)


def test_images_and_targets_are_mixed_with_the_same_shares() -> None:
    image, target = torch.randn(3, 1, 4, 5), torch.tensor([0, 2, 1])
    mixing = (Mixed(1, 0.75), Mixed(1, 0.5), Mixed(0, 0.0))
    mixed, shares = mix(image, target, 3, mixing)
    assert torch.allclose(mixed[0], 0.75 * image[0] + 0.25 * image[1])
    assert torch.equal(mixed[1], image[1])  # its own partner
    assert torch.equal(mixed[2], image[0])
    assert torch.allclose(shares, torch.tensor([[0.75, 0, 0.25], [0, 0, 1], [1, 0, 0]]))


def test_a_batch_is_what_its_parameters_say_and_nothing_else_changes() -> None:
    targets = [0, 1, 1, 0, 1, 0, 0, 1]
    for step, (plain, mixed) in enumerate(
        zip(_source(0, targets).stream(0, 4), _source(0.4, targets).stream(0, 4), strict=True)
    ):
        assert [replace(item, mixed=None) for item in mixed.parameters] == list(plain.parameters)
        drawn = tuple(item.mixed for item in mixed.parameters if item.mixed is not None)
        image, target = mix(plain.image, plain.target, 2, drawn)
        assert torch.equal(mixed.image, image)
        assert torch.equal(mixed.target, target)
        again = next(iter(_source(0.4, targets).stream(step, step + 1)))
        assert torch.equal(again.image, mixed.image)


def test_labels_that_are_not_exclusive_are_mixed_each() -> None:
    batch = next(iter(_source(0.4, [(1, 0, 1), (0, 0, 1), (1, 1, 0), (0, 0, 0)]).stream(0, 1)))
    assert batch.target.shape == (4, 3)
    assert set(batch.target.unique().tolist()) - {0.0, 1.0}, "something was mixed"


def test_shares_follow_the_beta_distribution() -> None:
    drawn = [draw_mixing(0.4, 2, np.random.default_rng([7, step]))[0].share for step in range(4000)]
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1))
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.02)
    assert np.var(drawn) == pytest.approx(1 / (4 * 1.8), rel=0.05)


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_shares_is_that_of_indices_where_nothing_is_mixed(balance: bool, smoothing: float) -> None:
    config = CrossEntropyConfig(balance=balance, label_smoothing=smoothing)
    loss = build_loss(config, [5, 20, 11])
    logits, target = torch.randn(6, 3), torch.tensor([0, 1, 2, 1, 1, 0])
    shares = torch.nn.functional.one_hot(target, 3).float()
    torch.testing.assert_close(loss(logits, shares), loss(logits, target))


def test_where_it_cannot_be_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"augment\.mixup 0\.4 is for classifiers"):
        tiny_config("augment.mixup=0.4")
    with pytest.raises(UserError, match="a mixed image has no site"):
        tiny_radiograph_config("augment.mixup=0.4", "train.site_adversary=0.5")
