"""Every registered network builds from its name, gives logits of the promised shape, and names wrong parameters."""

import pytest
import torch

from medseg.files import UserError
from medseg.models import MODELS, build_model

SMALL = {
    "unet": {"channels": (4, 8), "strides": (2,)},
    "dynunet": {"channels": (4, 8, 16)},
    "segresnet": {"init_filters": 8},
    "unetpp": {"depth": 2, "features": (4, 8, 16)},
    "densenet": {"init_features": 8, "growth_rate": 4, "block_config": (2, 2)},
}


def test_every_network_has_a_small_setting_here() -> None:
    assert set(SMALL) == set(MODELS)


@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.parametrize("dims", [2, 3])
def test_logits_have_the_promised_shape_and_every_parameter_learns(name: str, dims: int) -> None:
    net = build_model(name, spatial_dims=dims, in_channels=2, out_channels=3, **SMALL[name])
    logits = net(torch.randn(2, 2, *[32] * dims))
    assert logits.shape == ((2, 3) if name == "densenet" else (2, 3, *[32] * dims))
    logits.square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("depth", "parameters"), [(121, 7_978_856), (169, 14_149_480), (201, 20_013_928)])
def test_densenets_have_the_published_number_of_parameters(depth: int, parameters: int) -> None:
    net = build_model("densenet", spatial_dims=2, in_channels=3, out_channels=1000, depth=depth)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="vnet"):
        build_model("vnet", spatial_dims=3, in_channels=1, out_channels=2)
    with pytest.raises(UserError, match="widths"):
        build_model("unet", spatial_dims=3, in_channels=1, out_channels=2, widths=3)
    with pytest.raises(UserError, match="strides"):
        build_model("unet", spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2, 2))
