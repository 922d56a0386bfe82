"""The reversible U-Net: one set of weights in three modes, training alike, explained, compiled, distributed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from medseg.config import ReversibleUNetConfig
from medseg.explain import explain
from medseg.files import UserError
from medseg.models import build_model
from medseg.models.reversible import Branch
from medseg.models.reversible_unet import MBConv, NormActConv, ReversibleUNet

MODES = ("store", "checkpoint", "reversible")
SMALL: dict[str, Any] = {
    "channels": (8, 16, 16), "blocks_down": (1, 2, 1), "blocks_up": (2, 1), "expansion": 2, "groups": 4, "chunks": 2
}  # fmt: skip


def _net(dims: int = 3, **params: Any) -> ReversibleUNet:
    torch.manual_seed(0)
    net = build_model("reversible_unet", spatial_dims=dims, in_channels=2, out_channels=3, **{**SMALL, **params})
    assert isinstance(net, ReversibleUNet)
    return net


def _image(dims: int = 3, side: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, 2, *[side] * dims, generator=torch.Generator().manual_seed(1))


def _gradients(net: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    net.zero_grad()
    logits = net(x)
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("dims", "params"),
    [
        (3, {}),
        (2, {}),
        (2, {"norm": "instance", "chunks": 8}),
        (3, {"chunks": 1}),
        (2, {"block": "conv"}),
        (3, {"block": "conv", "norm": "instance", "blocks_up": (0, 1)}),
        (2, {"channels": (8,), "blocks_down": (2,), "blocks_up": ()}),
    ],
)
def test_all_modes_give_the_same_logits_and_gradients(dims: int, params: dict[str, Any]) -> None:
    # in fp64: with few positions, rounding that moves one across the kink of its activation moves a gradient by 1 %
    net, x = _net(dims, **params).double(), _image(dims).double()
    state = copy.deepcopy(net.state_dict())
    logits, expected = {}, {}
    for memory in MODES:
        net.memory = memory
        logits[memory], expected[memory] = _gradients(net, x)
        assert list(net.state_dict()) == list(state)
    for memory in MODES[1:]:
        torch.testing.assert_close(logits[memory], logits["store"])
        assert set(expected[memory]) == {name for name, _ in net.named_parameters()}
        for name, gradient in expected["store"].items():
            error = (expected[memory][name] - gradient).norm() / gradient.norm()
            assert error < 1e-10, (memory, name, float(error))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("resample", ["none", "down", "up"])
@pytest.mark.parametrize("block", [MBConv, NormActConv])
def test_a_branch_is_the_sum_of_its_pieces(dims: int, resample: str, block: type[Branch]) -> None:
    torch.manual_seed(0)
    branch = block(ReversibleUNetConfig(expansion=4, groups=8, chunks=4), dims, 4, 6, resample)
    x = torch.randn(2, 4, *[6] * dims)
    with torch.no_grad():
        pieces = [piece(x) for piece in branch.pieces()]
        expected = branch(x)
    assert len(pieces) == (4 if block is MBConv else 1)
    torch.testing.assert_close(sum(pieces), expected, rtol=1e-5, atol=1e-5)
    scale = {"none": 6, "down": 3, "up": 12}[resample]
    assert expected.shape == (2, 6, *[scale] * dims)


@pytest.mark.parametrize(
    ("dtype", "side", "bound"),
    [pytest.param(torch.float32, 48, 1e-4, marks=pytest.mark.slow), (torch.float64, 16, 1e-10)],
)
def test_fifty_steps_give_the_same_losses_in_every_mode(dtype: torch.dtype, side: int, bound: float) -> None:
    # Rounding may move a unit across the kink of its activation; with many positions that moves the loss little.
    x = torch.randn(1, 2, side, side, generator=torch.Generator().manual_seed(2)).to(dtype)
    label = (x[:, :1] > 0.5).long() + (x[:, :1] > 1.2).long()
    curves = {}
    for memory in MODES:
        net = _net(2, memory=memory, channels=(8, 16), blocks_down=(2, 1), blocks_up=(1,)).to(dtype)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        curves[memory] = []
        for _ in range(50):
            value = functional.cross_entropy(net(x), label[:, 0])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            curves[memory].append(float(value.detach()))
    assert curves["store"][-1] < 0.5 * curves["store"][0], "it learns"
    for memory in MODES[1:]:
        assert max(abs(a - b) for a, b in zip(curves[memory], curves["store"], strict=True)) < bound


def test_evaluation_stores_so_that_a_hook_sees_every_layer_once() -> None:
    net, x = _net(memory="reversible"), _image()
    seen: list[str] = []
    for name, module in net.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    leaves = sorted(name for name, module in net.named_modules() if not list(module.children()))
    net.eval()(x).sum().backward()
    assert sorted(set(seen) & set(leaves)) == sorted(name for name in seen if name in leaves) == leaves
    seen.clear()
    net.train()(x).sum().backward()
    assert "encoder.1.blocks.0.f.depthwise" not in seen


@pytest.mark.parametrize("layer", ["last", "bottleneck", "encoder.2.blocks.0.g.depthwise"])
def test_explanation_is_that_of_the_stored_network(layer: str) -> None:
    net, x = _net(memory="reversible").train(), _image(side=16, batch=1)
    found = explain(net, x, method="gradcam", target=1, layer=layer)
    net.memory = "store"
    assert torch.equal(found, explain(net, x, method="gradcam", target=1, layer=layer))
    assert found.shape == (1, 16, 16, 16)
    assert found.abs().max() > 0
    assert net.training


def test_the_compiled_network_gives_the_same_gradients() -> None:
    net, x = _net(2), _image(2)
    expected, gradients = _gradients(net, x)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager")
    found, compiled_gradients = _gradients(compiled, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[f"_orig_mod.{name}"], gradient, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"(?s)in_reverse|disable"):
        torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()


def test_bf16_training_gives_finite_gradients_in_every_mode() -> None:
    for memory in MODES:
        net = _net(memory=memory)
        with torch.autocast("cpu", torch.bfloat16):  # four positions at the bottom; see _gradients in train/loop.py
            value = net(_image(side=16)).float().square().mean()
        value.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def _train_on_a_rank(rank: int, folder: str) -> None:
    """Two steps, the second accumulated over two backward passes; what this rank ends with goes to the disk."""
    torch.set_num_threads(1)
    store = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for memory in ("store", "reversible"):
        for unused in (False, True):
            net = _net(2, memory=memory)
            ddp = DistributedDataParallel(net, find_unused_parameters=unused)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            x = _image(2)[rank : rank + 1]
            for accumulated in (1, 2):
                optimizer.zero_grad()
                for part in range(accumulated - 1):
                    with ddp.no_sync():
                        ddp(x + part).square().mean().backward()
                ddp(x).square().mean().backward()
                optimizer.step()
            torch.save(net.state_dict(), f"{folder}/{memory}_{unused}_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_train_alike_in_both_modes_also_when_searching_for_unused_parameters(tmp_path: Path) -> None:
    mp.spawn(_train_on_a_rank, (str(tmp_path),), nprocs=2)
    expected = torch.load(tmp_path / "store_False_0.pt", weights_only=True)
    start = _net(2).state_dict()
    assert any(not torch.equal(expected[name], start[name]) for name in start)
    for memory in ("store", "reversible"):
        for unused in (False, True):
            for rank in (0, 1):
                found = torch.load(tmp_path / f"{memory}_{unused}_{rank}.pt", weights_only=True)
                for name, value in expected.items():
                    torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_copies_keep_their_mode_and_their_own_weights() -> None:
    net = _net(2, memory="checkpoint")
    twin = copy.deepcopy(net)
    net.memory = "reversible"
    assert twin.memory == "checkpoint"
    assert {module.memory for module in twin.downs} == {"checkpoint"}
    assert {module.memory for module in net.encoder} == {"reversible"}


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"norm.*batch norm would count every batch twice"):
        _net(norm="batch")
    with pytest.raises(UserError, match="channels"):
        _net(channels=(7, 16, 16))
    with pytest.raises(UserError, match=r"model.blocks_up has 1 entries for 3 entries of model.channels; give 2"):
        _net(blocks_up=(1,))
    with pytest.raises(UserError, match=r"model.memory 'disk' is unknown; choose one of store, checkpoint, reversible"):
        _net().memory = "disk"
    net = _net(2)
    with pytest.raises(UserError, match=r"plan.patch_size \(10, 8\): .* multiples of 4; set it to \(12, 8\)"):
        net(torch.zeros(1, 2, 10, 8))
    with pytest.raises(UserError, match="single position"):
        net(torch.zeros(1, 2, 4, 4))
    with pytest.raises(UserError, match="2D"):
        net(torch.zeros(1, 2, 8, 8, 8))


def test_chunks_are_as_wide_as_a_cpu_computes_at_a_time_unless_told() -> None:
    def chunks(**settings: Any) -> list[int]:
        net = build_model("reversible_unet", spatial_dims=3, in_channels=1, out_channels=2, **settings)
        return [sequence.blocks[0].f.chunks for sequence in net.encoder]

    assert chunks(channels=(4, 16, 32, 64), expansion=4) == [1, 2, 4, 4]  # of 8, 32, 64, 128 expanded channels
    assert chunks(channels=(4, 16, 32, 64), expansion=4, chunks=4) == [4, 4, 4, 4]
