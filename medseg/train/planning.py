"""The step `plan`: what the cohort measures, and what follows from it."""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from medseg.cohort import Case, Cohort
from medseg.config import Config, NetworkConfig
from medseg.files import dump_json
from medseg.images import read_image
from medseg.plan import Plan, write_plan
from medseg.progress import tracked
from medseg.result import Result
from medseg.train.probe import probe
from medseg.train.step import check_cohort
from medseg.volume import closest_axes, spacing_of, to_canonical

_MAX_PATCH_VOXELS = 96**3  # a patch that a U-Net of 32 to 256 channels trains on within 8 GB
_DIVISOR = 8  # patches are multiples of it even for networks that need less
_CT_SAMPLES = 20_000


def run(config: Config, cohort: Cohort, out: Path, *, measure: bool = True) -> Result:
    """Write `out/plan.yaml`: grid, patch, batch and intensities, each with its reason; with `measure`, also the
    peak memory and the time of a training step, measured in a process of its own.

    Raises:
        UserError: the cohort does not fit the config, or nothing can be planned from it.
    """
    check_cohort(config, cohort)
    plan = make_plan(config, cohort)
    figures: dict[str, object] = {"cases": len(cohort.cases), "patch_size": plan.patch_size}
    figures |= {"batch_size": plan.batch_size, "spacing_mm": plan.spacing_mm or plan.size_px}
    if measure:
        plan, probed = probe(config, plan)
        figures |= probed | _time_estimate(config, cohort, plan)
    path = write_plan(out / "plan.yaml", plan)
    return Result("plan", "done", {"plan": path}, figures).write(out)


def make_plan(config: Config, cohort: Cohort) -> Plan:
    """Fingerprint of the train split, then the plan; what the config fixes is taken as it is."""
    cases = cohort.split("train")
    flat = config.task.spatial_dims == 2
    plan = _plan_radiographs(config, cases) if flat else _plan_volumes(config, cohort, cases)
    return replace(plan, fingerprint={"key": plan_key(config, cohort), **plan.fingerprint})


def plan_key(config: Config, cohort: Cohort) -> str:
    """Names what a plan was made for; a plan with another key is stale."""
    parts = [cohort.sha256, config.task, config.plan, config.model]
    return hashlib.sha256(dump_json([str(part) for part in parts]).encode()).hexdigest()[:16]


def _plan_radiographs(config: Config, cases: Sequence[Case]) -> Plan:
    shapes = np.array([case.shape for case in cases])
    size = config.plan.size_px or config.model.published_px
    batch = config.plan.batch_size or 8
    return Plan(
        spatial_dims=2,
        patch_size=(size, size),
        batch_size=batch,
        size_px=(size, size),
        normalise="zscore",
        fingerprint={"cases": len(cases), "median_shape_px": np.median(shapes, axis=0).tolist()},
        reasons={
            "size_px": _fixed(config.plan.size_px, _published(config)),
            "batch_size": _fixed(config.plan.batch_size, "8 radiographs"),
            "normalise": "per image: exposure differs between radiographs",
        },
    )


