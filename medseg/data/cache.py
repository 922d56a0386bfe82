"""Prepared cases on disk, read through memory maps: training starts at once the second time, and a cohort larger
than the memory still trains."""

import hashlib
import json
import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Case, Cohort
from medseg.data.lung_view import LungView
from medseg.data.preprocess import prepare
from medseg.files import replacing
from medseg.images import read_image
from medseg.label_sets import read_set
from medseg.plan import Plan
from medseg.progress import progress
from medseg.volume import Volume

_POINTS_PER_CLASS = 5000
_ONE_HEADER = Lock()  # Python 3.11 fails now and then where two threads parse, and numpy parses the header as Python
_GRID_FIELDS = (
    "spacing_mm",
    "size_px",
    "normalise",
    "intensity_low",
    "intensity_high",
    "intensity_mean",
    "intensity_sd",
)


@dataclass(frozen=True)
class Example:
    """One case on the network's grid.

    Attributes:
        image: (channel, *space) float32, memory-mapped.
        label: (*space) uint8 or uint16, memory-mapped; None for classification.
        points: per label value 1, 2, …: (n, space) int32 voxel indices of that label, at most 5000, evenly spread.
        target: class index, or for each label in the order of its value whether it is present (1) or not (0); -1 for
            segmentation.
        annotated: of each class, background first, whether the label tells of it; empty when of all.
    """

    case: Case
    image: NDArray[np.float32]
    label: NDArray[np.integer] | None
    points: tuple[NDArray[np.int32], ...]
    target: int | tuple[int, ...]
    annotated: tuple[bool, ...] = ()


def load_examples(
    cohort: Cohort,
    cases: Sequence[Case],
    plan: Plan,
    cache: Path,
    *,
    multi_label: bool = False,
    label_maps: bool = True,
    lungs: LungView | None = None,
    workers: int = 2,
    what: str = "cases",
) -> list[Example]:
    """Prepare each case once into `cache` and map it.

    The cache's key covers the cohort, the case, every field of the plan that changes the arrays, and what of a
    radiograph is visible.

    Args:
        multi_label: the target of a case is a set of labels, as `label_sets` writes it.
        label_maps: the label maps are what is learnt; those of a classifier's cohort are not read as labels.
        lungs: what of a radiograph is visible; by default all.
    """
    load = partial(_load, cohort, plan, cache, multi_label, label_maps, lungs)
    with ThreadPoolExecutor(workers) as pool, progress(f"Preparing {what}", len(cases)) as shown:
        futures = [pool.submit(load, case) for case in cases]
        examples = []
        for future in futures:
            examples.append(future.result())
            shown.advance()
    return examples


def _load(
    cohort: Cohort,
    plan: Plan,
    cache: Path,
    multi_label: bool,
    label_maps: bool,
    lungs: LungView | None,
    case: Case,
) -> Example:
    grid = [cohort.sha256, case.case_id, [str(getattr(plan, name)) for name in _GRID_FIELDS]]
    grid += [lungs.key] if lungs is not None and lungs.key else []
    stem = cache / hashlib.sha256(json.dumps(grid).encode()).hexdigest()[:32]
    image_path, label_path = stem.with_suffix(".image.npy"), stem.with_suffix(".label.npy")
    kept = cohort.label_path(case)
    source = kept if label_maps else None
    if not image_path.is_file():
        channels: Sequence[Volume] = [read_image(path) for path in cohort.image_paths(case)]
        if lungs is not None:
            channels = lungs.show(channels, kept)
        prepared = prepare(channels, plan, read_image(source) if source else None)
        if prepared.label is not None:
            _save(label_path, prepared.label)
        _save(image_path, prepared.image)
    with _ONE_HEADER:
        image = np.load(image_path, mmap_mode="r", allow_pickle=False)
        label = np.load(label_path, mmap_mode="r", allow_pickle=False) if source else None
    classes = max(cohort.label_names.values(), default=0)
    points = () if label is None else _points(np.asarray(label), classes)
    if label is not None:
        release(label)
    known = cohort.annotated(case) if case.annotated else ()
    annotated = tuple(value == 0 or value in known for value in range(classes + 1)) if known else ()
    return Example(case, image, label, points, _target(cohort, case, multi_label), annotated)


def _target(cohort: Cohort, case: Case, multi_label: bool) -> int | tuple[int, ...]:
    names = cohort.label_names
    if not multi_label:
        return names.get(case.target, -1) if case.target else -1
    present = read_set(case.target)
    return tuple(int(name in present) for name in sorted(names, key=lambda name: names[name]))


def release(array: NDArray[np.generic]) -> None:
    """Let go of the pages that were read of a memory-mapped array; they stay in the system's cache, off this process.

    Else the resident set grows to the size of the cohort, and hides what training itself takes.
    """
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _points(label: NDArray[np.integer], classes: int) -> tuple[NDArray[np.int32], ...]:
    found = []
    for value in range(1, classes + 1):
        index = np.flatnonzero(label == value)
        if len(index) > _POINTS_PER_CLASS:
            index = index[np.linspace(0, len(index) - 1, _POINTS_PER_CLASS).astype(np.int64)]
        found.append(np.stack(np.unravel_index(index, label.shape), axis=1).astype(np.int32))
    return tuple(found)


def _save(path: Path, array: NDArray[np.generic]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)
