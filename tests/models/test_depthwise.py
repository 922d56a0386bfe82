"""The depthwise convolution and its gradients are torch's, whichever kernels compute them."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medseg.models.depthwise import DepthwiseConv, depthwise
from medseg.models.layout import CHANNELS_LAST


def _with_gradients(x: Tensor, weight: Tensor, ours: bool) -> tuple[Tensor, ...]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    conv = functional.conv3d if x.ndim == 5 else functional.conv2d
    y = depthwise(x, weight) if ours else conv(x, weight, padding=1, groups=x.shape[1])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return y, *torch.autograd.grad(y, (x, weight), dy)


@pytest.mark.parametrize(
    "shape", [(1, 5, 7, 6, 4), (2, 16, 5, 4, 3), (2, 3, 1, 5, 5), (1, 4, 2, 1, 3), (2, 5, 7, 6), (1, 16, 9, 1)]
)
def test_results_and_gradients_are_those_of_torch(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw)
    weight = torch.randn(shape[1], 1, *[3] * (len(shape) - 2), generator=draw)
    expected = _with_gradients(x.double(), weight.double(), ours=False)
    for found, wanted in zip(_with_gradients(x, weight, ours=True), expected, strict=True):
        assert found.is_contiguous() or found.is_contiguous(memory_format=CHANNELS_LAST[x.ndim - 2])
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_half_of_the_channels_of_a_batch_is_no_special_case() -> None:
    x = torch.randn(2, 8, 4, 5, 6)[:, 2:6]
    weight = torch.randn(4, 1, 3, 3, 3)
    for found, wanted in zip(_with_gradients(x, weight, True), _with_gradients(x, weight, False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_bf16_is_as_good_as_that_of_torch() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 8, 6, 7, 8), torch.randn(8, 1, 3, 3, 3)
    exact = _with_gradients(x, weight, ours=False)
    torchs = _with_gradients(x.bfloat16(), weight.bfloat16(), ours=False)
    found = _with_gradients(x.bfloat16(), weight, ours=True)
    for ours, theirs, wanted in zip(found, torchs, exact, strict=True):
        assert ours.dtype == (torch.bfloat16 if ours.shape != weight.shape else torch.float32)
        assert (ours.float() - wanted).norm() <= 1.1 * (theirs.float() - wanted).norm() + 1e-3 * wanted.norm()


def test_gradients_can_be_derived_again() -> None:
    layer = DepthwiseConv(2, 2)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), layer.weight)
    twin = x.detach().requires_grad_()
    y = functional.conv2d(twin, layer.weight, padding=1, groups=2)
    (dx,) = torch.autograd.grad(y.square().sum(), twin, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(dx.square().sum(), layer.weight)[0], rtol=1e-4, atol=1e-4)
