"""The growth law of training's peak memory, fitted to sizes that were measured.

    peak(v) = fixed + slope * v,    v = voxels of a step = batch * patch

Libraries, weights, optimiser and moving average are fixed; activations, gradients of activations and batches made
ahead grow with the voxels of a step. Below some size the peak lies elsewhere (a checkpoint being written), so the law
is the line through the two largest sizes measured; the residual is its largest error at the others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """One way to train: `patch` and `batch`, and `network`: null fields of the model's config that follow from it."""

    patch: tuple[int, ...]
    batch: int
    network: Mapping[str, Any] = field(default_factory=dict)

    @property
    def voxels(self) -> int:
        """Of one step."""
        return self.batch * math.prod(self.patch)

    def __str__(self) -> str:
        return f"patch_size {'×'.join(map(str, self.patch))} with batch_size {self.batch}"


@dataclass(frozen=True)
class Measured:
    """A candidate in a mode, measured.

    Attributes:
        step_gb: peak (1e9 bytes) of training steps. peak_gb: with validation of the largest case after them.
        step_seconds: median after the first step.
    """

    candidate: Candidate
    mode: str
    step_gb: float
    peak_gb: float
    step_seconds: float


class TooLarge(Exception):
    """A trial was stopped by the device: out of memory."""


Measure = Callable[[Candidate, str, int], Measured]
"""(candidate, mode, steps) -> what was measured; raises TooLarge."""


@dataclass(frozen=True)
class Law:
    """peak = fixed_gb + gb_per_mvoxel * millions of voxels a step, and never below `floor_gb`, which validation takes.

    Attributes:
        residual: largest relative error at the points that the line does not pass through; None with two points.
    """

    fixed_gb: float
    gb_per_mvoxel: float
    floor_gb: float
    seconds_per_mvoxel: float
    residual: float | None
    points: tuple[Measured, ...]

    def predict(self, voxels: int) -> float:
        """Peak in GB."""
        return max(self.fixed_gb + self.gb_per_mvoxel * voxels / 1e6, self.floor_gb)

    def fitting(self, budget_gb: float) -> int:
        """Most voxels a step within the budget."""
        if self.floor_gb > budget_gb:
            return 0
        return int(max(0.0, budget_gb - self.fixed_gb) / max(self.gb_per_mvoxel, 1e-12) * 1e6)


def fit_law(points: Sequence[Measured]) -> Law:
    """The law through two or more sizes of one mode."""
    ordered = sorted(points, key=lambda point: point.candidate.voxels)
    low, high = ordered[-2:]
    span = (high.candidate.voxels - low.candidate.voxels) / 1e6
    slope = max(0.0, (high.step_gb - low.step_gb) / span)
    fixed = high.step_gb - slope * high.candidate.voxels / 1e6
    errors = [abs(fixed + slope * p.candidate.voxels / 1e6 - p.step_gb) / p.step_gb for p in ordered[:-2]]
    # What validation takes beyond the steps hardly depends on the patch; where it does not exceed them it is unseen.
    floor = max((p.peak_gb for p in ordered if p.peak_gb > 1.01 * p.step_gb), default=0.0)
    return Law(
        fixed_gb=fixed,
        gb_per_mvoxel=slope,
        floor_gb=floor,
        seconds_per_mvoxel=high.step_seconds / high.candidate.voxels * 1e6,
        residual=max(errors) if errors else None,
        points=tuple(ordered),
    )
