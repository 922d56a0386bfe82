"""Volumes of each patient of a batch over time: `changes.json`, from the results on disk."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg.bundle import Bundle
from medseg.change import Retest, known_retests, measure_change
from medseg.exams import in_order
from medseg.files import read_json, write_json
from medseg.ledger import USABLE
from medseg.predict.jobs import Job

Exams = dict[str, list[tuple[Job, Mapping[str, Any]]]]


def write_changes(path: Path, jobs: Sequence[Job], bundle: Bundle) -> Path | None:
    """Write what became of each structure's volume in every patient who was examined on two days or more.

    Returns:
        None, and no file, where there is no such patient; a file of before is removed.
    """
    config = bundle.config.predict.change
    retests = known_retests(bundle.retest.get("labels") or {}, config.cv_percent)
    patients = []
    for patient, exams in volumes_by_patient(jobs, path.parent).items():
        days = [job.exam_day for job, _ in exams if job.exam_day is not None]
        if len(set(days)) < 2:
            continue
        structures = {
            label: measure_change(days, volumes, retests.get(label), min_days=config.min_days)
            for label in bundle.labels
            if None not in (volumes := [result["volumes_ml"].get(label) for _, result in exams])
        }
        told = [{"case_id": job.case_id, "day": job.exam_day, "status": result["status"]} for job, result in exams]
        patients.append({"patient_id": patient, "exams": told, "structures": structures})
    if not patients:
        path.unlink(missing_ok=True)
        return None
    about = {"within_days": bundle.retest.get("within_days"), "min_days": config.min_days}
    noise = {label: _told(retest) for label, retest in retests.items()}
    return write_json(path, {"bundle": bundle.identity(), **about, "retest": noise, "patients": patients})


def volumes_by_patient(jobs: Sequence[Job], out: Path) -> Exams:
    """The dated examinations with volumes of each patient, in the order of time."""
    found: Exams = defaultdict(list)
    for job in in_order(job for job in jobs if job.exam_day is not None and job.patient_id):
        file = out / job.case_id / "result.json"
        result = read_json(file) if file.is_file() else {}
        if result.get("status") in USABLE and result.get("volumes_ml"):
            found[job.patient_id].append((job, result))
    return found


def _told(retest: Retest) -> dict[str, Any]:
    measured = "measured" if retest.scans else "stated in the config"
    return {**vars(retest), "repeatability_percent": retest.repeatability_percent, "source": measured}
