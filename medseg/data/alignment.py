"""Where one scan of a patient lies in another: a rigid alignment by correlation, from coarse to fine.

Two examinations share no frame of reference: the patient lies differently each time. The alignment moves and turns the
head or body as a whole; what has changed its shape stays where the change has put it.
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.volume import Affine, Volume, resample, world_of

SPACING_MM = 3.0
"""Of both scans while they are compared: fine enough for a fraction of a millimetre, and done within seconds."""

_SHRINK, _SMOOTH_MM = (4, 2, 1), (8.0, 4.0, 0.0)
_SAMPLED = 0.2  # of the voxels
_ITERATIONS, _FIRST_STEP_MM, _LAST_STEP_MM = 100, 4.0, 0.01


@dataclass(frozen=True)
class Alignment:
    """Where the earlier scan lies in the later one.

    Attributes:
        to_later: (4, 4) rigid, world mm (RAS+) of the earlier scan to world mm of the later one.
        similarity: correlation of the two, -1 to 1, over the later scan; where the earlier one ends it counts as 0.
    """

    to_later: Affine
    similarity: float


def align(earlier: Volume, later: Volume) -> Alignment:
    """Find the rigid movement that makes two volumes of one patient and one kind of image most alike.

    The search begins where the scans' own coordinates agree or where their centres of intensity do, whichever makes
    them more alike, and what it finds counts where that is more alike still. It runs in one thread: the same scans
    always give the same movement.
    """
    import SimpleITK as sitk  # half a second, which networks without a prior need not spend

    moving, fixed = _upright(earlier), _upright(later)
    pair = [_as_itk(sitk, volume) for volume in (fixed, moving)]
    centres = [_centre_mm(volume) for volume in (fixed, moving)]
    likeness = partial(_similarity, moving, fixed)
    start = max((_moved_by(np.zeros(3)), _moved_by(centres[0] - centres[1])), key=likeness)
    found = _search(sitk, pair, start, centres[0])
    to_later = max((start, found), key=likeness)
    return Alignment(to_later, likeness(to_later))


def _search(sitk: Any, pair: list[Any], start: Affine, centre_mm: NDArray[np.float64]) -> Affine:
    """Go on from a movement that only shifts; turns are about `centre_mm` of the later image."""
    transform = sitk.Euler3DTransform()  # from the fixed image to the moving one
    transform.SetCenter(centre_mm.tolist())
    transform.SetTranslation((-start[:3, 3]).tolist())
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsCorrelation()
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(_SAMPLED, seed=1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=_FIRST_STEP_MM, minStep=_LAST_STEP_MM, numberOfIterations=_ITERATIONS
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(_SHRINK)
    method.SetSmoothingSigmasPerLevel(_SMOOTH_MM)
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(transform, inPlace=True)
    with suppress(RuntimeError):  # it left the other image; where it has come to is judged like any other place
        method.Execute(*pair)
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(transform.GetMatrix(), (3, 3))
    matrix[:3, 3] = centre_mm + transform.GetTranslation() - matrix[:3, :3] @ centre_mm
    return np.asarray(np.linalg.inv(matrix))


def _moved_by(shift_mm: NDArray[np.float64]) -> Affine:
    matrix = np.eye(4)
    matrix[:3, 3] = shift_mm
    return matrix


def _upright(volume: Volume) -> Volume:
    """Float32 on axes parallel to the world's, voxels of `SPACING_MM`, over the whole field of view; 0 outside it."""
    from scipy import ndimage

    size = np.asarray(volume.array.shape)
    corners = world_of(volume.affine, np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in size])).reshape(3, -1).T)
    low = corners.min(axis=0)
    shape = tuple(int(n) for n in np.maximum(np.ceil((corners.max(axis=0) - low) / SPACING_MM), 1))
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    affine[:3, 3] = low + SPACING_MM / 2
    sigma = [0.5 * SPACING_MM / s if s < SPACING_MM else 0.0 for s in volume.spacing_mm]
    smooth = ndimage.gaussian_filter(volume.array.astype(np.float32), sigma, mode="nearest")
    array = resample(smooth, volume.affine, shape, affine, order=1).astype(np.float32)
    inside = resample(np.ones(volume.array.shape, np.float32), volume.affine, shape, affine, order=0)
    return Volume((array - smooth.min()) * inside.astype(np.float32), affine)


def _as_itk(sitk: Any, volume: Volume) -> Any:
    """The same voxels at the same positions; ITK's own axes go unused, since the grid is upright."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array.T))
    image.SetSpacing([SPACING_MM] * 3)
    image.SetOrigin(volume.affine[:3, 3].tolist())
    return image


def _centre_mm(volume: Volume) -> NDArray[np.float64]:
    weights = volume.array.astype(np.float64)
    total = weights.sum()
    if not total > 0:
        return np.asarray(world_of(volume.affine, (np.asarray(weights.shape) - 1)[None] / 2)[0])
    places: tuple[NDArray[np.int64], ...] = np.indices(weights.shape, sparse=True)
    index = [float((weights * at).sum() / total) for at in places]
    return np.asarray(world_of(volume.affine, np.array([index]))[0])


def _similarity(moving: Volume, fixed: Volume, to_later: Affine) -> float:
    placed, grid = to_later @ moving.affine, (fixed.array.shape, fixed.affine)
    moved = resample(moving.array, placed, *grid, order=1).astype(np.float64)
    covered = resample(np.ones(moving.array.shape, np.float64), placed, *grid, order=0).astype(np.float64)
    pair = np.stack([(moved * covered).ravel(), fixed.array.astype(np.float64).ravel()])
    pair -= pair.mean(axis=1, keepdims=True)
    norm = float(np.sqrt((pair[0] ** 2).sum() * (pair[1] ** 2).sum()))
    return float((pair[0] * pair[1]).sum() / norm) if norm > 0 else -1.0
