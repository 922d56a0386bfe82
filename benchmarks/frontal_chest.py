"""How often `medseg.ingest.frontal` is right: chest radiographs as they are and turned, and what else there is.

    .venv/bin/python -m benchmarks.frontal_chest CHESTS [--sites TABLE] [--volumes FOLDER...] [--pictures FOLDER...]

CHESTS is a folder of frontal chest radiographs (PNG or JPEG). TABLE is a CSV with the columns image and site: then the
limits are also set on each site and tried on the others. FOLDER holds NIfTI volumes, of which the middle slice of each
axis is taken and the projection along it (mean of what is above the lowest value, as a radiograph shows it), or
pictures and DICOM radiographs that are no chests. Prints one row per kind of picture: how many are refused and flagged.
"""

import argparse
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medseg.config import IngestConfig
from medseg.files import read_rows
from medseg.ingest.frontal import check_frontal
from medseg.ingest.quality import MIN_RADIOGRAPH_PIXELS
from medseg.ingest.radiograph import read_picture
from medseg.ingest.sources import discover, read_source

Picture = NDArray[Any]
CHANGES: dict[str, Callable[[Picture], Picture]] = {
    "chest, as it is": lambda image: image,
    "chest, turned by 90 degrees": lambda image: np.rot90(image, 3),
    "chest, turned by 180 degrees": lambda image: np.rot90(image, 2),
    "chest, turned by 270 degrees": lambda image: np.rot90(image, 1),
    "chest, mirrored (allowed)": lambda image: image[:, ::-1],
    "chest, negative": lambda image: image.max() - image,
    "one half of a chest": lambda image: image[:, : image.shape[1] // 2],
    "lower half of a chest": lambda image: image[image.shape[0] // 2 :],
}
CROPS = 50


def chests(folder: Path) -> Iterator[tuple[str, Picture]]:
    """Each radiograph under its name."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
            yield path.name, read_picture(path)[0].array


def views(folder: Path) -> Iterator[tuple[str, Picture]]:
    """Middle slices, and projections both ways up, of the volumes below a folder."""
    for path in sorted(folder.rglob("*.nii*")):
        array = np.asarray(nib.load(path).dataobj, dtype=np.float32)  # type: ignore[attr-defined]
        array = array.reshape(array.shape[:3])
        for axis in range(3):
            yield (
                f"slices of {folder.parent.name}/{folder.name}",
                np.rot90(np.take(array, array.shape[axis] // 2, axis)),
            )
            shadow = np.rot90((array - array.min()).mean(axis))
            for picture in (shadow, shadow[::-1]):
                yield f"projections along axis {axis} of {folder.parent.name}/{folder.name}", picture


def pictures(folder: Path) -> Iterator[tuple[str, Picture]]:
    """Pictures and DICOM radiographs below a folder, each content once, and crops of the large ones."""
    rng, seen = np.random.default_rng(0), set()
    for source in discover([folder], IngestConfig())[0]:
        digest = hashlib.sha256(source.files[0].read_bytes()).digest()
        if source.kind != "radiograph" or digest in seen:
            continue
        seen.add(digest)
        image = read_source(source).channels[0].array
        if min(image.shape) >= MIN_RADIOGRAPH_PIXELS:
            yield f"pictures in {folder.name}", image
        for _ in range(CROPS if min(image.shape) >= 256 else 0):
            size = rng.integers(128, 257, 2)
            row, column = (
                int(rng.integers(0, whole - part + 1)) for whole, part in zip(image.shape, size, strict=True)
            )
            yield f"crops of pictures in {folder.name}", image[row : row + size[0], column : column + size[1]]


def shapes() -> Iterator[tuple[str, Picture]]:
    """Noise, gradients and discs."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:256, :256]
    for _ in range(50):
        yield "noise", rng.normal(size=(256, 256))
        slope = rng.normal(size=2)
        yield "gradient", rows * slope[0] + columns * slope[1]
        centre, radius = rng.uniform(80, 176, 2), rng.uniform(30, 90)
        inside = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
        yield "disc", inside + rng.normal(0, 0.1, (256, 256))


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chests", type=Path)
    parser.add_argument("--sites", type=Path)
    parser.add_argument("--volumes", nargs="*", type=Path, default=[])
    parser.add_argument("--pictures", nargs="*", type=Path, default=[])
    args = parser.parse_args()
