"""The step `plan`: what the cohort measures, what follows from it, and what fits into memory.

When is memory measured? `medseg plan` always does. `medseg train` without a plan makes one, and measures where the
choice depends on it: with `plan.memory_gb` set, and on a GPU where the config fixes neither patch nor batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from medseg.cohort import Cohort
from medseg.config import Config, ModelConfig, PlanConfig
from medseg.data.lung_view import LungView
from medseg.files import UserError, dump_json
from medseg.plan import Plan, write_plan
from medseg.result import Result
from medseg.train import probe
from medseg.train.budget import Choice, Chooser
from medseg.train.cohort_check import check_cohort, planned_cases
from medseg.train.device import choose_device, device_name, free_memory_gb
from medseg.train.draft import Draft, draft_plan
from medseg.train.fingerprint import canonical_grids
from medseg.train.memory_law import Candidate, Measure, Measured, TooLarge
from medseg.train.pooling import divisors_of
from medseg.train.reference import with_appearance

_GPU_SHARE, _CPU_SHARE = 0.9, 0.8  # of the free memory, where no budget is given
_MODES = ("store", "checkpoint", "reversible")  # fastest first


def run(config: Config, cohort: Cohort, out: Path, *, measure: bool = True, lungs: LungView | None = None) -> Result:
    """Write `out/plan.yaml`: grid, patch, batch, pooling and intensities, each with its reason; with `measure`, also
    the memory mode, the peak memory and the time of a training step, measured in processes of their own.

    Args:
        lungs: what a classifier sees of a radiograph; needed where `matches_lungs`.

    Raises:
        UserError: the cohort does not fit the config, nothing can be planned from it, or nothing fits the budget.
    """
    check_cohort(config, cohort)
    plan = measured_plan(config, cohort, lungs=lungs) if measure else make_plan(config, cohort, lungs)
    figures: dict[str, object] = {"cases": len(cohort.cases), "patch_size": plan.patch_size}
    figures |= {"batch_size": plan.batch_size, "spacing_mm": plan.spacing_mm or plan.size_px}
    if measure:
        names = ["memory_mode", "predicted_memory_gb", "memory_gb", "step_seconds"]
        names += ["predicted_step_seconds"] if plan.step_seconds is None else []
        figures |= {name: value for name in names if (value := getattr(plan, name)) not in (None, "")}
        figures |= _time_estimate(config, cohort, plan)
    path = write_plan(out / "plan.yaml", plan)
    return Result("plan", "done", {"plan": path}, figures).write(out)


def make_plan(config: Config, cohort: Cohort, lungs: LungView | None = None) -> Plan:
    """Fingerprint of the train split, then the plan, without measuring memory; what the config fixes is taken as it
    is.

    Folds share one plan, measured on all that is not of the test split: only so can their networks see one image.

    Args:
        lungs: what a classifier sees of a radiograph.
    """
    return _with_appearance(config, cohort, _draft(config, cohort).plan, lungs)


def plan_to_train(config: Config, cohort: Cohort, lungs: LungView | None = None) -> Plan:
    """The plan of a training that was not planned: measured only where a choice depends on it."""
    free = config.plan.patch_size is None and config.plan.size_px is None and config.plan.batch_size is None
    if config.plan.memory_gb is not None or (free and choose_device(config.device).type == "cuda"):
        return measured_plan(config, cohort, lungs=lungs)
    return make_plan(config, cohort, lungs)


def measured_plan(
    config: Config, cohort: Cohort, measure: Measure | None = None, lungs: LungView | None = None
) -> Plan:
    """The plan whose patch, batch and memory mode fit the budget.

    Args:
        measure: how a candidate is measured; by default in a fresh process.
        lungs: what a classifier sees of a radiograph.

    Raises:
        UserError: nothing fits; it names what would.
    """
    draft = _draft(config, cohort)
    device = choose_device(config.device)
    budget_gb, why = _budget(config.plan, device)
    case_size = _largest_validation_case(config, cohort, draft.plan)
    chooser = Chooser(
        draft.candidates,
        _modes(config.model),
        budget_gb,
        measure or _measurer(config, draft.plan, case_size),
        lambda candidate, share: _shrunk(config.model, candidate, share),
        device_type=device.type,
        seconds=config.plan.probe_seconds,
    )
    try:
        choice = chooser.choose()
    except TooLarge as error:
        raise UserError(
            f"{device_name(device)}: not even {error} could be trained for a step, out of memory; make model.channels "
            "smaller, or free memory."
        ) from error
    return _with_appearance(config, cohort, _chosen(draft.plan, choice, device_name(device), budget_gb, why), lungs)


def plan_key(config: Config, cohort: Cohort) -> str:
    """Names what a plan was made for; a plan with another key is stale."""
    parts = [cohort.sha256, config.task, config.plan, config.model]
    parts += ["folds"] if config.train.fold is not None else []
    parts += [config.lungs] if matches_lungs(config) else []
    return hashlib.sha256(dump_json([str(part) for part in parts]).encode()).hexdigest()[:16]


def _draft(config: Config, cohort: Cohort) -> Draft:
    drafted = draft_plan(config, cohort, planned_cases(config, cohort))
    fingerprint = {"key": plan_key(config, cohort), **drafted.plan.fingerprint}
    return replace(drafted, plan=replace(drafted.plan, fingerprint=fingerprint))


def matches_lungs(config: Config) -> bool:
    """Whether the plan holds what the visible part of a radiograph is matched to."""
    looks, lungs = config.plan.appearance, config.lungs
    matches = looks.match_sharpness or looks.histogram == "landmarks"
    return matches and lungs is not None and lungs.mask != "none"


def _with_appearance(config: Config, cohort: Cohort, plan: Plan, lungs: LungView | None) -> Plan:
    """What images are matched to, measured last: on the grid that was chosen."""
    assert lungs is not None or not matches_lungs(config)
    return with_appearance(plan, config.plan.appearance, cohort, planned_cases(config, cohort), lungs)


def _budget(fixed: PlanConfig, device: torch.device) -> tuple[float, str]:
    if fixed.memory_gb is not None:
        return fixed.memory_gb, "set in the config"
    share = _GPU_SHARE if device.type == "cuda" else _CPU_SHARE
    free = free_memory_gb(device)
    return share * free, f"{share:.0%} of the {free:.1f} GB that are free"


def _modes(model: ModelConfig) -> tuple[str, ...]:
    """The memory modes to choose from, fastest first; the config's own where it names one."""
    fields = type(model).model_fields
    if "memory" not in fields:
        return ("",)
    if "memory" in model.model_fields_set:
        return (str(getattr(model, "memory")),)  # noqa: B009  (not every model has it)
    known = get_args(fields["memory"].annotation)
    return tuple(mode for mode in _MODES if mode in known)


