"""U-Net++: the grid of the paper's equation, exact pruning, heads, and what is kept for the backward pass."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.explain.hooks import frozen, logits_and_layer
from medseg.files import UserError
from medseg.models import build_model
from medseg.models.unetpp import Node, ScSE, UNetPP

FEATURES = (4, 6, 8, 10, 12, 14)


def _net(dims: int, depth: int, **params: Any) -> UNetPP:
    torch.manual_seed(0)
    params = {"deep_supervision": True, "features": FEATURES[: depth + 1], **params}
    net = build_model("unetpp", spatial_dims=dims, in_channels=2, out_channels=3, depth=depth, **params)
    assert isinstance(net, UNetPP)
    return net


def _image(dims: int, side: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 2, *[side] * dims, generator=torch.Generator().manual_seed(1))


def _randomised(net: UNetPP) -> UNetPP:
    """Norms as after training: neither ones nor zeros, and running statistics of real activations."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    net.train()(_image(net.spatial_dims, 2 ** (net.depth + 1)))
    return net.eval()


def _by_equation(net: UNetPP, x: Tensor) -> dict[int, Tensor]:
    """X[i,j] by recursion over plain functions, with the weights of `net` (max pool, transposed, instance norm)."""
    weights = net.state_dict()
    three = net.spatial_dims == 3
    conv: Callable[..., Tensor] = functional.conv3d if three else functional.conv2d
    transposed: Callable[..., Tensor] = functional.conv_transpose3d if three else functional.conv_transpose2d
    pool: Callable[..., Tensor] = functional.max_pool3d if three else functional.max_pool2d

    def node(i: int, j: int) -> Tensor:
        name = f"nodes.x_{i}_{j}."
        if j:
            up = transposed(node(i + 1, j - 1), weights[name + "resample.weight"], stride=2)
            y = torch.cat([*(node(i, k) for k in range(j)), up], dim=1)
        else:
            y = pool(node(i - 1, 0), 2) if i else x
        for n in ("1", "2"):
            y = conv(y, weights[f"{name}conv{n}.weight"], padding=1)
            y = functional.instance_norm(
                y, weight=weights[f"{name}norm{n}.weight"], bias=weights[f"{name}norm{n}.bias"]
            )
            y = functional.leaky_relu(y, 0.01)
        return y

    levels = range(1, net.depth + 1)
    return {k: conv(node(0, k), weights[f"heads.{k}.weight"], weights[f"heads.{k}.bias"]) for k in levels}


@pytest.mark.parametrize(("dims", "depth"), [(2, 2), (2, 5), (3, 3)])
def test_the_grid_is_the_equation_of_the_paper(dims: int, depth: int) -> None:
    net = _randomised(_net(dims, depth)).double()
    x = _image(dims, 2**depth * 2, batch=1).double()
    expected = _by_equation(net, x)
    with torch.no_grad():
        found = net.train()(x)
        assert list(found) == list(range(1, depth + 1))
        for level, logits in expected.items():
            torch.testing.assert_close(found[level], logits)
            torch.testing.assert_close(net(x, level), logits)
    assert set(net.nodes) == {f"x_{i}_{j}" for i in range(depth + 1) for j in range(depth + 1 - i)}


@pytest.mark.parametrize(
    ("dims", "params"),
    [
        (2, {}),
        (3, {}),
        (2, {"norm": "batch", "down": "conv", "up": "linear", "scse": True}),
        (3, {"norm": "group", "scse": True, "up": "linear", "inference": "average"}),
        (2, {"norm": "group", "down": "conv", "inference": "average"}),
    ],
)
def test_pruning_is_exact_bit_for_bit(dims: int, params: dict[str, Any]) -> None:
    depth = 4 if dims == 2 else 3
    net, x = _randomised(_net(dims, depth, **params)), _image(dims, 32)
    before, random_state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        whole, heads = net(x), [net(x, k) for k in range(1, depth + 1)]
        if params.get("inference") != "average":
            assert torch.equal(whole, heads[-1]), "evaluation takes the deepest head"
        for level in range(1, depth + 1):
            small = net.prune_to(level)
            assert torch.equal(small(x), heads[level - 1])
            assert set(small.state_dict()) < set(before) or level == depth
            assert len(small.nodes) == (level + 1) * (level + 2) // 2
            assert torch.equal(small.prune_to(1)(x), heads[0]), "a pruned network can be pruned"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_pruned_network_is_rebuilt_from_its_config_and_shares_no_memory() -> None:
    net = _randomised(_net(2, 3))
    net.nodes["x_0_0"].requires_grad_(False)
    small = net.prune_to(2)
    params = small.config.model_dump(exclude={"name"})
    rebuilt = build_model("unetpp", spatial_dims=2, in_channels=2, out_channels=3, **params).eval()
    rebuilt.load_state_dict(small.state_dict())
    x = _image(2, 16)
    with torch.no_grad():
        assert torch.equal(rebuilt(x), small(x))
        expected = net(x)
        for parameter in small.parameters():
            parameter.zero_()
        assert torch.equal(net(x), expected)
    assert not small.training
    assert [name for name, p in small.named_parameters() if not p.requires_grad] == [
        name for name, p in net.named_parameters() if not p.requires_grad
    ]


