"""Figures of merit as pure functions on NumPy arrays: masks, scores, activation maps.

Empty masks, stated once (Maier-Hein et al. 2024, "Metrics reloaded", ask that this be settled before aggregation):

| reference | prediction | dice, iou | surface_dice | hd95_mm |
|---|---|---|---|---|
| empty | empty | NaN | NaN | NaN |
| one of them empty | | 0 | 0 | the diagonal of the field of view, the worst there is |

NaN means "nothing to find and nothing found": the case is left out of that figure's mean and the count says so; a
missed or an invented structure always counts with the worst value.

Surfaces are the voxels of a mask with a face neighbour outside it (outside the image counts as outside), taken at
their centres; no surface area is estimated.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.spatial import KDTree

Mask = NDArray[Any]


@dataclass(frozen=True)
class MaskFigures:
    """All figures of one mask against its reference; units and conventions as in the functions of this module."""

    dice: float
    iou: float
    hd95_mm: float
    surface_dice: float
    volume_error_ml: float


def compare_masks(pred: Mask, ref: Mask, spacing_mm: tuple[float, ...], tolerance_mm: float = 1.0) -> MaskFigures:
    """`dice`, `iou`, `hd95_mm`, `surface_dice` and `volume_error_ml` with the surfaces found only once."""
    to_ref, to_pred = surface_distances_mm(pred, ref, spacing_mm)
    overlap = dice(pred, ref)
    return MaskFigures(
        dice=overlap,
        iou=overlap / (2 - overlap),
        hd95_mm=_hd95(to_ref, to_pred, pred.shape, spacing_mm),
        surface_dice=_surface_dice(to_ref, to_pred, tolerance_mm),
        volume_error_ml=volume_error_ml(pred, ref, spacing_mm),
    )


def dice(pred: Mask, ref: Mask) -> float:
    """2|A ∩ B| / (|A| + |B|), 0 to 1, of two masks of one shape (any number of axes; non-zero is inside)."""
    inside, truth = pred.astype(bool), ref.astype(bool)
    size = int(np.count_nonzero(inside)) + int(np.count_nonzero(truth))
    return 2 * int(np.count_nonzero(inside & truth)) / size if size else float("nan")


def hd95_mm(pred: Mask, ref: Mask, spacing_mm: tuple[float, ...]) -> float:
    """95th percentile Hausdorff distance in mm.

    The larger of the two directed percentiles (not the percentile of the pooled distances), each with linear
    interpolation between ranks.
    """
    return _hd95(*surface_distances_mm(pred, ref, spacing_mm), pred.shape, spacing_mm)


def surface_dice(pred: Mask, ref: Mask, spacing_mm: tuple[float, ...], tolerance_mm: float) -> float:
    """Share of both surfaces, 0 to 1, that lies within `tolerance_mm` (inclusive) of the other (Nikolov et al. 2021).

    Surface voxels are counted, each with the same weight.
    """
    return _surface_dice(*surface_distances_mm(pred, ref, spacing_mm), tolerance_mm)


def volume_error_ml(pred: Mask, ref: Mask, spacing_mm: tuple[float, ...]) -> float:
    """Signed: predicted minus reference volume, in ml. `spacing_mm` has three entries."""
    voxels = int(np.count_nonzero(pred)) - int(np.count_nonzero(ref))
    return voxels * math.prod(spacing_mm) / 1000.0


def surface_distances_mm(
    pred: Mask, ref: Mask, spacing_mm: tuple[float, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance of each surface voxel to the other surface.

    Args:
        pred, ref: masks of one shape. spacing_mm: one entry per axis.

    Returns:
        For each surface voxel of `pred` the distance in mm to the surface of `ref`, and the reverse. When one mask is
        empty, the distances from the other are infinite.
    """
    a, b = (_surface_points(mask) * np.asarray(spacing_mm) for mask in (pred, ref))
    return _nearest(a, b), _nearest(b, a)


