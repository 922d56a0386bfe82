"""The norms are torch's, whichever kernels compute them, and keep the layout they are given."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.models import build_model
from medseg.models.layout import CHANNELS_LAST, fast_on_cpu, placed
from medseg.models.norms import Norm, group_norm, with_norms

GROUPS = [1, 2, 8]


def _operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(shape, generator=draw)
    weight, bias = torch.randn(shape[1], generator=draw), torch.randn(shape[1], generator=draw)
    dy = torch.randn(shape, generator=draw)
    layout = CHANNELS_LAST[len(shape) - 2]
    return x.to(dtype).contiguous(memory_format=layout), weight, bias, dy.to(dtype).contiguous(memory_format=layout)


def _with_gradients(ours: bool, x: Tensor, groups: int, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    leaves = [part.detach().requires_grad_() for part in (x, weight, bias)]
    norm = group_norm if ours else functional.group_norm
    y = norm(leaves[0], groups, leaves[1], leaves[2], 1e-5)
    return y, *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("shape", [(1, 8, 5, 6, 7), (3, 8, 4, 4, 4), (2, 8, 9, 7)])
def test_results_and_gradients_are_those_of_torch(shape: tuple[int, ...], groups: int) -> None:
    x, weight, bias, dy = _operands(shape, torch.float32)
    exact = _with_gradients(False, x.double(), groups, weight.double(), bias.double(), dy.double())
    for found, wanted in zip(_with_gradients(True, x, groups, weight, bias, dy), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", GROUPS)
def test_bf16_is_as_good_as_that_of_torch(groups: int) -> None:
    x, weight, bias, dy = _operands((2, 8, 6, 7, 8), torch.bfloat16)
    exact = _with_gradients(False, x.double(), groups, weight.double(), bias.double(), dy.double())
    torchs = _with_gradients(False, x, groups, weight, bias, dy)
    found = _with_gradients(True, x, groups, weight, bias, dy)
    for ours, theirs, wanted in zip(found, torchs, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - wanted).norm() <= 1.1 * (theirs - wanted).norm() + 1e-3 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", GROUPS)
def test_the_layout_is_kept(groups: int, dtype: torch.dtype) -> None:
    x, weight, bias, dy = _operands((2, 8, 4, 5, 6), dtype)
    y, dx, *_ = _with_gradients(True, x, groups, weight, bias, dy)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert dx.is_contiguous(memory_format=torch.channels_last_3d)


def test_a_norm_exports_as_the_norm_it_is() -> None:
    program = torch.export.export(Norm(8, 8).eval(), (torch.zeros(1, 8, 4, 4, 4),))
    assert "group_norm" in program.graph_module.code
    assert "batch_norm" not in program.graph_module.code


def test_weights_are_placed_with_channels_innermost_and_keep_their_values() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.ConvTranspose3d(4, 2, 2), nn.GroupNorm(2, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert placed(net, torch.device("cpu")) is net
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
        if value.ndim > 1:
            assert value.is_contiguous(memory_format=CHANNELS_LAST[value.ndim - 2])


@pytest.mark.parametrize(("name", "dims"), [("densenet", 2), ("resnet", 2)])
def test_images_of_one_channel_have_the_layout_from_the_first_layer_on(name: str, dims: int) -> None:
    """Weights of one channel have both layouts at once; torch goes by their strides."""
    net = placed(build_model(name, spatial_dims=dims, in_channels=1, out_channels=2), torch.device("cpu")).eval()
    seen: list[Tensor] = []
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Conv3d))
    first.register_forward_hook(lambda _, __, y: seen.append(y))
    with torch.no_grad():
        net(torch.zeros(1, 1, *[64] * dims))
    assert seen[0].is_contiguous(memory_format=CHANNELS_LAST[dims])


def test_fp64_and_what_is_in_the_layout_already_are_not_copied() -> None:
    last = torch.zeros(1, 3, 4, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    assert fast_on_cpu(last) is last
    double = torch.zeros(1, 3, 4, 4, 4, dtype=torch.float64)
    assert fast_on_cpu(double) is double


@pytest.mark.parametrize("name", ["unetpp", "reversible_unet"])
def test_small_images_keep_the_layout_through_the_network(name: str) -> None:
    """torch's kernels for small images put out the other layout; one such layer must not lose it for all others."""
    net = build_model(name, spatial_dims=3, in_channels=1, out_channels=2).eval()
    seen: dict[str, Tensor] = {}
    for path, module in net.named_modules():
        if isinstance(module, Norm):
            module.register_forward_hook(lambda _, given, __, path=path: seen.update({path: given[0]}))
    with torch.no_grad():
        net(torch.zeros(1, 1, 32, 32, 32))
    large = {path: x for path, x in seen.items() if x.numel() > 20_000}
    assert len(large) > 4
    assert all(x.is_contiguous(memory_format=torch.channels_last_3d) for x in large.values())


@pytest.mark.parametrize("space", [(4, 5, 6), (16, 16, 17), (70, 70), (72, 80, 64)])
def test_without_gradients_results_are_those_of_torch_and_keep_the_layout(space: tuple[int, ...]) -> None:
    x, weight, bias, _ = _operands((2, 8, *space), torch.float32)
    with torch.no_grad():
        found = group_norm(x, 8, weight, bias, 1e-5)
        exact = functional.group_norm(x.double(), 8, weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=CHANNELS_LAST[len(space)])


@pytest.mark.parametrize("space", [(4, 4, 4), (16, 16, 40)])
@pytest.mark.parametrize("mean", [0.0, 20.0])
def test_without_gradients_bf16_loses_no_more_than_its_rounding(space: tuple[int, ...], mean: float) -> None:
    x, weight, bias, _ = _operands((2, 8, *space), torch.bfloat16)
    x = x + mean
    with torch.no_grad():
        found = group_norm(x, 8, weight, bias, 1e-5)
        exact = functional.group_norm(x.double(), 8, weight.double(), bias.double(), 1e-5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("name", ["dynunet", "unet"])
def test_instance_norms_are_replaced_and_the_network_is_the_same_up_to_rounding(name: str) -> None:
    torch.manual_seed(0)
    net = build_model(name, spatial_dims=3, in_channels=1, out_channels=3).eval()
    x, names = torch.randn(2, 1, 32, 32, 32), list(net.state_dict())
    with torch.no_grad():
        before, after = net(x), with_norms(placed(net, torch.device("cpu")))(x)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert list(net.state_dict()) == names
    assert not any(isinstance(module, nn.InstanceNorm3d) for module in net.modules())


def test_instance_norms_that_keep_statistics_stay() -> None:
    net = nn.Sequential(nn.Conv3d(1, 2, 1), nn.InstanceNorm3d(2, track_running_stats=True), nn.InstanceNorm3d(2))
    assert [type(module) for module in with_norms(net)] == [nn.Conv3d, nn.InstanceNorm3d, Norm]
