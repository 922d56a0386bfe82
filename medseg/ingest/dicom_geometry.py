"""Put the slices of a DICOM series in order and find the affine of their volume, or say with numbers why not.

Geometry comes from Image Position and Image Orientation alone. Slice Thickness, Slice Location, instance numbers and
file names are never used for it: scanners fill them as they like.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.ingest.dicom_headers import Header
from medseg.ingest.scan import Refused
from medseg.volume import Affine, Volume

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
ORIENTATION_TOLERANCE = 1e-3  # direction cosines; about 0.06 degrees
_MAX_TILT_DEG = 0.5
_BESIDE_TOLERANCE = 0.1  # of a pixel
_GAP_TOLERANCE = 0.02  # of the spacing
POSITION_TOLERANCE_MM = 0.01  # positions are often written with two decimals


def order_slices(headers: Sequence[Header]) -> tuple[list[Header], Affine]:
    """Put the slices of one volume, two at least, in order along the normal of their common plane.

    Returns:
        The headers in order, and the (4, 4) affine that maps (column, row, slice) indices to RAS+ world mm.

    Raises:
        Refused: no geometry, mixed orientation or grid, several images at one position, missing or uneven slices,
            slices beside the common line. The sentence carries the numbers.

    The affine of a series with gantry tilt is sheared, which is exact; `tilt_of` tells and `upright` removes it.
    """
    _check_present(headers)
    row, column = _directions(headers)
    _check_pixel_grid(headers)
    normal = np.cross(row, column)
    positions = np.array([h.position for h in headers])
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    _check_gaps(np.diff(positions @ normal), len(headers))
    step = (positions[-1] - positions[0]) / (len(headers) - 1)
    _check_line(positions, step, min(headers[0].spacing))
    down_mm, across_mm = headers[0].spacing
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * across_mm, column * down_mm, step
    affine[:3, 3] = positions[0]
    return [headers[i] for i in order], _LPS_TO_RAS @ affine


def _check_present(headers: Sequence[Header]) -> None:
    lacking = [
        h
        for h in headers
        if (len(h.position), len(h.orientation), len(h.spacing)) != (3, 6, 2)
        or not np.isfinite([*h.position, *h.orientation, *h.spacing]).all()
    ]
    if lacking:
        raise Refused(
            "no_geometry",
            f"{len(lacking)} of {len(headers)} slices lack position, orientation or pixel spacing.",
        )


def _check_pixel_grid(headers: Sequence[Header]) -> None:
    sizes = Counter((h.rows, h.columns) for h in headers)
    if len(sizes) > 1:
        listed = ", ".join(f"{n} of {r}×{c}" for (r, c), n in sizes.most_common())
        raise Refused("mixed_size", f"Slices differ in rows and columns: {listed}.")
    spacings = np.array([h.spacing for h in headers])
    if not np.isfinite(spacings).all() or spacings.min() <= 0:
        raise Refused("no_geometry", f"Pixel spacing {spacings.min():g} mm is not a length.")
    if np.ptp(spacings, axis=0).max() > 1e-3 * spacings.min():
        raise Refused("mixed_spacing", f"Pixel spacing runs from {spacings.min():g} to {spacings.max():g} mm.")


def _directions(headers: Sequence[Header]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors (LPS) along which column and row indices grow, common to all slices."""
    orientations = np.array([h.orientation for h in headers])
    groups = Counter(tuple(np.round(o, 2)) for o in orientations)
    if np.abs(orientations - orientations[0]).max() > ORIENTATION_TOLERANCE:
        localiser = any("LOCALIZER" in h.image_type for h in headers)
        raise Refused(
            "localiser" if localiser else "mixed_orientation",
            f"{len(headers)} slices lie in {max(2, len(groups))} different orientations"
            f"{' (a localiser)' if localiser else ''}; they are no single volume.",
        )
    row, column = orientations[0, :3], orientations[0, 3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if not np.allclose(lengths, 1, atol=ORIENTATION_TOLERANCE) or abs(row @ column) > ORIENTATION_TOLERANCE:
        raise Refused(
            "bad_orientation",
            f"Row and column directions have lengths {lengths[0]:.4f}, {lengths[1]:.4f} and cosine "
            f"{row @ column:.4f}; 1, 1 and 0 are expected.",
        )
    return row / lengths[0], column / lengths[1]


def _check_gaps(gaps: NDArray[np.float64], count: int) -> None:
    same = gaps < POSITION_TOLERANCE_MM
    if same.any():
        places = count - int(same.sum())
        code = "several_volumes" if count % places == 0 and count > places else "duplicate_positions"
        raise Refused(
            code,
            f"{count} images lie at {places} positions (several echoes, time points or copies in one series); "
            "give one volume per series.",
        )
    spacing = float(np.median(gaps))
    tolerance = max(POSITION_TOLERANCE_MM, _GAP_TOLERANCE * spacing)
    worst = int(np.argmax(np.abs(gaps - spacing)))
    if abs(gaps[worst] - spacing) <= tolerance:
        return
    missing = gaps[worst] / spacing - 1
    numbers = f"slices {worst + 1} and {worst + 2} are {gaps[worst]:.3f} mm apart, most {spacing:.3f} mm"
    if missing > 0.5 and abs(missing - round(missing)) < 0.1:
        raise Refused("missing_slices", f"Of {count} slices, {numbers}: {round(missing)} missing there.")
    raise Refused("uneven_spacing", f"Of {count} slices, {numbers}.")


def _check_line(positions: NDArray[np.float64], step: NDArray[np.float64], pixel_mm: float) -> None:
    """All slices must lie on one line from the first to the last; gaps are checked elsewhere."""
    beside = np.linalg.norm(positions - positions[0] - np.outer(np.arange(len(positions)), step), axis=1)
    worst = int(np.argmax(beside))
    allowed = max(POSITION_TOLERANCE_MM, _BESIDE_TOLERANCE * pixel_mm, _GAP_TOLERANCE * float(np.linalg.norm(step)))
    if beside[worst] > allowed:
        raise Refused(
            "shifted_slices",
            f"Slice {worst + 1} of {len(positions)} lies {beside[worst]:.3f} mm off the even line from the first to "
            f"the last; {allowed:.3f} mm are allowed.",
        )


def tilt_of(affine: Affine, count: int) -> float:
    """Angle in degrees between the slice axis and the normal of `count` slices; 0 where rounding may be the cause."""
    row, column, step = affine[:3, :3].T
    normal = np.cross(row, column)
    along = abs(float(step @ normal)) / float(np.linalg.norm(normal))
    sideways = np.sqrt(max(float(step @ step) - along**2, 0))
    tilt_deg = float(np.degrees(np.arctan2(sideways, along)))
    drift_mm = sideways * (count - 1)
    return tilt_deg if tilt_deg > _MAX_TILT_DEG and drift_mm > POSITION_TOLERANCE_MM * 10 else 0.0


def upright(volume: Volume, fill: float) -> Volume:
    """Remove the shear of a tilted series: each slice is shifted in its own plane onto a grid along the normal.

    Slices are neither turned nor blended with one another. The grid is widened so that no voxel is lost.

    Args:
        volume: (i, j, k) with the slices at k.
        fill: for places that no slice covers.

    Returns:
        An orthogonal volume on the same axes; dtype kept, values interpolated linearly within each slice.
    """
    from scipy import ndimage  # few series are tilted

    row, column, step = volume.affine[:3, :3].T
    normal = np.cross(row, column) / np.linalg.norm(np.cross(row, column))
    along = float(step @ normal) * normal
    drift = np.linalg.lstsq(np.column_stack([row, column]), step - along, rcond=None)[0]  # pixels per slice
    count = volume.array.shape[2]
    ends = drift * (count - 1)
    before = np.floor(np.minimum(ends, 0) + 1e-6).astype(int)
    after = np.ceil(np.maximum(ends, 0) - 1e-6).astype(int)
    size = np.array(volume.array.shape[:2]) + after - before
    array = np.empty((*size, count), volume.array.dtype, order="F")
    for k in range(count):
        offset = before - drift * k  # where the grid's first pixel lies within slice k
        wide = np.pad(volume.array[:, :, k], [(0, int(n)) for n in after - before], constant_values=fill)
        moved = ndimage.shift(wide.astype(np.float32), -offset, order=1, mode="grid-constant", cval=fill)
        array[:, :, k] = np.rint(moved) if array.dtype.kind in "iu" else moved
    affine = volume.affine.copy()
    affine[:3, 2] = along
    affine[:3, 3] = volume.affine[:3, 3] + row * before[0] + column * before[1]
    return Volume(array, affine)
