"""The demonstration: the whole road on simulated scans, through the front door, without a download.

First half: T1 MRI of subjects deformed from one template, written as DICOM; a small U-Net learns three tissues.
Second half: chest radiographs of a phantom, half of them with a lesion at a known place; a DenseNet finds it, and its
activation maps are held against the place.
"""

import shlex
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from medseg import road
from medseg.files import read_json, read_rows, write_bytes, write_json, write_rows
from medseg.ingest.dicom_write import write_radiograph, write_series
from medseg.ingest.pseudonyms import load_key
from medseg.ingest.step import run as ingest_step
from medseg.progress import progress
from medseg.result import Result

SEED = 20
BRAINS, UNSEEN_BRAINS = 24, 3
RADIOGRAPHS, UNSEEN_RADIOGRAPHS = 320, 4
SPACING_MM = 2.0
SIZE_PX = 192
_DONE = "done.json"


@dataclass(frozen=True)
class Half:
    """What one half of the demonstration made."""

    run_id: str
    metrics: dict[str, object]
    predictions: Path
    report: Path
    minutes: float


def run(workspace: Path, *, brains: int = BRAINS, radiographs: int = RADIOGRAPHS, sets: tuple[str, ...] = ()) -> Result:
    """Make scans, train, measure, segment unseen scans, explain, report. Run again, it starts new runs on the same
    simulated scans.

    Args:
        brains, radiographs: how many subjects to simulate for the two cohorts.
        sets: overrides of both demo configs, as `--set` takes them.
    """
    started = time.monotonic()
    scans = workspace / "demo" / "scans"
    tissue = _brain_half(workspace, scans, brains, sets)
    lesion = _radiograph_half(workspace, scans, radiographs, sets)
    minutes = (time.monotonic() - started) / 60
    result = Result(
        "demo",
        "done",
        {"tissue_report": tissue.report, "lesion_report": lesion.report, "masks": tissue.predictions},
        {
            "note": "simulated: subjects deformed from one template, and a phantom; not a measure of clinical quality",
            **tissue.metrics,
            **lesion.metrics,
            "tissue_run": tissue.run_id,
            "lesion_run": lesion.run_id,
            "minutes": round(minutes, 1),
            "look": f"medseg up --workspace {shlex.quote(str(workspace))}",
        },
    )
    return result.write(workspace / "demo")


def _brain_half(workspace: Path, scans: Path, count: int, sets: tuple[str, ...]) -> Half:
    start = time.monotonic()
    _simulate(scans / "brains", count, _write_brain, 0, "Simulating brain MRI")
    _simulate(scans / "new_brains", UNSEEN_BRAINS, _write_brain, 10_000, "Simulating unseen brain MRI")
    config = road.load("demo_brain", sets)
    cohort = workspace / "cohorts" / "demo_brain"
    ingest_step(
        config,
        [scans / "brains" / "dicom"],
        cohort,
        labels=scans / "brains" / "labels",
        key=load_key(workspace / "pseudonym.key"),
    )
    trained = road.train(config, cohort, workspace)
    measured = road.evaluate(trained.run_id, cohort, workspace)
    out = workspace / "demo" / "new_brains"
    road.predict(trained.run_id, [str(scans / "new_brains" / "dicom")], out, workspace)
    road.report(str(out), workspace)
    classes = read_json(measured.paths["metrics"])["classes"]
    dice = {f"dice_{name}": figures["dice"]["mean"] for name, figures in classes.items()}
    return Half(trained.run_id, dice, out, measured.paths["report"], (time.monotonic() - start) / 60)


