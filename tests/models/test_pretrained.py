"""Pretrained weights: all of them or a sentence that says which do not fit; never again after training has begun."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medseg.config import DenseNetConfig, ResNetConfig
from medseg.files import UserError, sha256_file
from medseg.models import build_model, pretrained
from medseg.models.pretrained import load_pretrained

RESNET: dict[str, Any] = {"depth": 18, "init_features": 4}
DENSENET: dict[str, Any] = {"init_features": 8, "growth_rate": 4, "block_config": (2, 2)}


def net_of(name: str = "resnet", seed: int = 0, in_channels: int = 3, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    params = RESNET if name == "resnet" else DENSENET
    return build_model(name, spatial_dims=2, in_channels=in_channels, out_channels=classes, **params).eval()


def file_of(net: nn.Module, path: Path) -> Path:
    save_file({name: value.clone() for name, value in net.state_dict().items()}, path)
    return path


def logits(net: nn.Module, channels: int = 3) -> Tensor:
    with torch.no_grad():
        return net(torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(2)).expand(-1, channels, -1, -1))


def test_a_safetensors_file_gives_its_network(tmp_path: Path) -> None:
    source, net = net_of(seed=1), net_of()
    path = file_of(source, tmp_path / "w.safetensors")
    done = load_pretrained(net, ResNetConfig(weights=str(path), **RESNET))
    assert done is not None
    assert torch.equal(logits(net), logits(source))
    assert (done.sha256, done.source, done.loaded) == (sha256_file(path), str(path), len(net.state_dict()))
    assert done.skipped == done.summed == ()


def test_a_torch_file_needs_its_hash(tmp_path: Path) -> None:
    source, net, path = net_of(seed=1), net_of(), tmp_path / "w.pth"
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": v for n, v in source.state_dict().items()}}, path)
    sha256 = sha256_file(path)
    with pytest.raises(UserError, match=f"needs model.weights_sha256; it has {sha256}"):
        load_pretrained(net, ResNetConfig(weights=str(path), **RESNET))
    with pytest.raises(UserError, match=r"not model\.weights_sha256 0000"):
        load_pretrained(net, ResNetConfig(weights=str(path), weights_sha256="0" * 64, **RESNET))
    load_pretrained(net, ResNetConfig(weights=str(path), weights_sha256=sha256, **RESNET))
    assert torch.equal(logits(net), logits(source))


def test_a_given_hash_is_compared_for_safetensors_too(tmp_path: Path) -> None:
    path = file_of(net_of(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"not model\.weights_sha256"):
        load_pretrained(net_of(), ResNetConfig(weights=str(path), weights_sha256="0" * 64, **RESNET))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_code_and_rubbish_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    torch.save(nn.Linear(2, 2), path)  # an object, which only unpickling could make
    config = ResNetConfig(weights=str(path), weights_sha256=sha256_file(path), **RESNET)
    with pytest.raises(UserError, match="cannot be read as weights alone"):
        load_pretrained(net_of(), config)
    path = tmp_path / "list.pth"
    torch.save([torch.ones(2)], path)
    with pytest.raises(UserError, match="no table of named tensors"):
        load_pretrained(net_of(), ResNetConfig(weights=str(path), weights_sha256=sha256_file(path), **RESNET))
    with pytest.raises(UserError, match="is no file"):
        load_pretrained(net_of(), ResNetConfig(weights=str(tmp_path / "none.pth"), **RESNET))


def test_a_wrong_match_lists_what_is_wrong_and_sets_nothing(tmp_path: Path) -> None:
    source, net = net_of(seed=1, classes=5), net_of()
    weights = {name: value.clone() for name, value in source.state_dict().items()}
    del weights["layer1.0.conv1.weight"]
    weights["layer9.weight"] = torch.ones(1)
    path = tmp_path / "w.safetensors"
    save_file(weights, path)
    before = logits(net)
    with pytest.raises(UserError) as raised:
        load_pretrained(net, ResNetConfig(weights=str(path), **RESNET))
    for part in (
        "1 missing (layer1.0.conv1.weight)",
        "1 unexpected (layer9.weight)",
        "2 of another shape (fc.weight is (5, 32), not (3, 32), fc.bias is (5,), not (3,))",
    ):
        assert part in str(raised.value)
    assert torch.equal(logits(net), before)


def test_the_head_is_left_out_only_by_name(tmp_path: Path) -> None:
    source, net = net_of(seed=1, classes=1000), net_of()
    head = net.fc.weight.clone()
    path = str(file_of(source, tmp_path / "w.safetensors"))
    done = load_pretrained(net, ResNetConfig(weights=path, weights_skip=("fc",), **RESNET))
    assert done is not None
    assert done.skipped == ("fc.weight", "fc.bias")
    assert torch.equal(net.fc.weight, head)
    assert torch.equal(net.conv1.weight, source.conv1.weight)
    with pytest.raises(UserError, match="'head' names nothing"):
        load_pretrained(net, ResNetConfig(weights=path, weights_skip=("fc", "head"), **RESNET))


def test_weights_of_three_channels_are_summed_for_one(tmp_path: Path) -> None:
    source, net = net_of(seed=1), net_of(in_channels=1)
    done = load_pretrained(net, ResNetConfig(weights=str(file_of(source, tmp_path / "w.safetensors")), **RESNET))
    assert done is not None
    assert done.summed == ("conv1.weight",)
    torch.testing.assert_close(logits(net, 1), logits(source, 3))
    with pytest.raises(UserError, match=r"conv1.weight is \(4, 3, 7, 7\), not \(4, 2, 7, 7\)"):
        load_pretrained(net_of(in_channels=2), ResNetConfig(weights=str(tmp_path / "w.safetensors"), **RESNET))


@pytest.mark.parametrize("old", [False, True])
def test_torchvisions_names_of_a_densenet_are_known(tmp_path: Path, old: bool) -> None:
    source, net = net_of("densenet", seed=1), net_of("densenet")
    renamed = {}
    for name, value in source.state_dict().items():
        if old and name.endswith("num_batches_tracked"):
            continue  # files of torch before 0.4.1 lack them
        name = name.replace("layers.", "") if "denselayer" in name else name
        name = name.replace("class_layers.out", "classifier")
        for part in ("norm1", "norm2", "conv1", "conv2") if old and "denselayer" in name else ():
            name = name.replace(part, f"{part[:-1]}.{part[-1]}")
        renamed[f"densenet121.{name}" if old else name] = value.clone()
    save_file(renamed, tmp_path / "w.safetensors")
    load_pretrained(net, DenseNetConfig(weights=str(tmp_path / "w.safetensors"), **DENSENET))
    assert torch.equal(logits(net), logits(source))
    backbone = net_of("densenet")
    for one in (backbone, source):
        one.set_submodule("class_layers.out", torch.nn.Identity())
    headless = DenseNetConfig(weights=str(tmp_path / "w.safetensors"), weights_skip=("class_layers.out",), **DENSENET)
    load_pretrained(backbone, headless)
    assert torch.equal(logits(backbone), logits(source))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source = net_of()
    with torch.no_grad():
        source.fc.bias[0] = torch.nan
    with pytest.raises(UserError, match=r"fc\.bias is not finite"):
        load_pretrained(net_of(), ResNetConfig(weights=str(file_of(source, tmp_path / "w.safetensors")), **RESNET))


def test_the_hub_is_a_published_file_with_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(pretrained, "_HUB_URL", "http://127.0.0.1:9/")  # nobody listens
    monkeypatch.setattr(pretrained, "PATIENCE", pretrained.Patience(attempts=1, wait_s=0, timeout_s=1))
    config = ResNetConfig(weights="hub", **RESNET)
    target = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    with pytest.raises(UserError, match=rf"'hub': .*cannot be had.*put the file at {target}"):
        load_pretrained(net_of(), config)
    source = net_of(seed=1)
    torch.save(source.state_dict(), target)
    with pytest.raises(UserError, match="published as f37072fd"):
        load_pretrained(net_of(), config)
    digits = hashlib.sha256(target.read_bytes()).hexdigest()[:8]
    named = target.rename(target.with_name(f"resnet18-{digits}.pth"))
    monkeypatch.setitem(pretrained._HUB_FILES, "resnet18", named.name)
    net = net_of()
    done = load_pretrained(net, config)
    assert done is not None
    assert done.source == f"http://127.0.0.1:9/{named.name}"
    assert torch.equal(logits(net), logits(source))
    with pytest.raises(UserError, match="none are published for densenet264"):
        load_pretrained(net_of("densenet"), DenseNetConfig(weights="hub", depth=264))


def test_settings_of_weights_need_weights() -> None:
    with pytest.raises(UserError, match="weights_sha256 and weights_skip need weights"):
        build_model("resnet", spatial_dims=2, in_channels=1, out_channels=2, weights_skip=("fc",))
    with pytest.raises(UserError, match="weights_sha256"):
        build_model("resnet", spatial_dims=2, in_channels=1, out_channels=2, weights="w", weights_sha256="abc")
