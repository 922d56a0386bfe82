"""Compare medseg's DICOM reader with dcm2niix, series by series; writes docs/dicom_conformance.md.

    .venv/bin/python -m benchmarks.dicom_conformance FOLDER... [--out docs/dicom_conformance.md]

A series counts as the same when dcm2niix made an image with equal voxels on an equal grid (affine to 1e-4) after both
were brought to canonical orientation. pydicom's own test files are always among the folders.
"""

import argparse
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import dcm2niix
import nibabel as nib
import numpy as np
import pydicom.data

from medseg.config import IngestConfig
from medseg.files import UserError, write_text
from medseg.ingest.scan import Refused
from medseg.ingest.sources import discover, read_source
from medseg.volume import Volume, to_canonical

AFFINE_TOLERANCE = 1e-4
# Both of its scalings: the standard one (-p n), and the one that also takes slopes that differ between slices.
OPTIONS = [["-b", "n", "-z", "n", "-p", scaling, "-f", f"{scaling}_%j_%s_%e"] for scaling in "ny"]


@dataclass(frozen=True)
class Row:
    """One volume of medseg's, or one that it refused, and what dcm2niix made of it."""

    series: str
    medseg: str
    same: bool | None
    remark: str


def compare(folder: Path, config: IngestConfig) -> list[Row]:
    """What the two readers make of one folder that holds one data set."""
    theirs = dcm2niix_volumes(folder)
    try:
        sources, rejects = discover([folder], config, key=b"conformance")
    except UserError:
        return []
    rows = []
    for number, source in enumerate([s for s in sources if s.kind == "volume" and s.source_kind == "dicom"], 1):
        title = f"volume {number}: {source.modality} of {len(source.slices)} slices"
        try:
            ours = read_source(source).channels[0]
        except Refused as error:
            rows.append(Row(title, error.code, None, error.reason))
            continue
        rows.append(Row(title, "read", *verdict(ours, theirs)))
    for reject in rejects:
        kind = reject.source.partition(" (")[2].rstrip(")") or reject.source
        rows.append(
            Row(
                kind,
                reject.code,
                None,
                f"{reject.reason} dcm2niix made {len(theirs) // len(OPTIONS)} images of the folder.",
            )
        )
    return rows


def verdict(ours: Volume, theirs: list[Volume]) -> tuple[bool | None, str]:
    """Whether one of their images is ours, and if none is, how far the nearest grid and its voxels are."""
    if not theirs:
        return None, "dcm2niix made no image"
    mine = to_canonical(ours)
    best: tuple[float, float] | None = None
    for other in theirs:
        its = to_canonical(other)
        if its.array.shape != mine.array.shape:
            continue
        shift = float(np.abs(its.affine - mine.affine).max())
        off = np.abs(its.array.astype(np.float64) - mine.array) > 1e-5 * max(1.0, float(np.abs(mine.array).max()))
        if shift <= AFFINE_TOLERANCE and not off.any():
            return True, ""
        best = min(filter(None, (best, (shift, float(off.mean())))))
    if best is None:
        return False, f"no image of shape {'×'.join(map(str, mine.array.shape))}"
    return False, f"affine differs by {best[0]:.1g} at most; {best[1]:.2%} of the voxels differ"


def dcm2niix_volumes(folder: Path) -> list[Volume]:
    """Every 3D volume that dcm2niix makes of a folder; time points of a 4D image one by one."""
    with tempfile.TemporaryDirectory() as out:
        for options in OPTIONS:
            dcm2niix.main([*options, "-o", out, str(folder)], capture_output=True)
        volumes = []
        for path in sorted(Path(out).glob("*.nii")):
            image = nib.load(path)
            array = np.asarray(image.dataobj)
            if array.dtype.names:  # colour
                continue
            parts = array.reshape(*array.shape[:3], -1) if array.ndim > 3 else np.atleast_3d(array)[..., None]
            volumes += [Volume(parts[..., t].copy(), image.affine) for t in range(parts.shape[3])]
    return volumes


def data_sets(folder: Path) -> list[Path]:
    """The folders below `folder` that hold DICOM files themselves, as far as names tell."""
    foreign = (".gz", ".md", ".txt", ".json", ".py")
    return sorted({path.parent for path in folder.rglob("*") if path.is_file() and path.suffix not in foreign})


def table(folders: list[Path]) -> list[str]:
    """The rows of every data set as Markdown, and the totals."""
    config = IngestConfig(min_slices=2)
    lines = ["| data set | series | medseg | same as dcm2niix | remark |", "|---|---|---|---|---|"]
    counts = {True: 0, False: 0, None: 0}
    for root in folders:
        for folder in data_sets(root):
            for row in compare(folder, config):
                counts[row.same] += 1
                same = {True: "yes", False: "**no**", None: "–"}[row.same]
                name = folder.relative_to(root.parent).as_posix()
                lines.append(f"| {name} | {row.series} | {row.medseg} | {same} | {row.remark} |")
    total = f"{counts[True]} volumes are the same, {counts[False]} differ, {counts[None]} only one of the two made."
    return [total, "", *lines]


def main() -> None:
    """Write the table below the hand-written part of the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/dicom_conformance.md"))
    args = parser.parse_args()
    own = Path(pydicom.data.__file__).parent / "test_files"
    warnings.simplefilter("ignore")
    mark = "<!-- below: python -m benchmarks.dicom_conformance -->"
    head = args.out.read_text(encoding="utf-8").partition(mark)[0] if args.out.is_file() else "# DICOM conformance\n\n"
    write_text(args.out, f"{head}{mark}\n\n" + "\n".join(table([*args.folders, own])) + "\n")


if __name__ == "__main__":
    main()
