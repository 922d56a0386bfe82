"""Every registered network builds from its name, learns, does not mix the images of a batch, and survives a bundle."""

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg.bundle import load_bundle
from medseg.bundle_writing import save_bundle
from medseg.config import validate_config
from medseg.files import UserError
from medseg.losses import WithLosses
from medseg.models import MODELS, build_model
from medseg.models.features import features_and_logits, mean_features
from medseg.models.layout import placed
from medseg.models.norms import with_norms
from medseg.plan import Plan
from medseg.predict import load_network

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": (4, 8), "strides": (2,)},
    "attention_unet": {"channels": (4, 8), "strides": (2,)},
    "dynunet": {"channels": (4, 8, 16)},
    "segresnet": {"init_filters": 8},
    "swin_unetr": {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2},
    "mednext": {"init_filters": 2},
    "unetpp": {"depth": 2, "features": (4, 8, 16)},
    "reversible_unet": {"channels": (4, 8, 16), "blocks_down": (1, 1, 1), "blocks_up": (1, 1)},
    "prior_unet": {"channels": (4, 8, 16)},
    "densenet": {"init_features": 8, "growth_rate": 4, "block_config": (2, 2)},
    "resnet": {"depth": 18, "init_features": 4},
    "two_stage": {
        "backbones": (
            {"name": "densenet", "init_features": 8, "growth_rate": 4, "block_config": (2, 2)},
            {"name": "resnet", "depth": 18, "init_features": 4},
        ),
        "hidden": 32,
        "code": 16,
        "classifier": (12,),
    },
}
VISION: dict[str, dict[str, Any]] = {
    "vgg": {},
    "inception_v3": {},
    "squeezenet": {},
    "mobilenet_v2": {"width": 0.25},
}
FEATURES = {
    "unet": 12,  # MONAI joins the bottom's 8 channels and the skip's 4 before it enlarges
    "attention_unet": 8,
    "dynunet": 16,
    "segresnet": 32,
    "swin_unetr": 192,
    "mednext": 32,
    "unetpp": 16,
    "prior_unet": 16,
    "reversible_unet": 32,  # the first expansion going up: 4 × 8
    "densenet": 16,
    "resnet": 32,
    "two_stage": 12,
    "vgg": 4096,
    "inception_v3": 2048,
    "squeezenet": 512,
    "mobilenet_v2": 1280,
}
LARGE = ("vgg", "inception_v3")
CASES = [
    pytest.param(name, dims, id=f"{name}-{dims}d", marks=[pytest.mark.slow] if name in LARGE else [])
    for name in (*SMALL, *VISION)
    for dims in MODELS[name][0].dims
]


def build(name: str, dims: int = 2, in_channels: int = 2) -> nn.Module:
    """A small network of this name; the test is skipped where it needs the extra `vision`, which does not load."""
    torch.manual_seed(0)
    params = {**SMALL, **VISION}[name]
    try:
        return build_model(name, spatial_dims=dims, in_channels=in_channels, out_channels=3, **params)
    except UserError as error:
        if "medseg[vision]" in str(error) or "torchvision that was built" in str(error):
            pytest.skip(str(error))
        raise


def logits_of(output: Tensor | WithLosses) -> Tensor:
    """What a network puts out, in training too."""
    return output.logits if isinstance(output, WithLosses) else output


def image(name: str, dims: int, batch: int = 2, in_channels: int = 2) -> Tensor:
    config = MODELS[name][0](**{**SMALL, **VISION}[name])
    size = config.legal_size((32 if config.classifies else 8,) * dims)
    return torch.randn(batch, in_channels, *size, generator=torch.Generator().manual_seed(1))