def _measurer(config: Config, plan: Plan, case_size: Sequence[int] | None) -> Measure:
    def measure(candidate: Candidate, mode: str, steps: int) -> Measured:
        trial = replace(
            plan, patch_size=candidate.patch, batch_size=candidate.batch, network=candidate.network, memory_mode=mode
        )
        try:
            found = probe.probe(config, trial, steps=steps, case_size=case_size)
        except probe.OutOfMemory as error:
            raise TooLarge(str(candidate)) from error
        return Measured(candidate, mode, found["step_gb"], found["peak_gb"], found["step_seconds"])

    return measure


def _shrunk(model: ModelConfig, candidate: Candidate, share: float) -> Candidate | None:
    divisors = divisors_of(model, len(candidate.patch), candidate.network)
    made = probe.shrink_patch(candidate.patch, candidate.batch, divisors, share)
    return Candidate(made[0], made[1], candidate.network) if made else None


def _largest_validation_case(config: Config, cohort: Cohort, plan: Plan) -> tuple[int, ...] | None:
    """Voxels per axis, on the network's grid, of the largest case that validation predicts."""
    cases = [case for case in cohort.cases if case.split == "val"]
    if not cases:
        return None
    if plan.size_px:
        return plan.size_px
    spacings, shapes = canonical_grids(cohort, cases)
    extents = np.round(shapes * spacings / np.asarray(plan.spacing_mm)).astype(int)
    return tuple(int(n) for n in extents[np.argmax(extents.prod(axis=1))])


def _chosen(plan: Plan, choice: Choice, device: str, budget_gb: float, why: str) -> Plan:
    """The plan with the choice in it, and why."""
    candidate, measured = choice.candidate, choice.measured
    reasons: dict[str, str] = {**plan.reasons, **choice.notes}
    reasons["memory_law"] = f"budget {budget_gb:.2f} GB: {why}"
    for name, new, old in (
        ("size_px" if plan.size_px else "patch_size", candidate.patch, plan.patch_size),
        ("batch_size", candidate.batch, plan.batch_size),
    ):
        if new != old:
            reasons[name] += f"; {old} taken down to fit {budget_gb:.2f} GB"
    return replace(
        plan,
        patch_size=candidate.patch,
        size_px=candidate.patch if plan.size_px else (),
        batch_size=candidate.batch,
        network=candidate.network,
        memory_mode=choice.mode,
        predicted_memory_gb=round(choice.predicted_gb, 3),
        memory_gb=round(measured.peak_gb, 3) if measured else None,
        predicted_step_seconds=round(choice.predicted_seconds, 4),
        step_seconds=measured.step_seconds if measured else None,
        memory_law=choice.law_facts(device, budget_gb),
        reasons=reasons,
    )


def _time_estimate(config: Config, cohort: Cohort, plan: Plan) -> dict[str, object]:
    steps = config.train.steps_per_epoch or max(1, len(cohort.split("train")) // plan.batch_size)
    seconds = plan.step_seconds or plan.predicted_step_seconds
    return {"train_minutes": round(config.train.epochs * steps * seconds / 60, 1)} if seconds else {}
