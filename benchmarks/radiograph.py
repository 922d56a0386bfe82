"""Seconds from a DICOM radiograph on disk to its verdict with an activation map, all of its checks and the overlay.

    python -m benchmarks.radiograph                                DenseNet121, images of 224 and 320 pixels
    python -m benchmarks.radiograph --sizes 256 --repeats 11 --profile

Simulated radiographs of 2048² pixels go through `predict` and `explain` one by one, as in a batch whose network is
loaded: read, checked, prepared, called at an operating point, mapped, checked, written. The first, which warms up, is
not counted; the others give medians and the slowest. `wall` is what a clock shows, `processor` the seconds of all
cores. The weights are random, which changes no time as long as every map has evidence; that is looked at.
"""

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from medseg.bundle import load_bundle
from medseg.bundle_writing import save_bundle
from medseg.config import load_config
from medseg.data.phantom import draw_radiographs, render_radiograph
from medseg.explain import step as explain_step
from medseg.files import read_json
from medseg.ingest.dicom_write import write_radiograph
from medseg.models import build_from_config
from medseg.plan import Plan
from medseg.predict import Predictor
from medseg.predict import step as predict_step
from medseg.verdict import Verdict

PARTS = ("predict", "explain")


def make_bundle(size_px: int, folder: Path) -> Path:
    """An untrained tuberculosis classifier with a verdict."""
    config = load_config("tb_radiograph")
    torch.manual_seed(0)
    net = build_from_config(config.model, spatial_dims=2, in_channels=1, out_channels=2)
    plan = Plan(2, (size_px, size_px), 8, size_px=(size_px, size_px), normalise="zscore")
    return save_bundle(
        folder,
        state_dict=net.state_dict(),
        config=config,
        plan=plan,
        run_id="benchmark",
        cohort_sha256="0" * 64,
        metrics={},
        verdict=Verdict("tb", "temperature", 0.5),
    )


def time_one(predictor: Predictor, scan: Path, out: Path, workspace: Path) -> list[tuple[float, float]]:
    """Wall and processor seconds of each part."""
    bundle, found = predictor.bundle, []
    for part in PARTS:
        started = time.perf_counter(), time.process_time()
        if part == "predict":
            predict_step.run(bundle, [scan], out, workspace=workspace, predictor=predictor)
        else:
            config, ingest = bundle.config.explain, bundle.config.ingest.for_use()
            explain_step.run(config, predictor.net, bundle.plan, bundle.labels, [scan], predictions=out, ingest=ingest)
        found.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    (about,) = (read_json(path) for path in out.glob("*/explanation/explanation.json"))
    assert about["evidence"], "a map without evidence is not checked"
    return found


def measure(size_px: int, scans: Sequence[Path], folder: Path, profile: bool) -> list[str]:
    """The rows of one size."""
    predictor = Predictor(load_bundle(make_bundle(size_px, folder / f"bundle-{size_px}")))
    outs = [folder / f"out-{size_px}-{number}" for number in range(len(scans))]
    time_one(predictor, scans[0], outs[0], folder)
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    times = np.array([time_one(predictor, scan, out, folder) for scan, out in zip(scans[1:], outs[1:], strict=True)])
    if profile:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(60)
    both = np.concatenate([times, times.sum(axis=1, keepdims=True)], axis=1)
    rows = []
    for name, of_part in zip((*PARTS, "both"), both.swapaxes(0, 1), strict=True):
        (wall, processor), slowest = np.median(of_part, axis=0), of_part[:, 0].max()
        rows.append(f"| {size_px} | {name} | {wall:.2f} | {slowest:.2f} | {processor:.2f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 320], help="pixels of the network's image")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pixels", type=int, default=2048, help="rows and columns of the radiographs")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="medseg-benchmark-") as temporary:
        folder, scans = Path(temporary), []
        for number, params in enumerate(draw_radiographs(0, options.repeats + 1)):
            made = render_radiograph(params, options.pixels)
            scans.append(folder / "scans" / f"{number}.dcm")
            write_radiograph(
                made.image, made.pixel_spacing_mm, scans[-1], patient_id=f"p{number}", seed_uid=f"b/{number}"
            )
        print(f"{torch.get_num_threads()} threads, {options.repeats} radiographs of {options.pixels}² pixels; seconds")
        print("| image | part | wall | slowest | processor |\n|---|---|---:|---:|---:|", flush=True)
        for size_px in options.sizes:
            print("\n".join(measure(size_px, scans, folder, options.profile)), flush=True)


if __name__ == "__main__":
    main()
