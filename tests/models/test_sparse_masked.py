"""What is hidden reaches nothing, what is visible alone is counted, and the network comes out as it went in."""

import pytest
import torch
from torch import Tensor, nn

from medseg.files import UserError
from medseg.models import build_model
from medseg.models.sparse_masked import SparseMaskedModel, _maps, _patches, _visible_norm


def _network() -> nn.Module:
    torch.manual_seed(0)
    return build_model(
        "densenet",
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        init_features=8,
        growth_rate=4,
        block_config=(2, 2, 2),
    )


def _images(count: int = 4) -> Tensor:
    return torch.randn((count, 1, 64, 64), generator=torch.Generator().manual_seed(1)).cumsum(2) / 4


def _model(share: float = 0.5) -> SparseMaskedModel:
    return SparseMaskedModel(_network(), 1, (64, 64), share, 32)


def test_as_many_patches_are_hidden_as_configured() -> None:
    model = _model(0.6)
    assert (model.grid, model.patch) == ((4, 4), 16)
    visible = model.draw(50)
    assert (visible.flatten(1).sum(1) == 16 - 10).all()
    assert 0.2 < float(visible.mean(0).min()) <= float(visible.mean(0).max()) < 0.6, "every place is hidden at times"


@pytest.mark.parametrize("training", [False, True])
def test_hidden_pixels_change_nothing(training: bool) -> None:
    model, images = _model().train(training), _images()
    visible = model.draw(4)
    pixels = torch.nn.functional.interpolate(visible, scale_factor=16)
    changed = images * pixels + 100 * (1 - pixels)
    assert torch.allclose(model.fill_in(images, visible), model.fill_in(changed, visible), atol=1e-5)
    assert not torch.allclose(model.fill_in(images + 1, visible), model.fill_in(images, visible), atol=1e-3)


def test_every_map_is_empty_where_the_image_is_hidden() -> None:
    model = _model()
    visible = model.draw(4)
    pixels = torch.nn.functional.interpolate(visible, scale_factor=16)
    maps = _maps(model.net.train(), _images() * pixels, visible)
    assert [tuple(one.shape[2:]) for one in maps] == [(4, 4), (8, 8), (16, 16)]
    for one in maps:
        seen = torch.nn.functional.interpolate(visible, one.shape[2:])
        assert not (one * (1 - seen)).any()
        assert (one * seen).any()


def test_batch_norm_counts_visible_positions_alone() -> None:
    model = _model().train()
    images, visible = _images(), model.draw(4)
    first = next(part for part in model.net.modules() if isinstance(part, nn.BatchNorm2d))
    first.momentum = 1.0
    pixels = torch.nn.functional.interpolate(visible, scale_factor=16)
    with torch.no_grad():
        seen = model.net.features.conv0(images * pixels).movedim(1, -1)  # type: ignore[union-attr, operator]
        model.fill_in(images, visible)
    inside = torch.nn.functional.interpolate(visible, scale_factor=8)[:, 0] > 0
    assert torch.allclose(first.get_buffer("running_mean"), seen[inside].mean(0), atol=1e-5)
    assert torch.allclose(first.get_buffer("running_var"), seen[inside].var(0), rtol=1e-4)


def test_with_nothing_hidden_the_encoder_is_the_network_itself() -> None:
    net, images = _network().train(), _images()
    torch.manual_seed(0)
    plain = _network().train()
    maps = _maps(net, images, torch.ones(4, 1, 4, 4))
    kept: list[Tensor] = []
    plain.features.register_forward_hook(lambda module, inputs, output: kept.append(output))  # type: ignore[union-attr, operator]
    plain(images)
    assert torch.allclose(maps[0], kept[0], atol=1e-4)
    for (name, one), other in zip(net.state_dict().items(), plain.state_dict().values(), strict=True):
        if "num_batches" not in name:
            assert torch.allclose(one, other, atol=1e-5), name


def test_the_network_is_left_without_hooks_and_in_its_mode() -> None:
    model = _model().train()
    model(_images())
    assert all(part.training for part in model.modules())
    assert not any(part._forward_hooks for part in model.modules())


def test_the_loss_is_that_of_hidden_patches_alone() -> None:
    model, images = _model().eval(), _images(2)
    torch.manual_seed(3)
    found = model(images).detach()
    torch.manual_seed(3)
    visible = model.draw(2)
    wanted, pred = _patches(images, 16), _patches(model.fill_in(images, visible).detach(), 16)
    assert torch.equal(wanted[1, 5].view(16, 16), images[1, 0, 16:32, 16:32])
    for item in range(2):
        errors = []
        for place in range(16):
            if not visible[item].flatten()[place]:
                patch = wanted[item, place]
                errors.append(((patch - patch.mean()) / patch.std() - pred[item, place]).square().mean())
        assert float(found[item]) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)


def test_it_learns_to_fill_in_a_pattern() -> None:
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    images = torch.stack([torch.sin(rows / 5 + phase) + torch.sin(columns / 7) for phase in (0.0, 1.0, 2.0, 3.0)])[
        :, None
    ]
    model = SparseMaskedModel(_network(), 1, (32, 32), 0.5, 32).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = model(images).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_an_image_that_the_maps_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"plan\.size_px 60.*multiple of 32"):
        SparseMaskedModel(_network(), 1, (60, 60), 0.5, 32)


@pytest.mark.parametrize("training", [False, True])
def test_the_norm_of_visible_positions_and_its_gradients_are_those_of_gathering_them(training: bool) -> None:
    torch.manual_seed(0)
    seen = torch.nn.functional.interpolate(_model().draw(3), scale_factor=2)
    x = ((3 * torch.randn(3, 5, 8, 8) + 2) * seen).double().requires_grad_()
    upstream = torch.randn(3, 5, 8, 8).double()
    norms = [nn.BatchNorm2d(5, momentum=0.3).double().train(training) for _ in range(2)]
    for norm in norms:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1, 2, 5))
            norm.bias.copy_(torch.linspace(1, -1, 5))
            norm.get_buffer("running_mean").fill_(0.5)
    inside = seen[:, 0] > 0
    gathered = torch.zeros(3, 8, 8, 5).double()
    gathered[inside] = norms[0](x.movedim(1, -1)[inside][:, :, None, None])[:, :, 0, 0]
    found = [gathered.movedim(-1, 1), _visible_norm(norms[1], x, seen.double())]
    assert torch.allclose(found[0], found[1], atol=1e-12)
    grads = [
        torch.autograd.grad(y, (x, norm.weight, norm.bias), upstream) for y, norm in zip(found, norms, strict=True)
    ]
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    for buffer in ("running_mean", "running_var"):
        assert torch.allclose(norms[0].get_buffer(buffer), norms[1].get_buffer(buffer), atol=1e-12)
