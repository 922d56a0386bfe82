"""The page of a prediction folder: what became of each scan, what needs a look, volumes or classes, previews."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg.config import ReportConfig
from medseg.files import UserError, read_rows, write_bytes
from medseg.label_sets import EMPTY
from medseg.report import page
from medseg.report.cases import CaseView, draw_case, explain_in_words, flag_texts, lungs_of, remove_stale
from medseg.report.changes import show_changes
from medseg.report.figures import draw_scene, embedded
from medseg.report.page import STATUS_TONES, Cell, Picture, Table, anchor, capped, number, words
from medseg.report.slices import is_withheld, load_map
from medseg.report.sources import read_mapping, simulated_cohort, without_folders

ORDER = ("failed", "rejected", "flagged", "done")
MEANINGS = {
    "done": "finished without a flag",
    "flagged": "finished; something asks for a look",
    "rejected": "not a scan that this model takes",
    "failed": "something went wrong; run again to retry",
}

VERDICT_TONES = {"refer": "warn", "not assessable": "bad"}

Row = Mapping[str, str]
Results = Mapping[str, Mapping[str, Any]]


def build(config: ReportConfig, folder: Path) -> page.Page:
    """Make the page of a folder with `ledger.csv`; failed, rejected and flagged scans come first.

    Raises:
        UserError: the ledger or the summary is damaged.
    """
    rows = sorted(_read_ledger(folder / "ledger.csv"), key=_order)
    shown = rows[: page.MAX_ROWS]
    results: Results = {
        row["case_id"]: read_mapping(folder / row["case_id"] / "result.json", missing={}) for row in shown
    }
    summary = read_mapping(folder / "summary.json", missing={})
    bundle: Mapping[str, Any] = summary.get("bundle") or next(
        (result["bundle"] for result in results.values() if result.get("bundle")), {}
    )
    drawable = [row for row in shown if row["status"] in ("done", "flagged")][: config.max_cases]
    drawn = _draw(drawable, results, folder, config.viewer_cases)
    counts = Counter(row["status"] for row in rows)
    html = page.render(
        "batch.html.j2",
        title=f"Predictions: {bundle.get('name') or folder.name}",
        facts=_facts(rows, bundle),
        counts=[(status, counts.get(status, 0), MEANINGS[status], STATUS_TONES[status]) for status in ORDER],
        simulated=simulated_cohort(str(path) for result in results.values() for path in result.get("image") or ()),
        trained_on_simulated=bool(bundle.get("simulated")),
        attention=_attention([row for row in shown if row["status"] != "done"], results, {c.case_id for c in drawn}),
        scans=_table(shown, results, {case.case_id for case in drawn}, len(rows)),
        queue=_queue(folder / "review_queue.csv", {case.case_id for case in drawn}),
        changes=show_changes(folder, config.max_cases),
        drawn=drawn,
        note=capped(
            sum(row["status"] in ("done", "flagged") for row in rows), len(drawn), "finished scans", "the table"
        ),
    )
    figures = {**{status: counts.get(status, 0) for status in ORDER}, "cases_drawn": len(drawn)}
    return page.Page(html, figures)


def _read_ledger(path: Path) -> list[dict[str, str]]:
    rows = read_rows(path)
    for name in ("case_id", "status", "reason", "seconds"):
        if rows and name not in rows[0]:
            raise UserError(f"{path} has no column {name!r}; predict again to write the ledger anew.")
    return rows


def _order(row: Row) -> tuple[int, str]:
    status = row.get("status", "")
    return ORDER.index(status) if status in ORDER else 0, row.get("case_id", "")


def _draw(rows: Sequence[Row], results: Results, folder: Path, viewers: int) -> list[CaseView]:
    remove_stale(folder / "report" / "overlays", {row["case_id"] for row in rows})
    drawn = []
    for row in rows:
        view = _draw_one(row["case_id"], results[row["case_id"]], folder, with_viewer=viewers > 0)
        viewers -= view.viewer is not None
        drawn.append(view)
    return drawn


def _draw_one(case_id: str, result: Mapping[str, Any], folder: Path, *, with_viewer: bool) -> CaseView:
    """From the scan where it is at hand (a cohort's), else from the preview that predict left."""
    place = folder / case_id
    images = [Path(str(path)) for path in result.get("image") or ()]
    mask = next((path for path in (place / "mask.nii.gz", place / "mask.png") if path.is_file()), None)
    explanation = place / "explanation" if (place / "explanation" / "explanation.json").is_file() else None
    flags = result.get("flags") or ()
    lead = _lead(result)
    overlay = folder / "report" / "overlays" / f"{case_id}.png"
    if images and all(path.is_file() for path in images):
        return draw_case(
            case_id,
            overlay,
            images=images,
            label=None,
            pred=mask,
            explanation=explanation,
            lungs=lungs_of(place),
            labels=_labels(result),
            lead=lead,
            flags=flags,
            with_viewer=with_viewer,
        )
    view = CaseView(case_id, anchor(case_id), lead, flag_texts(flags))
    try:
        pictures = _previews(place, mask, explanation, overlay)
        told = explain_in_words(explanation) if explanation is not None else ""
    except UserError as error:
        return replace(view, problem=without_folders(str(error)))
    return replace(view, explanation=told, pictures=pictures)


def _previews(place: Path, mask: Path | None, explanation: Path | None, overlay: Path) -> tuple[Picture, ...]:
    """The preview that `predict` left, and the map; a preview without a mask is the map's first panel."""
    preview = place / "preview.png"
    mapped = explanation is not None and not is_withheld(explanation)
    pictures = []
    if preview.is_file() and (mask is not None or not mapped):
        pictures.append(embedded(preview, f"Preview of {place.name}."))
    if explanation is not None and mapped:
        scene = load_map(explanation, mask, preview, lungs_of(place))
        write_bytes(overlay, draw_scene(scene, {}, f"{place.name} · activation map"))
        pictures.append(embedded(overlay, f"Activation map of {place.name}."))
    return tuple(pictures)


def _lead(result: Mapping[str, Any]) -> str:
    if called := _called(result):
        probs = result.get("probs") or {}
        told = ((name, probs.get(name)) for name in called)
        return ", ".join(f"{name} ({page.format_number(p, 3)})" if p is not None else name for name, p in told)
    volumes = result.get("volumes_ml") or {}
    parts = [f"{label} {page.format_number(ml, 1)} ml" for label, ml in volumes.items() if page.is_number(ml)]
    return ", ".join(parts[:4])


def _called(result: Mapping[str, Any]) -> list[str]:
    """The class that is called, or the labels that are, `none` if no label is; nothing for a segmentation."""
    found = result.get("predicted")
    if isinstance(found, list):
        return [str(name) for name in found] or [EMPTY]
    return [str(found)] if found else []


def _labels(result: Mapping[str, Any]) -> dict[str, int]:
    """Names of the values; where the result does not tell, volumes stand in the order of the labels, from 1 on."""
    volumes = result.get("volumes_ml") or {}
    return result.get("labels") or {str(name): value for value, name in enumerate(volumes, start=1)}


def _facts(rows: Sequence[Row], bundle: Mapping[str, Any]) -> list[tuple[str, str]]:
    seconds = sum(float(row["seconds"]) for row in rows if row.get("seconds"))
    facts = [
        ("Scans", str(len(rows))),
        ("Model", str(bundle.get("name") or "")),
        ("Bundle", str(bundle.get("sha256") or "")[:12]),
        ("Trained in run", str(bundle.get("run_id") or "")),
        ("Time", (f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s") if seconds else ""),
    ]
    return [(name, value) for name, value in facts if value]


def _attention(rows: Sequence[Row], results: Results, drawn: set[str]) -> Table:
    cells = []
    for row in rows:
        texts = flag_texts(results[row["case_id"]].get("flags") or ())
        reason = without_folders(row.get("reason") or "") or " ".join(texts)
        status = words(row["status"], tone=STATUS_TONES.get(row["status"], ""))
        cells.append((_name(row, drawn), status, words(reason)))
    rejected = any(row["status"] == "rejected" for row in rows)
    note = "The files of rejected scans are named in rejects.csv." if rejected else ""
    return Table("Needs a look", ("Case", "Status", "Why"), tuple(cells), (False,) * 3, note)


def _queue(path: Path, drawn: set[str]) -> Table | None:
    """The review queue, the riskiest first; None where the model says nothing of how far to trust it."""
    rows = read_rows(path) if path.is_file() else []
    structures, distances = (any(row.get(name) for row in rows) for name in ("structure", "feature_distance"))
    if not structures and not distances:
        return None
    figures = [("expected_dice", "Expected Dice"), ("agreement", "Agreement of the folds")] if structures else []
    figures += [("feature_distance", "Distance from training"), ("distance_limit", "Its limit")] if distances else []
    cells = []
    for row in rows[: page.MAX_ROWS]:
        named = [words(row["structure"])] if structures else []
        numbers = [number(float(row[name]) if row.get(name) else None, 3) for name, _ in figures]
        flags = words(_codes(row), tone=STATUS_TONES.get(row["status"], ""))
        cells.append((number(int(row["rank"])), _name(row, drawn), *named, *numbers, flags))
    structure = ["Least certain structure"] if structures else []
    heads = ("Rank", "Case", *structure, *(head for _, head in figures), "Flags")
    numeric = (True, False, *(False for _ in structure), *(True for _ in figures), False)
    return Table("To be reviewed, in this order", heads, tuple(cells), numeric, _order_in_words(rows))


def _order_in_words(rows: Sequence[Row]) -> str:
    first = "Flagged results first, those unlike the training cohort at the top"
    if not any(row.get("structure") for row in rows):
        return f"{first}; then the scans farthest from it."
    if any(row["expected_dice"] for row in rows):
        return f"{first}; then those whose least certain structure has the lowest expected Dice."
    return f"{first}; then the least certain; the model was not calibrated to expect a Dice."


def _codes(row: Row) -> str:
    return ", ".join(code.replace("_", " ") for code in row["flags"].split())


def _table(rows: Sequence[Row], results: Results, drawn: set[str], total: int) -> Table:
    volumes = list(dict.fromkeys(name for r in results.values() for name in r.get("volumes_ml") or {}))
    classes = list(dict.fromkeys(name for r in results.values() for name in r.get("probs") or {}))
    judged = any(r.get("verdict") for r in results.values())
    cells: list[tuple[Cell, ...]] = []
    for row in rows:
        result = results[row["case_id"]]
        found, probs = result.get("volumes_ml") or {}, result.get("probs") or {}
        line = [_name(row, drawn), words(row["status"], tone=STATUS_TONES.get(row["status"], ""))]
        line += [words(", ".join(_called(result)))] if classes else []
        told = result.get("verdict") or {}
        line += [words(told.get("call"), tone=VERDICT_TONES.get(str(told.get("call")), ""))] if judged else []
        line += [number(told.get("score"))] if judged else []
        line += [number(probs.get(name), 3) for name in classes] + [number(found.get(name), 2) for name in volumes]
        cells.append((*line, number(float(row["seconds"]) if row.get("seconds") else None, 1)))
    heads = ["Case", "Status", *(["Called"] if classes else []), *(["Verdict"] if judged else [])]
    measured = [
        *(["Score"] if judged else []),
        *(f"p({name})" for name in classes),
        *(f"{name} (ml)" for name in volumes),
        "Seconds",
    ]
    numeric = (False,) * len(heads) + (True,) * len(measured)
    note = capped(total, len(rows), "scans", "ledger.csv")
    return Table("All scans", (*heads, *measured), tuple(cells), numeric, note, sortable=True)


def _name(row: Row, drawn: set[str]) -> Cell:
    case_id = row["case_id"]
    return words(case_id, href=f"#{anchor(case_id)}" if case_id in drawn else "")
