"""Cross-validation: folds that are trained as runs of their own, and `medseg models join`, which makes them one model.

What the joined model knows of itself comes from out-of-fold predictions alone: each case of train and val as the
networks predict it that have not seen it, one for each seed. The test split stays out of everything here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from medseg.bundle import Bundle, load_bundle, read_weights
from medseg.bundle_writing import check_target, copy_bundle, save_bundle, with_explanation
from medseg.calibrations import out_of_fold_verdict
from medseg.cohort import Cohort, read_cohort
from medseg.config import Config, dump_config
from medseg.evaluate import cross_validation, earned, trust
from medseg.evaluate import step as evaluate_step
from medseg.evaluate.outcomes import Outcome, read_outcomes
from medseg.explanations import pooled as pooled_explanations
from medseg.feature_distance import join_distances
from medseg.files import UserError, write_text
from medseg.plan import IMAGE_FIELDS, write_plan
from medseg.predict import postprocess
from medseg.predict import step as predict_step
from medseg.result import Result
from medseg.runs import RunFolder, create_run, find_run
from medseg.splits import take_fold
from medseg.tracking import Tracker, track

EVALUATED = Path("evaluation") / "val"
"""Where, in the run of a fold, its out-of-fold predictions and their figures lie."""


@dataclass(frozen=True)
class Fold:
    """One finished fold: its number, its bundles (one for each seed), and what became of each of its cases."""

    number: int
    bundles: tuple[Bundle, ...]
    outcomes: tuple[Outcome, ...]


def as_trained(config: Config, cohort: Cohort) -> Cohort:
    """The cohort with the splits that a training with this config sees; raises UserError when it cannot be dealt."""
    train = config.train
    if train.fold is None:
        return cohort
    return take_fold(cohort, train.fold, train.folds, seed=config.ingest.split.seed, by=train.folds_by)


def fold_facts(config: Config) -> dict[str, int]:
    """`fold` and `folds` of a training that is one of several; empty for an ordinary one."""
    train = config.train
    return {} if train.fold is None else {"fold": train.fold, "folds": train.folds}


def measure_fold(bundle_dir: Path, cohort: Cohort, folder: RunFolder, tracker: Tracker) -> Result:
    """Predict the cases that the fold's network has not seen and compare them with their labels.

    Args:
        cohort: as `as_trained` gives it. folder: the fold's run; masks and figures go to `evaluation/val` in it.
    """
    out = folder.path / EVALUATED
    result = _measure(load_bundle(bundle_dir), cohort, out, folder.workspace)
    numbers = {name: value for name, value in result.figures.items() if isinstance(value, int | float)}
    tracker.log_metrics({f"oof_{name}": float(value) for name, value in numbers.items()}, step=0)
    for name in ("metrics.json", "cases.csv"):
        tracker.log_artifact(out / name, "evaluation/val")
    return result


def _measure(bundle: Bundle, cohort: Cohort, out: Path, workspace: Path) -> Result:
    """Masks and figures of the val split, in `out`."""
    task = bundle.config.task
    predict_step.run(bundle, cohort, out / "predictions", split="val", workspace=workspace)
    facts = {**bundle.identity(), "operating_point": bundle.facts["operating_point"]}
    return evaluate_step.run(
        cohort, out / "predictions", out, split="val", bundle_facts=facts, labels=task.labels, kind=task.measured_as
    )


def is_measured(workspace: Path, run_id: str) -> bool:
    """Whether there is such a run, with a bundle and out-of-fold predictions that were measured."""
    run = workspace / "runs" / run_id
    return (run / "bundle" / "bundle.json").is_file() and (run / EVALUATED / "evaluate.json").is_file()


def join(
    models: Sequence[str],
    workspace: Path,
    *,
    cohort: Path | None = None,
    out: Path | None = None,
    run_id: str | None = None,
) -> Result:
    """Join finished folds into one bundle whose logits are the mean of theirs, as a run of its own.

    A fold may be there several times, trained with several seeds: its cases are then predicted anew by the mean of its
    networks, in `folds/<number>/` of the run.

    Args:
        models: the folds' runs or bundles, in any order; folds that are missing are named in the result.
        cohort: that of the folds; needed where there are several seeds.
        out: a second place for the bundle, beside `runs/<id>/bundle`.
        run_id: identity given from outside; where that run was begun already, it goes on.

    Raises:
        UserError: a model is no fold, or not of the same cross-validation, or its predictions are missing; the cohort
            is missing or another; `out` exists and is no bundle.
    """
    if out is not None:
        check_target(out)
    found = sorted((_read_fold(model, workspace) for model in models), key=lambda fold: fold.number)
    _check_together(found)
    by_number = [list(group) for _, group in groupby(found, key=lambda fold: fold.number)]
    cases = _cohort_of(found[0], cohort) if any(len(group) > 1 for group in by_number) else None
    first = found[0].bundles[0]
    config = first.config.model_copy(update={"train": first.config.train.model_copy(update={"fold": None})})
    cohort_sha256 = str(first.facts["cohort_sha256"])
    facts = {"step": "join", "seed": config.seed, "cohort_sha256": cohort_sha256}
    again = bool(run_id) and (workspace / "runs" / str(run_id) / "run.json").is_file()
    name = f"{config.name}-joined"
    folder = find_run(workspace, str(run_id)) if again else create_run(workspace, name, run_id, **facts)
    tags = {"medseg.step": "join", "medseg.folds": ",".join(str(group[0].number) for group in by_number)}
    with track(folder, config.tracking, tags=tags, resume=again) as tracker:
        write_text(folder.path / "config.yaml", dump_config(config))
        write_plan(folder.path / "plan.yaml", first.plan)
        folds = [group[0] if cases is None else _pooled(group, cases, folder) for group in by_number]
        bundles = [bundle for fold in folds for bundle in fold.bundles]
        evidence, tables = collect_evidence(folds)
        figures = _headline(evidence, folds)
        outcomes = [outcome for fold in folds for outcome in fold.outcomes]
        verdict = out_of_fold_verdict(outcomes, config, cohort_sha256, tracker)
        bundle_dir = save_bundle(
            folder.path / "bundle",
            state_dict=[read_weights(bundle) for bundle in bundles],
            config=config,
            plan=first.plan,
            run_id=folder.id,
            cohort_sha256=cohort_sha256,
            metrics={name: value for name, value in figures.items() if isinstance(value, float)},
            calibration=_calibration(bundles),
            members=[_member(bundle) for bundle in bundles],
            evidence=evidence,
            attached=tables,
            verdict=verdict,
            lungs=first.lungs,
            distance=join_distances([bundle.distance for bundle in bundles]),
        )
        if explained := pooled_explanations(bundles):
            with_explanation(load_bundle(bundle_dir), bundle_dir, explained)
            tracker.set_tag("medseg.explained_by", "/".join(explained["chosen"].values()))
        tracker.log_params({"members": [bundle.run_id for bundle in bundles], "config": config.model_dump(mode="json")})
        tracker.log_metrics({name: float(v) for name, v in figures.items() if isinstance(v, int | float)}, step=0)
        tracker.log_bundle(bundle_dir, config.tracking.register_as)
    paths = {"bundle": bundle_dir if out is None else copy_bundle(bundle_dir, out), "run": folder.path}
    told, rows = _told(figures, config.train.folds), cross_validation.rows(evidence)
    return Result("models", "done", paths, figures, folder.id, rows=rows, text=told).write(folder.path)


def collect_evidence(folds: Sequence[Fold]) -> tuple[dict[str, Any], dict[str, str]]:
    """What the out-of-fold predictions say: facts for the bundle, and tables to travel with it."""
    config = folds[0].bundles[0].config
    outcomes = {fold.number: fold.outcomes for fold in folds}
    evidence: dict[str, Any] = {"folds": config.train.folds, "joined": [fold.number for fold in folds]}
    evidence["cross_validation"] = cross_validation.total(outcomes, config.task.labels, config.task.measured_as)
    if config.task.kind == "segmentation":
        pairs = [
            earned.Pair(outcome.case.patient_id, outcome.pred, Path(outcome.case.label), outcome.not_annotated)
            for fold in folds
            for outcome in fold.outcomes
            if outcome.measured and outcome.pred is not None
        ]
        evidence["postprocessing"] = earned.choose(pairs, config.task.labels, postprocess.apply)
        evidence["expected_dice"] = trust.calibrate(outcomes, config.task.labels)
        evidence["volumes_ml"] = trust.volume_ranges(pairs, config.task.labels)
    return evidence, {"out_of_fold.csv": cross_validation.table(outcomes)}


def _read_fold(model: str, workspace: Path) -> Fold:
    bundle = load_bundle(model, workspace)
    number = bundle.config.train.fold
    if number is None:
        raise UserError(f"model {model!r} is no fold of a cross-validation; train folds with --set train.fold=0, 1, ….")
    run = find_run(workspace, bundle.run_id)
    if not is_measured(workspace, run.id):
        raise UserError(f"{run.path / EVALUATED} holds no figures; finish the fold with `--resume {run.id}`.")
    return Fold(number, (bundle,), tuple(read_outcomes(run.path / EVALUATED)))


def _cohort_of(fold: Fold, folder: Path | None) -> Cohort:
    """The cohort that the folds were trained on."""
    if folder is None:
        raise UserError(
            "a fold is there with several seeds; name the folds' cohort by --cohort, to measure their mean."
        )
    cohort = read_cohort(folder)
    if cohort.sha256 != fold.bundles[0].facts["cohort_sha256"]:
        raise UserError(f"--cohort {folder} is not the one that the folds were trained on; name that.")
    return cohort


def _pooled(group: Sequence[Fold], cohort: Cohort, folder: RunFolder) -> Fold:
    """The networks of one fold as one, measured on the fold's cases; of a fold with one network, that as it is."""
    if len(group) == 1:
        return group[0]
    bundles = [fold.bundles[0] for fold in group]
    first, place = bundles[0], folder.path / "folds" / str(group[0].number)
    made = save_bundle(
        place / "bundle",
        state_dict=[read_weights(bundle) for bundle in bundles],
        config=first.config,
        plan=first.plan,
        run_id=folder.id,
        cohort_sha256=cohort.sha256,
        metrics={},
        calibration=_calibration(bundles),
        members=[_member(bundle) for bundle in bundles],
        lungs=first.lungs,
    )
    _measure(load_bundle(made), as_trained(first.config, cohort), place / EVALUATED, folder.workspace)
    return Fold(group[0].number, tuple(bundles), tuple(read_outcomes(place / EVALUATED)))


