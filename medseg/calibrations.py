"""`medseg models calibrate`: a classifier's verdict, fitted when it is trained and again at a new site; the
test-retest noise of a segmentation model is measured by `medseg.retests`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg import retests
from medseg.bundle import Bundle, load_bundle
from medseg.bundle_writing import check_target, with_verdict
from medseg.cohort import Case, Cohort, read_cohort
from medseg.config import Config, apply_override, validate_config
from medseg.evaluate.calibrate import CannotCalibrate, calibrate, calibrate_out_of_fold
from medseg.evaluate.outcomes import Outcome, reason_of
from medseg.files import UserError
from medseg.predict import load_network, view_of
from medseg.result import Result
from medseg.runs import create_run
from medseg.tracking import Tracker, track
from medseg.verdict import Verdict


def add_verdict(bundle_dir: Path, cohort: Cohort, tracker: Tracker) -> dict[str, float]:
    """Calibrate a classifier on its validation split, and write the verdict into its bundle.

    Where `train.select` is `best`, the same split chose the weights, which makes it a little optimistic: the figures
    that count are those of the test split at the threshold chosen here.

    A fold gets none: its validation cases are those that it is measured on, which a threshold of their own would
    flatter.

    Returns:
        The figures of the verdict by name; empty for folds, labels that are not exclusive and other models, and where
        the split allows no calibration, which is said on stderr and in the run's tag `medseg.no_verdict`.
    """
    bundle = load_bundle(bundle_dir)
    task = bundle.config.task
    if task.kind != "classification" or task.multi_label or bundle.config.train.fold is not None:
        return {}
    cases = [case for case in cohort.cases if case.split == "val"]
    try:
        verdict = calibrate(
            load_network(bundle),
            bundle.plan,
            bundle.labels,
            cohort,
            cases,
            bundle.config.verdict,
            split="val",
            trained_sites=sorted({case.site for case in cohort.cases if case.split in ("train", "val")}),
            lungs=view_of(bundle),
            mirror_axes=bundle.config.predict.mirror_axes,
        )
    except CannotCalibrate as error:
        _note_no_verdict(reason_of(error, cohort.folder.parent), tracker)
        return {}
    with_verdict(bundle, bundle_dir, verdict)
    figures = _figures(verdict)
    tracker.log_metrics({f"verdict_{name}": value for name, value in figures.items()})
    return {f"val_{name}" if name != "threshold" else name: value for name, value in figures.items()}


def out_of_fold_verdict(
    outcomes: Sequence[Outcome], config: Config, cohort_sha256: str, tracker: Tracker
) -> Verdict | None:
    """The verdict of joined folds; None for other tasks, and where the cases allow none, which is noted."""
    task = config.task
    if task.kind != "classification" or task.multi_label:
        return None
    try:
        return calibrate_out_of_fold(outcomes, task.labels, config.verdict, cohort_sha256=cohort_sha256)
    except CannotCalibrate as error:
        _note_no_verdict(str(error), tracker)
        return None


def _note_no_verdict(reason: str, tracker: Tracker) -> None:
    print(f"Note: the bundle carries no verdict: {reason}", file=sys.stderr)
    tracker.set_tag("medseg.no_verdict", reason)


def run(
    model: str, cohort_dir: Path, workspace: Path, *, out: Path | None = None, overrides: Sequence[str] = ()
) -> Result:
    """Fit the verdict of a model anew on labelled cases of a cohort, as a run of its own with a bundle of its own.

    Of a segmentation model the test-retest noise is measured instead, on the cohort's repeat scans.

    All labelled cases of the cohort count; of the cohort that the model was trained on, those of the split `val`.

    Args:
        out: folder of the new bundle; by default `runs/<id>/bundle`.
        overrides: `verdict.field=value`, such as the prevalence at the new site; of a segmentation model
            `predict.change.field=value`.

    Returns:
        A result whose text says how sure sensitivity and specificity are, and how many more cases would halve their
        intervals.

    Raises:
        UserError: the model has task.multi_label, an override is about something else, the cases allow no calibration
            or were all seen in training, or `out` exists and is no bundle.
    """
    if out is not None:
        check_target(out)
    bundle, cohort = load_bundle(model, workspace), read_cohort(cohort_dir)
    config = _config(bundle, overrides)
    if config.task.kind == "segmentation":
        return retests.run(bundle, cohort, workspace, out=out, within_days=config.predict.change.retest_days)
    cases, split = _cases(bundle, cohort)
    facts = {"step": "calibrate", "seed": config.seed, "cohort_sha256": cohort.sha256, "bundle_sha256": bundle.sha256}
    net = load_network(bundle)
    verdict = calibrate(
        net,
        bundle.plan,
        bundle.labels,
        cohort,
        cases,
        config.verdict,
        split=split,
        trained_sites=bundle.trained_sites,
        new_site=split != "val",
        earlier=bundle.verdict,
        lungs=view_of(bundle),
        mirror_axes=config.predict.mirror_axes,
    )
    folder = create_run(workspace, f"calibrate-{config.name}", None, **facts)
    with track(folder, config.tracking, tags={"medseg.step": "calibrate"}) as tracker:
        tracker.log_params(config.verdict.model_dump(mode="json"))
        tracker.log_cohort(cohort, "calibrate")
        made = with_verdict(bundle, out or folder.path / "bundle", verdict, run_id=folder.id, config=config)
        tracker.log_metrics({f"verdict_{name}": value for name, value in _figures(verdict).items()})
        version = tracker.log_bundle(made, config.tracking.register_as)
    figures: dict[str, object] = {**_figures(verdict), "method": verdict.method, "calibration": verdict.id}
    figures |= {"cases": verdict.fitted["n"], "positive_cases": verdict.fitted["n_positive"]}
    if version is not None:
        figures["model"] = version.uri
    paths = {"bundle": made, "run": folder.path}
    return Result("models", "done", paths, figures, folder.id, text=in_words(verdict)).write(folder.path)


def in_words(verdict: Verdict) -> str:
    """How sure the verdict is, and what would make it surer."""
    point = verdict.point
    lines = []
    for name, of, more in (("sensitivity", "positive", "positive"), ("specificity", "negative", "negative")):
        found: Mapping[str, Any] = point[name]
        lines.append(
            f"{name.capitalize()} {found['value']:.3f}, 95 % interval {found['ci_low']:.3f} to {found['ci_high']:.3f} "
            f"({found['n']} {of} cases); {point['more_to_halve'][more]} more {of} cases would halve its width."
        )
    share, ppv = point["referral_rate"], point["ppv"]
    lines.append(
        f"At a prevalence of {point['prevalence']:.1%}, {share['value']:.1%} of all are referred "
        f"({share['ci_low']:.1%} to {share['ci_high']:.1%}), and {ppv['value']:.1%} of these have "
        f"{verdict.positive}."
    )
    if lent := verdict.fitted.get("borrowed"):
        lines.append(
            f"The threshold is where a sensitivity of {point['target_sensitivity']:g} is expected, from where the "
            f"positive cases lie and how they spread; {lent['cases']:g} cases' worth of the spread is that of the "
            f"calibration before, {lent['calibration']} (verdict.borrowed_cases)."
        )
    return "\n".join(lines)


def _config(bundle: Bundle, overrides: Sequence[str]) -> Config:
    if bundle.config.task.multi_label:
        raise UserError(
            f"model {bundle.name!r} has task.multi_label true, and a verdict is about one class; train a model of the "
            "label to refer."
        )
    tree = bundle.config.model_dump(mode="json")
    section = "verdict" if bundle.config.task.kind == "classification" else "predict.change"
    for override in overrides:
        if not override.startswith(f"{section}."):
            raise UserError(f"--set {override!r}: only fields of {section} can be set here; train again for others.")
        apply_override(tree, override)
    return validate_config(tree, "--set")


def _cases(bundle: Bundle, cohort: Cohort) -> tuple[list[Case], str]:
    """What the model was not trained on, and the split that this is; empty for a whole cohort."""
    if cohort.sha256 != bundle.facts["cohort_sha256"]:
        return list(cohort.cases), ""
    if bundle.members or bundle.config.train.fold is not None:
        raise UserError(
            f"{cohort.folder}: folds of model {bundle.name!r} were trained on its val split; calibrate on labelled "
            "cases of another cohort."
        )
    return [case for case in cohort.cases if case.split == "val"], "val"


def _figures(verdict: Verdict) -> dict[str, float]:
    figures = {"threshold": verdict.threshold}
    for name in ("sensitivity", "specificity"):
        found = verdict.point[name]
        figures |= {name: found["value"], f"{name}_low": found["ci_low"], f"{name}_high": found["ci_high"]}
    return {name: round(float(value), 5) for name, value in figures.items()}
