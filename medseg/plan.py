"""The plan: what follows from a cohort's fingerprint, as a file that a person can read and edit."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from medseg.files import UserError, plain, write_text


@dataclass(frozen=True)
class Appearance:
    """What is done to a radiograph's pixels before they are normalised; by default nothing.

    Attributes:
        crop_padding, histogram, clahe_tiles, clahe_limit: as in the config's `plan.appearance`.
        landmarks: of the training cases' histogram; see `medseg.data.appearance.landmarks_of`. Only `landmarks`.
        detail_sd: of the training cases; see `medseg.data.appearance.detail_of`. Empty: sharpness stays as it is.
    """

    crop_padding: bool = False
    histogram: Literal["none", "percentile", "landmarks", "clahe"] = "none"
    clahe_tiles: int = 8
    clahe_limit: float = 2.0
    landmarks: tuple[float, ...] = ()
    detail_sd: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Grid, intensities and batches of one model.

    Attributes:
        spatial_dims: 2 or 3.
        spacing_mm: grid of the network for volumes (canonical axis order R, A, S); empty for radiographs.
        size_px: (rows, columns) to which radiographs are resized; empty for volumes.
        patch_size: voxels seen by one training step and one inference window.
        batch_size: items per step.
        normalise: `zscore` per image; `zscore_nonzero` likewise, over the voxels that are not exactly 0, which stay 0
            (brain-extracted images); or `ct`: clip to `intensity_low/high`, then subtract and divide by the cohort's
            foreground mean and standard deviation.
        intensity_low, intensity_high, intensity_mean, intensity_sd: in the image's unit (HU for CT); only `ct`.
        appearance: how radiographs of different sources are made to look alike; nothing is done to volumes.
        network: fields of the config's `model` that were null and follow from the cohort: pooling and kernels by axis.
        memory_mode: what training keeps for the backward pass, for networks that have the choice; else empty.
        predicted_memory_gb: peak memory of training (1e9 bytes; resident on a CPU, allocated on a GPU) as the growth
            law foretold it, before this patch was measured.
        memory_gb: the same, measured on this patch and batch; None where it was not measured.
        predicted_step_seconds: time of a training step by the same law. step_seconds: its median where it was measured.
        memory_law: the growth law, the points it was fitted to, its residual, the device and the budget.
        fingerprint: what was measured on the cohort. reasons: why each number is what it is.
    """

    spatial_dims: Literal[2, 3]
    patch_size: tuple[int, ...]
    batch_size: int
    spacing_mm: tuple[float, ...] = ()
    size_px: tuple[int, ...] = ()
    normalise: Literal["zscore", "zscore_nonzero", "ct"] = "zscore"
    intensity_low: float = 0.0
    intensity_high: float = 0.0
    intensity_mean: float = 0.0
    intensity_sd: float = 1.0
    appearance: Appearance = Appearance()
    network: Mapping[str, Any] = field(default_factory=dict)
    memory_mode: str = ""
    predicted_memory_gb: float | None = None
    memory_gb: float | None = None
    predicted_step_seconds: float | None = None
    step_seconds: float | None = None
    memory_law: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


IMAGE_FIELDS = (
    "spacing_mm", "size_px", "normalise", "intensity_low", "intensity_high", "intensity_mean", "intensity_sd",
    "appearance",
)  # fmt: skip
"""What of a plan makes the image that a network sees; patch, batch and memory do not."""


def write_plan(path: Path, plan: Plan) -> Path:
    """Write the plan as YAML, atomically."""
    return write_text(path, yaml.safe_dump(plain(asdict(plan)), sort_keys=False, allow_unicode=True))


def read_plan(path: Path) -> Plan:
    """Read a plan. Raises UserError naming the file and the field that does not fit."""
    try:
        return plan_of(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; run `medseg plan`.") from error
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a plan ({error}); run `medseg plan` again.") from error


def plan_of(tree: Mapping[str, Any]) -> Plan:
    """The plan in a tree as YAML and JSON hold it. Raises KeyError, TypeError or AttributeError for anything else."""
    looks = dict(tree.get("appearance") or {})
    looks |= {name: tuple(looks[name]) for name in ("landmarks", "detail_sd") if name in looks}
    fixed = {name: tuple(tree[name]) for name in ("patch_size", "spacing_mm", "size_px")}
    return Plan(**{**tree, **fixed, "appearance": Appearance(**looks)})