def _check_together(folds: Sequence[Fold]) -> None:
    seeds = [(fold.number, fold.bundles[0].config.seed) for fold in folds]
    if twice := [known for known in set(seeds) if seeds.count(known) > 1]:
        number, seed = twice[0]
        raise UserError(f"fold {number} is named twice with the seed {seed}; give one run for each fold and seed.")
    first, *others = [fold.bundles[0] for fold in folds]
    named = repr(first.run_id)
    for other in others:
        run = other.run_id
        if other.facts["cohort_sha256"] != first.facts["cohort_sha256"]:
            raise UserError(f"run {run!r} was trained on another cohort than {named}; join folds of one cohort.")
        if field := _first_difference(_common(other.config), _common(first.config)):
            raise UserError(
                f"the config of run {run!r} differs from that of {named} in more than train.fold and seed: in {field}."
            )
        if (other.plan.patch_size, *_grid(other)) != (first.plan.patch_size, *_grid(first)):
            raise UserError(f"the plan of run {run!r} differs from that of {named}; train it again with one plan.")
        if other.facts.get("lungs") != first.facts.get("lungs"):
            raise UserError(f"the lung model of run {run!r} differs from that of {named}; train both with one.")


def _first_difference(one: Any, other: Any) -> str:
    """The dotted name of the first field in which two trees differ; empty where they are equal."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)) or one.keys() != other.keys():
        return ""
    field = next((name for name in one if one[name] != other[name]), None)
    if field is None:
        return ""
    below = _first_difference(one[field], other[field])
    return f"{field}.{below}" if below else str(field)


def _common(config: Config) -> Mapping[str, Any]:
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree["train"] = {**tree["train"], "fold": None, "checkpoint_minutes": None}
    if tree["model"].get("weights") not in (None, "hub"):  # each fold's own, pretrained without what measures it
        tree["model"] = {**tree["model"], "weights": "a file"}
    return {name: value for name, value in tree.items() if name not in ("device", "tracking", "report", "seed")}


def _grid(bundle: Bundle) -> tuple[object, ...]:
    return tuple(getattr(bundle.plan, name) for name in IMAGE_FIELDS)


def _member(bundle: Bundle) -> dict[str, Any]:
    fold, seed = bundle.config.train.fold, bundle.config.seed
    about = {"run_id": bundle.run_id, "fold": fold, "seed": seed, "sha256": bundle.sha256}
    return {**about, "temperature": bundle.temperature}


def _calibration(bundles: Sequence[Bundle]) -> dict[str, float] | None:
    """Means over the networks; each one's own temperature stands with the member."""
    known = [bundle.facts["calibration"] for bundle in bundles if bundle.facts["calibration"]]
    if not known or len(known) < len(bundles):
        return None
    names = [name for name in known[0] if all(name in found for found in known)]
    return {name: float(sum(found[name] for found in known)) / len(known) for name in names}


