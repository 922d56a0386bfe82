"""The 2D network with a prior: how far it reaches, what a missing prior means, and which sizes it takes."""

import pytest
import torch

from medseg.config import PriorUNetConfig
from medseg.models import build_model
from medseg.models.sliding import window_logits

SMALL = {"channels": (4, 8, 16)}


def net(axis: int = 0, neighbours: int = 1) -> torch.nn.Module:
    torch.manual_seed(0)
    made = build_model(
        "prior_unet", spatial_dims=3, in_channels=2, out_channels=3, axis=axis, neighbours=neighbours, **SMALL
    )
    return made.eval()


def image(channels: int = 2, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, 8, 8, 8, generator=torch.Generator().manual_seed(1))


def test_no_prior_is_a_prior_that_knows_nothing() -> None:
    made, x = net(), image()
    with torch.no_grad():
        assert torch.equal(made(x), made(torch.cat([x, torch.zeros(1, 3, 8, 8, 8)], 1)))
        known = torch.cat([x, torch.ones(1, 3, 8, 8, 8)], 1)
        assert not torch.allclose(made(x), made(known))
    with pytest.raises(ValueError, match="3 channels; 2 are wanted, or 5"):
        made(image(3))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("neighbours", [0, 2])
def test_convolutions_reach_the_neighbouring_slices_and_no_other(axis: int, neighbours: int) -> None:
    """The norm joins the slices of a window, so the reach is measured with its statistics held still."""
    made = net(axis, neighbours)
    for module in made.modules():
        if isinstance(module, torch.nn.InstanceNorm3d):
            module.forward = lambda x: x  # type: ignore[method-assign]
    x = image(5).requires_grad_()
    made(x).select(2 + axis, 3).square().sum().backward()
    slices = x.grad.abs().movedim(2 + axis, 0).flatten(1).sum(1)
    assert [n for n in range(8) if slices[n] > 0] == list(range(3 - neighbours, 4 + neighbours))


def test_slices_need_no_multiple_and_planes_do() -> None:
    config = PriorUNetConfig(axis=1, channels=(4, 8, 16))
    assert config.divisors(3) == (4, 1, 4)
    assert config.legal_size((7, 7, 7)) == (8, 7, 8)
    assert config.takes_prior
    with torch.no_grad():
        assert net(1)(torch.randn(1, 2, 8, 7, 8)).shape == (1, 3, 8, 7, 8)


def test_windows_and_flips_carry_the_prior_along() -> None:
    made, x = net(), torch.cat([image(), (torch.rand(1, 3, 8, 8, 8) > 0.5).float()], 1)
    with torch.no_grad():
        whole = window_logits(made, x, (8, 8, 8), 0.5, mirror_axes=(0, 2))
        by_hand = sum(made(x.flip(dims)).flip(dims) if dims else made(x) for dims in ([], [2], [4], [2, 4])) / 4
    torch.testing.assert_close(whole, by_hand, rtol=1e-4, atol=1e-5)
