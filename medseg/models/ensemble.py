"""Several networks as one: their logits are averaged."""

from collections.abc import Sequence

from torch import Tensor, nn


class Ensemble(nn.Module):
    """Networks of one task; x -> the mean of their logits, summed one network after another.

    An activation map takes a layer of all members as one layer with all their channels (`medseg.explain.hooks`).

    Args:
        members: in evaluation each returns one tensor of logits, all of one shape.

    Raises:
        ValueError: there is no member.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise ValueError("an ensemble needs one network at least")
        self.members = nn.ModuleList(members)

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """logits_BKDHW (or logits_BK): the mean over the members."""
        first, *others = self.members
        total: Tensor = first(x_BCDHW)
        for member in others:
            total = total + member(x_BCDHW)
        return total / len(self.members) if others else total
