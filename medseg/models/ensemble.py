"""Several networks as one: their logits are averaged."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

Watch = Callable[[Tensor, Sequence[Tensor]], None]


class Ensemble(nn.Module):
    """Networks of one task; x_BCDHW -> the mean of their logits, of which one at a time is kept beside the sum.

    Args:
        members: in evaluation each returns one tensor of logits, all of one shape.

    Attributes:
        watch: is given the input and the logits of every member at each call, when set; all are kept then.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise ValueError("an ensemble needs one network at least")
        self.members = nn.ModuleList(members)
        self.watch: Watch | None = None

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """logits_BKDHW (or logits_BK): the mean over the members."""
        kept: list[Tensor] = []
        total: Tensor | None = None
        for member in self.members:
            logits = member(x_BCDHW)
            total = logits if total is None else total + logits
            if self.watch is not None:
                kept.append(logits)
        assert total is not None
        if self.watch is not None:
            self.watch(x_BCDHW, kept)
        return total / len(self.members) if len(self.members) > 1 else total
