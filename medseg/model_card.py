"""The model card: what a model is for, what it was measured at, and where it ends. Made of facts only."""

from collections.abc import Iterator, Mapping
from typing import Any

from medseg.config import Config
from medseg.plan import Plan
from medseg.unlearned import not_learned
from medseg.verdict import Verdict


def model_card(facts: Mapping[str, Any], config: Config, plan: Plan, verdict: Verdict | None = None) -> str:
    """The model card in Markdown, made of facts only."""
    task, grid = config.task, " × ".join(f"{n:g}" for n in plan.spacing_mm or plan.size_px)
    kind = "multi-label classification" if task.multi_label else task.kind
    if grid:
        grid += " mm" if plan.spacing_mm else " px"
    cases = plan.fingerprint.get("cases", "an unknown number of")
    figures = [
        f"| {name.replace('_', ' ')} | {value:.4g} |"
        for name, value in facts["metrics"].items()
        if isinstance(value, (int, float))
    ]
    simulated = "\nThe training cases are simulated; figures on them say nothing about patients.\n"
    return "\n".join(
        [
            f"# {config.name}",
            "",
            f"{kind.capitalize()} in {task.spatial_dims}D of {', '.join(task.labels)} from the image channels "
            f"{', '.join(task.channels)}, by the network `{config.model.name}`.",
            "",
            "## Intended use",
            "",
            "Research only. Not a medical device; a qualified person must review every result.",
            "",
            "## Data",
            "",
            f"Trained on {cases} cases of the cohort with SHA-256 `{facts['cohort_sha256']}`, on "
            f"{f'a grid of {grid}' if grid else 'their own grids'} (normalisation: {plan.normalise}).",
            *_partly_annotated(plan),
            simulated if config.ingest.simulated else "",
            "## Figures",
            "",
            "Measured during training, on the validation split where named `val`. The test split is measured by "
            "`medseg evaluate`.",
            "",
            *(["| figure | value |", "|---|---|", *figures] if figures else ["None was recorded."]),
            "",
            *_joined(facts),
            *_adapted(facts),
            *_retest(facts),
            "## Limits",
            "",
            *(f"{sentence[0].upper()}{sentence[1:]}" for sentence in not_learned(facts["metrics"])),
            "Not tested on other scanners, protocols, ages or diseases than those of its cohort. Probabilities are "
            f"{'calibrated' if facts['calibration'] else 'not calibrated'}.",
            *_distance_lines(facts.get("feature_distance")),
            "",
            *(_verdict_lines(verdict) if verdict else ()),
            *_explanation_lines(facts.get("explained_by") or {}),
            "## Origin",
            "",
            f"Run `{facts['run_id']}`, seed {config.seed}, medseg {facts['version']}.",
            "",
        ]
    )


def _partly_annotated(plan: Plan) -> Iterator[str]:
    """Which structures the labels of some training cases do not tell of."""
    cases, classes = plan.fingerprint.get("read_cases", 0), plan.fingerprint.get("classes", {})
    few = [
        f"{name} in {found['annotated']}" for name, found in classes.items() if found.get("annotated", cases) < cases
    ]
    if few:
        yield f"Some have not all structures contoured; of {cases} cases looked at: {', '.join(few)}."


def _joined(facts: Mapping[str, Any]) -> Iterator[str]:
    """What cross-validation says, where folds were joined."""
    members, evidence = facts.get("members") or (), facts.get("evidence") or {}
    if not members or not evidence:
        return
    yield "## Cross-validation"
    yield ""
    folds = sorted({member["fold"] for member in members})
    named, each = ", ".join(map(str, folds)), len(members) > len(folds)
    yield f"{len(members)} networks whose logits are averaged, of the folds {named} of {evidence['folds']}. Each case"
    yield f"was measured by {'those networks' if each else 'the one network'} that had not seen it."
    yield ""
    if "mean_dice" not in evidence["cross_validation"]:
        auc = evidence["cross_validation"]["auc"]
        yield from (f"Area under the ROC curve {_interval({**auc, 'mean': auc['value']})}.", "")
        return
    yield "| label | Dice | HD95 (mm) | surface Dice | cases |"
    yield "|---|---|---|---|---|"
    for label, found in evidence["cross_validation"]["classes"].items():
        cells = [_interval(found[name]) for name in ("dice", "hd95_mm", "surface_dice")]
        yield f"| {label} | {' | '.join(cells)} | {found['dice']['n']} |"
    yield ""
    for choice in evidence.get("postprocessing") or ():
        if choice["used"]:
            yield f"- {choice['label']}: {choice['operation'].replace('_', ' ')} is applied, since it raises the mean "
            yield f"  Dice from {choice['dice_before']:.4f} to {choice['dice_after']:.4f} (n = {choice['n']})."
    yield ""