def test_every_network_is_tested_here() -> None:
    assert {*SMALL, *VISION} == set(MODELS) == set(FEATURES)


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_a_step_moves_every_weight_and_the_batch_is_not_mixed(name: str, dims: int) -> None:
    net, x = build(name, dims), image(name, dims)
    output = net(x)
    logits, own = logits_of(output), output.losses if isinstance(output, WithLosses) else {}
    classifies = MODELS[name][0].classifies
    assert logits.shape == ((2, 3) if classifies else (2, 3, *x.shape[2:]))
    (logits - torch.randn_like(logits)).square().mean().add(sum(own.values())).backward()
    bad = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert bad == []
    still = [n for n, p in net.named_parameters() if name not in VISION and not p.grad.any()]
    assert all(n.endswith("bias") for n in still), "a bias before a norm has no effect; every other weight learns"
    net.eval()
    with torch.no_grad():
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for parameter in net.parameters():
            parameter -= 1e-3 * parameter.grad
        both = net(x)
        assert both.isfinite().all()
        torch.testing.assert_close(net(x[1:]), both[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_features_come_with_the_same_logits(name: str, dims: int) -> None:
    net, x = build(name, dims).eval(), image(name, dims)
    with torch.no_grad():
        features, logits = features_and_logits(net, x)
        assert torch.equal(logits, net(x))
        assert features.shape == (2, FEATURES[name])
        assert features.isfinite().all()
        assert not torch.equal(features[0], features[1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_features_of_an_image_are_the_mean_over_its_passes(name: str, dims: int) -> None:
    net, x = build(name, dims).eval(), image(name, dims)
    found = []
    for passes in ((x[:1],), (x[1:],), (x,), (x[1:], torch.ones_like(x), x[:1])):
        with mean_features(net, classifies=MODELS[name][0].classifies) as (seen,), torch.no_grad():
            for one in passes:
                net(one)
        found.append(seen.mean())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert np.isfinite(found[0]).all()
    assert not np.allclose(found[0], found[1])
    mean = (found[0] + found[1]) / 2
    for both in found[2:]:
        np.testing.assert_allclose(both, mean, rtol=1e-3, atol=1e-4 + 1e-5 * np.abs(mean).max())


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_a_bundle_gives_the_network_back(name: str, dims: int, tmp_path: Path) -> None:
    net, x = with_norms(placed(build(name, dims).eval(), torch.device("cpu"))), image(name, dims)
    kind = "classification" if MODELS[name][0].classifies else "segmentation"
    config = validate_config(
        {
            "name": "t",
            "task": {
                "kind": kind,
                "labels": {"a": 0, "b": 1, "c": 2} if kind == "classification" else {"a": 1, "b": 2},
                "channels": ["x", "y"],
                "spatial_dims": dims,
            },
            "model": {"name": name, **{**SMALL, **VISION}[name]},
            "loss": {"name": "cross_entropy" if kind == "classification" else "dice_ce"},
        },
        "test",
    )
    plan = Plan(2 if dims == 2 else 3, tuple(x.shape[2:]), 1)
    facts: dict[str, Any] = {"run_id": "r", "cohort_sha256": "c" * 64, "metrics": {}}
    save_bundle(tmp_path / "b", state_dict=net.state_dict(), config=config, plan=plan, **facts)
    back = load_network(load_bundle(tmp_path / "b"), torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(back(x), net(x))


@pytest.mark.parametrize("name", ["densenet", "resnet", "squeezenet", "mobilenet_v2"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_classifiers_take_any_number_of_channels(name: str, channels: int) -> None:
    net = build(name, in_channels=channels).eval()
    with torch.no_grad():
        assert net(image(name, 2, 1, channels)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "params", "parameters"),
    [
        ("densenet", {"depth": 121}, 7_978_856),
        ("densenet", {"depth": 201}, 20_013_928),
        ("resnet", {"depth": 18}, 11_689_512),
        ("resnet", {"depth": 50}, 25_557_032),
        ("squeezenet", {"version": 1.0}, 1_248_424),
        ("mobilenet_v2", {}, 3_504_872),
        ("vgg", {}, 143_667_240),
    ],
)
def test_classifiers_have_the_published_number_of_parameters(
    name: str, params: dict[str, Any], parameters: int
) -> None:
    if name in VISION:
        build(name)  # skips where torchvision does not load
    with torch.device("meta"):
        net = build_model(name, spatial_dims=2, in_channels=3, out_channels=1000, **params)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_features_of_a_classifier_are_what_its_head_reads() -> None:
    net, x = build("resnet").eval(), image("resnet", 2)
    features, logits = features_and_logits(net, x)
    torch.testing.assert_close(net.fc(features), logits)
    assert features.requires_grad


def test_features_survive_an_activation_in_place_and_an_exception() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Upsample(scale_factor=2))
    x = torch.randn(2, 1, 8, 8) - 5
    features, _ = features_and_logits(net, x)
    assert torch.equal(features, net[2](net[1](net[0](x))).mean((2, 3)))
    broken = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Linear(5, 2))
    with pytest.raises(RuntimeError):
        features_and_logits(broken, x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in broken.modules())
    with pytest.raises(UserError, match="no module of ReLU puts out features"):
        features_and_logits(nn.ReLU(), x)


def test_dynunet_keeps_the_thick_axis() -> None:
    params = {"channels": (4, 8, 16), "strides": ((2, 2, 1), 2), "kernels": ((3, 3, 1), 3, 3), "res_block": True}
    net = build_model("dynunet", spatial_dims=3, in_channels=1, out_channels=2, **params)
    assert MODELS["dynunet"][0](**params).divisors(3) == (4, 4, 2)
    assert net(torch.randn(1, 1, 8, 8, 2)).shape == (1, 2, 8, 8, 2)
    with pytest.raises(UserError, match="one per axis"):
        build_model("dynunet", spatial_dims=2, in_channels=1, out_channels=2, **params)


def test_checkpointing_swin_unetr_changes_no_number() -> None:
    build("swin_unetr")  # skips without einops
    nets = []
    for memory in ("store", "checkpoint"):
        torch.manual_seed(0)
        params = {**SMALL["swin_unetr"], "memory": memory}
        net = build_model("swin_unetr", spatial_dims=2, in_channels=2, out_channels=3, **params)
        net(image("swin_unetr", 2)).square().mean().backward()
        nets.append(net)
    for (name, one), other in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


@pytest.mark.parametrize("name", SMALL)
def test_sizes_said_to_be_legal_are_and_others_are_not(name: str) -> None:
    config = MODELS[name][0](**SMALL[name])
    dims = min(config.dims)
    divisor, one = config.divisors(dims)[-1], (1,) * dims
    assert config.legal_size(config.legal_size(one)) == config.legal_size(one)
    net = build(name, dims)
    smallest = config.legal_size(one)
    assert logits_of(net(torch.randn(2, 2, *smallest))).isfinite().all()
    if divisor > 1:
        wrong = (*smallest[:-1], smallest[-1] + 1)
        assert config.legal_size(wrong) == (*smallest[:-1], smallest[-1] + divisor)
        assert f"set it to {config.legal_size(wrong)}" in str(config.size_problem(wrong))
        with contextlib.suppress(RuntimeError, ValueError):  # most refuse; the others give logits of another size
            assert logits_of(net(torch.randn(2, 2, *wrong))).shape[2:] != wrong


def test_without_torchvision_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'swin_unetr' needs einops, .*medseg\[vision\]"):
        build_model("swin_unetr", spatial_dims=2, in_channels=1, out_channels=2)
    for name in VISION:
        with pytest.raises(UserError, match=rf"'{name}' is built by torchvision, which is not installed; .*vision"):
            build_model(name, spatial_dims=2, in_channels=1, out_channels=2)


def test_a_torchvision_of_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    dist = tmp_path / "torchvision-0.1.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"version 0.1 does not load beside torch .*nms does not exist.*install"):
        build_model("vgg", spatial_dims=2, in_channels=1, out_channels=2)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="vnet"):
        build_model("vnet", spatial_dims=3, in_channels=1, out_channels=2)
    with pytest.raises(UserError, match="widths"):
        build_model("unet", spatial_dims=3, in_channels=1, out_channels=2, widths=3)
    for name in ("unet", "attention_unet"):
        with pytest.raises(UserError, match="strides has 2 entries for 2 channels; give 1"):
            build_model(name, spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2, 2))
    with pytest.raises(UserError, match="vgg19 takes 2D images, not 3D"):
        build_model("vgg", spatial_dims=3, in_channels=1, out_channels=2)
    with pytest.raises(UserError, match="num_heads 5 of stage 0 does not divide 24"):
        build_model("swin_unetr", spatial_dims=3, in_channels=1, out_channels=2, num_heads=(5, 6, 12, 24))
    with pytest.raises(UserError, match="channels"):
        build_model("dynunet", spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8))
