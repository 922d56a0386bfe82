"""Tiny cohorts with a known truth, shared by tests."""

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from medseg.bundle_writing import save_bundle
from medseg.cohort import Case, Cohort, write_cohort
from medseg.config import Config, load_config
from medseg.data.phantom import SITES, draw_radiograph_parameters, render_radiograph
from medseg.images import write_nifti, write_png
from medseg.models import build_from_config
from medseg.plan import Plan
from medseg.splits import assign_splits
from medseg.verdict import Verdict
from medseg.volume import Volume

AFFINE = np.array([[-1.5, 0, 0, 12], [0, 1.5, 0, -7], [0, 0, 2.0, 3], [0, 0, 0, 1]])
TINY = (
    "model={name: unet, channels: [4, 8], strides: [2], num_res_units: 1}",
    "plan={patch_size: [16, 16, 16], batch_size: 2}",
    "train={epochs: 2, validate_every: 1, warmup_steps: 2, precision: fp32}",
    "tracking={system_metrics: false}",
)


def tiny_config(*overrides: str) -> Config:
    """The hippocampus config made small: two labels, 16 voxels a side."""
    return load_config("hippocampus", [*TINY, *overrides])


def tiny_radiograph_config(*overrides: str) -> Config:
    """The tuberculosis config made small: two classes, 32 pixels a side."""
    model = "model={name: densenet, init_features: 8, growth_rate: 4, block_config: [2, 2]}"
    plan = "plan={size_px: 32, batch_size: 4}"
    return load_config("tb_radiograph", [model, plan, *TINY[2:], "explain.rank.cases=0", *overrides])


def segmentation_cohort(folder: Path, count: int = 10) -> Cohort:
    """Noise with a bright box (label 1, anterior) and a dark one (label 2, posterior); the boxes move by case."""
    rng = np.random.default_rng(7)
    cases = []
    for number in range(count):
        label = np.zeros((18, 16, 14), dtype=np.uint8)
        x, y, z = rng.integers(2, 7, 3)
        label[x : x + 5, y : y + 5, z : z + 5] = 1
        label[x + 6 : x + 10, y : y + 5, z : z + 5] = 2
        image = rng.normal(0, 0.3, label.shape) + 2.0 * (label == 1) - 2.0 * (label == 2)
        name = f"case-{number:02d}"
        write_nifti(folder / "images" / f"{name}.nii.gz", Volume(image.astype(np.float32), AFFINE))
        write_nifti(folder / "labels" / f"{name}.nii.gz", Volume(label, AFFINE))
        cases.append(
            Case(
                case_id=name,
                patient_id=f"patient-{number:02d}",
                images=(f"images/{name}.nii.gz",),
                label=f"labels/{name}.nii.gz",
                modality="MR",
                shape=label.shape,
                spacing_mm=(1.5, 1.5, 2.0),
                orientation="LAS",
                source_kind="nifti",
            )
        )
    split = assign_splits(cases, val=0.2, test=0.3, seed=0)
    return write_cohort(Cohort(folder, split, {"anterior": 1, "posterior": 2}), [], {"made_by": "tests"})