def test_a_smaller_level_runs_only_its_own_nodes() -> None:
    net, ran = _net(2, 4).eval(), []
    for name, node in net.nodes.items():
        node.register_forward_hook(lambda *_, name=name: ran.append(name))
    net(_image(2, 32), 2)
    assert sorted(ran) == ["x_0_0", "x_0_1", "x_0_2", "x_1_0", "x_1_1", "x_2_0"]


def test_average_is_the_logarithm_of_the_mean_probability() -> None:
    net, x = _randomised(_net(2, 3, inference="average")), _image(2, 16)
    with torch.no_grad():
        probs = torch.stack([net(x, k).softmax(1) for k in (1, 2, 3)]).mean(0)
        torch.testing.assert_close(net(x).softmax(1), probs)


def test_heads_exist_only_when_they_are_trained() -> None:
    net = _net(2, 3, deep_supervision=False)
    assert list(net.heads) == ["3"]
    assert isinstance(net.train()(_image(2, 16)), Tensor)
    with pytest.raises(UserError, match="level 2: without deep supervision"):
        net.prune_to(2)
    deep = _net(2, 3)
    sum(logits.square().mean() for logits in deep(_image(2, 16)).values()).backward()
    assert [name for name, p in deep.named_parameters() if p.grad is None] == []


def test_names_of_the_weights_are_stable() -> None:
    names = set(_net(3, 2, scse=True, down="conv").state_dict())
    assert {
        "nodes.x_0_0.conv1.weight",
        "nodes.x_1_0.resample.weight",
        "nodes.x_0_1.resample.weight",
        "nodes.x_0_1.norm2.bias",
        "nodes.x_0_2.scse.squeeze.weight",
        "heads.1.weight",
        "heads.2.bias",
    } <= names


def _gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    sum(logits.square().mean() for logits in net(x).values()).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def _cat_kept(self: Node, below: Tensor, row: list[Tensor]) -> Tensor:
    y = self._merge(below, *row)
    y = functional.leaky_relu(self.norm1(y), 0.01)
    return self.scse(functional.leaky_relu(self.norm2(self.conv2(y)), 0.01))


@pytest.mark.parametrize("dims", [2, 3])
def test_making_the_concatenation_anew_changes_no_gradient(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = _net(dims, 2, scse=True).double().train(), _image(dims, 8).double()
    found = _gradients(net, x)
    monkeypatch.setattr(Node, "forward", _cat_kept)
    expected = _gradients(net, x)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_the_backward_pass_makes_the_concatenation_anew_but_not_the_convolution() -> None:
    net, x = _net(2, 2).train(), _image(2, 16)
    runs = {"resample": 0, "conv1": 0}
    last = net.nodes["x_0_2"]
    for name in runs:

        def count(*_: object, name: str = name) -> None:
            runs[name] += 1

        getattr(last, name).register_forward_hook(count)
    net(x)[2].sum().backward()
    assert runs == {"resample": 2, "conv1": 1}


def test_training_under_bf16_autocast_gives_finite_gradients() -> None:
    net = _net(3, 2).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(_image(3, 16))  # four positions at the bottom; see _gradients in medseg/train/loop.py
        value = sum(level.float().square().mean() for level in logits.values())
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_scse_takes_the_larger_of_both_weighings() -> None:
    block, x = ScSE(2, 4), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        for layer in (block.excite, block.spatial):
            layer.weight.zero_()
        block.excite.bias.fill_(0.0)
        block.spatial.bias.fill_(1.0)
        expected = torch.maximum(0.5 * x, torch.sigmoid(torch.tensor(1.0)) * x)
        torch.testing.assert_close(block(x), expected)


def test_explanation_finds_the_deepest_node_and_the_bottom() -> None:
    net = _net(2, 3, scse=True)
    with frozen(net):
        assert logits_and_layer(net, _image(2, 32), "last")[1] == "nodes.x_0_3"
        assert logits_and_layer(net, _image(2, 32), "bottleneck")[1] == "nodes.x_3_0"


def test_a_network_goes_through_export() -> None:
    net, x = _net(2, 2).eval(), _image(2, 16)
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), net(x))


def test_mistakes_are_named() -> None:
    net = _net(2, 3)
    for level in (0, 4, -1):
        with pytest.raises(UserError, match=f"level {level}: the network has the levels 1 to 3"):
            net.prune_to(level)
    with pytest.raises(UserError, match=r"plan.patch_size \(20, 16\): .* multiples of 8; set it to \(24, 16\)"):
        net(torch.zeros(1, 2, 20, 16))
    with pytest.raises(UserError, match=r"plan.patch_size \(8, 8\)"):
        net(torch.zeros(1, 2, 8, 8))
    with pytest.raises(UserError, match="2D"):
        net(torch.zeros(1, 2, 16, 16, 16))
    with pytest.raises(UserError, match=r"model.features has 2 entries for model.depth 3; give 4"):
        _net(2, 3, features=(4, 8))
    with pytest.raises(UserError, match="average"):
        _net(2, 3, deep_supervision=False, inference="average")
    with pytest.raises(UserError, match="depth"):
        _net(2, 6)
