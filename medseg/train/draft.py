"""A plan before memory is considered: what follows from the fingerprint, and the smaller ways to train, in order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Case, Cohort
from medseg.config import Config, ModelConfig, PlanConfig
from medseg.plan import Plan
from medseg.train.device import choose_device
from medseg.train.fingerprint import Fingerprint, measure_cohort, target_spacing
from medseg.train.memory_law import Candidate
from medseg.train.pooling import completed, divisors_of, pool_by_axis

_CPU_VOXELS = 96**3  # a step of at most so many where no budget is given: a CPU's time, not its memory, ends there
_BATCHES = (4, 3, 2)
_RADIOGRAPHS = 8
_BRAIN_EXTRACTED = 0.25  # share of zeros from which, as in nnU-Net, intensities are taken inside the mask


@dataclass(frozen=True)
class Draft:
    """The plan with the most wanted candidate in it, and all candidates, smaller and smaller."""

    plan: Plan
    candidates: tuple[Candidate, ...]


def draft_plan(config: Config, cohort: Cohort, cases: Sequence[Case]) -> Draft:
    """Measure the cases and draft a plan from them; what the config fixes is taken as it is."""
    found = measure_cohort(cohort, cases, config.task)
    drafted = _draft_radiographs(config, found) if config.task.spatial_dims == 2 else _draft_volumes(config, found)
    first = drafted.candidates[0]
    plan = replace(
        drafted.plan,
        patch_size=first.patch,
        batch_size=first.batch,
        network=first.network,
    )
    return replace(drafted, plan=plan)


def _draft_radiographs(config: Config, found: Fingerprint) -> Draft:
    fixed = config.plan
    divisors = divisors_of(config.model, 2, {})
    published = config.model.published_px
    size = fixed.size_px or published
    by = f", {config.model.size_reason}" if config.model.classifies else ""
    largest = fixed.batch_size or _RADIOGRAPHS
    candidates = [Candidate((size, size), largest)]
    if fixed.batch_size is None:
        candidates += [Candidate((size, size), n) for n in (6, 4, 3, 2)]
    if fixed.size_px is None:
        smaller = (n for n in range(size - 16, 63, -16) if all(n % d == 0 for d in divisors))
        candidates += [Candidate((n, n), candidates[-1].batch) for n in smaller]
    plan = Plan(
        spatial_dims=2,
        patch_size=(size, size),
        batch_size=largest,
        size_px=(size, size),
        normalise="zscore",
        fingerprint={"median_shape_px": np.median(found.shapes, axis=0).tolist(), **found.facts()},
        reasons={
            "size_px": _fixed(fixed.size_px, f"{published} px{by}"),
            "batch_size": _fixed(fixed.batch_size, f"{_RADIOGRAPHS} radiographs"),
            "normalise": "per image: exposure differs between radiographs",
        },
    )
    return Draft(plan, tuple(candidates))


def _draft_volumes(config: Config, found: Fingerprint) -> Draft:
    spacing, why = target_spacing(found.spacings_mm, found.shapes)
    spacing = config.plan.spacing_mm or spacing
    extent = found.extents(spacing)
    bounded = config.plan.memory_gb is not None or choose_device(config.device).type == "cuda"
    candidates, reasons = _volume_candidates(config, extent, spacing, None if bounded else _CPU_VOXELS)
    scheme, scheme_why = _intensity_scheme(config.plan, found)
    low, high, mean, deviation = found.foreground if scheme == "ct" and found.foreground else (0.0, 0.0, 0.0, 1.0)
    plan = Plan(
        spatial_dims=3,
        patch_size=candidates[0].patch,
        batch_size=candidates[0].batch,
        spacing_mm=spacing,
        normalise=scheme,
        intensity_low=low,
        intensity_high=high,
        intensity_mean=mean,
        intensity_sd=deviation,
        fingerprint={
            "median_spacing_mm": np.median(found.spacings_mm, axis=0).tolist(),
            "largest_shape_at_spacing": extent.max(axis=0).tolist(),
            "median_shape_at_spacing": np.median(extent, axis=0).tolist(),
            **found.facts(),
        },
        reasons={"spacing_mm": _fixed(config.plan.spacing_mm, why), **reasons, "normalise": scheme_why},
    )
    return Draft(plan, tuple(candidates))


def _intensity_scheme(fixed: PlanConfig, found: Fingerprint) -> tuple[Any, str]:
    if fixed.normalise != "auto":
        return fixed.normalise, "set in the config"
    if found.modality == "CT":
        return "ct", "cohort percentiles of the foreground: CT has a physical unit"
    if found.zero_share > _BRAIN_EXTRACTED:
        return "zscore_nonzero", (
            f"per image, inside what is not 0: {found.zero_share:.0%} of the voxels are exactly 0, as after brain "
            "extraction, and would set the mean"
        )
    return "zscore", "per image: MR intensities have no unit"


def _volume_candidates(
    config: Config, extent: NDArray[np.int64], spacing: Sequence[float], most_voxels: int | None
) -> tuple[list[Candidate], dict[str, str]]:
    """From the most wanted on: whole fields of view in batches of 4 to 2, then smaller patches of their proportions."""
    fixed = config.plan
    field = np.percentile(extent, 75, axis=0)
    most = most_voxels or math.inf
    candidates = []
    if fixed.patch_size:
        network = pool_by_axis(config.model, fixed.patch_size, spacing)
        patch_reason = "set in the config"
        patches = [(fixed.patch_size, network)]
    else:
        patches, patch_reason = _patches(config.model, extent, field, spacing, most)
    patch = patches[0][0]
    if fixed.batch_size:
        batches: tuple[int, ...] = (fixed.batch_size,)
    else:
        first = max(2, min(4, most // math.prod(patch))) if most_voxels else _BATCHES[0]
        batches = tuple(n for n in _BATCHES if n <= first)
    candidates = [Candidate(patch, n, patches[0][1]) for n in batches]
    candidates += [Candidate(patch, batches[-1], network) for patch, network in patches[1:]]
    if fixed.patch_size and not fixed.batch_size:
        candidates.append(Candidate(patch, 1, patches[0][1]))
    limit = f", at most {most_voxels} voxels" if most_voxels else ", and within the memory"
    reasons = {
        "patch_size": patch_reason,
        "batch_size": _fixed(fixed.batch_size, f"2 to 4 patches{limit}"),
    }
    if patches[0][1]:
        reasons["network"] = (
            "pooling by axis: none below 4 voxels, none along an axis whose spacing is more than twice the finest, "
            "whose kernel is 1 until the others have caught up"
        )
    return candidates, reasons


_Patches = list[tuple[tuple[int, ...], dict[str, Any]]]


def _patches(
    model: ModelConfig, extent: NDArray[np.int64], field: NDArray[np.float64], spacing: Sequence[float], most: float
) -> tuple[_Patches, str]:
    """Patches with their pooling, smaller and smaller; the first is the field of view of most cases, or as `most`."""
    wanted = tuple(math.ceil(n) for n in field)
    network = pool_by_axis(model, wanted, spacing)
    divisors = divisors_of(model, 3, network)
    rounded = [_round_up(n, d) for n, d in zip(wanted, divisors, strict=True)]
    whole = completed(model, network).legal_size(rounded)
    found: _Patches = []
    shown = " × ".join(str(d) for d in divisors) if len(set(divisors)) > 1 else str(divisors[0])
    reason = f"three cases in four as a whole (75th percentile), rounded up to multiples of {shown}"
    if math.prod(whole) <= most:
        found.append((whole, network))
    else:
        reason = f"longest axes of the median shape cut until at most {most:.0f} voxels"
    side = np.minimum(np.median(extent, axis=0), 512)
    least = np.array([min(2 * d, n) for n, d in zip(whole, divisors, strict=True)])
    while True:
        patch = tuple(max(int(low), int(n) // d * d) for n, d, low in zip(side, divisors, least, strict=True))
        voxels = np.prod(np.maximum(side, least))
        if voxels <= most and (not found or math.prod(patch) < math.prod(found[-1][0])):
            found.append((patch, pool_by_axis(model, patch, spacing)))
        free = side > least
        if not free.any():
            break
        longest = int(np.argmax(np.where(free, side, 0)))
        side[longest] *= 0.95
    return found or [(tuple(int(n) for n in least), network)], reason


def _fixed(value: object, reason: str) -> str:
    return "set in the config" if value is not None else reason


def _round_up(n: float, divisor: int) -> int:
    return -(-math.ceil(n) // divisor) * divisor
