"""The test-retest noise of a segmentation model's volumes, from repeat scans: `medseg models calibrate`."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from medseg.bundle import Bundle
from medseg.bundle_writing import with_retest
from medseg.change import Retest, measure_retest
from medseg.cohort import Case, Cohort
from medseg.files import UserError
from medseg.predict import step
from medseg.predict.changes import volumes_by_patient
from medseg.predict.jobs import cohort_jobs
from medseg.result import Result
from medseg.runs import create_run
from medseg.tracking import track


def run(bundle: Bundle, cohort: Cohort, workspace: Path, *, out: Path | None, within_days: int) -> Result:
    """Segment the repeat scans of a cohort and keep how much their volumes differ, as a run with a bundle of its own.

    Scans of one patient at most `within_days` apart are taken for repeats: nothing can have changed between them. Of
    the cohort that the model was trained on, cases that it has seen do not count.

    Raises:
        UserError: no patient has repeat scans, or none of them could be measured.
    """
    repeats = _repeats(_unseen(bundle, cohort), within_days)
    if not repeats:
        raise UserError(
            f"{cohort.folder / 'cohort.csv'}: no patient that model {bundle.name!r} has not seen has two scans at most "
            f"{within_days} days apart (exam_day); ingest repeat scans, or set predict.change.retest_days."
        )
    patients = {case.patient_id for group in repeats for case in group}
    chosen = replace(cohort, cases=tuple(case for case in cohort.cases if case.patient_id in patients))
    facts = {"step": "calibrate", "seed": bundle.config.seed, "cohort_sha256": cohort.sha256}
    folder = create_run(workspace, f"calibrate-{bundle.name}", None, **facts, bundle_sha256=bundle.sha256)
    with track(folder, bundle.config.tracking, tags={"medseg.step": "calibrate"}) as tracker:
        tracker.log_cohort(cohort, "calibrate")
        done = step.run(bundle, chosen, folder.path / "predictions", workspace=workspace)
        labels = _measure(bundle, chosen, repeats, folder.path / "predictions")
        if not labels:
            raise UserError(f"{done.paths['ledger']}: no repeat scans of one patient were both segmented; see why.")
        told = {name: asdict(retest) for name, retest in labels.items()}
        retest = {"labels": told, "within_days": within_days, "cohort_sha256": cohort.sha256}
        made = with_retest(bundle, out or folder.path / "bundle", retest, run_id=folder.id)
        noise = {f"retest_cv_percent_{name}": round(r.cv_percent, 4) for name, r in labels.items()}
        tracker.log_metrics(noise)
        version = tracker.log_bundle(made, bundle.config.tracking.register_as)
    figures: dict[str, object] = dict(noise)
    if version is not None:
        figures["model"] = version.uri
    paths = {"bundle": made, "run": folder.path, "ledger": done.paths["ledger"]}
    return Result("models", done.status, paths, figures, folder.id, text=in_words(labels)).write(folder.path)


def in_words(labels: dict[str, Retest]) -> str:
    """One line a label: its noise, how sure that is, and what a change has to exceed."""
    return "\n".join(
        f"{name}: {r.cv_percent:.2f} % (95 % interval {r.cv_low:.2f} to {r.cv_high:.2f}, {r.scans} scans of "
        f"{r.patients} patients); a difference below {r.repeatability_percent:.1f} % is within the noise."
        for name, r in labels.items()
    )


def _unseen(bundle: Bundle, cohort: Cohort) -> list[Case]:
    if cohort.sha256 != bundle.facts["cohort_sha256"]:
        return list(cohort.cases)
    seen = {"train", "val"} if bundle.members or bundle.config.train.fold is not None else {"train"}
    return [case for case in cohort.cases if case.split not in seen]


def _repeats(cases: Sequence[Case], within_days: int) -> list[list[Case]]:
    """Groups of two scans or more of a patient, each at most so many days after the first of its group."""
    by_patient: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        if case.exam_day is not None:
            by_patient[case.patient_id].append(case)
    groups: list[list[Case]] = []
    for members in by_patient.values():
        group: list[Case] = []
        for case in sorted(members, key=lambda case: (case.exam_day or 0, case.case_id)):
            if group and (case.exam_day or 0) - (group[0].exam_day or 0) > within_days:
                groups.append(group)
                group = []
            group.append(case)
        groups.append(group)
    return [group for group in groups if len(group) > 1]


def _measure(bundle: Bundle, cohort: Cohort, repeats: Sequence[Sequence[Case]], out: Path) -> dict[str, Retest]:
    exams = volumes_by_patient(cohort_jobs(cohort, None), out).values()
    volumes = {job.case_id: result["volumes_ml"] for found in exams for job, result in found}
    labels = {}
    for label in bundle.labels:
        groups = [[volumes[c.case_id][label] for c in group if c.case_id in volumes] for group in repeats]
        if (retest := measure_retest(groups)) is not None:
            labels[label] = retest
    return labels