def _radiograph_half(workspace: Path, scans: Path, count: int, sets: tuple[str, ...]) -> Half:
    start = time.monotonic()
    folder = scans / "radiographs"
    _simulate(folder, count, _write_radiograph, 0, "Simulating radiographs")
    _simulate(scans / "new_radiographs", UNSEEN_RADIOGRAPHS, _write_radiograph, 10_000, "Simulating unseen radiographs")
    config = road.load("demo_radiograph", sets)
    cohort = workspace / "cohorts" / "demo_radiograph"
    lookup = workspace / "demo" / "radiograph_lookup.csv"
    ingest_step(
        config,
        [folder / "dicom"],
        cohort,
        labels=folder / "labels.csv",
        key=load_key(workspace / "pseudonym.key"),
        lookup=lookup,
    )
    lesions = _lesions_by_case(folder, lookup, workspace / "demo" / "lesions")
    trained = road.train(config, cohort, workspace)
    measured = road.evaluate(trained.run_id, cohort, workspace, lesions=lesions)
    out = workspace / "demo" / "new_radiographs"
    road.predict(trained.run_id, [str(scans / "new_radiographs" / "dicom")], out, workspace)
    road.report(str(out), workspace)
    figures = read_json(measured.paths["metrics"])
    shown = {
        "lesion_auc": figures["auc"]["value"],
        "map_energy_in_lesion": figures["localisation"]["energy_in_mask"]["mean"],
        "map_energy_by_chance": figures["localisation"]["mask_share"]["mean"],
    }
    return Half(trained.run_id, shown, out, measured.paths["report"], (time.monotonic() - start) / 60)


def _simulate(folder: Path, count: int, write: Callable[[Path, int], dict[str, object]], first: int, what: str) -> None:
    """Write subjects first..first+count-1 unless the same ones are there already; parameters are recorded."""
    done = folder / _DONE
    wanted = {"seed": SEED, "first": first, "count": count}
    if done.is_file() and read_json(done)["made"] == wanted:
        return
    with ProcessPoolExecutor(2) as pool, progress(what, count) as shown:
        rows = []
        for row in pool.map(partial(write, folder), range(first, first + count)):
            rows.append(row)
            shown.advance()
    parameters = [row.pop("parameters") for row in rows]
    write_rows(folder / "labels.csv", list(rows[0]), rows)
    write_json(done, {"made": wanted, "parameters": parameters})


def _write_brain(folder: Path, index: int) -> dict[str, object]:
    import numpy as np

    from medseg.data.simulate import apply_parameters, draw_parameters, load_anatomy
    from medseg.images import write_nifti
    from medseg.volume import Volume

    subject = apply_parameters(load_anatomy(SPACING_MM), draw_parameters(SEED, index))
    name = f"subject-{index:05d}"
    voxels = np.clip(np.round(subject.t1), 0, 32767).astype(np.int16)
    write_series(
        Volume(voxels, subject.affine),
        folder / "dicom" / name,
        modality="MR",
        patient_id=name,
        series_description="simulated T1",
        seed_uid=f"{SEED}/{name}",
    )
    write_nifti(folder / "labels" / f"{name}.nii.gz", Volume(subject.label, subject.affine))
    return {"image": f"dicom/{name}", "patient_id": name, "parameters": subject.params}


def _write_radiograph(folder: Path, index: int) -> dict[str, object]:
    import numpy as np

    from medseg.data.phantom import SITES, draw_radiograph_parameters, render_radiograph
    from medseg.images import write_png

    site = SITES[index // 2 % 2]
    radiograph = render_radiograph(draw_radiograph_parameters(SEED, index, bool(index % 2), site), SIZE_PX)
    name = f"chest-{index:05d}"
    path = folder / "dicom" / name / "image.dcm"
    write_radiograph(radiograph.image, radiograph.pixel_spacing_mm, path, patient_id=name, seed_uid=f"{SEED}/{name}")
    write_png(folder / "lesions" / f"{name}.png", (radiograph.lesion_mask > 0).astype(np.uint8) * np.uint8(255))
    target = "lesion" if radiograph.params.has_lesion else "normal"
    return {
        "image": f"dicom/{name}/image.dcm",
        "patient_id": name,
        "site": site,
        "target": target,
        "parameters": radiograph.params,
    }


def _lesions_by_case(folder: Path, lookup: Path, out: Path) -> Path:
    """The known lesion masks under the cohort's pseudonyms."""
    for row in read_rows(lookup):
        name = Path(row["folder"]).name
        write_bytes(out / f"{row['case_id']}.png", (folder / "lesions" / f"{name}.png").read_bytes())
    return out
