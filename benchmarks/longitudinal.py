"""Repeat scans of simulated patients with a known atrophy: what an earlier segmentation as prior changes.

    python benchmarks/longitudinal.py --patients 10 --steps 250

Each patient is deformed from one template, and widens the ventricles from examination to examination; every
examination has a pose, an oblique grid, a contrast and a noise of its own. One `prior_unet` is trained on some patients
and predicts the others twice: every scan by itself, and every scan with the mask of the one before. Printed are the
Dice, the test-retest noise from two scans without change, 20 days apart, and the change of volume over two years beside
the true one. The truth is the volume of the simulated label.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from medseg import road
from medseg.bundle import load_bundle
from medseg.change import measure_retest
from medseg.cohort import Case, Cohort, write_cohort
from medseg.data.simulate import SubjectParameters, apply_parameters, draw_parameters, load_anatomy
from medseg.files import read_json
from medseg.images import read_image, write_nifti
from medseg.metrics import compare_masks
from medseg.predict import step
from medseg.volume import Volume

LABELS = {"csf": 1, "grey_matter": 2, "white_matter": 3}
EXAMS = ((0, 0.0), (20, 0.0), (730, 2.5))  # day, and how much the ventricles have widened
SPACING_MM = 4.0
CONFIG = (
    "task={kind: segmentation, labels: {csf: 1, grey_matter: 2, white_matter: 3}}",
    "model={name: prior_unet, channels: [12, 24, 48], axis: 0}",
    "export={}",
    "explain={max_cases: 0}",
    "tracking={system_metrics: false}",
    "predict={overlap: 0.25, mirror_axes: []}",
    "plan={patch_size: [24, 48, 48], batch_size: 2}",
)


def scan(patient: SubjectParameters, seed: int, widened_mm: float) -> SubjectParameters:
    """One examination: the anatomy of the patient, an acquisition of its own."""
    rng, drawn = np.random.default_rng(seed), draw_parameters(seed, 0)
    turn = tuple(float(a + d) for a, d in zip(patient.head_rotation_deg, rng.uniform(-5, 5, 3), strict=True))
    return replace(
        drawn,
        seed=patient.seed,
        deformation=patient.deformation,
        ventricle_mm=patient.ventricle_mm + widened_mm,
        head_scale=patient.head_scale,
        head_rotation_deg=turn,
        head_translation_mm=tuple(float(x) for x in rng.uniform(-8, 8, 3)),
        scan_rotation_deg=tuple(float(a + rng.normal(0, 1.5)) for a in turn),
    )


def simulate(folder: Path, patients: int, test: int, seed: int) -> Cohort:
    """Write every examination of every patient; the last patients are the test split."""
    anatomy, cases = load_anatomy(SPACING_MM), []
    for number in range(patients):
        patient = draw_parameters(seed, number)
        for at, (day, widened_mm) in enumerate(EXAMS):
            made = apply_parameters(anatomy, scan(patient, 1000 * seed + 10 * number + at, widened_mm))
            name = f"p{number:02d}-{at}"
            write_nifti(folder / "images" / f"{name}.nii.gz", Volume(made.t1, made.affine))
            write_nifti(folder / "labels" / f"{name}.nii.gz", Volume(made.label, made.affine))
            split = "test" if number >= patients - test else "train"
            case = Case(name, f"p{number:02d}", (f"images/{name}.nii.gz",), split=split, exam_day=day, modality="MR")
            cases.append(replace(case, label=f"labels/{name}.nii.gz", shape=made.t1.shape, source_kind="nifti",
                                 spacing_mm=(SPACING_MM,) * 3, orientation="RAS"))  # fmt: skip
    return write_cohort(Cohort(folder, tuple(cases), LABELS), [], {"simulated": True})


def measure(cohort: Cohort, out: Path) -> list[str]:
    """A row per label: Dice, test-retest noise, and the true and the measured change over two years."""
    cases = cohort.split("test")
    pred = {case.case_id: read_image(out / case.case_id / "mask.nii.gz") for case in cases}
    truth = {case.case_id: read_image(cohort.folder / case.label) for case in cases}
    patients = sorted({case.patient_id for case in cases})
    rows = []
    for label, value in LABELS.items():
        dice = [compare_masks(pred[c.case_id].array == value, truth[c.case_id].array == value,
                              truth[c.case_id].spacing_mm, 1.0).dice for c in cases]  # fmt: skip
        ml = {name: float((v.array == value).sum()) * v.voxel_ml for name, v in pred.items()}
        true_ml = {name: float((v.array == value).sum()) * v.voxel_ml for name, v in truth.items()}
        noise = [_cv([[of[f"{p}-0"], of[f"{p}-1"]] for p in patients]) for of in (ml, true_ml)]
        change = [np.array([of[f"{p}-2"] / of[f"{p}-0"] - 1 for p in patients]) * 100 for of in (true_ml, ml)]
        error = change[1] - change[0]
        rows.append(
            f"| {label} | {np.mean(dice):.3f} | {noise[0]:.2f} | {noise[1]:.2f} | {change[0].mean():+.2f} | "
            f"{change[1].mean():+.2f} | {error.mean():+.2f} ± {error.std(ddof=1):.2f} |"
        )
    return rows


def _cv(groups: Sequence[Sequence[float]]) -> float:
    found = measure_retest(groups)
    return found.cv_percent if found is not None else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=10)
    parser.add_argument("--test", type=int, default=4, help="patients that are not trained on")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="medseg-") as folder:
        workspace = Path(folder)
        cohort = simulate(workspace / "cohort", options.patients, options.test, options.seed)
        train = f"train={{epochs: 1, steps_per_epoch: {options.steps}, learning_rate: 0.003, ema_decay: 0.98}}"
        config = road.load("demo_brain", (*CONFIG, train, f"seed={options.seed}"))
        started = time.process_time()
        bundle = load_bundle(road.train(config, cohort.folder, workspace).paths["bundle"])
        print(f"Trained for {time.process_time() - started:.0f} s of processor time, {options.steps} steps.")
        alone = replace(cohort, cases=tuple(replace(case, exam_day=None) for case in cohort.cases))
        for name, given in (("each scan by itself", alone), ("with the earlier mask", cohort)):
            step.run(bundle, given, workspace / name, split="test")
            if given is cohort:
                found = [read_json(path).get("prior") for path in (workspace / name).glob("*/result.json")]
                print(f"{sum(prior is not None for prior in found)} of {len(found)} test scans had an earlier mask.")
            print(f"\n{name}\n\n| label | Dice | noise (%) | noise of the truth (%) | true change (%) | measured (%) | "
                  "measured - true |\n|---|---|---|---|---|---|---|")  # fmt: skip
            print("\n".join(measure(cohort, workspace / name)), flush=True)


if __name__ == "__main__":
    main()
