"""The audit of a classifier as part of a run: lung fields, models trained without one site, the registry's record."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.bundle import Bundle, load_bundle
from medseg.calibrations import add_verdict
from medseg.cohort import Cohort
from medseg.config import AuditConfig, LungsConfig, apply_override, validate_config
from medseg.data.lung_view import load_lung_model, read_mask
from medseg.evaluate.audit import step
from medseg.evaluate.audit.model_items import SiteScore, score_sites
from medseg.evaluate.audit.step import Elsewhere
from medseg.evaluate.audit.subject import FindLungs, Subject, sample_cases
from medseg.evaluate.calibrate import positive_class
from medseg.evaluate.scoring import Scorer
from medseg.files import UserError, read_json
from medseg.predict import Predictor, load_network, view_of
from medseg.result import Result
from medseg.runs import RunFolder, create_run, find_run
from medseg.tracking import Tracker, record_audit, track
from medseg.verdict import Verdict
from medseg.volume import Volume

SETTABLE = ("lungs", "leave_one_site_out", "train_epochs", "max_cases")
"""What may be set for one audit; the limits belong to the model's config, or they would be none."""


def run(
    bundle: Bundle,
    cohort: Cohort,
    folder: RunFolder,
    tracker: Tracker,
    *,
    split: str = "test",
    overrides: Sequence[str] = (),
) -> Result:
    """Audit a classifier of radiographs into `runs/<id>/audit/<split>`; record it with the registered versions of it.

    Args:
        folder, tracker: the run that the audit belongs to.
        overrides: `audit.field=value` for the fields of `SETTABLE`.

    Raises:
        UserError: the model is no classifier of radiographs in two or more classes that exclude each other, an override
            sets a limit, or the cases hold one class only.
    """
    config = _settings(bundle, overrides)
    subject = _subject(bundle, cohort, split, config, folder.workspace)
    left_out = _leave_sites_out(bundle, subject, folder.workspace) if config.leave_one_site_out else []
    out = folder.path / "audit" / split
    result = step.run(
        subject, out, split=split, bundle_facts=bundle.identity(), elsewhere=Elsewhere(bundle.trained_sites, left_out)
    )
    tracker.log_metrics(
        {name: float(value) for name, value in result.figures.items() if isinstance(value, (int, float))}
    )
    tracker.set_tag(f"medseg.audit.{split}", str(result.figures["audit"]))
    record_audit(
        bundle.sha256, _record(read_json(result.paths["audit_json"])), folder.workspace, bundle.config.tracking
    )
    return replace(result, run_id=folder.id)


def _record(audit: dict[str, Any]) -> dict[str, Any]:
    """What the registry keeps of an audit."""
    items = {item["name"]: item["status"] for item in audit["items"]}
    return {"cohort_sha256": audit["cohort_sha256"], "split": audit["split"], "items": items}


def _settings(bundle: Bundle, overrides: Sequence[str]) -> AuditConfig:
    task = bundle.config.task
    if task.kind != "classification" or task.spatial_dims != 2:
        raise UserError(f"model {bundle.name!r} is no classifier of radiographs; the audit is made for these.")
    if task.multi_label:
        raise UserError(
            f"model {bundle.name!r} has task.multi_label true, and an audit is about one class; train and audit a "
            "model of the label in question."
        )
    lungs = bundle.config.lungs
    if lungs is not None and lungs.mask != "none" and not lungs.model:
        raise UserError(
            f"model {bundle.name!r} sees lungs by the masks of its cohort, and an audit changes the images; train it "
            "with lungs.model."
        )
    tree = bundle.config.model_dump(mode="json")
    for override in overrides:
        name = override.partition("=")[0].removeprefix("audit.")
        if not override.startswith("audit.") or name not in SETTABLE:
            fields = ", ".join(f"audit.{field}" for field in SETTABLE)
            raise UserError(f"--set {override!r}: an audit takes only {fields}; its limits are those of the bundle.")
        apply_override(tree, override)
    return validate_config(tree, "--set").audit


def _subject(bundle: Bundle, cohort: Cohort, split: str, config: AuditConfig, workspace: Path) -> Subject:
    positive = positive_class(bundle.config.verdict, bundle.labels)
    if positive is None:
        raise UserError(
            f"model {bundle.name!r} has {len(bundle.labels)} classes; name verdict.positive and train again."
        )
    labelled = [case for case in cohort.cases if case.target in bundle.labels]
    return Subject(
        Scorer(load_network(bundle), bundle.plan, view_of(bundle), bundle.config.predict.mirror_axes),
        cohort,
        sample_cases([case for case in cohort.split(split) if case.target in bundle.labels], config.max_cases),
        sample_cases(labelled, config.max_cases),
        bundle.labels,
        bundle.verdict or Verdict(positive, "temperature", 0.5),
        config,
        _find_lungs(config.lungs, bundle.lungs, workspace),
        bundle.config.lungs or LungsConfig(),
    )


