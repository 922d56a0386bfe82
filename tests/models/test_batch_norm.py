"""Statistics of all images, whatever the batches: what one pass over a single batch finds."""

import copy

import pytest
import torch
from torch import Tensor, nn

from medseg.models import build_model
from medseg.models.batch_norm import batch_norms, reestimate


def _network() -> nn.Module:
    torch.manual_seed(0)
    return build_model(
        "densenet", spatial_dims=2, in_channels=1, out_channels=2, init_features=8, growth_rate=4, block_config=(2, 3)
    )


def _images(count: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((count, 1, 32, 32), generator=generator) * torch.linspace(0.2, 3, count).view(-1, 1, 1, 1) + 0.7


@pytest.mark.parametrize("sizes", [(4, 4, 3), (2, 9), (11,)])
def test_small_batches_find_what_all_images_at_once_find(sizes: tuple[int, ...]) -> None:
    net, images = _network(), _images()
    wanted = copy.deepcopy(net).train()(images)
    found = reestimate(net, images.split(list(sizes)))
    assert found.layers == len(batch_norms(net)) > 10
    assert found.last_change < 1e-3
    assert torch.allclose(net(images), wanted, atol=5e-3)
    seen: dict[nn.Module, Tensor] = {}
    for layer in batch_norms(net):
        layer.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0]}))
    net(images)
    for layer, x_BCHW in seen.items():
        variance, mean = torch.var_mean(x_BCHW, (0, 2, 3), correction=0)
        assert torch.allclose(layer.get_buffer("running_mean"), mean, atol=2e-3)
        assert torch.allclose(layer.get_buffer("running_var"), variance, rtol=5e-3, atol=1e-5)


def test_weights_stay_and_a_second_time_changes_nothing() -> None:
    net, images = _network(), _images()
    before = {name: value.clone() for name, value in net.state_dict().items() if "running" not in name}
    reestimate(net, images.split(4))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert not any(part.training for part in net.modules())
    assert not any(part._forward_pre_hooks for part in net.modules())
    first = copy.deepcopy(net)
    assert reestimate(net, images.split(4)).last_change < 1e-3
    assert torch.allclose(net(images), first(images), atol=5e-3)


def test_a_scanner_with_another_contrast_is_adapted_away() -> None:
    net, images = _network(), _images()
    reestimate(net, images.split(4))
    wanted = net(images)
    assert not torch.allclose(net(3 * images), wanted, atol=0.05)
    reestimate(net, (3 * images).split(4))
    assert torch.allclose(net(3 * images), wanted, atol=5e-3)


def test_a_network_without_batch_norm_is_refused() -> None:
    net = build_model("unet", spatial_dims=2, in_channels=1, out_channels=2, channels=[4, 8], strides=[2])
    with pytest.raises(ValueError, match="no batch norm"):
        reestimate(net, [_images()])
