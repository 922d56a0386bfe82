"""Array + affine: orientation, spacing and resampling maths. No file access.

The geometry law: `affine` maps voxel indices (i, j, k, 1) of `array[i, j, k]` to RAS+ world millimetres, and
every operation here returns the affine that keeps each voxel's world position.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Affine = NDArray[np.float64]


@dataclass(frozen=True)
class Volume:
    """An image on a grid.

    Attributes:
        array: (i, j, k) volume, or (row, column) radiograph; any numeric dtype.
        affine: (4, 4) float64, voxel indices to RAS+ world mm. A radiograph has no world position: its affine
            is diag(row_mm, column_mm, 1, 1).
    """

    array: NDArray[np.generic]
    affine: Affine

    @cached_property
    def spacing_mm(self) -> tuple[float, ...]:
        """Distance between neighbouring voxel centres along each array axis."""
        return spacing_of(self.affine)[: self.array.ndim]

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000.0


def spacing_of(affine: Affine) -> tuple[float, ...]:
    """Column norms of the affine: (mm, mm, mm)."""
    return tuple(float(s) for s in np.sqrt((np.asarray(affine)[:3, :3] ** 2).sum(axis=0)))


def world_of(affine: Affine, index: NDArray[np.floating]) -> NDArray[np.float64]:
    """World position in mm, (n, 3), of voxel indices (n, 3)."""
    return np.asarray(index, dtype=np.float64) @ affine[:3, :3].T + affine[:3, 3]


def closest_axes(affine: Affine) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which array axis lies closest to each world axis, and its sign.

    Returns:
        axes: (3,) a permutation, axes[w] = array axis closest to world axis w.
        signs: (3,) +1 or -1, the direction of that array axis along the world axis.

    The permutation is the one with the largest product of direction cosines, so that ties of very oblique scans
    are settled globally and never map two world axes to one array axis.
    """
    cosines = affine[:3, :3] / np.asarray(spacing_of(affine))
    permutations = np.array([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
    scores = [np.prod([abs(cosines[w, p[w]]) + 1e-12 for w in range(3)]) for p in permutations]
    axes = permutations[int(np.argmax(scores))]
    signs = np.array([1 if cosines[w, axes[w]] >= 0 else -1 for w in range(3)])
    return axes, signs


def orientation_code(affine: Affine) -> str:
    """Three letters, e.g. `LPS`: the direction in which each array axis mostly runs."""
    axes, signs = closest_axes(affine)
    letters = [""] * 3
    for world, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        letters[axis] = ("LR", "PA", "IS")[world][0 if sign < 0 else 1]
    return "".join(letters)


def sampled(array: NDArray[np.generic], count: int) -> NDArray[np.generic]:
    """Every n-th value in C order, (m,): all of them, or at least `count`. The array is not copied."""
    step = max(1, array.size // count)
    if array.flags.c_contiguous:
        return array.reshape(-1)[::step]
    return array[np.unravel_index(np.arange(0, array.size, step), array.shape)]


def to_canonical(volume: Volume) -> Volume:
    """Permute and flip axes so that they run closest to R, A, S. No interpolation; positions kept."""
    axes, signs = closest_axes(volume.affine)
    array = np.transpose(volume.array, axes)
    affine = volume.affine.copy()
    affine[:, :3] = volume.affine[:, axes]
    for axis in range(3):
        if signs[axis] < 0:
            array = np.flip(array, axis)
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
    return Volume(array, affine)


def from_canonical(array: NDArray[np.generic], reference_affine: Affine) -> NDArray[np.generic]:
    """Undo `to_canonical` for an array on the canonical grid of a scan with `reference_affine`."""
    axes, signs = closest_axes(reference_affine)
    for axis in range(3):
        if signs[axis] < 0:
            array = np.flip(array, axis)
    return np.transpose(array, np.argsort(axes))


def resampled_grid(
    shape: tuple[int, ...], affine: Affine, spacing_mm: tuple[float, ...]
) -> tuple[tuple[int, ...], Affine]:
    """The grid with another spacing that covers the same field of view, edge to edge.

    Returns:
        The new shape (each axis rounded, at least 1) and its affine. The voxel-edge corner of the field of view
        stays in place and the spacing is stretched so that the far edge does too.
    """
    old = np.asarray(spacing_of(affine))[: len(shape)]
    new_shape = tuple(max(1, round(n * o / s)) for n, o, s in zip(shape, old, spacing_mm, strict=True))
    zoom = np.ones(3)
    zoom[: len(shape)] = np.asarray(shape) / np.asarray(new_shape)
    new_affine = affine.copy()
    new_affine[:3, :3] = affine[:3, :3] * zoom
    new_affine[:3, 3] = affine[:3, 3] + affine[:3, :3] @ ((zoom - 1) / 2)
    return new_shape, new_affine


def resample(
    array: NDArray[np.generic], affine: Affine, shape: tuple[int, ...], to_affine: Affine, *, order: int
) -> NDArray[np.generic]:
    """Values of `array` (on `affine`) at the voxel centres of the grid (`shape`, `to_affine`).

    Args:
        array: (i, j, k) or (row, column).
        order: 0 nearest (labels), 1 linear (images).

    Returns:
        Array of `shape`; dtype kept for order 0, float32 otherwise. Outside the field of view the edge value is
        repeated for images and 0 is used for labels.
    """
    from scipy import ndimage  # a third of a second, which most commands need not spend

    ndim = array.ndim
    matrix = np.linalg.inv(affine) @ to_affine
    linear, offset = matrix[:ndim, :ndim], matrix[:ndim, 3]
    if shape == array.shape and np.allclose(matrix, np.eye(4), atol=1e-6):
        return array if order == 0 else array.astype(np.float32, copy=False)
    diagonal = np.allclose(linear, np.diag(np.diag(linear)), atol=1e-9)
    mode, dtype = ("grid-constant", array.dtype) if order == 0 else ("nearest", np.dtype(np.float32))
    source = array if order == 0 else array.astype(np.float32, copy=False)
    result: NDArray[np.generic] = ndimage.affine_transform(
        source, np.diag(linear) if diagonal else linear, offset, shape, dtype, order, mode=mode, cval=0
    )
    return result
