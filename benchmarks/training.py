"""Seconds per training step of medseg's loop beside a plain loop of MONAI: the same network, patch, batch and scans.

    python -m benchmarks.training COHORT                            12 rounds of 10 steps of each loop
    python -m benchmarks.training COHORT --config hippocampus --rounds 6 --set model.name=unetpp

The plain loop is that of MONAI's tutorials: `CacheDataset`, dictionary transforms (normalisation, a crop round the
labels, flip, affine, contrast, noise) on single patches, a `DataLoader` without workers, `DiceCELoss`, AdamW; in fp32,
and with bf16 autocast. medseg's steps are those of `medseg train`: augmentation one batch ahead, all losses, clipping,
moving average, in the precision it would choose. Scans are in memory before the clock starts.

The loops take turns in one process, since a shared machine is now quick and now slow, for minutes: a ratio is that of
the medians of two neighbouring turns, of which the first and last two steps do not count.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from medseg.cohort import Cohort, read_cohort
from medseg.config import Config, load_config
from medseg.plan import Plan
from medseg.train.planning import make_plan

_UNCOUNTED = 2  # steps at both ends of a turn: caches are cold at first, and at last no batch is made beside the step


def medseg_steps(config: Config, cohort: Cohort, plan: Plan, turn: int) -> Iterator[float]:
    """Seconds of every step."""
    from medseg.data.cache import load_examples
    from medseg.train import step
    from medseg.train.loop import train_loop

    device, bf16 = step.prepare_torch(config)
    with tempfile.TemporaryDirectory() as folder:
        examples = load_examples(cohort, cohort.split("train"), plan, Path(folder) / "cache")
        training, source, loss = step.assemble(config, plan, step.build_network(config, plan), examples, device)
        while True:
            total = training.step + turn
            each = {"epochs": total, "steps_per_epoch": 1, "validate_every": total + 1}
            train_loop(
                training, source, loss, config.train.model_copy(update=each), folder=Path(folder), device=device,
                bf16=bf16, validate=None, on_epoch=lambda figures: None, stop=lambda: False,
            )  # fmt: skip
            yield from (row["seconds"] for row in training.history[-turn:])


def monai_steps(config: Config, cohort: Cohort, plan: Plan, *, bf16: bool) -> Iterator[float]:
    """Seconds of every step, from asking for the batch to the optimiser's."""
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
    started = time.perf_counter()
    while True:
        for batch in loader:
            image, label = batch["image"].as_tensor().to(device), batch["label"].as_tensor().to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                value = loss(net(image), label)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            value.item()
            yield time.perf_counter() - started
            started = time.perf_counter()


def main() -> None:
    """Let the loops take turns; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--config", default="hippocampus")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--turn", type=int, default=10, help="steps")
    options = parser.parse_args()
    config, cohort = load_config(options.config, options.set), read_cohort(options.cohort)
    plan = make_plan(config, cohort)
    loops = {
        "medseg": medseg_steps(config, cohort, plan, options.turn),
        "MONAI fp32": monai_steps(config, cohort, plan, bf16=False),
        "MONAI bf16": monai_steps(config, cohort, plan, bf16=True),
    }
    found: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(options.rounds + 1):
        for name, steps in loops.items():
            turn = [next(steps) for _ in range(options.turn)][_UNCOUNTED:-_UNCOUNTED]
            if number:  # the first round warms up
                found[name].append(statistics.median(turn))
    print(f"| loop | s per step ({torch.get_num_threads()} threads): median (quartiles) | medseg's, of it |")
    print("|---|---:|---:|")
    for name, seconds in found.items():
        ratios = [mine / other for mine, other in zip(found["medseg"], seconds, strict=True)]
        print(f"| {name} | {_quartiles(seconds)} | {_quartiles(ratios)} |")


def _quartiles(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
