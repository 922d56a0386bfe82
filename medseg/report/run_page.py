"""The page of a run: what it is, how good it is, which cases are worst and why, how it was trained."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from medseg.config import ReportConfig
from medseg.report import page
from medseg.report.audit_section import show_audits, show_verdict
from medseg.report.charts import training_curves
from medseg.report.results import Budget, show_split
from medseg.report.sources import read_history, read_list, read_mapping, read_yaml, simulated_cohort, without_folders
from medseg.unlearned import not_learned

SPLIT_ORDER = ("test", "val", "train")


def build(config: ReportConfig, folder: Path) -> page.Page:
    """Make the page of `runs/<id>` and the overlays `evaluation/<split>/overlays/<case>.png`.

    Raises:
        UserError: run.json or a JSON of the evaluation is damaged.
    """
    about = read_mapping(folder / "run.json")
    settings = read_yaml(folder / "config.yaml")
    bundle = read_mapping(folder / "bundle" / "bundle.json", missing={})
    labels = settings.get("task", {}).get("labels") or bundle.get("labels") or {}
    budget = Budget(config.max_cases, config.viewer_cases)
    splits = [show_split(folder / "evaluation" / name, name, labels, budget) for name in _evaluated(folder)]
    history = read_history(folder / "history.csv")
    html = page.render(
        "run.html.j2",
        title=about.get("name") or folder.name,
        facts=_facts(about, settings, folder.name),
        failure=_failure(about),
        evaluable=about.get("step") != "predict",
        purpose=_purpose(settings),
        simulated=_is_simulated(settings, folder),
        unlearned=not_learned(bundle.get("metrics") or {}),
        splits=splits,
        verdict=show_verdict(folder / "bundle" / "verdict.json"),
        audits=show_audits(folder),
        explanations=_explanations(read_mapping(folder / "bundle" / "explanation.json", missing={})),
        curves=training_curves(history) if history else None,
        training=_training_facts(history),
        recipe=_recipe(about, settings, folder),
    )
    drawn = [case for split in splits for case in split.drawn]
    figures = {
        "splits": len(splits),
        "cases_drawn": sum(bool(case.pictures) for case in drawn),
        "viewers": sum(case.viewer is not None for case in drawn),
    }
    return page.Page(html, figures)


def _facts(about: Mapping[str, Any], settings: Mapping[str, Any], run_id: str) -> list[tuple[str, str]]:
    model, machine = settings.get("model") or {}, about.get("machine") or {}
    facts = [
        ("Run", str(about.get("id") or run_id)),
        ("Status", _status(about)),
        ("Started", _when(about.get("created"))),
        ("Model", str(model.get("name") or "")),
        ("Cohort", str(about.get("cohort_sha256") or "")[:12]),
        ("Seed", str(about.get("seed", settings.get("seed", "")))),
        ("Source", _revision(str(about.get("git") or ""))),
        ("Machine", _machine(machine)),
    ]
    return [(name, value) for name, value in facts if value]


def _status(about: Mapping[str, Any]) -> str:
    """How the run ended; while the evaluation that calls for this page still runs, nothing."""
    status = str(about.get("status") or "unknown").lower()
    return "" if status == "running" else status


def _machine(machine: Mapping[str, Any]) -> str:
    if not machine:
        return ""
    gpus = ", ".join(machine.get("gpus") or ()) or "no GPU"
    return f"{machine.get('cores', '?')} cores, {machine.get('memory_gb', '?')} GB, {gpus}"


def _revision(git: str) -> str:
    revision, _, dirty = git.partition("-")
    return f"{revision[:10]}{' with local changes' if dirty else ''}"


def _when(moment: object) -> str:
    text = str(moment or "")
    return f"{text[:10]} {text[11:16]} UTC" if re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d", text) else text


def _failure(about: Mapping[str, Any]) -> str:
    if about.get("status") not in ("FAILED", "INTERRUPTED"):
        return ""
    return without_folders(str(about.get("failure") or "no cause was recorded"))


def _purpose(settings: Mapping[str, Any]) -> str:
    task = settings.get("task") or {}
    names = ", ".join(task.get("labels") or ())
    if not names:
        return ""
    verb = "Classifies into" if task.get("kind") == "classification" else "Segments"
    verb = "Finds, each on its own," if task.get("multi_label") else verb
    return f"{verb} {names} from {', '.join(task.get('channels') or ['image'])}, in {task.get('spatial_dims', 3)}D."


def _is_simulated(settings: Mapping[str, Any], folder: Path) -> bool:
    """By the config, or by the cohort of the evaluated cases."""
    if (settings.get("ingest") or {}).get("simulated"):
        return True
    cases = [case for name in _evaluated(folder) for case in read_list(folder / "evaluation" / name / "cases.json")[:1]]
    return simulated_cohort(image for case in cases for image in case.get("images") or ())


def _recipe(about: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """What one needs to do it again: the sections of the config, the plan, the versions."""
    recipe = [
        (name, _flow(settings[name])) for name in ("task", "model", "loss", "train", "augment") if name in settings
    ]
    plan = read_yaml(folder / "plan.yaml")
    if plan:
        recipe.append(("plan", _flow({k: v for k, v in plan.items() if k not in ("fingerprint", "reasons")})))
    if packages := about.get("packages"):
        recipe.append(("packages", _flow(packages)))
    return recipe


def _explanations(measured: Mapping[str, Any]) -> page.Table | None:
    """How the activation maps of every method compared did on cases that the network, or its fold's, had not seen."""
    candidates: Sequence[Mapping[str, Any]] = measured.get("candidates") or ()
    if not candidates:
        return None
    checks = list(candidates[0]["checks"])
    rows = []
    for found in candidates:
        shares = ({**found["checks"][name], "mean": found["checks"][name]["share"]} for name in checks)
        figures = ({**found, "mean": found["score"]}, *shares)
        cells = (page.estimate(figure, 2) for figure in figures)
        rows.append((page.words(found["method"]), page.words(found["layer"]), *cells))
    unseen = "that the network of their fold had not seen"
    where = unseen if measured["split"] == "folds" else f"of the split “{measured['split']}”"
    note = (
        f"On {measured['n']} cases {where}, with 95 % intervals. The score is the share of "
        "the other candidates that a map beats, averaged over checks and cases; then the share of maps that pass each "
        f"check. Maps are made by {measured['chosen']['method']} where the config says auto."
    )
    columns = ("Method", "Layer", "Score", *(name.capitalize() for name in checks))
    numeric = (False, False, *[True] * (len(checks) + 1))
    return page.Table("Which activation maps explain best?", columns, tuple(rows), numeric, note)


def _flow(value: object) -> str:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    return str(text).strip()


def _training_facts(history: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    if not history:
        return []
    seconds = [row.get("seconds", 0.0) for row in history]
    waited = sum(row.get("data_wait_share", 0.0) * s for row, s in zip(history, seconds, strict=True))
    peak = max(row.get("peak_memory_gb", 0.0) for row in history)
    return [
        ("Epochs", str(len(history))),
        ("Time", f"{sum(seconds) / 60:.1f} min"),
        ("Waiting for data", f"{100 * waited / max(sum(seconds), 1e-9):.0f} % of the time"),
        ("Peak memory", f"{peak:.2f} GB"),
    ]


def _evaluated(folder: Path) -> list[str]:
    found = [path.parent.name for path in sorted((folder / "evaluation").glob("*/metrics.json"))]
    return sorted(found, key=lambda name: (SPLIT_ORDER.index(name) if name in SPLIT_ORDER else 9, name))
