"""Read NIfTI volumes: one or several channels on one grid, with the affine the header means."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Finding
from medseg.ingest.scan import Refused
from medseg.volume import Affine, Volume, spacing_of, world_of

_FORM_TOLERANCE_MM = 0.1
_INTEGERS = (np.uint8, np.int16, np.uint16, np.int32)


def read_channels(paths: tuple[Any, ...]) -> tuple[tuple[Volume, ...], tuple[Finding, ...]]:
    """Read one file per channel, or one 4D file whose last axis counts the channels.

    Returns:
        Volumes (i, j, k) on one grid (uint8, int16, uint16 or int32 as stored, else float32), and findings.

    Raises:
        Refused: damaged, not 3D or 4D, an affine that is no grid, a unit other than mm, channels on different grids.
    """
    channels: list[Volume] = []
    findings: list[Finding] = []
    for path in paths:
        volumes, found = _read_file(path)
        channels += volumes
        findings += found
    check_one_grid(channels)
    return tuple(channels), tuple(findings)


def as_meant(
    channels: Sequence[Volume], findings: Sequence[Finding], offset_hu: float, orientation: str
) -> tuple[tuple[Volume, ...], tuple[Finding, ...]]:
    """What was read, with what its files do not say of themselves.

    Args:
        offset_hu: added to every voxel.
        orientation: to where each axis points, such as `LPI`; the spacing stays, the first voxel lies at 0. Empty keeps
            the affine of the header.
    """
    if orientation:
        findings = [finding for finding in findings if finding.code != "no_orientation"]
        channels = [Volume(channel.array, _axes_to(orientation, channel.spacing_mm)) for channel in channels]
    if offset_hu:
        channels = [Volume(_shifted(channel.array, offset_hu), channel.affine) for channel in channels]
    return tuple(channels), tuple(findings)


def check_one_grid(channels: Sequence[Volume]) -> None:
    """Raises Refused with the offset in mm when a channel does not lie on the grid of the first, voxel for voxel."""
    for number, channel in enumerate(channels[1:], start=2):
        offset = grid_offset_mm(channels[0], channel)
        if offset is None:
            shapes = [" × ".join(map(str, each.array.shape)) for each in (channel, channels[0])]
            start_mm = float(np.linalg.norm(channel.affine[:3, 3] - channels[0].affine[:3, 3]))
            where = f"has {shapes[0]} voxels, not {shapes[1]}, and begins {start_mm:.3g} mm away"
        elif offset > grid_tolerance_mm(channels[0]):
            where = f"lies {offset:.3g} mm away"
        else:
            continue
        raise Refused("channel_grid", f"Channel {number} {where} from the grid of channel 1; register them first.")


def grid_offset_mm(first: Volume, second: Volume) -> float | None:
    """The largest distance between the corners of two grids, voxel for voxel; None when their shapes differ."""
    if first.array.shape != second.array.shape:
        return None
    last = np.array(first.array.shape, dtype=float) - 1
    corners = np.array(np.meshgrid(*[(0.0, n) for n in last], indexing="ij")).reshape(3, -1).T
    gap = world_of(first.affine, corners) - world_of(second.affine, corners)
    return float(np.sqrt((gap**2).sum(axis=1)).max())


def grid_tolerance_mm(volume: Volume) -> float:
    """How far two grids may lie apart and still be one: a hundredth of a voxel, and at least 0.01 mm."""
    return max(0.01, 0.01 * min(spacing_of(volume.affine)))


def _read_file(path: Any) -> tuple[list[Volume], list[Finding]]:
    import nibabel as nib

    try:
        image: Any = nib.load(path)
        array = _values(image.dataobj)
    except Refused:
        raise
    except MemoryError as error:
        raise Refused("too_large", "The volume does not fit into memory; crop it first.") from error
    except Exception as error:  # damaged files raise anything, from zlib's errors to struct's
        reason = "the file ends early" if isinstance(error, EOFError) else _words(error, path)
        raise Refused("unreadable_nifti", f"The file is no readable NIfTI ({reason}); copy it again.") from error
    affine = np.asarray(image.affine, dtype=np.float64)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise Refused("not_3d", f"The image has shape {array.shape}; a volume has three axes.")
    _check_affine(affine)
    findings = _check_header(image)
    parts = [array] if array.ndim == 3 else list(np.moveaxis(array, -1, 0))
    return [Volume(part, affine) for part in parts], findings


def _values(data: Any) -> NDArray[np.generic]:
    unscaled = (data.slope, data.inter) in ((1.0, 0.0), (None, None))
    array = data.get_unscaled() if unscaled else np.asarray(data, dtype=np.float32)
    array = np.asarray(array)
    if array.dtype.kind not in "buif":
        raise Refused("not_grey", f"Voxels of type {array.dtype} are no grey values; export a scalar image.")
    for dtype in _INTEGERS:
        if array.dtype.kind in "bui" and np.can_cast(array.dtype, dtype):
            return np.asarray(array, dtype=dtype)
    return np.asarray(array, dtype=np.float32)


def _shifted(array: NDArray[np.generic], offset: float) -> NDArray[np.generic]:
    """The sum, in the smallest integer type that holds it, else float32."""
    if array.dtype.kind == "f" or offset % 1:
        return np.asarray(array, dtype=np.float32) + np.float32(offset)
    shifted = array.astype(np.int64) + int(offset)
    low, high = shifted.min(), shifted.max()
    fitting = (dtype for dtype in _INTEGERS if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max)
    return shifted.astype(next(fitting, np.float32))


def _axes_to(codes: str, spacing_mm: Sequence[float]) -> Affine:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (code, step) in enumerate(zip(codes, spacing_mm, strict=True)):
        world = next(number for number, pair in enumerate(("RL", "AP", "SI")) if code in pair)
        affine[world, axis] = step if code in "RAS" else -step
    return affine


def _check_affine(affine: Affine) -> None:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise Refused("bad_affine", "The header's affine maps no grid (not finite, or flat); export it again.")


def _check_header(image: Any) -> list[Finding]:
    header = image.header
    findings: list[Finding] = []
    if hasattr(header, "get_xyzt_units"):
        unit = header.get_xyzt_units()[0]
        if unit not in ("mm", "unknown"):
            raise Refused("unit", f"The header gives positions in {unit}; save the image in millimetres.")
    if not hasattr(header, "get_sform"):
        return findings
    sform, qform = header.get_sform(coded=True), header.get_qform(coded=True)
    if sform[1] == 0 and qform[1] == 0:
        message = "The header has neither sform nor qform: left and right are not known."
        findings.append(Finding("no_orientation", "warning", message))
    if sform[1] > 0 and qform[1] > 0:
        grid = np.empty(image.shape[:3], dtype=np.bool_)
        offset = grid_offset_mm(Volume(grid, sform[0]), Volume(grid, qform[0])) or 0.0
        if offset > _FORM_TOLERANCE_MM:
            message = f"sform and qform disagree by up to {offset:.3g} mm; the sform is used."
            findings.append(Finding("form_mismatch", "warning", message, round(offset, 4), _FORM_TOLERANCE_MM))
        if np.linalg.det(sform[0][:3, :3]) * np.linalg.det(qform[0][:3, :3]) < 0:
            message = "sform and qform are mirror images: left and right are not known; keep the true one of them."
            findings.append(Finding("form_mirrored", "warning", message))
    return findings


def _words(error: Exception, path: Any) -> str:
    return " ".join(str(error).replace(str(path), "").split())[:160] or type(error).__name__
