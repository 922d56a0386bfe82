"""What may be done to a label map after the network: one label at a time, on the scan's own grid.

None of it is done unasked: a bundle names the operations that out-of-fold predictions speak for.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Labels = NDArray[Any]  # uint8 or uint16
Mask = NDArray[np.bool_]


def apply(labels: Labels, value: int, operation: str, *, voxel_ml: float = 0.0, min_ml: float = 0.0) -> Labels:
    """Apply one operation of `OPERATIONS` to one label.

    Args:
        labels: (i, j, k) or (row, column); stays as it is.
        voxel_ml: volume of one voxel. min_ml: only of `remove_small`.

    Returns:
        A map of the same shape and dtype: what leaves the label becomes background, and only background joins it.
    """
    found = ndimage.find_objects((labels == value).view(np.uint8))
    if not found:
        return labels
    crop = labels[found[0]]
    before = crop == value
    after = OPERATIONS[operation](before, min_ml / voxel_ml if voxel_ml > 0 else 0.0)
    changed = labels.copy()
    part = changed[found[0]]
    part[before & ~after] = 0
    part[after & (crop == 0)] = value
    return changed


def apply_all(
    labels: Labels, values: Mapping[str, int], choices: Iterable[Mapping[str, Any]], *, voxel_ml: float = 0.0
) -> Labels:
    """Apply the choices of a bundle in their order: mappings with `label`, `operation` and perhaps `min_ml`."""
    for choice in choices:
        labels = apply(
            labels,
            values[choice["label"]],
            choice["operation"],
            voxel_ml=voxel_ml,
            min_ml=float(choice.get("min_ml") or 0.0),
        )
    return labels


def keep_largest(mask: Mask, min_voxels: float = 0.0) -> Mask:
    """The largest component; of equal ones the first in array order. Voxels that touch at a corner are connected."""
    parts, count = _components(mask)
    if count < 2:
        return mask
    kept: Mask = parts == 1 + int(np.argmax(np.bincount(parts.reshape(-1))[1:]))
    return kept


def fill_holes(mask: Mask, min_voxels: float = 0.0) -> Mask:
    """The mask with all that it encloses; a hole that reaches the outside over a face of a voxel is none."""
    filled: Mask = ndimage.binary_fill_holes(mask)
    return filled


def remove_small(mask: Mask, min_voxels: float) -> Mask:
    """The mask without components of fewer than `min_voxels` voxels; the largest stays whatever its size."""
    parts, count = _components(mask)
    if count < 2:
        return mask
    sizes = np.bincount(parts.reshape(-1))
    keep = sizes >= min_voxels
    keep[1 + int(np.argmax(sizes[1:]))] = True
    keep[0] = False
    kept: Mask = keep[parts]
    return kept


OPERATIONS: dict[str, Callable[[Mask, float], Mask]] = {
    "largest_component": keep_largest,
    "fill_holes": fill_holes,
    "remove_small": remove_small,
}


def _components(mask: Mask) -> tuple[NDArray[np.int32], int]:
    parts, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    return parts, int(count)
