"""The site is unlearnt and the class is not: reversed gradients, weights within classes, resumed bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import radiograph_cohort, tiny_radiograph_config
from torch import Tensor, nn
from torch.nn import functional

from medseg.config import load_config
from medseg.data.cache import load_examples
from medseg.files import UserError
from medseg.train import step
from medseg.train.adversary import SiteAdversary, balance, make_adversary
from medseg.train.loop import resume_training, train_against, train_loop
from medseg.train.planning import make_plan

SITES, TARGETS = ["a", "a", "b", "b"], [0, 1, 0, 1]
CPU = torch.device("cpu")


def test_the_gradient_into_the_features_is_reversed_and_that_of_the_head_is_not() -> None:
    torch.manual_seed(0)
    features, cases = torch.randn(4, 6), torch.arange(4)
    adversary = SiteAdversary(6, SITES, TARGETS, weight=0.3)
    reversed_features = features.clone().requires_grad_()
    adversary(reversed_features, cases, progress=1.0).backward()
    head = [parameter.grad.clone() for parameter in adversary.parameters() if parameter.grad is not None]
    adversary.zero_grad()
    plain_features = features.clone().requires_grad_()
    functional.cross_entropy(adversary.head(plain_features), torch.tensor([0, 0, 1, 1])).backward()
    plain, turned = plain_features.grad, reversed_features.grad
    assert plain is not None
    assert turned is not None
    strength = 0.3 * (2 / (1 + torch.exp(torch.tensor(-10.0))) - 1)
    assert torch.allclose(turned, -strength * plain)
    assert all(torch.allclose(a, b.grad) for a, b in zip(head, adversary.parameters(), strict=True))


def test_at_the_start_of_training_the_features_are_left_alone() -> None:
    features = torch.randn(4, 6, requires_grad=True)
    SiteAdversary(6, SITES, TARGETS, weight=1.0)(features, torch.arange(4), progress=0.0).backward()
    assert features.grad is not None
    assert not features.grad.any()


def test_sites_weigh_the_same_within_each_class_and_classes_of_one_site_nothing() -> None:
    sites = ["a"] * 6 + ["b"] * 3 + ["b", "", "a"]
    targets = [0] * 4 + [1] * 2 + [0, 0, 1] + [2, 0, 1]
    weights = balance(sites, targets)
    total = {(s, t): sum(w for w, *key in zip(weights, sites, targets, strict=True) if key == [s, t])
             for s, t in set(zip(sites, targets, strict=True))}  # fmt: skip
    assert total["a", 0] == pytest.approx(total["b", 0])
    assert total["a", 1] == pytest.approx(total["b", 1])
    assert total["b", 2] == total["", 0] == 0
    assert sum(weights) == pytest.approx(len(weights))


def test_class_and_site_that_are_one_cannot_be_told_apart() -> None:
    with pytest.raises(UserError, match="no class of the training cases is found at two sites"):
        SiteAdversary(4, ["a", "a", "b", "b"], [0, 0, 1, 1], 0.1)
    with pytest.raises(UserError, match=r"train\.site_adversary"):
        load_config("hippocampus", ["train.site_adversary=0.1"])


def _right_where_the_site_misleads(weight: float, seed: int) -> float:
    """Accuracy on cases of the class that is rare at their site, trained where the site mostly tells the class."""
    torch.manual_seed(seed)

    def draw(count: int, told_by_site: float) -> tuple[Tensor, Tensor, Tensor]:
        site = torch.arange(count) % 2
        target = torch.where(torch.rand(count) < told_by_site, site, 1 - site)
        return torch.stack([target + 0.5 * torch.randn(count), 2.0 * site + 0.4 * torch.randn(count)], 1), site, target

    x, site, target = draw(400, 0.85)
    body, head = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)), nn.Linear(2, 2)
    adversary = SiteAdversary(2, [str(s) for s in site.tolist()], target.tolist(), weight)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters(), *adversary.parameters()], 0.01)
    for number in range(400):
        features = body(x)
        loss = functional.cross_entropy(head(features), target)
        loss = loss + adversary(features, torch.arange(400), number / 400)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, site, target = draw(2000, 0.5)
    with torch.no_grad():
        right = head(body(x)).argmax(1) == target
    return float(right[site != target].float().mean())


def test_a_network_trained_against_the_site_goes_by_it_less() -> None:
    """A game of two players ends elsewhere with every rounding, so the mean over seeds is what counts."""
    before, after = (np.mean([_right_where_the_site_misleads(w, seed) for seed in range(6)]) for w in (0.0, 1.0))
    assert before < 0.65
    assert after > before + 0.08


def test_a_stopped_training_against_the_site_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = tiny_radiograph_config("train.site_adversary=0.5", "train.epochs=2")
    cohort = radiograph_cohort(tmp_path / "cohort")
    plan = make_plan(config, cohort)
    examples = load_examples(cohort, cohort.split("train"), plan, tmp_path / "cache")

    def train(folder: Path, stop_at: int | None = None, resume: bool = False) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        training, source, loss = step.assemble(config, plan, step.build_network(config, plan), examples, CPU)
        adversary = make_adversary(training.net, examples, plan, config.train.site_adversary)
        train_against(training, adversary)
        if resume:
            resume_training(training, folder)
        options = {"folder": folder, "device": CPU, "bf16": False, "validate": None}
        train_loop(
            training, source, loss, config.train, on_epoch=lambda figures: None,
            stop=lambda: training.step == stop_at, **options,
        )  # fmt: skip
        return {**training.net.state_dict(), **{f"adversary.{n}": v for n, v in adversary.state_dict().items()}}

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", stop_at=3)
    resumed = train(tmp_path / "parts", resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
