"""The fingerprint: what a cohort measures, as facts that a plan follows from."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Case, Cohort
from medseg.config import TaskConfig
from medseg.images import read_image
from medseg.label_sets import read_set
from medseg.progress import tracked
from medseg.volume import closest_axes, spacing_of, to_canonical

_READ_CASES = 64  # pixels are read of so many cases, evenly spread; headers of all
_CT_SAMPLES = 20_000
_ANISOTROPIC = 3.0  # as nnU-Net's plans (Isensee et al. 2021): in spacing and in size


@dataclass(frozen=True)
class Fingerprint:
    """Facts of the training cases.

    Attributes:
        spacings_mm: (case, axis) in canonical order R, A, S; for radiographs (case, 2) rows, columns.
        shapes: (case, axis) voxels as acquired, in the same order.
        modality: the commonest, or empty when unknown. modalities: cases of each.
        classes: per label `annotated` (cases read whose label map tells of it), `voxel_share` (of the voxels of these)
            and its `volume_ml` (`mean`, `sd`, over the `cases` of them that have it); per class of a classification
            task `cases` and their `share`.
        zero_share: median over the cases read of the share of voxels that are exactly 0.
        foreground: 0.5 and 99.5 percentile, mean and SD (within the percentiles) of labelled voxels, in the image's
            unit; equally many voxels of each case read. Empty for radiographs.
        read_cases: of so many cases the pixels were read.
    """

    spacings_mm: NDArray[np.float64]
    shapes: NDArray[np.int64]
    modality: str
    modalities: dict[str, int]
    classes: dict[str, dict[str, Any]] = field(default_factory=dict)
    zero_share: float = 0.0
    foreground: tuple[float, ...] = ()
    read_cases: int = 0

    def extents(self, spacing_mm: Sequence[float]) -> NDArray[np.int64]:
        """(case, axis) voxels of each case at a spacing."""
        voxels: NDArray[np.int64] = np.round(self.shapes * self.spacings_mm / np.asarray(spacing_mm)).astype(np.int64)
        return voxels

    def facts(self) -> dict[str, Any]:
        """What a plan quotes of it."""
        return {
            "cases": len(self.shapes),
            "median_shape": np.median(self.shapes, axis=0).tolist(),
            "modalities": self.modalities,
            "read_cases": self.read_cases,
            "zero_share": round(self.zero_share, 4),
            "classes": self.classes,
        }


def measure_cohort(cohort: Cohort, cases: Sequence[Case], task: TaskConfig) -> Fingerprint:
    """Measure the cases: all headers, and the pixels of at most 64 of them, evenly spread."""
    flat = task.spatial_dims == 2
    if flat:
        spacings = np.array([case.spacing_mm or (1.0, 1.0) for case in cases])
        shapes = np.array([case.shape for case in cases])
    else:
        spacings, shapes = canonical_grids(cohort, cases)
    counted = Counter(case.modality for case in cases)
    facts: dict[str, Any] = {"modality": counted.most_common(1)[0][0], "modalities": dict(counted)}
    if task.kind == "classification":
        named = (read_set(case.target) if task.multi_label else (case.target,) for case in cases)
        found = Counter(name for names in named for name in names)
        facts["classes"] = {
            name: {"cases": found[name], "share": round(found[name] / len(cases), 4)} for name in task.labels
        }
        if flat:
            return Fingerprint(spacings, shapes, **facts)
    chosen = spread(cases)
    with ThreadPoolExecutor(2) as pool:
        read = pool.map(lambda case: _read_case(cohort, case, task), chosen)
        measured = list(tracked(read, "Measuring the cohort", len(chosen)))
    facts |= {"zero_share": float(np.median([one.zero_share for one in measured])), "read_cases": len(chosen)}
    if task.kind == "segmentation":
        facts["classes"] = _class_balance(measured, task)
    return Fingerprint(spacings, shapes, **facts, foreground=() if flat else _foreground(measured))


def spread(cases: Sequence[Case]) -> list[Case]:
    """At most 64 of the cases, evenly spread: those whose pixels are read."""
    return [cases[i] for i in sorted(set(np.linspace(0, len(cases) - 1, _READ_CASES).round().astype(int)))]


def canonical_grids(cohort: Cohort, cases: Sequence[Case]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Spacing (mm) and shape of each case after canonical orientation, (case, 3), from the headers alone."""
    import nibabel as nib

    spacings, shapes = [], []
    for case in cases:
        image = nib.load(cohort.image_paths(case)[0])
        axes, _ = closest_axes(image.affine)
        spacings.append(np.asarray(spacing_of(image.affine))[axes])
        shapes.append(np.asarray(image.shape)[axes])
    return np.array(spacings), np.array(shapes)


