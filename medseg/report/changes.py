"""Change over time on the page of a batch: from `changes.json`, a table and a chart for each patient."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.exams import DAYS_PER_YEAR
from medseg.report import page
from medseg.report.charts import change_chart
from medseg.report.page import Cell, Picture, Table, capped, format_number, number, words
from medseg.report.sources import read_mapping

_PANELS = 3
_TONES = {"beyond the noise": "warn"}
_NO_RATE = "too short"


@dataclass(frozen=True)
class ChangesView:
    """What the page shows of change over time."""

    lead: str
    table: Table
    noise: Table
    charts: tuple[tuple[str, Picture], ...]
    note: str


def show_changes(folder: Path, max_charts: int) -> ChangesView | None:
    """The section, those changes first that exceed the noise most; None where no patient was examined twice."""
    about = read_mapping(folder / "changes.json", missing={})
    patients: Sequence[Mapping[str, Any]] = about.get("patients") or ()
    if not patients:
        return None
    rows = sorted(
        ((patient, label, change) for patient in patients for label, change in patient["structures"].items()),
        key=lambda row: (-_excess(row[2]), row[0]["patient_id"]),
    )
    shown = list({row[0]["patient_id"]: row[0] for row in rows}.values())[:max_charts]
    return ChangesView(
        lead=_lead([change for _, _, change in rows], bool(about.get("retest"))),
        table=_table(rows[: page.MAX_ROWS], len(rows)),
        noise=_noise(about),
        charts=tuple((str(patient["patient_id"]), _chart(patient)) for patient in shown),
        note=capped(len(patients), len(shown), "patients", "changes.json"),
    )


def _excess(change: Mapping[str, Any]) -> float:
    """How many times the noise a change is; 0 where no noise is known."""
    size, band = _size(change)
    return abs(size) / band if band else 0.0


def _size(change: Mapping[str, Any]) -> tuple[float, float | None]:
    """What the verdict is about: the rate and its noise, without a rate the difference and its noise, in ml."""
    if change["per_year_ml"] is not None:
        return change["per_year_ml"], change["per_year_band_ml"]
    return change["difference_ml"], change["band_ml"]


def _lead(changes: Sequence[Mapping[str, Any]], known: bool) -> str:
    if not known:
        return (
            "The test-retest noise of this model is not known, so nothing here says whether a volume has changed. "
            "Measure it on repeat scans with medseg models calibrate, or state it in predict.change.cv_percent."
        )
    judged = [change for change in changes if change["verdict"] != "unknown"]
    beyond = sum(change["verdict"] == "beyond the noise" for change in judged)
    return (
        f"{beyond} of {len(judged)} changes exceed what repeated scans of an unchanged patient show; the others are "
        "within that noise, and are no evidence of change. By chance alone 1 in 20 unchanged structures exceeds it."
    )


def _table(rows: Sequence[tuple[Mapping[str, Any], str, Mapping[str, Any]]], total: int) -> Table:
    cells = []
    for patient, label, change in rows:
        exams = patient["exams"]
        flagged = sum(exam["status"] == "flagged" for exam in exams)
        count = Cell(str(len(exams)), len(exams), f"{flagged} flagged" if flagged else "")
        rate = _banded(change["per_year_percent"], change["per_year_band_percent"], 1)
        verdict = str(change["verdict"])
        cells.append(
            (
                words(patient["patient_id"]),
                words(label),
                words(verdict, tone=_TONES.get(verdict, "")),
                count,
                number((exams[-1]["day"] - exams[0]["day"]) / DAYS_PER_YEAR, 2),
                number(change["volumes_ml"][0], 2),
                number(change["volumes_ml"][-1], 2),
                _banded(change["difference_ml"], change["band_ml"], 2),
                _banded(change["per_year_ml"], change["per_year_band_ml"], 2),
                rate if change["per_year_percent"] is not None else words("–", detail=_NO_RATE),
            )
        )
    heads = ("Patient", "Structure", "Change", "Exams", "Years", "First (ml)", "Last (ml)", "Difference (ml)")
    columns = (*heads, "Per year (ml)", "Per year (%)")
    note = "Below each change, after ±, the noise that it has to exceed. The rate is the slope through all exams, in "
    note += f"percent of the volume at the first. {capped(total, len(rows), 'changes', 'changes.json')}"
    return Table("Volumes over time", columns, tuple(cells), (False, False, False, *[True] * 7), note.strip(), True)


def _banded(value: float | None, band: float | None, digits: int) -> Cell:
    if value is None:
        return Cell("–")
    sign = "+" if value > 0 else ""
    detail = f"± {format_number(band, digits)}" if band is not None else ""
    return Cell(sign + format_number(value, digits), value, detail)


def _noise(about: Mapping[str, Any]) -> Table:
    cells = []
    for label, found in (about.get("retest") or {}).items():
        low, high = found["cv_low"], found["cv_high"]
        interval = f"{low:.2f} to {high:.2f}" if low is not None else ""
        measured = f"{found['scans']} scans of {found['patients']} patients" if found["scans"] else found["source"]
        cells.append(
            (
                words(label),
                Cell(f"{found['cv_percent']:.2f}", found["cv_percent"], interval),
                number(found["repeatability_percent"], 1),
                words(measured),
            )
        )
    within = about.get("within_days")
    note = "Standard deviation of repeated measurements, its 95 % interval below; two measurements of an unchanged "
    note += "structure differ by less than 1.96·√2 times that in 95 % of cases (Bland & Altman)."
    note += f" Measured on scans at most {within} days apart." if within is not None else ""
    heads = ("Structure", "Noise (% of the volume)", "Smallest difference that counts (%)", "Known from")
    return Table("Test-retest noise", heads, tuple(cells), (False, True, True, False), note)


def _chart(patient: Mapping[str, Any]) -> Picture:
    structures = sorted(patient["structures"].items(), key=lambda item: -_excess(item[1]))[:_PANELS]
    return change_chart(str(patient["patient_id"]), patient["exams"], dict(structures))
