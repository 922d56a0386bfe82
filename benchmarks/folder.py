"""Volumes per minute from a folder of scans to a folder of masks, start and loading of the model included.

    python benchmarks/folder.py BUNDLE COHORT                                   medseg alone
    python benchmarks/folder.py BUNDLE COHORT --nnunet PYTHON --threads 2 --rounds 3
    python benchmarks/folder.py BUNDLE COHORT --set explain.max_cases=0 --set predict.precision=auto

BUNDLE is a model that was trained on COHORT; the scans are those of the cohort's test split. Each row is a process of
its own, and the rows take turns; `s` is what a clock shows, `cpu s` the processor time of the process and of all that
it started, and the table gives medians.

`medseg` is `medseg predict` with the bundle's own settings: mask, preview and result of each case, the ledger, a run in
MLflow, and the activation maps of `explain.max_cases` cases with their checks. `medseg-set` is the same with the
settings that `--set` changes. PYTHON is an interpreter that has nnunetv2. With it nnU-Net plans for the training cases,
a network of random weights is saved as fold 0 of its 3d_fullres configuration (weights cost no time), and
`predict_from_files` is timed: half overlapping windows, Gaussian weights, mirrored along all axes in `nnunet`, not
mirrored in `nnunet-plain`. It runs its network in the process itself and has `--workers` processes each to read and to
write. What training leaves behind is there beforehand: nnU-Net's plan and folders, and medseg's database of runs.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from medseg.bundle_files import digest
from medseg.cohort import read_cohort
from medseg.config import TrackingConfig, dump_config, load_config
from medseg.files import read_json, sha256_file, write_json, write_text
from medseg.tracking.store import open_store

MEDSEG = "import sys; from medseg.cli import main; main()"
START = """
import os, sys, torch
try:
    import torchvision
except Exception:  # built for another torch: nnU-Net needs none of its operators, only that they have names
    sys.modules.pop("torchvision", None)
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
root = os.environ["nnUNet_results"] + "/Dataset001_bench/nnUNetTrainer__nnUNetPlans__3d_fullres"
"""
PREPARE = (
    START
    + """
