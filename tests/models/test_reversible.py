"""Reversible sequences: the inverse, gradients against the stored twin by dtype and depth, and what is kept."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from medseg.config import ReversibleUNetConfig
from medseg.models.reversible import Branch, Coupling, ReversibleSequence, recomputed
from medseg.models.reversible_unet import MBConv

CONFIG = ReversibleUNetConfig(expansion=2, groups=4, chunks=2)
HALF = 4


def _sequence(depth: int, reuse_output: bool = False, dtype: torch.dtype = torch.float32) -> ReversibleSequence:
    torch.manual_seed(0)
    blocks = [Coupling(*(MBConv(CONFIG, 3, HALF, HALF, "none") for _ in range(2))) for _ in range(depth)]
    sequence = ReversibleSequence(blocks, reuse_output=reuse_output).to(dtype)
    with torch.no_grad():
        for parameter in sequence.parameters():  # norms as after training
            parameter.add_(0.3 * torch.randn_like(parameter)) if parameter.ndim == 1 else parameter.mul_(0.7)
    return sequence.train()


def _image(dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 2 * HALF, 5, 4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def _gradients(sequence: ReversibleSequence, memory: str, x: Tensor, bf16: bool = False) -> dict[str, Tensor]:
    """Of the input and of every parameter, by name."""
    sequence.memory = memory
    names, parameters = zip(*sequence.named_parameters(), strict=True)
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = sequence(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    found = torch.autograd.grad((y * weights).sum(), (x, *parameters))
    return dict(zip(("input", *names), found, strict=True))


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("depth", [1, 4, 16])
def test_the_inverse_gives_the_input(depth: int) -> None:
    sequence, x = _sequence(depth), _image()
    with torch.no_grad():
        y = sequence(x)
    assert _error(y, x) > 0.1
    assert _error(sequence.inverse(y), x) < 1e-5


@pytest.mark.parametrize("depth", [1, 4, 16])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_every_gradient_is_that_of_the_stored_twin(depth: int, dtype: torch.dtype, bound: float) -> None:
    sequence, x = _sequence(depth, dtype=dtype), _image(dtype, batch=1)
    expected = _gradients(sequence, "store", x)
    for memory in ("checkpoint", "reversible"):
        found = _gradients(sequence, memory, x)
        worst = max((_error(found[name], expected[name]), name) for name in expected)
        assert worst[0] < bound, worst


@pytest.mark.parametrize("depth", [1, 4, 16])
def test_bf16_loses_little_more_than_plain_bf16(depth: int) -> None:
    sequence, x = _sequence(depth), _image()
    exact, plain, found = (
        torch.cat([g.flatten() for g in _gradients(sequence, memory, x, bf16).values()])
        for memory, bf16 in (("store", False), ("store", True), ("reversible", True))
    )
    assert _error(plain, exact) > 1e-4, "autocast was at work"
    assert _error(found, exact) <= 1.6 * _error(plain, exact)


def test_autocast_is_that_of_the_forward_pass_wherever_backward_is_called() -> None:
    sequence, x = _sequence(2), _image()

    def gradients(forward: bool, backward: bool) -> list[Tensor]:
        sequence.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            loss = sequence(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            loss.backward()
        return [parameter.grad for parameter in sequence.parameters()]

    for forward in (False, True):
        for one, other in zip(gradients(forward, False), gradients(forward, True), strict=True):
            assert torch.equal(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert sequence(x).dtype == torch.float32, "streams stay wide"


def _bytes_kept(sequence: ReversibleSequence, memory: str) -> int:
    """Of tensors saved by any node of the graph, parameters and input apart, each storage counted once."""
    sequence.memory = memory
    x = _image().requires_grad_()
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *sequence.parameters())}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = sequence(x)
    node = y.grad_fn
    for value in (vars(node) if hasattr(node, "__dict__") else {}).values():
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, Tensor):
                pack(tensor)
    return sum(kept.values())


def test_what_is_kept_does_not_grow_with_depth() -> None:
    reversible = [_bytes_kept(_sequence(depth), "reversible") for depth in (1, 2, 8)]
    stored = [_bytes_kept(_sequence(depth), "store") for depth in (1, 2, 8)]
    output = _image().numel() * 4
    assert reversible == [output] * 3
    assert stored[2] > 6 * stored[0]


def test_after_the_backward_pass_nothing_stays_alive_without_the_garbage_collector() -> None:
    sequence, x = _sequence(2, reuse_output=True), _image()
    gc.disable()
    try:
        y = sequence(x * 1.0)
        node, kept = weakref.ref(y.grad_fn), weakref.ref(y)
        y.sum().backward()
        del y
        assert kept() is None
        assert node() is None
    finally:
        gc.enable()


class _Counted(Branch):
    """A branch whose pieces tell how many of their graphs are alive."""

    alive = most = 0

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))

    def pieces(self) -> list[Callable[[Tensor], Tensor]]:
        return [lambda x, i=i: self._piece(x, i) for i in range(3)]

    def forward(self, x: Tensor) -> Tensor:
        return sum(piece(x) for piece in self.pieces())

    def _piece(self, x: Tensor, i: int) -> Tensor:
        y = torch.sin(x * self.scale[i])
        if y.grad_fn is not None:
            _Counted.alive += 1
            _Counted.most = max(_Counted.most, _Counted.alive)
            weakref.finalize(y, _Counted._gone)
        return y

    @staticmethod
    def _gone() -> None:
        _Counted.alive -= 1


def test_one_piece_s_graph_is_alive_at_a_time() -> None:
    sequence, x = ReversibleSequence([Coupling(_Counted(), _Counted()) for _ in range(2)]), _image().double()
    expected = _gradients(sequence, "store", x)
    _Counted.alive = _Counted.most = 0
    gc.collect()
    found = _gradients(sequence, "reversible", x)
    assert _Counted.most == 1
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    branch = _Counted()
    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(branch(leaf).square().sum(), (leaf, branch.scale))
    got = torch.autograd.grad(recomputed(branch, leaf).square().sum(), (leaf, branch.scale))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("retain", [False, True])
def test_a_second_backward_pass_is_refused(retain: bool) -> None:
    sequence = _sequence(1)
    y = sequence(_image()).sum()
    y.backward(retain_graph=retain)
    with pytest.raises(RuntimeError, match=r"second backward pass.*set its memory to 'store'"):
        y.backward()


def test_a_parameter_changed_in_between_is_noticed() -> None:
    sequence = _sequence(1)
    y = sequence(_image()).sum()
    with torch.no_grad():
        next(sequence.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_the_output_is_reused_only_when_allowed_and_torch_knows() -> None:
    x = _image()
    for reuse in (False, True):
        sequence = _sequence(2, reuse_output=reuse)
        y = sequence(x)
        before = y.detach().clone()
        y.sum().backward()
        assert torch.equal(y, before) != reuse
    torch.testing.assert_close(y, x)
    y = sequence(x)
    later = y.square().sum()
    y.sum().backward()
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|second backward"):
        later.backward()


def test_frozen_parameters_get_no_gradient_and_the_others_theirs() -> None:
    sequence, x = _sequence(2), _image()
    expected = _gradients(sequence, "store", x)
    sequence.memory = "reversible"
    frozen = {name for i, (name, _) in enumerate(sequence.named_parameters()) if i % 2}
    for name, parameter in sequence.named_parameters():
        parameter.requires_grad_(name not in frozen)
    y = sequence(x)  # nor does x need one
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    for name, parameter in sequence.named_parameters():
        assert (parameter.grad is None) == (name in frozen)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_gradients_accumulate_over_steps() -> None:
    sequence = _sequence(2)
    images = [_image(), 2 * _image().flip(2)]
    sums = {}
    for memory in ("store", "reversible"):
        sequence.memory = memory
        sequence.zero_grad()
        for x in images:
            sequence(x).square().mean().backward()
        sums[memory] = [parameter.grad.clone() for parameter in sequence.parameters()]
    for found, expected in zip(sums["reversible"], sums["store"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_modules_that_cannot_run_twice_are_refused() -> None:
    for layer in (nn.BatchNorm3d(HALF), nn.Dropout(0.1)):
        branch = Branch()
        branch.layer = layer
        with pytest.raises(ValueError, match=rf"blocks.0.f.layer is a {type(layer).__name__}: .* runs twice"):
            ReversibleSequence([Coupling(branch, Branch())])


def test_the_compiler_is_loaded_where_something_is_compiled_or_trained_in_reverse_and_not_before() -> None:
    code = "import sys, medseg.models.reversible; print('torch._dynamo' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "False\n"


def test_compiling_breaks_its_graph_at_a_reversible_sequence() -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    sequence = _sequence(2)
    torch.compile(sequence, backend="eager")(_image()).sum().backward()
    assert any("_in_reverse" in reason for reason in counters["graph_break"])
