"""Activation maps: identities that hold exactly, answers known in closed form, parity, and no trace left behind."""

import copy

import pytest
import torch
from monai.visualize import GradCAM
from torch import nn

from medseg.config import MethodConfig
from medseg.explain import EXPLAINERS, explain
from medseg.explain.gradients import gradcam, hirescam
from medseg.explain.hooks import captured, frozen, logits_and_layer
from medseg.files import UserError
from medseg.models import build_model
from medseg.models.ensemble import Ensemble

CAMS = ("gradcam", "gradcampp", "hirescam", "layercam", "eigencam", "scorecam")


class PooledNet(nn.Module):
    """Convolutions, an in-place activation, global average pooling, one linear layer."""

    def __init__(self, dims: int, classes: int = 3) -> None:
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        pool = (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 2]
        self.features = nn.Sequential(
            conv(1, 4, 3, padding=1), nn.ReLU(inplace=True), conv(4, 6, 3, stride=2, padding=1)
        )
        self.act = nn.ReLU(inplace=True)
        self.pool = pool(1)
        self.head = nn.Linear(6, classes)

    def forward(self, x_BCDHW: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.act(self.features(x_BCDHW))).flatten(1))


class Weighted(nn.Module):
    """Two channels x and -2x, each summed over the image; class 0 takes the first, class 1 the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 1, bias=False)
        self.layer.weight.data = torch.tensor([1.0, -2.0]).view(2, 1, 1, 1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.layer(x_BCHW).flatten(2).sum(2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _small_unet() -> nn.Module:
    return build_model("unet", spatial_dims=3, in_channels=1, out_channels=3, channels=(4, 8, 16), strides=(2, 2))


def _image(dims: int, batch: int = 2, side: int = 16) -> torch.Tensor:
    return torch.randn(batch, 1, *[side] * dims)


@pytest.mark.parametrize("dims", [2, 3])
def test_pooled_net_grad_cam_is_hires_cam_is_cam(dims: int) -> None:
    """With global average pooling and one linear layer the gradient is w_c / positions everywhere."""
    net, x = PooledNet(dims).eval(), _image(dims)
    hires = explain(net, x, "hirescam", 2, "last", size="layer")
    with torch.no_grad():
        A = net.act(net.features(x))
        positions = A[0, 0].numel()
        cam = torch.einsum("c,bc...->b...", net.head.weight[2], A) / positions
        logit = net(x)[:, 2]
    torch.testing.assert_close(hires, cam)
    torch.testing.assert_close(explain(net, x, "gradcam", 2, "last", size="layer"), cam.relu())
    torch.testing.assert_close(hires.flatten(1).sum(1) + net.head.bias[2], logit)


@pytest.mark.parametrize("kind", ["classifier", "segmenter"])
def test_joined_networks_are_explained_by_the_layer_of_all(kind: str) -> None:
    """The score is the mean of the members', so HiResCAM, which is linear in it, is the mean of their maps."""
    nets = [PooledNet(3) if kind == "classifier" else _small_unet() for _ in range(3)]
    together, x = Ensemble(nets), _image(3)
    region = torch.rand(2, 16, 16, 16) > 0.5 if kind == "segmenter" else None
    found = explain(together, x, "hirescam", 1, "last", region_BDHW=region, size="layer")
    alone = [explain(net, x, "hirescam", 1, "last", region_BDHW=region, size="layer") for net in nets]
    torch.testing.assert_close(found, sum(alone) / 3)
    assert logits_and_layer(together, x, "last")[1] == logits_and_layer(nets[0], x, "last")[1]
    one = explain(together, x, "hirescam", 1, "members.2." + logits_and_layer(nets[0], x, "last")[1],
                  region_BDHW=region, size="layer")  # fmt: skip
    torch.testing.assert_close(one, alone[2] / 3)
    assert not any(module._forward_hooks for module in together.modules())


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "layercam", "scorecam", "fullgrad", "gradients"])
def test_a_network_joined_with_itself_has_its_own_map(method: str) -> None:
    net, x = PooledNet(2), _image(2)
    found = explain(Ensemble([net, copy.deepcopy(net)]), x, method, 1, "last")
    torch.testing.assert_close(found, explain(net, x, method, 1, "last"))
    assert float(found.abs().max()) > 0