def prepare():
    import json, pathlib, shutil
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    extract_fingerprints([1], num_processes=1, show_progress_bar=False)
    plan_experiments([1])
    raw, made = (pathlib.Path(os.environ[name], "Dataset001_bench") for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    fold = pathlib.Path(root, "fold_0")
    fold.mkdir(parents=True)
    shutil.copy(raw / "dataset.json", root)
    shutil.copy(made / "nnUNetPlans.json", root + "/plans.json")
    plans, given = (json.loads(pathlib.Path(root, name).read_text()) for name in ("plans.json", "dataset.json"))
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    print("nnU-Net's patch", configuration.patch_size, "spacing", configuration.spacing, "features",
          configuration.network_arch_init_kwargs["features_per_stage"])
    torch.manual_seed(0)
    net = nnUNetTrainer.build_network_architecture(
        manager, configuration, len(given["channel_names"]), len(given["labels"]), enable_deep_supervision=False)
    about = {"trainer_name": "nnUNetTrainer", "init_args": {"configuration": "3d_fullres"}}
    more = {"inference_allowed_mirroring_axes": (0, 1, 2)}
    torch.save({"network_weights": net.state_dict(), **about, **more}, fold / "checkpoint_final.pth")

if __name__ == "__main__":  # its processes import this file
    prepare()
"""
)
PREDICT = (
    START
    + """
if __name__ == "__main__":  # its processes import this file
    scans, out, mirrored, threads, workers = sys.argv[1:]
    torch.set_num_threads(int(threads))
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    predictor = nnUNetPredictor(use_mirroring=mirrored == "yes", device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(root, (0,))
    predictor.predict_from_files(scans, out, num_processes_preprocessing=int(workers),
                                 num_processes_segmentation_export=int(workers))
"""
)


def lay_out(cohort_dir: Path, folder: Path) -> int:
    """Link the test scans into `folder/scans`, and all as nnU-Net wants them; returns how many test scans there are."""
    cohort = read_cohort(cohort_dir)
    raw = folder / "raw" / "Dataset001_bench"
    images = {"train": raw / "imagesTr", "test": raw / "imagesTs"}
    for made in (folder / "scans", raw / "labelsTr", *images.values()):
        made.mkdir(parents=True)
    for case in cohort.cases:
        if len(case.images) != 1 or not case.images[0].endswith(".nii.gz"):
            raise SystemExit(f"{case.case_id}: volumes of one channel are compared")
        names = [images[case.split] / f"{case.case_id}_0000.nii.gz"] if case.split in images else []
        names += [folder / "scans" / f"{case.case_id}.nii.gz"] if case.split == "test" else []
        for name in names:
            name.symlink_to((cohort_dir / case.images[0]).resolve())
        if case.split == "train":
            (raw / "labelsTr" / f"{case.case_id}.nii.gz").symlink_to((cohort_dir / case.label).resolve())
    training = cohort.split("train")
    labels = {"background": 0, **cohort.label_names}
    channels = {"0": "CT" if training[0].modality == "CT" else "MRI"}
    about = {"channel_names": channels, "labels": labels, "numTraining": len(training), "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(about))
    return len(cohort.split("test"))


def with_settings(bundle: Path, overrides: Sequence[str], folder: Path) -> Path:
    """A copy of a bundle with other settings, which its hashes vouch for."""
    shutil.copytree(bundle, folder)
    write_text(folder / "config.yaml", dump_config(load_config(bundle / "config.yaml", overrides)))
    facts = read_json(folder / "bundle.json")
    facts["files"]["config.yaml"] = sha256_file(folder / "config.yaml")
    write_json(folder / "bundle.json", {**facts, "sha256": digest(facts)})
    return folder


def run(command: Sequence[str | Path], environment: dict[str, str], log: Path) -> tuple[float, float]:
    """Wall and processor seconds of a process and of all that it starts. Raises SystemExit when it fails."""
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    seconds, process.returncode = time.monotonic() - start, os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit {process.returncode} of {command[:3]}:\n{log.read_text()[-2000:]}")
    return seconds, usage.ru_utime + usage.ru_stime


def rows(options: argparse.Namespace, folder: Path, environment: dict[str, str]) -> dict[str, list[str | Path]]:
    """The command of each row; `OUT` stands for where its masks go."""
    bundles = {"medseg": options.bundle}
    if options.set:
        bundles["medseg-set"] = with_settings(options.bundle, options.set, folder / "bundle")
    more = [folder / "scans", "--out", "OUT", "--workspace", folder / "workspace"]
    found = {name: [sys.executable, "-c", MEDSEG, "predict", bundle, *more] for name, bundle in bundles.items()}
    if options.nnunet:
        programs = {"prepare.py": PREPARE, "predict.py": PREDICT}
        for name, program in programs.items():
            (folder / name).write_text(program)
        log = folder / "log"
        run([options.nnunet, folder / "prepare.py"], environment, log)
        print(*[line for line in log.read_text().splitlines() if line.startswith("nnU-Net's patch")], "\n", sep="\n")
        scans = folder / "raw" / "Dataset001_bench" / "imagesTs"
        for name, mirrored in (("nnunet", "yes"), ("nnunet-plain", "no")):
            settings = [mirrored, str(options.threads), str(options.workers)]
            found[name] = [options.nnunet, folder / "predict.py", scans, "OUT", *settings]
    return {name: found[name] for name in options.rows or found}


def main() -> None:
    """Print one table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--nnunet", metavar="PYTHON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--set", action="append", metavar="A.B=C")
    parser.add_argument("--rows", nargs="+", choices=("medseg", "medseg-set", "nnunet", "nnunet-plain"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        count = lay_out(options.cohort, folder)
        places = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
        environment = {**os.environ, **places, "OMP_NUM_THREADS": str(options.threads)}
        commands, found = rows(options, folder, environment), dict[str, list[tuple[float, float]]]()
        open_store(folder / "workspace", TrackingConfig())
        for number in range(options.rounds):
            for name, command in commands.items():
                out = folder / f"{name}-{number}"
                ready = [out if part == "OUT" else part for part in command]
                found.setdefault(name, []).append(run(ready, environment, folder / "log"))
                masks = len([*out.glob("*.nii.gz"), *out.glob("*/mask.nii.gz")])
                assert masks == count, f"{name} wrote {masks} masks of {count}"
    print(f"{count} scans, {options.threads} threads, {options.workers} workers, median of {options.rounds}\n")
    print("| row | s | cpu s | volumes per minute | per minute of processor time |\n|---|---|---|---|---|")
    for name, measured in found.items():
        wall, cpu = (statistics.median(each) for each in zip(*measured, strict=True))
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {60 * count / wall:.1f} | {60 * count / cpu:.1f} |")


if __name__ == "__main__":
    main()
