"""The memory contract: what a plan foretells, what it measures, and what training then takes.

    python benchmarks/memory_contract.py                                 networks x budgets, 3D, field of view 96³
    python benchmarks/memory_contract.py --field 64 --budgets 1 --networks unet:store --steps 4
    python benchmarks/memory_contract.py --device cuda --field 192 --budgets 4 12

For each row a made-up cohort is planned under the budget by `medseg plan`, then trained by `medseg train` with that
plan, each in a fresh process as a user would. A memory mode named after a colon is fixed in the model's config;
without one the planner chooses. Every peak is in 1e9 bytes: resident set on a CPU, allocated on a GPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg.cohort import Case, Cohort, write_cohort
from medseg.config import dump_config, load_config
from medseg.files import write_text
from medseg.images import write_nifti
from medseg.models import MODELS
from medseg.volume import Volume

_CHANNELS = {"unet": "channels", "dynunet": "channels", "reversible_unet": "channels"}
_NETWORKS = ("unet", "dynunet", "unetpp", "segresnet", "reversible_unet", "reversible_unet:store")
_CALL = "import sys; from medseg.cli import main; main()"


def make_cohort(folder: Path, side: int) -> Cohort:
    """Three noise volumes of `side`³ voxels with two boxes; two train, one validates."""
    rng = np.random.default_rng(0)
    cases = []
    for number, split in enumerate(("train", "train", "val")):
        label = np.zeros((side,) * 3, dtype=np.uint8)
        label[: side // 3], label[-side // 3 :] = 1, 2
        image = rng.normal(0, 1, label.shape).astype(np.float32) + label
        name = f"case-{number}"
        write_nifti(folder / f"{name}.nii.gz", Volume(image, np.eye(4)))
        write_nifti(folder / f"{name}-label.nii.gz", Volume(label, np.eye(4)))
        cases.append(
            Case(
                name,
                name,
                (f"{name}.nii.gz",),
                split=split,
                modality="MR",
                label=f"{name}-label.nii.gz",
                shape=label.shape,
                spacing_mm=(1.0, 1.0, 1.0),
            )
        )
    return write_cohort(Cohort(folder, tuple(cases), {"anterior": 1, "posterior": 2}), [], {})


def write_config(path: Path, network: str, budget_gb: float, options: argparse.Namespace) -> Path:
    """The config of one row: the hippocampus task with another network and a budget."""
    name, _, mode = network.partition(":")
    model: dict[str, Any] = {"name": name}
    if name in _CHANNELS:
        model[_CHANNELS[name]] = options.channels
    if mode:
        model["memory"] = mode
    train = {"epochs": 1, "steps_per_epoch": options.steps, "validate_every": 1, "precision": options.precision}
    plan = {"memory_gb": budget_gb, "batch_size": options.batch, "probe_seconds": options.probe_seconds}
    sets = [f"{key}={json.dumps(value)}" for key, value in (("model", model), ("train", train), ("plan", plan))]
    return write_text(path, dump_config(load_config("hippocampus", [*sets, f"device={options.device}"])))


def call(arguments: Sequence[str]) -> dict[str, Any]:
    """One medseg command in a fresh process; its JSON."""
    done = subprocess.run(
        [sys.executable, "-c", _CALL, *arguments, "--json"], capture_output=True, text=True, check=False
    )
    if not done.stdout.strip():
        raise SystemExit(done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def row(network: str, budget_gb: float, cohort: Path, folder: Path, options: argparse.Namespace) -> str:
    """Plan, train and compare."""
    name = f"{network.replace(':', '-')}-{budget_gb:g}"
    config = write_config(folder / f"{name}.yaml", network, budget_gb, options)
    start = time.perf_counter()
    planned = call(["plan", str(config), "--cohort", str(cohort)])
    took = time.perf_counter() - start
    if planned["status"] != "done":
        return f"| {network} | {budget_gb:g} | {planned['error']} |"
    found = planned["figures"]
    trained = call(["train", str(config), "--cohort", str(cohort), "--workspace", str(folder / "workspace")])
    if trained["status"] != "done":
        return f"| {network} | {budget_gb:g} | {trained['error']} |"
    real = trained["figures"]["real_peak_memory_gb"]
    predicted, measured = found["predicted_memory_gb"], found.get("memory_gb")
    patch = "×".join(str(n) for n in found["patch_size"])
    return (
        f"| {network} | {budget_gb:g} | {patch} × {found['batch_size']} | {found.get('memory_mode', '')} "
        f"| {predicted:.2f} | {f'{measured:.2f}' if measured else '-'} | {real:.2f} "
        f"| {100 * (predicted / real - 1):+.1f} | {f'{100 * (measured / real - 1):+.1f}' if measured else '-'} "
        f"| {took:.0f} | {trained['figures']['data_wait_share']:.1%} |"
    )


def main() -> None:
    """Read the options; print the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [network for network in _NETWORKS if network.partition(":")[0] in MODELS]
    parser.add_argument("--networks", nargs="+", default=known, help="NAME, or NAME:MODE to fix its memory mode")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.5, 3.0], help="GB")
    parser.add_argument("--field", type=int, default=96, help="side of the cases")
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="training steps")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--probe-seconds", type=float, default=60.0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    print(
        "| network | budget | patch × batch | mode | predicted | measured by plan | real | predicted error (%) "
        "| measured error (%) | plan (s) | waiting for data |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(prefix="medseg-contract-") as scratch:
        folder = Path(scratch)
        cohort = make_cohort(folder / "cohort", options.field)
        for network in options.networks:
            for budget_gb in options.budgets:
                print(row(network, budget_gb, cohort.folder, folder, options), flush=True)


if __name__ == "__main__":
    main()
