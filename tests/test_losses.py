"""Losses: zero for the truth, known values, no surprise on absent classes."""

import math

import pytest
import torch

from medseg.config import BinaryCrossEntropyConfig, CrossEntropyConfig, DiceCEConfig
from medseg.losses import LOSSES, build_loss


def test_registry_has_a_loss_per_config() -> None:
    assert set(LOSSES) == {"dice_ce", "cross_entropy", "binary_cross_entropy"}


def test_dice_ce_vanishes_for_the_truth_and_is_finite_without_foreground() -> None:
    loss = build_loss(DiceCEConfig())
    label = torch.randint(0, 3, (2, 1, 6, 6, 6)).float()
    logits = 50 * torch.nn.functional.one_hot(label[:, 0].long(), 3).movedim(-1, 1).float()
    assert float(loss(logits, label)) < 1e-3
    assert math.isfinite(float(loss(torch.zeros(1, 3, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4))))


def test_dice_term_has_its_closed_form() -> None:
    """Uniform probabilities p over K classes, share s of one foreground class: 1 - 2ps/(p + s) for each class."""
    loss = build_loss(DiceCEConfig(ce_weight=0))
    label = torch.zeros(1, 1, 10, 10, 10)
    label[..., :5] = 1
    value = float(loss(torch.zeros(1, 2, 10, 10, 10), label))
    assert value == pytest.approx(1 - 2 * 0.5 * 0.5 / (0.5 + 0.5), abs=1e-4)


def test_cross_entropy_of_no_knowledge_is_log_k_and_balance_weighs_the_rare() -> None:
    target = torch.tensor([0, 0, 0, 1])
    assert float(build_loss(CrossEntropyConfig(), [3, 1])(torch.zeros(4, 2), target)) == pytest.approx(math.log(2))
    plain, balanced = build_loss(CrossEntropyConfig(), [3, 1]), build_loss(CrossEntropyConfig(balance=True), [3, 1])
    always_first = torch.tensor([[5.0, 0.0]] * 4)
    assert float(balanced(always_first, target)) > float(plain(always_first, target))


def test_binary_cross_entropy_is_torchs_and_the_formula() -> None:
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(8, 3), torch.randint(0, 2, (8, 3))
    p = torch.sigmoid(logits.double())
    plain = float(build_loss(BinaryCrossEntropyConfig())(logits, target))
    assert plain == pytest.approx(float(torch.nn.functional.binary_cross_entropy(p, target.double())), rel=1e-5)
    # 2 of 8 cases have the first label, 4 the second, 7 the third: the present count 3, 1 and 1/7 times.
    balanced = float(build_loss(BinaryCrossEntropyConfig(balance=True), [2, 4, 7], 8)(logits, target))
    weight = torch.tensor([3.0, 1.0, 1 / 7], dtype=torch.float64)
    terms = -(weight * target * p.log() + (1 - target) * (1 - p).log())
    assert balanced == pytest.approx(float(terms.mean()), rel=1e-5)
    assert balanced != pytest.approx(plain, rel=1e-3)
