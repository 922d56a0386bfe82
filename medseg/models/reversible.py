"""Reversible sequences: blocks whose input is rebuilt from their output, so that nothing between them is kept.

Additive coupling (Gomez et al. 2017, arXiv:1707.04585, eq. 1 to 3) over the two halves of the channels:

    y1 = x1 + F(x2);  y2 = x2 + G(y1)        x2 = y2 - G(y1);  x1 = y1 - F(x2)

The backward pass of a block rebuilds its input and pulls the gradient through F and G in one go:

    (dG, dx1) = vjp(G, y1, dy2);  dx1 += dy1;  x2 = y2 - G(y1)
    (dF, dx2) = vjp(F, x2, dx1);  dx2 += dy2;  x1 = y1 - F(x2)

A branch (F, G, or what changes the resolution) may say that it is a sum of pieces; then one piece's graph is alive at
a time. The streams stay in fp32 (or fp64) under autocast, since what is rebuilt from rounded sums drifts.

Shape legend: B batch, C channels, D H W the spatial axes in array order (H W for 2D).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # `torch.compiler.disable`, which imports the compiler, 2.7 s, at once
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

Memory = Literal["store", "checkpoint", "reversible"]
"""What training keeps: every activation, the input of every block, or the output of every sequence."""

Piece = Callable[[Tensor], Tensor]


class Branch(nn.Module):
    """A function that is the sum of its pieces; a single piece by default."""

    def pieces(self) -> Sequence[Piece]:
        """Functions x -> tensor whose sum is `forward(x)`, up to the order of summation."""
        return (self.forward,)


class Coupling(nn.Module):
    """One reversible block; F and G keep the shape."""

    def __init__(self, f: Branch, g: Branch) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x1_BCDHW: Tensor, x2_BCDHW: Tensor) -> tuple[Tensor, Tensor]:
        """Both halves of the output."""
        y1 = x1_BCDHW + self.f(x2_BCDHW)
        return y1, x2_BCDHW + self.g(y1)


class ReversibleSequence(nn.Module):
    """Blocks of one resolution, in one autograd node.

    Args:
        blocks: may be empty.
        memory: of training; can be set at any time. Evaluation always stores, so that hooks see every layer once.
        reuse_output: rebuild the inputs in the storage of the output, which then holds other values after the
            backward pass: for whoever keeps no reference to it. torch raises if its value is still needed.

    Raises:
        ValueError: a module draws random numbers or keeps running statistics; it would run twice a step.
    """

    def __init__(self, blocks: Sequence[Coupling], memory: Memory = "reversible", reuse_output: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.memory: Memory = memory
        self.reuse_output = reuse_output
        for name, module in self.named_modules():
            if isinstance(module, _BatchNorm | _DropoutNd):
                raise ValueError(
                    f"{name} is a {type(module).__name__}: a reversible block runs twice a step, so running statistics "
                    "would be updated twice and random numbers differ; use group or instance norm, and no dropout"
                )

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Output of the last block, same shape; C must be even."""
        x = wide(x_BCDHW)
        memory = memory_now(self, self.memory)
        if memory == "reversible" and len(self.blocks):
            return _in_reverse(_Reversible, self.blocks, x, self.reuse_output)
        x1, x2 = x.chunk(2, 1)
        for block in self.blocks:
            if memory == "checkpoint":
                x1, x2 = checkpoint(block, x1, x2, use_reentrant=False, preserve_rng_state=False)
            else:
                x1, x2 = block(x1, x2)
        return torch.cat([x1, x2], 1)

    @torch.no_grad()
    def inverse(self, y_BCDHW: Tensor) -> Tensor:
        """The input that gives `y_BCDHW`, up to rounding."""
        x = wide(y_BCDHW).clone()
        x1, x2 = _halves(x)
        for block in reversed(_couplings(self.blocks)):
            _add(block.g, x1, x2, -1)
            _add(block.f, x2, x1, -1)
        return x


def recomputed(branch: Branch, x_BCDHW: Tensor) -> Tensor:
    """`branch(x)`, in fp32 at least, of which only x is kept; the backward pass recomputes it piece by piece."""
    return _in_reverse(_Recomputed, branch, x_BCDHW)


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def memory_now(module: nn.Module, memory: Memory) -> Memory:
    """The mode that applies: `store` in evaluation, or where there is no backward pass."""
    return memory if module.training and torch.is_grad_enabled() else "store"


@_disable_dynamo
def _in_reverse(function: type[torch.autograd.Function], modules: nn.Module, x: Tensor, *options: object) -> Tensor:
    """Apply `function`; every parameter is an input, so that DDP and torch.autograd.grad see its gradient.

    torch.compile breaks its graph here: traced, the recomputation would become one graph, whose memory is the
    compiler's to plan.
    """
    parameters = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    return cast(Tensor, function.apply(modules, options, x, *parameters))  # type: ignore[no-untyped-call]


