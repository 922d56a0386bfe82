"""What several models measured on the same cases, side by side: `medseg models compare`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg.bundle import Bundle, load_bundle
from medseg.config import ReportConfig
from medseg.evaluate.outcomes import Outcome, read_outcomes
from medseg.evaluate.paired import differences
from medseg.files import UserError, read_json, write_json
from medseg.folds import EVALUATED
from medseg.report import comparison_page
from medseg.report import step as report_step
from medseg.result import Result
from medseg.runs import find_run
from medseg.unlearned import not_learned

SCHEMA_VERSION = 1
FOLDS = "folds"
"""In place of a split: the out-of-fold predictions of joined folds."""

EXPERIMENTS = ("tb_radiograph", "tb_lungs_tight", "tb_lungs_dilated", "tb_lungs_convex", "tb_lungs_box")
"""Configs of the experiments of Rahman et al. 2020 (arXiv:2007.14895) on whole radiographs and on segmented lungs, of
two wider masks, since tight ones cut off what lies at the rim, and of the rectangle round the lungs."""

_AT_224 = ["plan.size_px=224", "plan.batch_size=8", "train.learning_rate=0.0003"]

NETWORKS: Mapping[str, Sequence[str]] = {
    "resnet18": ["model={name: resnet, depth: 18}", *_AT_224],
    "resnet50": ["model={name: resnet, depth: 50}", *_AT_224],
    "resnet101": ["model={name: resnet, depth: 101}", *_AT_224],
    "chexnet": ["model={name: densenet, depth: 121}", *_AT_224],
    "inception_v3": ["model={name: inception_v3}", *_AT_224, "plan.size_px=299"],
    "vgg19": ["model={name: vgg, depth: 19}", *_AT_224],
    "densenet201": ["model={name: densenet, depth: 201}", *_AT_224],
    "squeezenet": ["model={name: squeezenet}", *_AT_224],
    "mobilenet_v2": ["model={name: mobilenet_v2}", *_AT_224],
}
"""The nine networks of that paper, each as overrides of a config, at the size of image that they were published at."""


def run(models: Sequence[str], workspace: Path, out: Path, *, split: str = "test") -> Result:
    """Put what models measured side by side, as `out/comparison.json` and a page.

    Beside its figures a model has its differences to the first one of its task that was measured on its cohort, on the
    cases of both.

    Args:
        models: run ids, or bundles whose runs are in the workspace; each evaluated on `split`.
        split: `train`, `val` or `test`; or `folds`, for what joined folds measured on cases that they had not seen.

    Raises:
        UserError: a model has no figures of this split.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder.")
    bundles = [load_bundle(model, workspace) for model in models]
    lines = [_line(bundle, workspace, split) for bundle in bundles]
    _hold_against_the_first(lines, bundles, workspace, split)
    path = write_json(out / comparison_page.FILE, {"schema_version": SCHEMA_VERSION, "split": split, "models": lines})
    page = report_step.run(ReportConfig(), out)
    paired = any("against" in line for line in lines)
    rows = [_row(line, paired) for line in lines]
    return Result("models", "done", {"comparison": path, **page.paths}, {"models": len(lines)}, rows=rows)


def _line(bundle: Bundle, workspace: Path, split: str) -> dict[str, Any]:
    config, lungs = bundle.config, bundle.config.lungs
    folder = find_run(workspace, bundle.run_id).path / "evaluation" / split
    metrics = bundle.evidence.get("cross_validation") if split == FOLDS else _read(folder / "metrics.json")
    if not metrics:
        remedy = "join its folds" if split == FOLDS else f"run `medseg evaluate {bundle.run_id} --split {split}`"
        raise UserError(f"model {bundle.run_id!r} has no figures of {split!r}; {remedy} first.")
    figures = {name: metrics[name] for name in comparison_page.RATES if name in metrics}
    segments = config.task.kind == "segmentation"
    if segments:
        figures["mean_dice"] = {"value": metrics["mean_dice"]}
        for label, found in metrics["classes"].items():
            figures |= {f"{name}_{label}": found[name] for name in comparison_page.OVERLAPS}
    figures |= _energy(_read(folder / "predictions" / "explanation.json"), "energy_in_mask" if segments else "energy")
    return {
        "run_id": bundle.run_id,
        "name": config.name,
        "task": config.task.measured_as,
        "network": config.model.variant,
        "sees": "whole images" if lungs is None or lungs.mask == "none" else f"lungs, {lungs.mask} mask",
        "seed": config.seed,
        "cohort_sha256": metrics.get("cohort_sha256", bundle.facts["cohort_sha256"]),  # measured on, not trained on
        "cases": metrics.get("n_measured", metrics.get("n")),
        "figures": figures,
        "positive": metrics.get("positive") if len(config.task.labels) == 2 else None,  # else means over the classes
        "not_learned": not_learned(bundle.facts.get("metrics") or {}),
    }


def _hold_against_the_first(
    lines: Sequence[dict[str, Any]], bundles: Sequence[Bundle], workspace: Path, split: str
) -> None:
    """Add `against`, a run id, and `differences` to the lines that have a line of their kind before them."""
    first: dict[tuple[object, ...], tuple[str, list[Outcome]]] = {}
    for line, bundle in zip(lines, bundles, strict=True):
        kind = (line["task"], tuple(bundle.config.task.labels), line["cohort_sha256"])
        outcomes = _outcomes(bundle, workspace, split)
        if kind not in first:
            first[kind] = line["run_id"], outcomes
            continue
        run_id, others = first[kind]
        if found := differences(others, outcomes, positive=line["positive"]):
            line["against"] = run_id
            line["differences"] = found


def _outcomes(bundle: Bundle, workspace: Path, split: str) -> list[Outcome]:
    """What is on disk of every case of the split; nothing where it was cleared away."""
    run = find_run(workspace, bundle.run_id).path
    if split != FOLDS:
        places = [run / "evaluation" / split]
    else:
        pooled = {m["fold"]: run / "folds" / str(m["fold"]) for m in bundle.members}
        own = {m["fold"]: workspace / "runs" / m["run_id"] for m in bundle.members}
        places = [(pooled[n] if pooled[n].is_dir() else own[n]) / EVALUATED for n in own]
    if not all((place / "cases.json").is_file() for place in places):
        return []
    return [outcome for place in places for outcome in read_outcomes(place)]


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return found


def _energy(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The share of the activation maps' energy where it should be, by the method that explained the cases."""
    for found in summary.values():
        if energy := found["checks"].get("energy"):
            return {name: {"value": energy["mean"], **energy["mean_interval"], "n": energy["n"]}}
    return {}


def _row(line: Mapping[str, Any], paired: bool) -> dict[str, object]:
    """A line of the table on the screen: the values alone, and the difference of AUC or mean Dice."""
    values = {name: found.get("mean", found.get("value")) for name, found in line["figures"].items()}
    told: dict[str, object] = {name: line[name] for name in ("run_id", "name", "network", "cases")}
    told |= {name: None if value is None else round(value, 4) for name, value in values.items()}
    if paired:
        told["to_the_first"] = _difference(line)
    return told


def _difference(line: Mapping[str, Any]) -> str:
    found = line.get("differences") or {}
    if (name := next((name for name in ("auc", "mean_dice") if name in found), None)) is None:
        return ""
    value, low, high = (found[name][bound] for bound in ("value", "ci_low", "ci_high"))
    if not math.isfinite(value + low + high):  # the cases of both are of one class, or of one patient
        return ""
    return f"{name.replace('_', ' ')} {value:+.3f} ({low:+.3f} to {high:+.3f})"