def _plan_volumes(config: Config, cohort: Cohort, cases: Sequence[Case]) -> Plan:
    spacings, shapes = _canonical_grids(cohort, cases)
    spacing = config.plan.spacing_mm or tuple(float(f"{s:.4g}") for s in np.median(spacings, axis=0))
    extent = np.round(shapes * spacings / np.asarray(spacing)).astype(int)
    patch, patch_reason = _choose_patch(extent, config.model)
    patch = config.plan.patch_size or patch
    batch = config.plan.batch_size or max(2, min(4, _MAX_PATCH_VOXELS // math.prod(patch)))
    modalities = Counter(case.modality for case in cases)
    wanted = config.plan.normalise
    is_ct = wanted == "ct" or (wanted == "auto" and modalities.most_common(1)[0][0] == "CT")
    low, high, mean, deviation = _ct_intensities(cohort, cases) if is_ct else (0.0, 0.0, 0.0, 1.0)
    return Plan(
        spatial_dims=3,
        patch_size=patch,
        batch_size=batch,
        spacing_mm=spacing,
        normalise="ct" if is_ct else "zscore",
        intensity_low=low,
        intensity_high=high,
        intensity_mean=mean,
        intensity_sd=deviation,
        fingerprint={
            "cases": len(cases),
            "median_spacing_mm": np.median(spacings, axis=0).tolist(),
            "median_shape": np.median(shapes, axis=0).tolist(),
            "largest_shape_at_spacing": extent.max(axis=0).tolist(),
            "modalities": dict(modalities),
        },
        reasons={
            "spacing_mm": _fixed(config.plan.spacing_mm, "median over the train split, axes R, A, S"),
            "patch_size": _fixed(config.plan.patch_size, patch_reason),
            "batch_size": _fixed(config.plan.batch_size, f"2 to 4 patches, at most {_MAX_PATCH_VOXELS} voxels"),
            "normalise": "cohort percentiles of the foreground: CT has a physical unit"
            if is_ct
            else "per image: MR intensities have no unit",
        },
    )


def _canonical_grids(cohort: Cohort, cases: Sequence[Case]) -> tuple[np.ndarray, np.ndarray]:
    """Spacing and shape of each case after canonical orientation, from the headers alone."""
    import nibabel as nib

    spacings, shapes = [], []
    for case in cases:
        image = nib.load(cohort.image_paths(case)[0])
        axes, _ = closest_axes(image.affine)
        spacings.append(np.asarray(spacing_of(image.affine))[axes])
        shapes.append(np.asarray(image.shape)[axes])
    return np.array(spacings), np.array(shapes)


def _choose_patch(extent: np.ndarray, model: NetworkConfig) -> tuple[tuple[int, ...], str]:
    """The whole field of view of most cases where that fits, else a box of its proportions; sizes the network takes."""
    steps = np.array([math.lcm(_DIVISOR, divisor) for divisor in model.divisors(extent.shape[1])])
    most = [
        int(-(-math.ceil(n) // step) * step) for n, step in zip(np.percentile(extent, 75, axis=0), steps, strict=True)
    ]
    multiples = " × ".join(str(step) for step in steps) if len(set(steps)) > 1 else str(steps[0])
    if math.prod(most) <= _MAX_PATCH_VOXELS:
        reason = f"three cases in four as a whole (75th percentile), rounded up to multiples of {multiples}"
        return model.legal_size(most), reason
    median = np.minimum(np.median(extent, axis=0), 512)
    side = median.copy()
    while np.prod(np.maximum(side, steps)) > _MAX_PATCH_VOXELS and (side > steps).any():
        side[np.argmax(side)] *= 0.95
    patch = [max(int(step), int(n) // int(step) * int(step)) for n, step in zip(side, steps, strict=True)]
    return model.legal_size(patch), f"longest axes of the median shape cut until at most {_MAX_PATCH_VOXELS} voxels"


def _ct_intensities(cohort: Cohort, cases: Sequence[Case]) -> tuple[float, float, float, float]:
    """0.5 and 99.5 percentile, mean and SD of labelled voxels in HU, equally many from each case."""

    def sample(case: Case) -> np.ndarray:
        label_path = cohort.label_path(case)
        image = to_canonical(read_image(cohort.image_paths(case)[0])).array
        if label_path is not None:
            image = image[np.asarray(to_canonical(read_image(label_path)).array, dtype=np.int64) > 0]
        values = np.asarray(image, dtype=np.float32).ravel()
        return values[:: max(1, len(values) // _CT_SAMPLES)]

    with ThreadPoolExecutor(2) as pool:
        values = np.concatenate(list(tracked(pool.map(sample, cases), "Measuring intensities", len(cases))))
    low, high = np.percentile(values, [0.5, 99.5])
    kept = np.clip(values, low, high)
    return float(low), float(high), float(kept.mean()), float(kept.std())


def _time_estimate(config: Config, cohort: Cohort, plan: Plan) -> dict[str, object]:
    steps = config.train.steps_per_epoch or max(1, len(cohort.split("train")) // plan.batch_size)
    if plan.step_seconds is None:
        return {}
    return {"train_minutes": round(config.train.epochs * steps * plan.step_seconds / 60, 1)}


def _fixed(value: object, reason: str) -> str:
    return "set in the config" if value is not None else reason


def _published(config: Config) -> str:
    if not config.model.classifies:
        return f"{config.model.published_px} px"
    return f"{config.model.published_px} px, the size at which {config.model.variant} was published"