class _Reversible(torch.autograd.Function):
    """A whole sequence of couplings; keeps its output alone."""

    @staticmethod
    def forward(ctx: Any, blocks: nn.ModuleList, options: tuple[bool], x: Tensor, *parameters: Tensor) -> Tensor:
        _remember(ctx, blocks, x, parameters)
        (ctx.reuse_output,) = options
        y = x.clone(memory_format=torch.contiguous_format)
        y1, y2 = _halves(y)
        with ctx.autocast:
            for block in _couplings(blocks):
                _add(block.f, y2, y1)
                _add(block.g, y1, y2)
        ctx.save_for_backward(y, *parameters)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y = _saved_once(ctx)
        if ctx.reuse_output:
            torch.autograd.graph.increment_version(y)
        else:
            y = y.clone()
        dx = dy.clone(memory_format=torch.contiguous_format)  # dy may be another node's gradient too
        y1, y2 = _halves(y)
        dx1, dx2 = _halves(dx)
        gradients: dict[Tensor, Tensor] = {}
        with ctx.autocast:
            for block in reversed(_couplings(ctx.modules)):
                _pull(block.g, y1, dx2, dx1, gradients, rebuilt=y2)
                _pull(block.f, y2, dx1, dx2, gradients, rebuilt=y1)
        return None, None, dx, *[gradients.get(parameter) for parameter in ctx.parameters]


class _Recomputed(torch.autograd.Function):
    """A branch that changes the resolution; keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, branch: Branch, options: tuple[()], x: Tensor, *parameters: Tensor) -> Tensor:
        _remember(ctx, branch, x, parameters)
        ctx.save_for_backward(x, *parameters)
        with ctx.autocast:
            first, *rest = branch.pieces()
            y = wide(first(x))
            for piece in rest:
                y.add_(piece(x))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x = _saved_once(ctx)
        dx, gradients = torch.zeros_like(x), dict[Tensor, Tensor]()
        with ctx.autocast:
            _pull(ctx.modules, x, dy, dx, gradients)
        return None, None, dx, *[gradients.get(parameter) for parameter in ctx.parameters]


def _remember(ctx: Any, modules: nn.Module, x: Tensor, parameters: Sequence[Tensor]) -> None:
    """What the backward pass runs with: the modules, and autocast as it is now.

    Without autocast's cache: it would keep weights that were cast where no gradient was recorded.
    """
    ctx.modules, ctx.parameters, ctx.spent = modules, parameters, False
    kind = x.device.type
    ctx.autocast = torch.autocast(
        kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    )


def _saved_once(ctx: Any) -> Tensor:
    """The tensor that was kept; raises if a parameter has changed since, or at a second backward pass."""
    if ctx.spent:
        raise RuntimeError(
            "a second backward pass through a reversible network: what it kept was used up by the first; "
            "set its memory to 'store', or run the forward pass again"
        )
    ctx.spent = True
    return cast(Tensor, ctx.saved_tensors[0])


def _couplings(blocks: nn.ModuleList) -> list[Coupling]:
    return cast("list[Coupling]", list(blocks))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of the channels as views of x that are changed in place.

    `.data` gives each a version counter of its own: F's input is not changed when F's result is taken off the other.
    """
    half = x.shape[1] // 2
    return x.data[:, :half], x.data[:, half:]


def _add(branch: Branch, x: Tensor, into: Tensor, sign: int = 1) -> None:
    for piece in branch.pieces():
        into.add_(piece(x), alpha=sign)


def _pull(
    branch: Branch, x: Tensor, dy: Tensor, dx: Tensor, gradients: dict[Tensor, Tensor], rebuilt: Tensor | None = None
) -> None:
    """Pull a gradient back through a branch, one piece's graph at a time.

    Args:
        x: the branch's input.
        dy: gradient of its output.
        dx: the input's gradient is added to it.
        gradients: those of the parameters are added to it.
        rebuilt: the output is taken off it.
    """
    parameters = [parameter for parameter in branch.parameters() if parameter.requires_grad]
    leaf = x.detach().requires_grad_()
    for piece in branch.pieces():
        with torch.enable_grad():
            y = piece(leaf)
        found = torch.autograd.grad(y, (leaf, *parameters), dy.to(y.dtype), allow_unused=True)
        if rebuilt is not None:
            rebuilt.sub_(y.detach())
        del y
        dx.add_(found[0])
        for parameter, gradient in zip(parameters, found[1:], strict=True):
            if gradient is not None:
                known = gradients.get(parameter)
                gradients[parameter] = gradient if known is None else known + gradient
        del found
