"""What the settings of every network share: where pretrained weights come from, and which images it takes."""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from medseg.config.fields import Strict


class NetworkConfig(Strict):
    """Settings of one network.

    `weights` is a file (safetensors or torch) from which training starts, or `hub` for the published ImageNet weights.
    A torch file needs its `weights_sha256`; where that is given it is always compared. Every name and shape must match;
    `weights_skip` names modules or weights to leave out, such as the head. A bundle predicts without this file.
    """

    classifies: ClassVar[bool] = False
    takes_prior: ClassVar[bool] = False
    dims: ClassVar[tuple[int, ...]] = (2, 3)
    published_px: ClassVar[int] = 224

    weights: Annotated[str, Field(min_length=1)] | None = None
    weights_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    weights_skip: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_weights(self) -> "NetworkConfig":
        if self.weights is None and (self.weights_sha256 or self.weights_skip):
            raise ValueError("weights_sha256 and weights_skip need weights")
        return self

    @property
    def variant(self) -> str:
        """The network by the name that publications use, such as densenet121."""
        return str(getattr(self, "name", ""))

    @property
    def parts(self) -> "dict[str, NetworkConfig]":
        """What can start from weights of its own, by the module's dotted name: the whole, and networks inside it."""
        return {"": self}

    @property
    def size_reason(self) -> str:
        """Why radiographs have `published_px` where nothing else is set."""
        return f"the size at which {self.variant} was published"

    @property
    def pooled_by_plan(self) -> bool:
        """Whether strides are left to the plan, which knows the spacing."""
        return "strides" in type(self).model_fields and getattr(self, "strides", ()) is None

    @property
    def smallest_size(self) -> int:
        """Fewest positions per axis that leave something to pool."""
        return 1

    def dims_problem(self, spatial_dims: int) -> str | None:
        """Why the network cannot be built for images of so many axes; None if it can."""
        if spatial_dims in self.dims:
            return None
        return f"{self.variant} takes {' or '.join(f'{n}D' for n in self.dims)} images, not {spatial_dims}D ones"

    def divisors(self, spatial_dims: int) -> tuple[int, ...]:
        """Per axis, what an image's size must be a multiple of."""
        return (1,) * spatial_dims

    def legal_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The smallest size that the network takes and that covers `size`.

        A network that halves its axes keeps more than one position at its bottom, where a norm over a single one would
        erase everything: then the first of the longest axes is doubled.
        """
        divisors = self.divisors(len(size))
        legal = [math.ceil(max(n, self.smallest_size) / d) * d for n, d in zip(size, divisors, strict=True)]
        if max(divisors) > 1 and tuple(legal) == divisors:
            legal[legal.index(max(legal))] *= 2
        return tuple(legal)

    def size_problem(self, size: Sequence[int]) -> str | None:
        """What is wrong with images of this size, with the nearest larger size that is legal; None if it is legal."""
        legal = self.legal_size(size)
        if legal == tuple(size):
            return None
        divisors = self.divisors(len(size))
        why = f"multiples of {' × '.join(str(d) for d in divisors)}, " if max(divisors) > 1 else ""
        more = "with more than one position at the bottom" if why else f"at least {self.smallest_size} positions"
        return f"{tuple(size)} does not fit {self.variant}, which takes {why}{more}; set it to {legal}"
