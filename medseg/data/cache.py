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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Case, Cohort
from medseg.data.alignment import align
from medseg.data.lung_view import LungView
from medseg.data.preprocess import network_grid, prepare
from medseg.data.prior import move_codes, without_background
from medseg.exams import previous
from medseg.files import replacing
from medseg.images import read_image
from medseg.label_sets import read_set
from medseg.plan import IMAGE_FIELDS, Plan
from medseg.progress import progress
from medseg.volume import Volume, to_canonical

_POINTS_PER_CLASS = 5000
_VERSION = 2  # of what is prepared: raised where the same scan and plan give other arrays than before
_ONE_HEADER = Lock()  # Python 3.11 fails now and then where two threads parse, and numpy parses the header as Python


@dataclass(frozen=True)
class Example:
    """One case on the network's grid.

    Attributes:
        image: (channel, *space) float32, memory-mapped.
        label: (*space) uint8 or uint16, memory-mapped; None for classification.
        points: per label value 1, 2, …: (n, space) int32 voxel indices of that label, at most 5000, evenly spread.
        prior: (*space) codes of the label of the patient's earlier examination (see `medseg.data.prior`),
            memory-mapped; None where there is none, or none was asked for.
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
    prior: NDArray[np.integer] | None = None


def load_examples(
    cohort: Cohort,
    cases: Sequence[Case],
    plan: Plan,
    cache: Path,
    *,
    multi_label: bool = False,
    label_maps: bool = True,
    lungs: LungView | None = None,
    min_similarity: float | None = None,
    workers: int = 2,
    what: str = "cases",
) -> list[Example]:
    """Prepare each case once into `cache` and map it.

    The cache's key covers the cohort, the case, every field of the plan that changes the arrays, what of a radiograph
    is visible, and the version of the code that prepares.

    Args:
        multi_label: the target of a case is a set of labels, as `label_sets` writes it.
        label_maps: the label maps are what is learnt; those of a classifier's cohort are not read as labels.
        lungs: what of a radiograph is visible; by default all.
        min_similarity: of an earlier examination, for its label to become the prior of a later one; None makes none.
    """
    load = partial(_load, cohort, plan, cache, multi_label, label_maps, lungs, min_similarity)
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
    min_similarity: float | None,
    case: Case,
) -> Example:
    name = f"{case.case_id}/{lungs.key}" if lungs is not None and lungs.key else case.case_id
    stem = cache / _key(cohort, name, plan)
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
    image = _mapped(image_path)
    label = _mapped(label_path) if source else None
    classes = max(cohort.label_names.values(), default=0)
    points = () if label is None else _points(np.asarray(label), classes)
    if label is not None:
        release(label)
    known = cohort.annotated(case) if case.annotated else ()
    annotated = tuple(value == 0 or value in known for value in range(classes + 1)) if known else ()
    prior = None if min_similarity is None else _prior(cohort, case, plan, cache, min_similarity)
    return Example(case, image, label, points, _target(cohort, case, multi_label), annotated, prior)


def _key(cohort: Cohort, name: str, plan: Plan) -> str:
    grid = [_VERSION, cohort.sha256, name, [str(getattr(plan, field)) for field in IMAGE_FIELDS]]
    return hashlib.sha256(json.dumps(grid).encode()).hexdigest()[:32]


def _mapped(path: Path) -> NDArray[Any]:
    with _ONE_HEADER:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _prior(cohort: Cohort, case: Case, plan: Plan, cache: Path, min_similarity: float) -> NDArray[np.integer] | None:
    """Codes of the earlier examination's label on this case's grid, all 0 where the two do not align; None without."""
    earlier = previous(case, (other for other in cohort.cases if other.label))
    if earlier is None:
        return None
    path = cache / f"{_key(cohort, f'{case.case_id}/{earlier.case_id}/{min_similarity}', plan)}.prior.npy"
    if not path.is_file():
        image, before = (read_image(cohort.image_paths(one)[0]) for one in (case, earlier))
        shape, affine = network_grid(to_canonical(image), plan)
        found = align(before, image)
        codes: NDArray[np.generic] = np.zeros(shape, np.uint8)
        if found.similarity >= min_similarity:
            codes = move_codes(read_image(cohort.folder / earlier.label), found.to_later, shape, affine)
            if earlier.annotated:
                codes = without_background(codes)
        _save(path, codes)
    return _mapped(path)


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
