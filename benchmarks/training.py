"""Seconds per training step of medseg's loop beside a plain loop of MONAI: the same network, patch, batch and scans.

    python -m benchmarks.training COHORT                            rows in turns, three fresh processes each
    python -m benchmarks.training COHORT --config hippocampus --steps 40 --set model.name=unetpp

The plain loop is that of MONAI's tutorials: `CacheDataset`, dictionary transforms (normalisation, a crop round the
labels, flip, affine, contrast, noise) on single patches, a `DataLoader` without workers, `DiceCELoss`, AdamW; in fp32,
and with bf16 autocast. medseg's steps are those of `medseg train`: augmentation one batch ahead, all losses, clipping,
moving average, in the precision it would choose. Scans are in memory before the clock starts; the first quarter of the
steps warms up and is not counted. The table gives the median over processes of the median step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from medseg.cohort import Cohort, read_cohort
from medseg.config import Config, load_config
from medseg.plan import Plan
from medseg.train.planning import make_plan

ROWS = ("medseg", "MONAI fp32", "MONAI bf16")


def medseg_seconds(config: Config, cohort: Cohort, plan: Plan, steps: int) -> list[float]:
    """Of every step."""
    from medseg.data.cache import load_examples
    from medseg.train import step
    from medseg.train.loop import train_loop

    device, bf16 = step.prepare_torch(config)
    with tempfile.TemporaryDirectory() as folder:
        examples = load_examples(cohort, cohort.split("train"), plan, Path(folder) / "cache")
        training, source, loss = step.assemble(config, plan, step.build_network(config, plan), examples, device)
        settings = config.train.model_copy(update={"epochs": steps, "steps_per_epoch": 1, "validate_every": steps + 1})
        train_loop(
            training, source, loss, settings, folder=Path(folder), device=device, bf16=bf16, validate=None,
            on_epoch=lambda figures: None, stop=lambda: False,
        )  # fmt: skip
    return [row["seconds"] for row in training.history]


def monai_seconds(config: Config, cohort: Cohort, plan: Plan, steps: int, bf16: bool) -> list[float]:
    """Of every step, from asking for the batch to the optimiser's."""
    from monai.data import CacheDataset, DataLoader
    from monai.losses import DiceCELoss
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        NormalizeIntensityd,
        RandAdjustContrastd,
        RandAffined,
        RandCropByPosNegLabeld,
        RandFlipd,
        RandGaussianNoised,
        SpatialPadd,
    )

    from medseg.train import step

    keys = ["image", "label"]
    device, _ = step.prepare_torch(config)
    transforms = Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            NormalizeIntensityd("image"),
            SpatialPadd(keys, plan.patch_size),
            RandCropByPosNegLabeld(keys, "label", plan.patch_size),
            RandFlipd(keys, prob=0.5, spatial_axis=0),
            RandAffined(
                keys, prob=0.8, rotate_range=[0.26] * 3, scale_range=[0.15] * 3, mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
            RandAdjustContrastd("image", prob=0.8, gamma=(0.8, 1.2)),
            RandGaussianNoised("image", prob=0.8, std=0.1),
        ]
    )  # fmt: skip
    cases = [
        {"image": str(cohort.folder / case.images[0]), "label": str(cohort.folder / case.label)}
        for case in cohort.split("train")
    ]
    loader = DataLoader(
        CacheDataset(cases, transforms, progress=False), batch_size=plan.batch_size, shuffle=True, drop_last=True
    )
    net = step.build_network(config, plan).to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), config.train.learning_rate)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    seconds: list[float] = []
    while len(seconds) < steps:
        started = time.perf_counter()
        for batch in loader:
            image, label = batch["image"].as_tensor().to(device), batch["label"].as_tensor().to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                value = loss(net(image), label)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            value.item()
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            if len(seconds) == steps:
                break
    return seconds


def measure(row: str, options: argparse.Namespace) -> float:
    """Median seconds of a step, in this process."""
    config = load_config(options.config, options.set)
    cohort = read_cohort(options.cohort)
    plan = make_plan(config, cohort)
    if row == "medseg":
        seconds = medseg_seconds(config, cohort, plan, options.steps)
    else:
        seconds = monai_seconds(config, cohort, plan, options.steps, bf16=row.endswith("bf16"))
    return statistics.median(seconds[options.steps // 4 :])


def in_fresh_process(row: str, arguments: Sequence[str]) -> float:
    """`measure` with the options of this call, where nothing else has run."""
    command = [sys.executable, "-m", "benchmarks.training", *arguments, "--row", row]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"row {row} ended with {done.returncode}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Read the options; print the table, or one row's figure as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--config", default="hippocampus")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.row, options)))
        return
    found: dict[str, list[float]] = {row: [] for row in ROWS}
    for _ in range(options.repeats):
        for row in ROWS:
            found[row].append(in_fresh_process(row, sys.argv[1:]))
    best = statistics.median(found["medseg"])
    print(f"| loop | s per step ({torch.get_num_threads()} threads) | of medseg's |\n|---|---:|---:|")
    for row, seconds in found.items():
        middle = statistics.median(seconds)
        print(f"| {row} | {middle:.3f} ({min(seconds):.3f} to {max(seconds):.3f}) | {100 * middle / best:.0f} % |")


if __name__ == "__main__":
    main()