def target_spacing(spacings_mm: NDArray[np.float64], shapes: NDArray[np.int64]) -> tuple[tuple[float, ...], str]:
    """The median per axis; where the cohort is strongly anisotropic, the 10th percentile along the coarse axis.

    Strongly anisotropic, as in nnU-Net (Isensee et al. 2021, Nature Methods 18:203, supplement): the coarsest median
    spacing exceeds three times each other one, and its median size is less than a third of each other one. Median
    spacing would then interpolate slices away. The axis is never made finer than the coarser of the others.

    Returns:
        Spacing in mm, four significant digits, and the reason.
    """
    median, size = np.median(spacings_mm, axis=0), np.median(shapes, axis=0)
    coarse = int(np.argmax(median))
    others = [axis for axis in range(len(median)) if axis != coarse]
    reason = "median over the train split, axes R, A, S"
    if all(median[coarse] > _ANISOTROPIC * median[o] and _ANISOTROPIC * size[coarse] < size[o] for o in others):
        was = float(median[coarse])
        median[coarse] = max(float(np.percentile(spacings_mm[:, coarse], 10)), float(median[others].max()))
        reason += (
            f"; along {'RAS'[coarse]} the 10th percentile instead of {was:.4g} mm, since spacing and size differ by "
            "more than 3 from those of the other axes"
        )
    return tuple(float(f"{s:.4g}") for s in median), reason


@dataclass(frozen=True)
class _CaseFacts:
    zero_share: float
    voxels: int
    voxel_ml: float
    counts: NDArray[np.int64]
    annotated: frozenset[int]
    sample: NDArray[np.float32]


def _read_case(cohort: Cohort, case: Case, task: TaskConfig) -> _CaseFacts:
    label_path = cohort.label_path(case)
    paths = cohort.image_paths(case)
    image = read_image(paths[0])
    zeros = float(np.mean(image.array == 0))
    label = read_image(label_path) if label_path else None
    counts = np.zeros(0, dtype=np.int64)
    values = np.asarray(image.array, dtype=np.float32)
    if label is not None:
        counts = np.bincount(label.array.astype(np.int64).ravel(), minlength=task.out_channels)
        if label.array.ndim == 3:
            values = np.asarray(to_canonical(image).array, dtype=np.float32)
            values = values[np.asarray(to_canonical(label).array) > 0]
    values = values.ravel()
    sample = values[:: max(1, len(values) // _CT_SAMPLES)].copy()
    annotated = cohort.annotated(case) if label is not None else frozenset()
    return _CaseFacts(zeros, image.array.size, image.voxel_ml, counts, annotated, sample)


def _class_balance(measured: Sequence[_CaseFacts], task: TaskConfig) -> dict[str, dict[str, Any]]:
    """Share of the voxels, and volume over the cases that have the label; radiographs have no volume."""
    balance: dict[str, dict[str, Any]] = {}
    for name, value in task.labels.items():
        labelled = [one for one in measured if value in one.annotated]
        total = sum(one.voxels for one in labelled)
        voxels = sum(int(one.counts[value]) for one in labelled)
        balance[name] = {"annotated": len(labelled), "voxel_share": float(f"{voxels / max(total, 1):.4g}")}
        if task.spatial_dims == 3:
            ml = np.array([one.counts[value] * one.voxel_ml for one in labelled if one.counts[value]])
            spread = float(f"{ml.std(ddof=1):.4g}") if len(ml) > 1 else 0.0
            mean = float(f"{ml.mean():.4g}") if len(ml) else 0.0
            balance[name] |= {"cases": len(ml), "volume_ml": {"mean": mean, "sd": spread}}
    return balance


def _foreground(measured: Sequence[_CaseFacts]) -> tuple[float, ...]:
    values = np.concatenate([one.sample for one in measured])
    if not values.size:
        return ()
    low, high = np.percentile(values, [0.5, 99.5])
    kept = np.clip(values, low, high)
    return float(low), float(high), float(kept.mean()), float(kept.std())
