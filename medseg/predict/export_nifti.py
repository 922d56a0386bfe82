"""Write a mask on exactly the grid of its scan: NIfTI for volumes, PNG for radiographs."""

from pathlib import Path

from medseg.images import write_nifti, write_png
from medseg.volume import Volume


def write_mask(folder: Path, mask: Volume) -> Path:
    """Write `folder/mask.nii.gz` or `folder/mask.png`, atomically; the same mask gives the same bytes.

    Args:
        mask: (i, j, k) or (row, column) uint8 or uint16 labels, with the scan's affine.
    """
    if mask.array.ndim == 2:
        return write_png(folder / "mask.png", mask.array)
    return write_nifti(folder / "mask.nii.gz", mask, intent="medseg labels, research use only")