def _find_lungs(where: str, own: Bundle | None, workspace: Path) -> FindLungs | None:
    """Lung fields from a folder of masks `<case_id>.png`, or by a segmentation model, such as the classifier's own."""
    folder = Path(where)
    holds_bundle = any((place / "bundle.json").is_file() for place in (folder, folder / "bundle"))
    if where and folder.is_dir() and not holds_bundle:
        return lambda case, image: _read_grey(folder / f"{case.case_id}.png", image)
    model = load_lung_model(where, workspace, "audit.lungs") if where else own
    if model is None:
        return None
    predictor = Predictor(model)
    return lambda case, image: predictor.segment(image)


def _read_grey(path: Path, image: Volume) -> NDArray[np.bool_] | None:
    """Inside is above half of the brightest value; None where there is no file."""
    if not path.is_file():
        return None
    mask = np.asarray(read_mask(path, image))
    return mask > float(mask.max()) / 2


def _leave_sites_out(bundle: Bundle, subject: Subject, workspace: Path) -> list[SiteScore]:
    """Train the model's own recipe once without each site, and score each at every site.

    Each training is a run with a name that follows from model, cohort and epochs: stopped, it goes on where it was,
    and made before, it is not made again.
    """
    cohort, scores = subject.cohort, []
    for site in sorted({case.site for case in cohort.cases if case.site}):
        without = _without(cohort, site)
        trained = _train_without(bundle, without, site, subject.config.train_epochs, workspace)
        cases = [case for case in without.cases if case.split == "test" and case.target in bundle.labels]
        plain = Verdict(subject.verdict.positive, "temperature", 0.5)
        other = replace(
            subject,
            scorer=Scorer(load_network(trained), trained.plan, view_of(trained), trained.config.predict.mirror_axes),
            verdict=trained.verdict or plain,
            cohort=without,
        )
        scores += score_sites(other, cases, trained_without=site, unseen={site})
    return scores


def _without(cohort: Cohort, site: str) -> Cohort:
    """The cohort with all of one site in the test split, where the other sites' test cases stay."""
    cases = tuple(replace(case, split="test") if case.site == site else case for case in cohort.cases)
    digest = hashlib.sha256(f"{cohort.sha256} without {site}".encode()).hexdigest()
    return replace(cohort, cases=cases, sha256=digest)


def _train_without(bundle: Bundle, cohort: Cohort, site: str, epochs: int | None, workspace: Path) -> Bundle:
    from medseg.train import step as train_step
    from medseg.train.cohort_check import check_cohort
    from medseg.train.reference import with_appearance

    config = bundle.config
    train = config.train.model_copy(update={"epochs": epochs or config.train.epochs})
    tracking = config.tracking.model_copy(update={"register_as": ""})
    config = config.model_copy(update={"train": train, "tracking": tracking})
    slug = re.sub(r"[^a-z0-9]+", "-", site.lower()).strip("-")[:30] or "site"
    recipe = hashlib.sha256(f"{bundle.sha256} {cohort.sha256} {train.epochs}".encode()).hexdigest()[:8]
    run_id = f"without-{slug}-{recipe}"
    if (workspace / "runs" / run_id / "bundle" / "bundle.json").is_file():
        return load_bundle(run_id, workspace)
    check_cohort(config, cohort)
    begun = (workspace / "runs" / run_id / "run.json").is_file()
    facts = {"step": "audit", "seed": config.seed, "cohort_sha256": cohort.sha256, "bundle_sha256": bundle.sha256}
    folder = find_run(workspace, run_id) if begun else create_run(workspace, f"without-{slug}", run_id, **facts)
    saved = any((folder.path / "checkpoints").glob("step_*.pt"))
    with track(folder, tracking, tags={"medseg.step": "audit", "medseg.left_out": slug}, resume=begun) as tracker:
        lungs = view_of(bundle)
        # what images are matched to is measured anew: the site that is left out has no say
        plan = with_appearance(bundle.plan, config.plan.appearance, cohort, cohort.split("train"), lungs)
        made = train_step.run(config, cohort, plan, folder, tracker, resume=saved, lungs=lungs)
        add_verdict(made.paths["bundle"], cohort, tracker)
    return load_bundle(run_id, workspace)
