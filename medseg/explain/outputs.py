"""Where maps go: onto the scan's own grid, and from there to disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.data.preprocess import Prepared
from medseg.explain.export_sc import OVERLAY, write_sc
from medseg.files import UserError, replacing
from medseg.images import write_nifti
from medseg.ingest.dicom_derived import why_not
from medseg.volume import Volume, from_canonical, resample, to_canonical

MAPS = ("map.npy", "map.nii.gz")


def restore_map(map_net: NDArray[np.float32], prepared: Prepared) -> NDArray[np.float32]:
    """Bring a map from the network's grid to the scan's own, shape `prepared.native_shape`, linearly; 0 where the
    network saw nothing."""
    native = Volume(np.empty(prepared.native_shape, dtype=np.uint8), prepared.native_affine)
    if map_net.ndim == 2:
        restored = resample(map_net, prepared.affine, native.array.shape, native.affine, order=1)
        restored = prepared.onto_scan(restored[prepared.content])
    else:
        canonical = to_canonical(native)
        restored = resample(map_net, prepared.affine, canonical.array.shape, canonical.affine, order=1)
        restored = from_canonical(restored, prepared.native_affine)
    return np.ascontiguousarray(restored, dtype=np.float32)


def write_overlay(
    folder: Path,
    radiograph: Path,
    image: Volume,
    map_scan: NDArray[np.float32],
    about: Mapping[str, Any],
    result: Mapping[str, Any],
) -> dict[str, Any]:
    """The map as DICOM Secondary Capture, or why there is none; the map itself is good either way."""
    try:
        write_sc(folder / OVERLAY, radiograph, image.array, map_scan, about, result)
    except UserError:
        raise  # the disk
    except Exception as error:  # headers of the source that no object may refer to
        return {"no_dicom": f"No DICOM SC was written ({why_not(error)})."}
    return {"dicom": OVERLAY}


def write_map(folder: Path, map_scan: NDArray[np.float32], prepared: Prepared) -> None:
    """The raw map as `map.npy` (row, column) or `map.nii.gz` with the scan's affine; atomic."""
    if map_scan.ndim == 3:
        write_nifti(folder / "map.nii.gz", Volume(map_scan, prepared.native_affine), intent="activation map")
        return
    with replacing(folder / "map.npy") as temporary, temporary.open("wb") as file:
        np.save(file, map_scan, allow_pickle=False)