def test_linear_net_has_its_known_maps() -> None:
    """Score of class 1 is the sum of -2 x: gradient 1 on channel 1, whose activation is -2 x."""
    net, x = Weighted(), torch.tensor([[[[1.0, -3.0], [0.5, 2.0]]]])
    expected = -2 * x[:, 0]
    torch.testing.assert_close(explain(net, x, "hirescam", 1, "layer"), expected)
    torch.testing.assert_close(explain(net, x, "gradcam", 1, "layer"), expected.relu())
    torch.testing.assert_close(explain(net, x, "layercam", 1, "layer"), expected.relu())
    torch.testing.assert_close(explain(net, x, "gradients", 1, "layer"), torch.full((1, 2, 2), 2.0))


@pytest.mark.parametrize("method", EXPLAINERS)
@pytest.mark.parametrize("kind", ["classifier", "segmenter"])
def test_a_batch_with_mixed_targets_equals_one_by_one(method: str, kind: str) -> None:
    net = (PooledNet(3) if kind == "classifier" else _small_unet()).double()
    x, targets = _image(3, batch=3).double(), [2, 0, 1]
    config = MethodConfig(occlusion_window=0.5)
    together = explain(net, x, method, targets, "last", config=config)
    assert together.shape == (3, 16, 16, 16)
    for one, target, found in zip(x, targets, together, strict=True):
        torch.testing.assert_close(found, explain(net, one[None], method, target, "last", config=config)[0])
    assert all(float(found.abs().max()) > 0 for found in explain(net, x, "hirescam", targets, "last"))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("layer", ["class_layers.relu", "features.transition2"])
def test_agrees_with_monai_called_with_an_explicit_class(dims: int, layer: str) -> None:
    net = build_model("densenet", spatial_dims=dims, in_channels=1, out_channels=3, block_config=(2, 2, 2, 2)).eval()
    x = _image(dims, side=64 if dims == 2 else 40)
    theirs = GradCAM(copy.deepcopy(net), layer)
    for target in range(3):
        ours = explain(net, x, "gradcam", target, layer, size="layer")
        torch.testing.assert_close(ours, theirs.compute_map(x, class_idx=target)[:, 0], rtol=1e-4, atol=1e-7)
        shown = theirs.upsampler(x.shape[2:])(theirs.compute_map(x, class_idx=target))[:, 0]
        torch.testing.assert_close(explain(net, x, "gradcam", target, layer), shown, rtol=1e-4, atol=1e-7)


def test_an_activation_in_place_behind_the_layer_changes_nothing() -> None:
    """The layer before the in-place ReLU must be seen as it was: with negative values."""
    net, x = PooledNet(2), _image(2)
    with frozen(net), captured(net, "features") as activation:
        net(x)
    assert activation.value is not None
    assert float(activation.value.min()) < 0
    safe = copy.deepcopy(net)
    for module in safe.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    for method in CAMS:
        torch.testing.assert_close(explain(net, x, method, 1, "features"), explain(safe, x, method, 1, "features"))


def test_a_single_logit_is_two_classes() -> None:
    net, x = PooledNet(2, classes=1), _image(2)
    positive, negative = (explain(net, x, "hirescam", target, "last") for target in (1, 0))
    torch.testing.assert_close(positive, -negative)
    with torch.no_grad():
        predicted = (net.eval()(x)[:, 0] > 0).long()
    torch.testing.assert_close(
        explain(net, x, "hirescam", None, "last"), explain(net, x, "hirescam", predicted, "last")
    )


def test_without_a_target_each_sample_explains_its_own_prediction() -> None:
    net, x = PooledNet(2), _image(2, batch=8)
    with torch.no_grad():
        predicted = net.eval()(x).argmax(1)
    torch.testing.assert_close(explain(net, x, "gradcam", None), explain(net, x, "gradcam", predicted))


