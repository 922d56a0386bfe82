"""How often `medseg.ingest.frontal` is right: chest radiographs as they are and turned, and what else there is.

    .venv/bin/python -m benchmarks.frontal_chest CHESTS [--sites TABLE] [--volumes FOLDER...] [--pictures FOLDER...]

CHESTS is a folder of frontal chest radiographs (PNG or JPEG). TABLE is a CSV with the columns image and site: then the
limits are also set on each site and tried on the others. FOLDER holds NIfTI volumes, of which the middle slice of each
axis is taken and the projection along it (mean of what is above the lowest value, as a radiograph shows it), or
pictures and DICOM radiographs that are no chests. Prints one row per kind of picture: how many are refused and flagged.
"""

import argparse
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medseg.config import IngestConfig
from medseg.files import read_rows
from medseg.ingest.frontal import check_frontal, likenesses
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
    """Pictures and DICOM radiographs below a folder, each content once, and crops of the large ones.

    Radiographs whose header names another part of the body or another view have a row of their own.
    """
    rng, seen = np.random.default_rng(0), set()
    for source in discover([folder], IngestConfig())[0]:
        digest = hashlib.sha256(source.files[0].read_bytes()).digest()
        if source.kind != "radiograph" or digest in seen:
            continue
        seen.add(digest)
        scan = read_source(source)
        image = scan.channels[0].array
        if min(image.shape) >= MIN_RADIOGRAPH_PIXELS:
            other = "not_frontal_chest" in {finding.code for finding in scan.findings}
            yield f"{'other radiographs' if other else 'pictures'} in {folder.name}", image
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


def limits(found: Sequence[tuple[float, ...]]) -> tuple[float, float, float]:
    """The three limits of the check as one site alone would set them: no chest, doubtful, and the margin of a turn."""
    upright = np.array([values[0] for values in found])
    margin = max(max(values[1:]) - values[0] for values in found)
    return 0.85 * float(upright.min()), float(np.quantile(upright, 0.005)), margin + 0.03


def print_sites(measured: dict[str, list[tuple[float, ...]]]) -> None:
    """Limits set on each site, tried on every other."""
    print("\n| limits from | no chest | doubtful | turn | tried on | number | refused (turned) | no chest | doubtful |")
    print("|---|---|---|---|---|---|---|---|---|")
    for own, theirs in measured.items():
        none, doubtful, margin = limits(theirs)
        for other, values in measured.items():
            if other != own:
                turned = [max(v[1:]) >= doubtful and max(v[1:]) - v[0] > margin for v in values]
                left = [v[0] for v, is_turned in zip(values, turned, strict=True) if not is_turned]
                counts = [sum(turned), sum(v < none for v in left), sum(none <= v < doubtful for v in left)]
                cells = [own, *(f"{limit:.2f}" for limit in (none, doubtful, margin)), other, len(values), *counts]
                print("| " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    """Print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chests", type=Path)
    parser.add_argument("--sites", type=Path)
    parser.add_argument("--volumes", nargs="*", type=Path, default=[])
    parser.add_argument("--pictures", nargs="*", type=Path, default=[])
    args = parser.parse_args()
    site_of = {Path(row["image"]).name: row["site"] for row in read_rows(args.sites)} if args.sites else {}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    measured: dict[str, list[tuple[float, ...]]] = defaultdict(list)

    def count(kind: str, image: Picture) -> None:
        codes = [finding.code for finding in check_frontal(image)] or ["passed"]
        counts[kind].update(codes)

    for name, image in chests(args.chests):
        for kind, change in CHANGES.items():
            count(kind, change(image))
        if name in site_of:
            measured[site_of[name]].append(likenesses(image))
    for folder in args.volumes:
        for kind, image in views(folder):
            count(kind, image)
    for folder in args.pictures:
        for kind, image in pictures(folder):
            count(kind, image)
    for kind, image in shapes():
        count(kind, image)
    columns = ("not_frontal_chest", "no_chest", "chest_doubtful", "passed")
    print("| picture | number | refused (turned) | no chest | doubtful | passed |\n|---|---|---|---|---|---|")
    for kind, found in counts.items():
        print(f"| {kind} | {found.total()} | {' | '.join(str(found[code]) for code in columns)} |")
    if measured:
        print_sites(measured)


if __name__ == "__main__":
    main()
