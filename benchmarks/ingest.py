"""Time and memory to turn DICOM slices into NIfTI: medseg beside dcm2niix, SimpleITK and dicom2nifti.

    .venv/bin/python -m benchmarks.ingest [FOLDER] [--slices 1000] [--dicom2nifti PYTHON]

Without FOLDER, simulated CT series of 100 slices of 512×512 are written first. Every reader gets the same files in a
process of its own and writes uncompressed NIfTI; two more rows write compressed ones, `medseg ingest` with its checks,
hashes, fingerprints and page. Each runs three times in turn and the medians count, so that another load on the machine
weighs on none more than on the rest; CPU seconds say most where there is one. PYTHON is an interpreter that has
dicom2nifti.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MEDSEG = """
import sys
from pathlib import Path
from medseg.config import IngestConfig
from medseg.images import write_nifti
from medseg.ingest.sources import discover, read_source
sources, rejects = discover([Path(sys.argv[1])], IngestConfig(), key=b"k")
for source in sources:
    write_nifti(Path(sys.argv[2]) / f"{source.case_id}.nii", read_source(source).channels[0])
"""
INGEST = """
import sys
from medseg.cli import main
folder, out = sys.argv[1:]
sys.argv[1:] = ["ingest", folder, "--cohort", out + "/cohort", "--workspace", out + "/workspace"]
main()
"""
SIMPLEITK = """
import os, sys, SimpleITK as sitk
for folder, _, files in os.walk(sys.argv[1]):
    for series in sitk.ImageSeriesReader.GetGDCMSeriesIDs(folder) if files else ():
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder, series)
        sitk.WriteImage(sitk.ReadImage(names), os.path.join(sys.argv[2], series + ".nii"))
"""
DCM2NIIX = """
import sys, dcm2niix
dcm2niix.main(["-b", "n", "-z", "n", "-f", "%j", "-o", sys.argv[2], sys.argv[1]], capture_output=True)
"""
DCM2NIIX_GZIP = DCM2NIIX.replace('"n", "-f"', '"i", "-f"')
DICOM2NIFTI = """
import sys, dicom2nifti
dicom2nifti.convert_directory(sys.argv[1], sys.argv[2], compression=False, reorient=False)
"""
ROUNDS = 3


def simulate(folder: Path, slices: int) -> None:
    """CT series of 100 slices each, a body in air with noise, at the size that scanners write."""
    import numpy as np

    from medseg.ingest.dicom_write import write_series
    from medseg.volume import Volume

    rng = np.random.default_rng(0)
    i, j = np.ogrid[-1:1:512j, -1:1:512j]
    tissue_hu = np.where((i / 0.8) ** 2 + (j / 0.6) ** 2 < 1, 40, -1000)[:, :, None]
    for number in range(max(1, slices // 100)):
        values = (tissue_hu + rng.normal(0, 20, (512, 512, min(100, slices)))).astype(np.int16)
        affine = np.diag([-0.7, -0.7, 1.25, 1.0])
        name = f"{number:03d}"
        write_series(Volume(values, affine), folder / name, modality="CT", patient_id=name, seed_uid=name)


def measure(python: str, program: str, folder: Path) -> dict[str, float]:
    """Wall seconds, CPU seconds and peak memory (MB) of one program in its own process, and the images it made."""
    with tempfile.TemporaryDirectory() as out:
        start = time.monotonic()
        process = subprocess.Popen(
            [python, "-c", program, str(folder), out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        images = len(list(Path(out).rglob("*.nii*")))
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "memory_mb": usage.ru_maxrss / 1024,
        "images": images,
        "exit": process.returncode,
    }


def compare(folder: Path, slices: int, dicom2nifti: str | None) -> list[dict[str, object]]:
    """The median of the rounds for each reader, seconds per 1,000 slices."""
    readers = [("medseg", sys.executable, MEDSEG), ("dcm2niix", sys.executable, DCM2NIIX)]
    readers += [("SimpleITK", sys.executable, SIMPLEITK)]
    readers += [("dicom2nifti", dicom2nifti, DICOM2NIFTI)] if dicom2nifti else []
    readers += [("medseg ingest", sys.executable, INGEST), ("dcm2niix, gzip", sys.executable, DCM2NIIX_GZIP)]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name, *_ in readers}
    for _ in range(ROUNDS):
        for name, python, program in readers:
            rounds[name].append(measure(python, program, folder))
    rows: list[dict[str, object]] = []
    for name, measured in rounds.items():
        middle = {key: statistics.median(each[key] for each in measured) for key in measured[0]}
        per_1000 = {key: round(middle[key] * 1000 / slices, 2) for key in ("seconds", "cpu_seconds")}
        whole = {key: round(middle[key]) for key in ("memory_mb", "images", "exit")}
        rows.append({"reader": name, **per_1000, **whole})
    return rows


def main() -> None:
    """Print one table in Markdown, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--slices", type=int, default=1000)
    parser.add_argument("--dicom2nifti", metavar="PYTHON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, slices = args.folder, args.slices
        if folder is None:
            folder = Path(temporary)
            # In a process of its own: what the parent holds would count as memory of each reader.
            maker = multiprocessing.get_context("spawn").Process(target=simulate, args=(folder, slices))
            maker.start()
            maker.join()
        else:
            slices = sum(path.is_file() for path in folder.rglob("*"))
        rows = compare(folder, slices, args.dicom2nifti)
    print(f"{slices} slices, load of the machine {os.getloadavg()[0]:.1f}\n")
    print("| reader | s per 1,000 slices | CPU s | peak MB | images | exit |\n|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