def roc_curve(
    truth: ArrayLike, score: ArrayLike, weights: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The receiver operating characteristic; equal scores make one step.

    Args:
        truth: (n,) 0 or 1. score: (n,) higher means more likely 1. weights: (n,) not negative; all 1 by default.

    Returns:
        False positive rate, true positive rate, and the threshold (positive when score >= threshold), each (m,), from
        (0, 0, inf) to (1, 1, smallest score).

    Raises:
        ValueError: one of the two classes has no weight.
    """
    scores = np.asarray(score, dtype=np.float64)
    order = np.argsort(-scores, kind="stable")
    sorted_score = scores[order]
    positive = np.asarray(truth).astype(bool)[order]
    weight = np.ones(len(order)) if weights is None else np.asarray(weights, dtype=np.float64)[order]
    if not (weight @ positive > 0 and weight @ ~positive > 0):
        raise ValueError("truth holds one class only; a ROC curve needs cases of both.")
    ends = np.flatnonzero(np.append(sorted_score[1:] != sorted_score[:-1], True))
    hits, alarms = np.cumsum(weight * positive)[ends], np.cumsum(weight * ~positive)[ends]
    fpr, tpr = np.append(0.0, alarms / alarms[-1]), np.append(0.0, hits / hits[-1])
    return fpr, tpr, np.append(np.inf, sorted_score[ends])


def roc_auc(truth: ArrayLike, score: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Area under the ROC curve: P(score of a 1 > score of a 0) + P(equal) / 2. Arguments as in `roc_curve`.

    Raises:
        ValueError: one of the two classes has no weight.
    """
    fpr, tpr, _ = roc_curve(truth, score, weights)
    return float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))


def confusion(truth: ArrayLike, pred: ArrayLike, classes: int) -> NDArray[np.int64]:
    """(classes, classes) counts; row: true class index, column: predicted class index."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (np.asarray(truth, dtype=np.int64), np.asarray(pred, dtype=np.int64)), 1)
    return counts


def energy_in_mask(activation: NDArray[np.floating], mask: Mask) -> float:
    """Share, 0 to 1, of a map's positive values that lies inside a mask; 0 for a map without positive values."""
    energy = np.maximum(activation, 0).astype(np.float64)
    total = float(energy.sum())
    return float(energy[mask.astype(bool)].sum()) / total if total > 0 else 0.0


def pointing_hit(activation: NDArray[np.floating], mask: Mask) -> float:
    """Pointing game (Zhang et al. 2018) without tolerance: 1 when the map's maximum lies inside the mask, else 0.

    Equal maxima count by the share of them inside; a map without positive values points nowhere and scores 0.
    """
    peak = activation.max()
    if not peak > 0:
        return 0.0
    return float(mask.astype(bool)[activation == peak].mean())


def _surface_points(mask: Mask) -> NDArray[np.int64]:
    """Voxel indices (n, axes) of a mask's surface. Only the mask's bounding box is looked at."""
    inside = mask.astype(bool)
    boxes = ndimage.find_objects(inside.view(np.uint8))
    if not boxes:
        return np.empty((0, inside.ndim), dtype=np.int64)
    box = boxes[0]
    crop = inside[box]
    surface = crop & ~ndimage.binary_erosion(crop)
    points: NDArray[np.int64] = np.argwhere(surface) + [side.start for side in box]
    return points


def _nearest(points: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    if not len(points) or not len(others):
        return np.full(len(points), np.inf)
    # Plain midpoint splits: grid points hold so many equal coordinates that balancing costs more than it saves.
    tree = KDTree(others, balanced_tree=False, compact_nodes=False)
    distances: NDArray[np.float64] = tree.query(points)[0]
    return distances


def _hd95(
    to_ref: NDArray[np.float64], to_pred: NDArray[np.float64], shape: tuple[int, ...], spacing_mm: tuple[float, ...]
) -> float:
    if not len(to_ref) and not len(to_pred):
        return float("nan")
    if not len(to_ref) or not len(to_pred):
        return float(np.linalg.norm(np.asarray(shape) * np.asarray(spacing_mm)))
    return float(max(np.percentile(to_ref, 95), np.percentile(to_pred, 95)))


def _surface_dice(to_ref: NDArray[np.float64], to_pred: NDArray[np.float64], tolerance_mm: float) -> float:
    size = len(to_ref) + len(to_pred)
    close = tolerance_mm * (1 + 1e-9)  # a distance that equals the tolerance must not fall to rounding
    within = int(np.count_nonzero(to_ref <= close)) + int(np.count_nonzero(to_pred <= close))
    return within / size if size else float("nan")