def _headline(evidence: Mapping[str, Any], folds: Sequence[Fold]) -> dict[str, object]:
    missing = sorted(set(range(evidence["folds"])) - {fold.number for fold in folds})
    networks = sum(len(fold.bundles) for fold in folds)
    figures: dict[str, object] = {"folds": len(folds), **({"networks": networks} if networks > len(folds) else {})}
    figures |= {"missing_folds": missing} if missing else {}
    figures |= cross_validation.headline(evidence["cross_validation"])
    for label, found in (evidence.get("expected_dice") or {}).items():
        held_out = found["held_out"]
        flat = {f"expected_dice_{name}_{label}": held_out[name] for name in ("spearman", "absolute_error")}
        figures |= {name: value for name, value in flat.items() if math.isfinite(value)}
    used = [f"{c['label']}: {c['operation']}" for c in evidence.get("postprocessing") or () if c["used"]]
    return figures | ({"postprocessing": used} if used else {})


def _told(figures: Mapping[str, object], folds: int) -> str:
    """What a person has to know of the joined model, in two sentences."""
    missing, used = figures.get("missing_folds"), figures.get("postprocessing")
    text = f"{figures['folds']} of {folds} folds joined"
    text += f", {figures['networks']} networks in all" if "networks" in figures else ""
    text += f"; missing: {', '.join(map(str, missing))}." if isinstance(missing, list) else "."
    chosen = ", ".join(map(str, used)) if isinstance(used, list) else "none is applied"
    return f"{text} Post-processing that out-of-fold predictions speak for: {chosen}.".replace("_", " ")