def test_segmentation_explains_the_predicted_region_or_the_one_given() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False))
    net[0].weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    net[1].weight.data = torch.eye(2).view(2, 2, 1, 1)  # class 0 scores x, class 1 scores -x
    x = torch.tensor([[[[-1.0, -2.0], [3.0, 4.0]]], [[[1.0, 1.0], [1.0, 1.0]]]])
    found = explain(net, x, "hirescam", 1, "0")
    torch.testing.assert_close(found[0], torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    assert not found[1].any(), "class 1 is predicted nowhere in the second image"
    region = torch.zeros(2, 2, 2, dtype=torch.bool)
    region[:, 1, 1] = True
    found = explain(net, x, "hirescam", 1, "0", region_BDHW=region)
    torch.testing.assert_close(found, torch.where(region, -x[:, 0], 0.0))


def test_layers_by_role() -> None:
    cases = {
        ("densenet", "last"): "class_layers.relu",
        ("unet", "bottleneck"): "model.1.submodule.1",
        ("unet", "last"): "model.1",
        ("dynunet", "bottleneck"): "bottleneck",
        ("dynunet", "last"): "skip_layers",
    }
    params = {
        "densenet": {"block_config": (2, 2, 2, 2)},
        "unet": {"channels": (4, 8, 16), "strides": (2, 2)},
        "dynunet": {"channels": (4, 8, 16)},
    }
    for (name, layer), expected in cases.items():
        net = build_model(name, spatial_dims=2, in_channels=1, out_channels=3, **params[name])
        with frozen(net):
            assert logits_and_layer(net, _image(2, side=64), layer)[1] == expected, name


def _state(net: nn.Module) -> tuple[object, ...]:
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    flags = [p.requires_grad for p in net.parameters()]
    return hooks, flags, [m.training for m in net.modules()], [p.grad for p in net.parameters()]


def test_the_network_is_left_as_it_was() -> None:
    net = PooledNet(2).train()
    net.features.eval()
    net.head.bias.requires_grad_(False)
    weights = copy.deepcopy(net.state_dict())
    before = _state(net)
    for method in EXPLAINERS:
        explain(net, _image(2), method, 1, "last")
    assert _state(net) == before
    for name, value in net.state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("method", EXPLAINERS)
def test_hooks_are_released_after_an_exception(method: str) -> None:
    class Breaks(PooledNet):
        def forward(self, x_BCDHW: torch.Tensor) -> torch.Tensor:
            super().forward(x_BCDHW)
            raise RuntimeError("out of memory")

    net = Breaks(2).train()
    before = _state(net)
    for layer in ("last", "features"):
        with pytest.raises(RuntimeError, match="out of memory"):
            explain(net, _image(2), method, 1, layer)
    with pytest.raises(RuntimeError, match="out of memory"), captured(net, "act"):
        net(_image(2))
    assert _state(net) == before


def test_caller_may_be_in_inference_mode_or_autocast() -> None:
    net, x = PooledNet(2), _image(2)
    expected = explain(net, x, "hirescam", 1, "last")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(explain(net, x * 1, "hirescam", 1, "last"), expected)


@pytest.mark.parametrize("method", EXPLAINERS)
def test_random_weights_give_another_map(method: str) -> None:
    """A map that does not depend on what was learnt explains nothing (Adebayo et al. 2018)."""
    x = _image(2, batch=1, side=32)
    first, second = (explain(PooledNet(2), x, method, [0], "features") for _ in range(2))
    assert not torch.allclose(first, second, rtol=0.05)


def test_pure_functions_need_no_network() -> None:
    A, g = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    constant = g.mean((2, 3), keepdim=True).expand_as(g)
    torch.testing.assert_close(gradcam(A, g), hirescam(A, constant).relu())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "gradcan"}, "gradcan"),
        ({"target": 3}, "not below the 3 classes"),
        ({"target": [0]}, "give one class or 2"),
        ({"layer": "feature"}, "features"),
        ({"layer": "head"}, "no place in the image"),
        ({"region_BDHW": torch.ones(2, 16, 16, dtype=torch.bool)}, "region"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        explain(PooledNet(2), _image(2), **arguments)  # type: ignore[arg-type]