def radiograph_cohort(folder: Path, count: int = 24) -> Cohort:
    """Noise; a bright disc in every second image (class tb); two sites with equal prevalence."""
    rng = np.random.default_rng(8)
    rows, columns = np.mgrid[:40, :36]
    cases = []
    for number in range(count):
        image = rng.normal(1000, 100, rows.shape)
        if number % 2:
            centre = rng.integers(10, 26, 2)
            image[(rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < 25] += 2500
        name = f"chest-{number:02d}"
        write_png(folder / "images" / f"{name}.png", np.clip(image, 0, 4095).astype(np.uint16))
        cases.append(
            Case(
                case_id=name,
                patient_id=f"patient-{number:02d}",
                images=(f"images/{name}.png",),
                kind="radiograph",
                site="north" if number // 2 % 2 else "south",
                target="tb" if number % 2 else "normal",
                modality="DX",
                shape=rows.shape,
                spacing_mm=(1.0, 1.0),
                source_kind="png",
            )
        )
    split = assign_splits(cases, val=0.2, test=0.3, seed=0)
    return write_cohort(Cohort(folder, split, {"normal": 0, "tb": 1}), [], {"made_by": "tests"})


def two_mark_radiographs(folder: Path, count: int = 40) -> Path:
    """Noise with two marks that know nothing of each other: a bright disc in the upper left corner (`upper`) and a dark
    one in the lower right (`lower`). Every combination occurs equally often.

    Returns:
        `marks.csv`, whose column `marks` names the marks of each image, or `No mark`.
    """
    rng = np.random.default_rng(9)
    rows, columns = np.mgrid[:72, :68]
    lines = ["image,marks,patient_id,site"]
    for number in range(count):
        upper, lower = number % 2, number // 2 % 2
        image = rng.normal(2000, 150, rows.shape)
        for present, centre, sign in ((upper, (18, 16), 1), (lower, (52, 50), -1)):
            row, column = centre + rng.integers(-5, 6, 2)
            image[((rows - row) ** 2 + (columns - column) ** 2 < 80) & bool(present)] += sign * 1500
        name = f"marks-{number:02d}.png"
        write_png(folder / name, np.clip(image, 0, 4095).astype(np.uint16))
        named = "|".join(["lower"] * lower + ["upper"] * upper)
        lines.append(f"{name},{named or 'No mark'},p{number:02d},{'north' if number % 8 < 4 else 'south'}")
    (folder / "marks.csv").write_text("\n".join(lines) + "\n")
    return folder / "marks.csv"


def chest(rows: int = 300, columns: int = 280, noise: float = 0.05) -> NDArray[np.uint16]:
    """Two dark lungs, pointed at the top, with ribs across them, beside a bright middle in a bright body."""
    y, x = (np.mgrid[:rows, :columns] + 0.5) / np.reshape([rows, columns], (2, 1, 1))
    aside = np.abs(x - 0.5)
    image = np.where(aside < 0.46, 0.75, 0.0)
    width = 0.34 * np.sqrt(np.clip((y - 0.08) / 0.72, 0, 1))
    lung = (aside > 0.05) & (aside < 0.05 + width) & (y < 0.8)
    image[lung] = 0.25 + 0.05 * np.sin(60 * y[lung])
    image[(y < 0.1) & (aside > 0.2)] = 0  # beside the neck
    image += np.random.default_rng(0).normal(0, noise, image.shape)
    return (np.clip(image, 0, 1) * 4000).astype(np.uint16)


def calibrated_bundle(folder: Path, *overrides: str) -> Path:
    """An untrained classifier with a verdict: threshold 0.25, `few_levels` leaves a radiograph not assessable."""
    config = tiny_radiograph_config(*overrides)
    torch.manual_seed(0)
    net = build_from_config(config.model, spatial_dims=2, in_channels=1, out_channels=2)
    rates = {
        "sensitivity": {"value": 0.9375, "ci_low": 0.75, "ci_high": 1.0, "n": 16},
        "specificity": {"value": 0.625, "ci_low": 0.5, "ci_high": 0.75, "n": 40},
    }
    verdict = Verdict("tb", "temperature", 0.25, withhold=("few_levels",), point=rates)
    facts = {"run_id": "run-1", "cohort_sha256": "c" * 64, "metrics": {}}
    plan = Plan(spatial_dims=2, patch_size=(32, 32), batch_size=1, size_px=(32, 32))
    return save_bundle(folder, state_dict=net.state_dict(), config=config, plan=plan, verdict=verdict, **facts)


def contoured(number: int) -> frozenset[int]:
    """Of the seven structures of `headneck_lookalike`, those that case `number` has contoured; every third has all."""
    return frozenset(value for value in range(1, 8) if number % 3 == 0 or value < 4 or (number + value) % 4)


def headneck_lookalike(folder: Path, count: int = 12) -> Path:
    """CT stored as HU + 1024 with air = 0, whose headers hold a spacing alone; a box for each of seven structures, all
    of them in every image, but in a label map only where `contoured` says so."""
    rng = np.random.default_rng(11)
    for number in range(count):
        label = np.zeros((20, 22, 18), dtype=np.uint8)
        for value in range(1, 8):
            x, y, z = 2 + 5 * (value % 3) + rng.integers(3), 2 + 6 * (value // 3) + rng.integers(3), rng.integers(2, 8)
            label[x : x + 4, y : y + 4, z : z + 8] = value
        image = np.zeros(label.shape)
        image[1:-1, 1:-1] = 1024 + rng.normal(0, 20, image[1:-1, 1:-1].shape)
        image += 120.0 * label
        label[~np.isin(label, list(contoured(number)))] = 0
        for kind, array in (("images", image.round().astype(np.int16)), ("labels", label)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.diag([4.0, 4.0, 2.5, 1.0])), folder / kind / f"pt_{number}.nii.gz")
    return folder


def pneumonia_radiographs(folder: Path, count: int = 3, size_px: int = 96) -> Path:
    """Simulated chests as the COVID-19 Radiography Database lays them out: as many normal ones, with one opacity
    (Viral Pneumonia) and with a haze in both lungs that thickens downwards (COVID). One without class and all masks
    lie between them.

    Returns:
        The folder of the set.
    """
    root = folder / "COVID-19_Radiography_Dataset"
    down = np.linspace(0, 1, size_px)[:, None]
    for number in range(3 * count):
        name = ("Normal", "Viral Pneumonia", "COVID")[number % 3]
        site = SITES[number // 3 % 2]
        made = render_radiograph(draw_radiograph_parameters(3, number, number % 3 == 1, site), size_px)
        image = made.image.astype(np.float64)
        if name == "COVID":
            image += 900.0 * made.lung_mask * down
        file = f"{name}-{number // 3 + 1}.png"
        write_png(root / name / "images" / file, np.clip(image / 16, 0, 255).astype(np.uint8))
        write_png(root / name / "masks" / file, made.lung_mask * np.uint8(255))
    write_png(root / "Lung_Opacity" / "images" / "Lung_Opacity-1.png", np.zeros((size_px, size_px), np.uint8))
    return folder
