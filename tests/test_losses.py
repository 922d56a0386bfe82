"""Losses: zero for the truth, known values, no surprise on absent classes."""

import math

import pytest
import torch

from medseg.config import BinaryCrossEntropyConfig, CrossEntropyConfig, DiceCEConfig
from medseg.losses import LOSSES, build_loss, marginal_logits


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


def test_where_all_is_annotated_the_numbers_stay_the_same() -> None:
    torch.manual_seed(1)
    for classes, shape in ((2, (5, 6)), (4, (5, 6, 7))):
        logits = 3 * torch.randn(2, classes, *shape, requires_grad=True)
        label = torch.randint(0, classes, (2, 1, *shape)).float()
        for config in (DiceCEConfig(), DiceCEConfig(dice_weight=0), DiceCEConfig(ce_weight=0)):
            loss = build_loss(config)
            plain, told = loss(logits, label), loss(logits, label, torch.ones(2, classes, dtype=torch.bool))
            torch.testing.assert_close(told, plain, rtol=1e-6, atol=0)
            gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (plain, told)]
            torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_marginal_logits_add_the_probabilities_of_what_is_not_annotated_to_the_background() -> None:
    torch.manual_seed(2)
    logits = 4 * torch.randn(2, 4, 3, 3)
    annotated = torch.tensor([[True, True, False, False], [True, True, True, True]])
    p, q = logits.softmax(1), marginal_logits(logits, annotated).softmax(1)
    torch.testing.assert_close(q[0, 0], p[0, 0] + p[0, 2] + p[0, 3])
    torch.testing.assert_close(q[0, 1], p[0, 1])
    assert torch.equal(q[0, 2:], torch.zeros(2, 3, 3))
    torch.testing.assert_close(q[1], p[1])


def test_the_gradient_of_the_marginal_cross_entropy_is_the_one_worked_out_by_hand() -> None:
    """With q = p0 + p2, class 2 not annotated: of -log q the derivative by z_k is p_k - p_k/q for k in {0, 2} and p_1
    by z_1; of -log p1 it is p_k, less 1 for k = 1."""
    logits = torch.tensor([[0.3, -1.2, 0.8], [1.5, 0.1, -0.4]]).T.reshape(1, 3, 2, 1).requires_grad_()
    label, annotated = torch.tensor([0.0, 1.0]).reshape(1, 1, 2, 1), torch.tensor([[True, True, False]])
    build_loss(DiceCEConfig(dice_weight=0))(logits, label, annotated).backward()
    p = logits.detach().softmax(1)[0, :, :, 0]
    q = p[0, 0] + p[2, 0]
    background = torch.stack([p[0, 0] - p[0, 0] / q, p[1, 0], p[2, 0] - p[2, 0] / q])
    structure = p[:, 1] - torch.tensor([0.0, 1.0, 0.0])
    torch.testing.assert_close(logits.grad[0, :, :, 0], torch.stack([background, structure], 1) / 2)


def test_a_background_that_may_hide_a_structure_does_not_speak_against_it() -> None:
    """On background voxels, exchanging z_0 and the z of what is not annotated changes nothing; where it is annotated,
    the loss is far from blind to it."""
    torch.manual_seed(3)
    logits, label = 2 * torch.randn(1, 3, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4)
    exchanged, loss = logits[:, [2, 1, 0]], build_loss(DiceCEConfig())
    told = [float(loss(z, label, torch.tensor([[True, True, False]]))) for z in (logits, exchanged)]
    assert told[0] == pytest.approx(told[1], rel=1e-6)
    assert abs(float(loss(logits, label)) - float(loss(exchanged, label))) > 0.05


def test_dice_sums_over_the_cases_that_annotate_a_class_and_leaves_out_what_none_does() -> None:
    torch.manual_seed(4)
    logits, label = torch.randn(3, 4, 6, 6), torch.randint(0, 2, (3, 1, 6, 6)).float()
    label[1] *= 2  # class 2 in the second case alone; class 3 in none
    label[2] = 0
    annotated = torch.tensor([[True, True, False, False], [True, True, True, False], [True, False, False, False]])
    p = logits.softmax(1)
    terms = []
    for value, cases in ((1, [0, 1]), (2, [1])):
        inside, truth = p[cases, value], (label[cases, 0] == value).float()
        terms.append(1 - (2 * (inside * truth).sum() + 1e-5) / (inside.sum() + truth.sum() + 1e-5))
    found = build_loss(DiceCEConfig(ce_weight=0))(logits, label, annotated)
    assert float(found) == pytest.approx(float(sum(terms) / 2), rel=1e-6)


def test_a_case_that_annotates_nothing_teaches_nothing() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    value = build_loss(DiceCEConfig())(logits, torch.zeros(1, 1, 4, 4), torch.tensor([[True, False, False]]))
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    assert float(logits.grad.abs().max()) < 1e-6


def test_every_head_is_masked_alike() -> None:
    torch.manual_seed(5)
    heads = {1: torch.randn(2, 3, 4, 4), 2: torch.randn(2, 3, 4, 4)}
    label, annotated = torch.randint(0, 2, (2, 1, 4, 4)).float(), torch.tensor([[True, True, False], [True] * 3])
    loss = build_loss(DiceCEConfig())
    alone = [float(loss(head, label, annotated)) for head in heads.values()]
    assert float(loss(heads, label, annotated)) == pytest.approx(sum(alone) / 2)
    assert alone[0] != pytest.approx(float(loss(heads[1], label)), rel=1e-3)
