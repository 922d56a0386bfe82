"""Read mutated DICOM files: each must be read or refused, quickly and within bounds.

    .venv/bin/python -m benchmarks.fuzz_dicom FOLDER... [--files 10000]

The originals are the readable images below the folders and among pydicom's own test files. A worker reads a share of
the mutants; one that dies is a crash of its current file. Prints what became of them, the slowest and the memory.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom.data

from medseg.ingest.dicom import RADIOGRAPH_MODALITIES
from medseg.ingest.dicom_headers import read_header
from medseg.ingest.scan import Refused, Source
from medseg.ingest.sources import read_source

SHARE = 1000
MAX_ORIGINAL_BYTES = 2 << 20


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Change, cut, repeat or insert bytes: mostly in the header, sometimes anywhere."""
    data = bytearray(content)
    end = len(data) if rng.random() < 0.4 else min(len(data), 4000)
    for _ in range(rng.choice([1, 1, 3, 10, 50])):
        at = rng.randrange(min(132, end - 1), end)
        kind = rng.random()
        if kind < 0.7:
            data[at] = rng.choice([0, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind < 0.8:
            data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4)])
        elif kind < 0.9:
            del data[at : at + rng.randrange(1, 64)]
        else:
            data[at:at] = data[at : at + rng.randrange(1, 64)]
        end = max(134, min(end, len(data)))
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.15 else data)


def attempt(path: Path) -> str:
    """Read header and pixels of one file; the code when it is refused."""
    try:
        headers = read_header(path, path.parent)
        if not headers:
            return "not_dicom"
        source = Source(
            case_id="x", kind="volume", source_kind="dicom", files=(path,), name="x", affine=np.eye(4),
            slices=tuple((0, header.frame) for header in headers[:3]), plain=(headers[0].plain,),
        )  # fmt: skip
        if headers[0].modality in RADIOGRAPH_MODALITIES:
            source = replace(source, kind="radiograph", affine=None, slices=())
        read_source(source)
    except Refused as error:
        return error.code
    return "read"


def work(originals: list[Path], first: int, count: int) -> None:
    """One worker: prints one line of JSON per file, before and after."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant"
        for seed in range(first, first + count):
            rng = random.Random(seed)
            path.write_bytes(mutate(rng.choice(originals).read_bytes(), rng))
            print(json.dumps([seed]), flush=True)
            start = time.process_time()  # of the worker: other work on the machine does not count
            outcome = attempt(path)
            memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(json.dumps([seed, outcome, time.process_time() - start, memory_mb]), flush=True)


def main() -> None:
    """Share the seeds out to worker processes and sum up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    roots = [*args.folders, Path(pydicom.data.__file__).parent / "test_files"]
    paths = sorted(path for root in roots for path in root.rglob("*") if path.is_file())
    small = (path for path in paths if 140 < path.stat().st_size < MAX_ORIGINAL_BYTES)
    originals = [path for path in small if path.read_bytes()[128:132] == b"DICM" and attempt(path) == "read"]
    if args.first is not None:
        work(originals, args.first, args.files)
        return
    outcomes: Counter[str] = Counter()
    slowest, memory_mb, first = (0.0, -1), 0.0, 0
    while first < args.files:
        count = min(SHARE, args.files - first)
        command = [sys.executable, "-m", "benchmarks.fuzz_dicom", *map(str, args.folders)]
        done = subprocess.run(
            [*command, "--files", str(count), "--first", str(first)], capture_output=True, text=True, check=False
        )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        for seed, outcome, seconds, size in (line for line in lines if len(line) == 4):
            outcomes[outcome] += 1
            slowest, memory_mb = max(slowest, (seconds, seed)), max(memory_mb, size)
        first += count
        if done.returncode:
            outcomes["crash"] += 1
            print(f"crash at seed {lines[-1][0]}: {done.stderr[-400:]}")
            first = lines[-1][0] + 1
    print(f"{sum(outcomes.values())} mutants of {len(originals)} files: {dict(outcomes.most_common())}")
    print(f"slowest {slowest[0]:.2f} s of processor time (seed {slowest[1]}), memory of a worker {memory_mb:.0f} MB")


if __name__ == "__main__":
    main()
