"""Whether a cohort fits the task that a network is to be trained for."""

from collections.abc import Sequence
from pathlib import Path

from medseg.cohort import Case, Cohort
from medseg.config import Config, TaskConfig
from medseg.files import UserError, read_json
from medseg.label_sets import read_set
from medseg.train.fingerprint import canonical_grids, target_spacing
from medseg.train.pooling import completed, pool_by_axis


def check_cohort(config: Config, cohort: Cohort) -> None:
    """The cohort fits the task: channels, label names, every class in the training split, and the patch that is set.

    Raises:
        UserError: naming the field, the case or the split that does not fit.
    """
    task = config.task
    where = cohort.folder / "cohort.json"
    if tuple(cohort.channels) != task.channels:
        raise UserError(f"task.channels {list(task.channels)} differ from {where}'s {list(cohort.channels)}.")
    if not _labels_fit(task, cohort):
        raise UserError(f"task.labels {task.labels} differ from {where}'s {dict(cohort.label_names)}; ingest it again.")
    for split in ("train", "val"):
        cases = [case for case in cohort.cases if case.split == split]
        if split == "train" and not cases:
            cohort.split("train")
        bare = [case.case_id for case in cases if not (case.label if task.kind == "segmentation" else case.target)]
        if bare:
            raise UserError(
                f"{cohort.folder / 'cohort.csv'}: case {bare[0]!r} of split {split!r} has no label "
                f"({len(bare)} such); ingest with --labels."
            )
        if task.kind == "classification" and cases:
            _check_classes(cohort.folder / "cohort.csv", split, cases, task)
        if config.lungs is not None and config.lungs.mask != "none" and not config.lungs.model:
            _check_masks(cohort.folder / "cohort.csv", split, cases)
    _check_patch(config, cohort)


def planned_cases(config: Config, cohort: Cohort) -> tuple[Case, ...]:
    """The cases that a plan is measured on."""
    if config.train.fold is None:
        return cohort.split("train")
    return tuple(case for case in cohort.cases if case.split in ("train", "val"))


def _check_patch(config: Config, cohort: Cohort) -> None:
    """The network takes the config's patch; where it is pooled by the cohort's spacing, only this can tell."""
    patch, spacing = config.plan.patch_size, config.plan.spacing_mm
    if patch is None or config.task.spatial_dims != 3 or not config.model.pooled_by_plan:
        return
    spacing = spacing or target_spacing(*canonical_grids(cohort, planned_cases(config, cohort)))[0]
    if problem := completed(config.model, pool_by_axis(config.model, patch, spacing)).size_problem(patch):
        raise UserError(f"plan.patch_size: {problem} (voxels of {' × '.join(f'{mm:g}' for mm in spacing)} mm).")


def _labels_fit(task: TaskConfig, cohort: Cohort) -> bool:
    """Names and values agree; where ingest guessed the names of a label map's values, the values are enough."""
    names = dict(cohort.label_names)
    if names == task.labels:
        return True
    if task.kind != "segmentation" or set(names.values()) != set(task.labels.values()):
        return False
    if any(task.labels.get(name, value) != value for name, value in names.items()):
        return False  # one name for two things: no guess, an exchange
    return bool(read_json(cohort.folder / "cohort.json")["provenance"].get("task") == "guessed")


def _check_classes(table: Path, split: str, cases: Sequence[Case], task: TaskConfig) -> None:
    """Every class or label is known and occurs, and no label is present in all cases: nothing would tell it apart."""
    found = [read_set(case.target) if task.multi_label else (case.target,) for case in cases]
    for case, names in zip(cases, found, strict=True):
        if not set(names) <= task.labels.keys():
            raise UserError(
                f"{table}: case {case.case_id!r} has the target {case.target!r}, which does not fit task.labels "
                f"({', '.join(task.labels)}) with task.multi_label {str(task.multi_label).lower()}; "
                "change the task, or ingest again."
            )
    for label in task.labels:
        count = sum(label in names for names in found)
        if count == 0:
            raise UserError(
                f"{table}: class {label!r} is missing from split {split!r} "
                f"({len(cases)} cases); change ingest.split or add cases of it."
            )
        if task.multi_label and count == len(cases):
            raise UserError(
                f"{table}: label {label!r} is present in every case of split {split!r} "
                f"({len(cases)} cases); change ingest.split or add cases without it."
            )


def _check_masks(table: Path, split: str, cases: Sequence[Case]) -> None:
    if bare := [case.case_id for case in cases if not case.label]:
        raise UserError(
            f"{table}: case {bare[0]!r} of split {split!r} has no lung mask ({len(bare)} such); leave it out, "
            "or name lungs.model."
        )