def _adapted(facts: Mapping[str, Any]) -> Iterator[str]:
    """To which images the batch norms were adapted, if they were."""
    if about := facts.get("adapted"):
        yield "## Adaptation"
        yield ""
        where = f"the split `{about['split']}` of " if about["split"] else ""
        yield f"The statistics of {about['layers']} batch norms were re-estimated on {about['cases']} images of {where}"
        yield f"the cohort with SHA-256 `{about['cohort_sha256']}`, without their labels. The figures above were"
        yield f"measured before, on the model `{facts['made_from'][:12]}`."
        yield ""


def _distance_lines(about: Mapping[str, Any] | None) -> Iterator[str]:
    """Which scans are flagged as unlike the training cohort."""
    if not about:
        return
    yield ""
    if about["limit"] is None:
        yield "How far a scan lies from the training cohort is told, but too few unseen cases were at hand for a limit."
        return
    yield f"Scans that lie beyond {about['limit']:.3g} from the training cohort in the network's features are flagged:"
    yield f"of new cases like the {about['held_out']} unseen ones from which this limit comes, {about['rate']:.0%} do."


def _retest(facts: Mapping[str, Any]) -> Iterator[str]:
    """How much volumes of repeat scans differ, where that was measured."""
    found = facts.get("retest") or {}
    if not found:
        return
    yield "## Test-retest noise of the volumes"
    yield ""
    yield f"Within-subject standard deviation on scans at most {found['within_days']} days apart, of the cohort with"
    yield f"SHA-256 `{found['cohort_sha256']}`."
    yield ""
    yield "| label | percent of the volume | 95 % interval | patients |"
    yield "|---|---|---|---|"
    for label, noise in found["labels"].items():
        low, high = noise["cv_low"], noise["cv_high"]
        yield f"| {label} | {noise['cv_percent']:.2f} | {low:.2f} to {high:.2f} | {noise['patients']} |"
    yield ""


def _verdict_lines(verdict: Verdict) -> list[str]:
    """The section of the model card about the verdict."""
    fitted, point = verdict.fitted, verdict.point
    rows = [
        f"| {name.replace('_', ' ')} | {found['value']:.3f} | {found['ci_low']:.3f} to {found['ci_high']:.3f} |"
        for name in ("sensitivity", "specificity", "referral_rate", "ppv", "npv")
        if isinstance(found := point.get(name), Mapping)
        and all(isinstance(found.get(key), (int, float)) for key in ("value", "ci_low", "ci_high"))
    ]
    where = f"the split `{fitted['split']}` of " if fitted.get("split") else ""
    lent = fitted.get("borrowed")
    spread = f", and by how positive cases spread in the calibration `{lent['calibration']}`" if lent else ""
    return [
        "## Verdict",
        "",
        f"Refers for {verdict.positive} from a probability of {verdict.threshold:.3f} on (calibration `{verdict.id}`, "
        f"{verdict.method}), chosen for a sensitivity of {point.get('target_sensitivity')} on {fitted.get('n')} cases, "
        f"{fitted.get('n_positive')} positive, of {where}the cohort with SHA-256 `{fitted.get('cohort_sha256')}`"
        f"{spread}. Referral rate and predictive values are for a prevalence of {point.get('prevalence')}.",
        "",
        *(["| figure | value | 95 % interval |", "|---|---|---|", *rows, ""] if rows else []),
    ]


def _explanation_lines(chosen: Mapping[str, Any]) -> list[str]:
    """The section about activation maps, where they were measured."""
    if not chosen:
        return []
    measured_on = "cases that their fold had not seen" if chosen.get("split") == "folds" else "validation cases"
    return [
        "## Explanations",
        "",
        f"Activation maps are made by `{chosen['method']}` at the layer `{chosen['layer']}`, which did best on "
        f"{chosen['n']} {measured_on}; `explanation.json` has the figures of all that were compared.",
        "",
    ]


def _interval(found: Mapping[str, Any]) -> str:
    low, high = found["ci_low"], found["ci_high"]
    if found["mean"] is None or found["mean"] != found["mean"]:
        return "–"
    text = f"{found['mean']:.3f}"
    return text if low is None or low != low else f"{text} ({low:.3f} to {high:.3f})"
