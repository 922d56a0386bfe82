"""DynUNet with heads at the coarser levels of its decoder."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medseg.bundle import load_bundle
from medseg.bundle_writing import save_bundle
from medseg.config import DiceCEConfig, validate_config
from medseg.losses import Heads, build_loss
from medseg.models import build_model
from medseg.plan import Plan
from medseg.predict import load_network

CHANNELS = (4, 8, 16, 16, 16)


def _net(channels: tuple[int, ...] = CHANNELS, **params: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model("dynunet", spatial_dims=2, in_channels=1, out_channels=3, channels=channels, **params)


@pytest.mark.parametrize(("levels", "weights"), [(3, (1, 0.5)), (4, (1, 0.5)), (5, (1, 0.5, 0.25))])
def test_each_level_but_the_coarsest_is_trained_with_half_the_weight_of_the_one_above(
    levels: int, weights: tuple[float, ...]
) -> None:
    heads = _net(CHANNELS[:levels], deep_supervision=True).train()(torch.randn(2, 1, 32, 32))
    assert isinstance(heads, Heads)
    assert heads.weights == weights
    assert [tuple(logits.shape) for logits in heads.logits] == [(2, 3, 32, 32)] * len(weights)
    for level, logits in enumerate(heads.logits):  # a coarse head's logits stand for blocks of pixels
        blocks = logits[:, :, :: 2**level, :: 2**level]
        assert torch.equal(blocks.repeat_interleave(2**level, 2).repeat_interleave(2**level, 3), logits)


def test_the_loss_is_the_weighted_mean_of_the_heads() -> None:
    loss = build_loss(DiceCEConfig())
    label = torch.randint(0, 3, (2, 1, 8, 8)).float()
    one, other = torch.randn(2, 2, 3, 8, 8).unbind(0)
    found = loss(Heads((one, other), (1.0, 0.5)), label)
    torch.testing.assert_close(found, (loss(one, label) + 0.5 * loss(other, label)) / 1.5)
    torch.testing.assert_close(loss({1: one, 2: other}, label), (loss(one, label) + loss(other, label)) / 2)


def test_predictions_are_those_of_the_same_weights_without_heads() -> None:
    with_heads, without = _net(deep_supervision=True).eval(), _net().eval()
    mine = without.state_dict()
    without.load_state_dict({name: value for name, value in with_heads.state_dict().items() if name in mine})
    x = torch.randn(1, 1, 32, 32)
    logits = with_heads(x)
    assert isinstance(logits, Tensor)
    assert torch.equal(logits, without(x))


def test_a_network_that_has_been_trained_can_be_copied() -> None:
    net = _net(deep_supervision=True).train()
    net(torch.randn(1, 1, 32, 32))
    twin = copy.deepcopy(net)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in net.state_dict().items())


def test_a_bundle_gives_the_network_with_its_heads_back(tmp_path: Path) -> None:
    config = validate_config(
        {
            "name": "deep",
            "task": {"kind": "segmentation", "labels": {"a": 1, "b": 2}, "spatial_dims": 2},
            "model": {"name": "dynunet", "channels": list(CHANNELS), "deep_supervision": True},
            "loss": {"name": "dice_ce"},
        },
        "here",
    )
    net, plan = _net(deep_supervision=True).eval(), Plan(2, (32, 32), 1)
    save_bundle(
        tmp_path / "bundle",
        state_dict=net.state_dict(),
        config=config,
        plan=plan,
        run_id="x",
        cohort_sha256="0" * 64,
        metrics={},
    )
    x = torch.randn(1, 1, 32, 32)
    found = load_network(load_bundle(tmp_path / "bundle"))(x)  # its norms round otherwise
    torch.testing.assert_close(found, net(x), rtol=1e-3, atol=1e-3)
