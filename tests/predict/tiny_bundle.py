"""A bundle small enough to be written in milliseconds, and a network whose answer is known beforehand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medseg.bundle import Bundle, load_bundle
from medseg.bundle_writing import save_bundle
from medseg.config import Config, validate_config
from medseg.images import write_nifti
from medseg.models import build_from_config
from medseg.plan import Plan
from medseg.predict import Predictor, step
from medseg.volume import Volume

UNET = {"name": "unet", "channels": [4, 8], "strides": [2], "num_res_units": 0}
DENSENET = {"name": "densenet", "init_features": 4, "growth_rate": 4, "block_config": [1, 1]}


class Threshold(nn.Module):
    """Logits 0 for background and the intensity itself for label 1: label 1 is where the image is positive."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, :1]], 1)


def config(labels: Mapping[str, int] | None = None, dims: int = 3, **more: Any) -> Config:
    return validate_config(
        {
            "name": "tiny",
            "task": {"kind": "segmentation", "labels": dict(labels or {"thing": 1}), "spatial_dims": dims},
            "model": UNET,
            "loss": {"name": "dice_ce"},
            **more,
        },
        "tiny",
    )


def classifier() -> Config:
    task = {"kind": "classification", "labels": {"normal": 0, "ill": 1}, "spatial_dims": 2}
    return config(task=task, model=DENSENET, loss={"name": "cross_entropy"})


def plan(**changes: Any) -> Plan:
    """Intensities 0 … 100 become -5 … 5, so that the threshold of `Threshold` lies half-way."""
    window = {"normalise": "ct", "intensity_low": 0.0, "intensity_high": 100.0}
    window |= {"intensity_mean": 50.0, "intensity_sd": 10.0}
    return Plan(**{"spatial_dims": 3, "patch_size": (16, 16, 16), "batch_size": 1, **window, **changes})


def bundle(folder: Path, made: Config | None = None, grid: Plan | None = None, **facts: Any) -> Bundle:
    made = made or config()
    torch.manual_seed(0)
    task = made.task
    net = build_from_config(
        made.model,
        spatial_dims=task.spatial_dims,
        in_channels=len(task.channels),
        out_channels=task.out_channels,
    )
    given = {"run_id": "run-1", "cohort_sha256": "c" * 64, "metrics": {"val_dice_thing": 0.9}, **facts}
    save_bundle(folder, state_dict=net.state_dict(), config=made, plan=grid or plan(), **given)
    return load_bundle(folder)


def box_volume(affine: np.ndarray, shape: tuple[int, ...] = (24, 20, 18)) -> tuple[Volume, np.ndarray]:
    """A bright box away from the middle of every axis, and the world position of its centre in mm."""
    array = (np.indices(shape).sum(0) % 17).astype(np.int16)  # not constant, or the scan would be flagged
    array[3:9, 8:16, 10:14] = 100
    centre = affine @ np.array([5.5, 11.5, 11.5, 1.0])
    return Volume(array, affine), centre[:3]


def write_boxes(folder: Path, count: int) -> Path:
    for number in range(count):
        volume, _ = box_volume(np.diag([1.0, 1.0, 1.0 + number / 10, 1.0]))
        write_nifti(folder / f"scan-{number:02d}.nii.gz", volume)
    return folder


def predict_boxes(bundle_dir: Path, scans: Path, out: Path) -> None:
    """A whole job, for a process of its own."""
    torch.set_num_threads(1)
    loaded = load_bundle(bundle_dir)
    step.run(loaded, [scans], out, predictor=Predictor(loaded, net=Threshold()))
