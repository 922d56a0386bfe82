"""The page of a comparison: one table per kind of task, a line per model, every figure with its interval."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg.config import ReportConfig
from medseg.report import page
from medseg.report.page import Table, estimate, metric, number, words
from medseg.report.sources import read_mapping

FILE = "comparison.json"
RATES = ("accuracy", "precision", "sensitivity", "f1", "specificity", "auc")
OVERLAPS = ("dice", "iou")


def build(config: ReportConfig, folder: Path) -> page.Page:
    """Make the page of a folder with `comparison.json`. Raises UserError when that is damaged."""
    about = read_mapping(folder / FILE)
    models: Sequence[Mapping[str, Any]] = about["models"]
    tables = [_table([line for line in models if line["task"] == task]) for task in _in_order(models, "task")]
    html = page.render(
        "comparison.html.j2",
        title="Models side by side",
        facts=[("Models", str(len(models))), ("Measured on", str(about["split"]))],
        simulated=False,
        tables=tables,
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


def _in_order(lines: Sequence[Mapping[str, Any]], field: str) -> list[str]:
    return list(dict.fromkeys(str(line[field]) for line in lines))
