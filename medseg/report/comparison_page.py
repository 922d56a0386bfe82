"""The page of a comparison: one table per kind of task, a line per model, every figure with its interval; below it
what each model differs by from the first on the same cases."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg.config import ReportConfig
from medseg.report import page
from medseg.report.page import Cell, Table, estimate, metric, number, words
from medseg.report.sources import read_mapping

FILE = "comparison.json"
RATES = ("auc", "accuracy", "precision", "sensitivity", "f1", "specificity")
OVERLAPS = ("dice", "iou")


def build(config: ReportConfig, folder: Path) -> page.Page:
    """Make the page of a folder with `comparison.json`. Raises UserError when that is damaged."""
    about = read_mapping(folder / FILE)
    models: Sequence[Mapping[str, Any]] = about["models"]
    tables = []
    for task in _in_order(models, "task"):
        lines = [line for line in models if line["task"] == task]
        tables += [_table(lines), *_differences(lines)]
    html = page.render(
        "comparison.html.j2",
        title="Models side by side",
        facts=[("Models", str(len(models))), ("Measured on", str(about["split"]))],
        simulated=False,
        tables=tables,
        unlearned=[(line["run_id"], sentence) for line in models for sentence in line.get("not_learned", ())],
    )
    return page.Page(html, {"models": len(models)})


def _table(lines: Sequence[Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for line in lines for name in line["figures"]))
    rows = [
        (
            words(line["name"], detail=line["run_id"]),
            words(line["network"]),
            words(line["sees"]),
            *(estimate(line["figures"].get(name), metric(name)[1]) for name in names),
            number(line["cases"]),
        )
        for line in lines
    ]
    columns = ("Experiment", "Network", "Sees", *(metric(name)[0] for name in names), "Cases")
    cohorts = len(_in_order(lines, "cohort_sha256"))
    note = "Each with its 95 % interval below; one training each, so the seed is not in the interval."
    if cohorts > 1:
        note += f" The models are of {cohorts} cohorts, whose figures are not of the same cases."
    numeric, caption = (False,) * 3 + (True,) * (len(names) + 1), str(lines[0]["task"]).replace("_", " ").capitalize()
    return Table(caption, columns, tuple(rows), numeric, note, sortable=True)


def _differences(lines: Sequence[Mapping[str, Any]]) -> list[Table]:
    """One table per model that others are held against."""
    tables = []
    for against in _in_order([line for line in lines if "against" in line], "against"):
        held = [line for line in lines if line.get("against") == against]
        known = list(dict.fromkeys(name for line in held for name in line["differences"]))
        rows = [
            (
                words(line["name"], detail=line["run_id"]),
                words(line["network"]),
                *(_signed(line["differences"].get(name), metric(name)[1]) for name in known),
                number(max(found["n"] for found in line["differences"].values())),
            )
            for line in held
        ]
        columns = ("Experiment", "Network", *(metric(name)[0] for name in known), "Cases")
        note = (
            "On the cases of both, so what is hard for both cancels out. Where an interval holds 0, these cases do not "
            "tell the two apart. One training each, so the seed is not in the interval."
        )
        numeric = (False,) * 2 + (True,) * (len(known) + 1)
        tables.append(Table(f"Difference to {against}", columns, tuple(rows), numeric, note, sortable=True))
    return tables


def _signed(found: Mapping[str, Any] | None, digits: int | None) -> Cell:
    """A difference with its sign, also where it is above 0."""
    cell = estimate(found, digits)
    return replace(cell, text=f"+{cell.text}") if isinstance(cell.sort, float) and cell.sort > 0 else cell


def _in_order(lines: Sequence[Mapping[str, Any]], field: str) -> list[str]:
    return list(dict.fromkeys(str(line[field]) for line in lines))
