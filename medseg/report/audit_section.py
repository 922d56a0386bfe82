"""The parts of a run's page about its verdict and its audit, from `verdict.json` and `audit.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.files import write_bytes
from medseg.report.charts import interval_chart, reliability_chart
from medseg.report.page import Cell, Picture, Table, estimate, format_number, is_number, metric, number, words
from medseg.report.sources import read_mapping, without_folders

TONES = {"pass": "good", "fail": "bad", "not assessable": "warn"}
_HEADS = {
    "auc": "AUC",
    "n": "Cases",
    "n_positive": "Positive",
    "mean_change": "Mean change of the probability",
    "verdicts_changed": "Verdicts changed",
    "alike": "Alike",
    "who": "Who looks",
    "trained": "Trained",
    "unseen": "Unseen site",
}
_POINT = ("sensitivity", "specificity", "referral_rate", "ppv", "npv")
_POINT_HEADS = ("Sensitivity", "Specificity", "Referred", "Positive predictive value", "Negative predictive value")


@dataclass(frozen=True)
class ItemView:
    """One item: its question and answer, and the figures behind it (None: there are none)."""

    title: str
    question: str
    status: str
    tone: str
    sentence: str
    table: Table | None


@dataclass(frozen=True)
class AuditView:
    """An audit of one split: the overall answer, the chart of all items, the items."""

    split: str
    lead: str
    tone: str
    chart: Picture
    overview: Table
    items: tuple[ItemView, ...]


@dataclass(frozen=True)
class VerdictView:
    """The verdict in words, tables and the calibration curve."""

    lead: str
    tables: tuple[Table, ...]
    curve: Picture | None


def show_audits(folder: Path) -> list[AuditView]:
    """The audits of a run, the test split first; each chart is also written beside its `audit.json`, for MLflow.

    Raises:
        UserError: an `audit.json` is damaged.
    """
    found = sorted(folder.glob("audit/*/audit.json"), key=lambda path: (path.parent.name != "test", path.parent.name))
    return [_show_audit(read_mapping(path), path) for path in found]


def _show_audit(audit: Mapping[str, Any], path: Path) -> AuditView:
    items: Sequence[Mapping[str, Any]] = audit.get("items") or ()
    required = set(audit.get("required") or ())
    chart, svg = interval_chart(items)
    write_bytes(path.with_name("audit.svg"), svg)
    status = str(audit.get("status"))
    return AuditView(
        path.parent.name,
        _lead(audit, items, required),
        TONES.get(status, ""),
        chart,
        _overview(items, required),
        tuple(_item(item) for item in items),
    )


def _lead(audit: Mapping[str, Any], items: Sequence[Mapping[str, Any]], required: set[str]) -> str:
    asked = [item for item in items if item["name"] in required]
    failed = [str(item["title"]).lower() for item in asked if item["status"] == "fail"]
    unclear = [str(item["title"]).lower() for item in asked if item["status"] == "not assessable"]
    passed = sum(item["status"] == "pass" for item in asked)
    text = f"{passed} of the {len(asked)} required items passed"
    text += f"; {len(failed)} failed ({', '.join(failed)})" if failed else ""
    text += f"; {len(unclear)} could not be assessed ({', '.join(unclear)}), which is no pass" if unclear else ""
    text += ". " + (
        "Nothing stands in the way of the alias champion."
        if passed == len(asked)
        else "The alias champion does not move here without a recorded reason for each."
    )
    cases = f" Made on {audit.get('n_cases')} cases of the split “{audit.get('split')}”"
    return f"{text}{cases} in {format_number(float(audit.get('seconds') or 0) / 60, 1)} minutes."


def _overview(items: Sequence[Mapping[str, Any]], required: set[str]) -> Table:
    rows = []
    for item in items:
        status = str(item["status"])
        sign = "at least" if item["better"] == "above" else "at most"
        figure = estimate(item, 3)
        rows.append(
            (
                words(item["title"], detail="" if item["name"] in required else "not required"),
                words(status, tone=TONES.get(status, "")),
                Cell(figure.text, figure.sort, figure.detail),
                words(f"{sign} {item['limit']:g}", detail=str(item.get("unit") or "")),
                words(without_folders(str(item["sentence"]))),
            )
        )
    note = "Below each figure its 95 % interval. An item passes when its whole interval keeps to the limit."
    columns = ("Item", "Result", "Figure", "Limit", "What it means")
    return Table("Item by item", columns, tuple(rows), (False, False, True, False, False), note)


def _item(item: Mapping[str, Any]) -> ItemView:
    status = str(item["status"])
    return ItemView(
        str(item["title"]),
        str(item["question"]),
        status,
        TONES.get(status, ""),
        without_folders(str(item["sentence"])),
        _details(item),
    )


def _details(item: Mapping[str, Any]) -> Table | None:
    rows: Sequence[Mapping[str, Any]] = item.get("details") or ()
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("ci_low", "ci_high")))
    interval_of = next((name for name in ("auc", "mean_change") if name in names), "")
    if item["name"] == "borders":
        interval_of = "mean_change"
    cells = [tuple(_detail(name, row, name == interval_of) for name in names) for row in rows]
    numeric = tuple(all(not isinstance(row.get(name), str) for row in rows) for name in names)
    heads = tuple(_HEADS.get(name) or metric(name)[0].capitalize() for name in names)
    return Table("The figures behind it", heads, tuple(cells), numeric)


def _detail(name: str, row: Mapping[str, Any], with_interval: bool) -> Cell:
    value = row.get(name)
    if isinstance(value, str):
        return words(value)
    if with_interval:
        return estimate({"value": value, "ci_low": row.get("ci_low"), "ci_high": row.get("ci_high")}, 3)
    return number(value, None if isinstance(value, int) else 3)


def show_verdict(path: Path) -> VerdictView | None:
    """What `verdict.json` says; None without one. Raises UserError when it is damaged."""
    verdict = read_mapping(path, missing={})
    if not verdict:
        return None
    point, fitted, quality = (verdict.get(name) or {} for name in ("point", "fitted", "quality"))
    where = f"split “{fitted['split']}”" if fitted.get("split") else "labelled cases of another cohort"
    lead = (
        f"From a probability of {verdict['threshold']:.3f} on, a case is referred for {verdict['positive']}; below, it "
        f"is not. The threshold was chosen for a sensitivity of {point.get('target_sensitivity', 0):.0%} on "
        f"{fitted.get('n')} cases ({where}), of which {fitted.get('n_positive')} are positive"
    )
    if fitted.get("borrowed"):
        lead += ", and by how positive cases spread in the calibration before"
    lead += (
        ". Chosen and measured on the same cases, these figures are optimistic: what counts are those of a split that "
        "no choice was made on."
    )
    tables = [_point_table(point, verdict), _quality_table(quality), _group_table(verdict.get("subgroups") or ())]
    reliability = quality.get("reliability") or ()
    curve = reliability_chart(reliability) if reliability else None
    return VerdictView(lead, tuple(table for table in tables if table is not None), curve)


def _point_table(point: Mapping[str, Any], verdict: Mapping[str, Any]) -> Table:
    more = point.get("more_to_halve") or {}
    note = (
        f"At a prevalence of {point.get('prevalence', 0):.1%}; calibration {verdict.get('id')} ({verdict['method']})."
    )
    if is_number(more.get("positive")) and is_number(more.get("negative")):
        note += (
            f" {more['positive']} more positive cases would halve the interval of the sensitivity, {more['negative']} "
            "more negative ones that of the specificity."
        )
    cells = tuple(estimate(point.get(name), 3) for name in _POINT)
    return Table("At the operating point", _POINT_HEADS, (cells,), (True,) * len(_POINT), note)


def _quality_table(quality: Mapping[str, Any]) -> Table | None:
    lines = [(name, quality.get(name)) for name in ("before", "after") if quality.get(name)]
    if not lines:
        return None
    figures = ("ece", "brier", "nll")
    rows = tuple(
        (words(f"{name} calibration"), *(estimate(found.get(figure), 3) for figure in figures))
        for name, found in lines
        if found
    )
    heads = ("", *(metric(figure)[0] for figure in figures))
    return Table("Are the probabilities true?", heads, rows, (False, True, True, True))


def _group_table(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    if not rows:
        return None
    figures = ("sensitivity", "specificity", "auc")
    cells = tuple(
        (
            words(f"{row['factor']} {row['group']}"),
            *(estimate(row.get(figure), 3) for figure in figures),
            number(row.get("n_positive")),
            number(row.get("n")),
        )
        for row in rows
    )
    heads = ("Group", "Sensitivity", "Specificity", "AUC", "Positive", "Cases")
    return Table("By group, at the same threshold", heads, cells, (False, *(True,) * 5))
