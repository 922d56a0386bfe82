"""How often `medseg.ingest.frontal` is right: chest radiographs as they are and turned, and what else there is.

    .venv/bin/python -m benchmarks.frontal_chest CHESTS [--volumes FOLDER...]

CHESTS is a folder of frontal chest radiographs (PNG or JPEG); FOLDER holds NIfTI volumes, of which the middle slice
of each axis is taken. Prints one row per kind of picture: how many would be refused, how many flagged.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medseg.ingest.frontal import check_frontal
from medseg.ingest.radiograph import read_picture

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


def others() -> Iterator[tuple[str, Picture]]:
    """Noise, gradients and discs."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:256, :256]
    for _ in range(50):
        yield "noise", rng.normal(size=(256, 256))
        slope = rng.normal(size=2)
        yield "gradient", rows * slope[0] + columns * slope[1]
        centre, radius = rng.uniform(80, 176, 2), rng.uniform(30, 90)
        yield (
            "disc",
            ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2) + rng.normal(0, 0.1, (256, 256)),
        )


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chests", type=Path)
    parser.add_argument("--volumes", nargs="*", type=Path, default=[])
    args = parser.parse_args()
    counts: dict[str, Counter[str]] = {}

    def count(kind: str, image: Picture) -> None:
        codes = [finding.code for finding in check_frontal(image)] or ["passed"]
        counts.setdefault(kind, Counter()).update([codes[0], "all"])

    for path in sorted(args.chests.rglob("*")):
        if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
            image = read_picture(path)[0].array
            for kind, change in CHANGES.items():
                count(kind, change(image))
    for folder in args.volumes:
        for path in sorted(folder.rglob("*.nii*")):
            array = np.asarray(nib.load(path).dataobj)  # type: ignore[attr-defined]
            for axis in range(3):
                count(
                    f"slices of {folder.parent.name}/{folder.name}",
                    np.rot90(np.take(array, array.shape[axis] // 2, axis)),
                )
    for kind, image in others():
        count(kind, image)
    print("| picture | number | refused (turned) | flagged (doubtful) |\n|---|---|---|---|")
    for kind, found in counts.items():
        print(f"| {kind} | {found['all']} | {found['not_frontal_chest']} | {found['chest_doubtful']} |")


if __name__ == "__main__":
    main()
