"""The page of a cohort: what it holds, how it is split, what the images look like, what was found and refused."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from medseg.cohort import SPLITS, Case, Cohort, Finding, read_cohort
from medseg.config import ReportConfig
from medseg.files import UserError, read_rows
from medseg.label_sets import EMPTY, read_set
from medseg.report import page
from medseg.report.charts import histograms, intensity_chart
from medseg.report.figures import draw_thumbnail
from medseg.report.page import Picture, Table, capped, number, words
from medseg.report.slices import load_scene
from medseg.report.sources import read_mapping, without_folders
from medseg.volume import sampled

PERCENTS = tuple(range(0, 101, 5))
AXES = ("first axis", "second axis", "third axis")


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of one case, or why there is none."""

    case_id: str
    lead: str
    picture: Picture | None
    problem: str = ""


def build(config: ReportConfig, folder: Path) -> page.Page:
    """Make the page of a cohort. At most `config.max_cases` images are read, spread evenly over the cases.

    Raises:
        UserError: not a finished cohort.
    """
    cohort = read_cohort(folder)
    about = read_mapping(folder / "cohort.json")
    rejects = read_rows(folder / "rejects.csv") if (folder / "rejects.csv").is_file() else []
    provenance = about.get("provenance") or {}
    chosen = _spread(cohort.cases, config.max_cases)
    thumbnails, seen = _look(cohort, chosen)
    curves = provenance.get("percentiles") or seen  # of every image where ingest left them, else of those drawn
    html = page.render(
        "cohort.html.j2",
        title=f"Cohort {folder.name}",
        facts=_facts(cohort, len(rejects)),
        simulated=bool(provenance.get("simulated")),
        splits=_split_table(cohort),
        annotated=_annotated_table(cohort),
        geometry=_geometry(cohort.cases),
        grids=_grid_table(cohort.cases),
        intensities=intensity_chart(curves, PERCENTS) if curves else None,
        findings=_finding_table(cohort.cases),
        duplicates=_duplicate_table(cohort.cases),
        privacy=_privacy(provenance.get("deidentification") or {}),
        rejects=_reject_table(rejects),
        thumbnails=thumbnails,
        note=capped(len(cohort.cases), len(chosen), "cases", "cohort.csv") if chosen else "",
    )
    figures = {"cases": len(cohort.cases), "rejects": len(rejects), "cases_drawn": len(thumbnails)}
    return page.Page(html, figures)


def _spread(cases: Sequence[Case], count: int) -> list[Case]:
    if len(cases) <= count:
        return list(cases)
    return [cases[round(n)] for n in np.linspace(0, len(cases) - 1, count)] if count else []


def _look(cohort: Cohort, cases: Sequence[Case]) -> tuple[list[Thumbnail], dict[str, list[float]]]:
    thumbnails, curves = [], {}
    for case in cases:
        lead = ", ".join(filter(None, (case.split or "unassigned", case.site, case.target)))
        try:
            scene = load_scene(cohort.image_paths(case), cohort.label_path(case))
        except UserError as error:
            thumbnails.append(Thumbnail(case.case_id, lead, None, without_folders(str(error))))
            continue
        values = sampled(scene.image, 200_000).astype(np.float64)
        curves[case.case_id] = [float(v) for v in np.percentile(values[np.isfinite(values)], PERCENTS)]
        thumbnails.append(Thumbnail(case.case_id, lead, _thumbnail(case, draw_thumbnail(scene))))
    return thumbnails, curves


def _thumbnail(case: Case, pixels: np.ndarray) -> Picture:
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="WEBP", quality=80, method=4)
    return Picture(page.data_uri(buffer.getvalue(), "image/webp"), f"Image of {case.case_id}.", pixels.shape[1])


def _facts(cohort: Cohort, rejects: int) -> list[tuple[str, str]]:
    cases = cohort.cases
    sites = {case.site for case in cases if case.site}
    labels = ", ".join(f"{name} ({value})" for name, value in cohort.label_names.items())
    facts = [
        ("Cases", str(len(cases))),
        ("Patients", str(len({case.patient_id for case in cases}))),
        ("Examined on several days", _followed(cases)),
        ("Refused", str(rejects)),
        ("Sites", str(len(sites)) if sites else ""),
        ("With label", str(sum(bool(case.label or case.target) for case in cases))),
        ("Labels", labels),
        ("Channels", ", ".join(cohort.channels)),
        ("Modality", _tally(case.modality for case in cases)),
        ("Source", _tally(case.source_kind for case in cases)),
        ("Cohort", cohort.sha256[:12]),
    ]
    return [(name, value) for name, value in facts if value]


def _followed(cases: Sequence[Case]) -> str:
    """How many patients were; empty where none is known to have been."""
    days: dict[str, set[int]] = defaultdict(set)
    for case in cases:
        if case.exam_day is not None:
            days[case.patient_id].add(case.exam_day)
    count = sum(len(found) > 1 for found in days.values())
    return f"{count} patients" if count else ""


def _tally(values: Iterable[str]) -> str:
    counts = Counter(value for value in values if value)
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common(6))


def _classes_of(case: Case, names: Mapping[str, int]) -> tuple[str, ...]:
    """The class of a case, or all its labels where they are not exclusive."""
    return (case.target,) if not case.target or case.target in names else read_set(case.target) or (EMPTY,)


def _split_table(cohort: Cohort) -> Table:
    """Cases per split, by site and class where these are known; and patients."""
    cases = cohort.cases
    keys = [name for name in ("site", "target") if any(getattr(case, name) for case in cases)]
    groups: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    patients: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        split = case.split or "unassigned"
        for name in _classes_of(case, cohort.label_names):
            groups[tuple({"site": case.site, "target": name}[key] for key in keys)][split] += 1
        patients[split].add(case.patient_id)
    splits = [name for name in (*SPLITS, "unassigned") if name in patients]
    rows = []
    for group, counts in sorted(groups.items()):
        heads = (words("Cases"), *(words(value) for value in group))
        rows.append((*heads, *(number(counts[name]) for name in splits), number(counts.total())))
    if rows:
        everyone = number(len({case.patient_id for case in cases}))
        heads = (words("Patients"), *(words("all") for _ in keys))
        rows.append((*heads, *(number(len(patients[name])) for name in splits), everyone))
    columns = ("", *({"site": "Site", "target": "Class"}[key] for key in keys), *splits, "All")
    numeric = (False,) * (1 + len(keys)) + (True,) * (len(splits) + 1)
    note = "No patient lies in two splits."
    if any(len(_classes_of(case, cohort.label_names)) > 1 for case in cases):
        note += " A case counts under each of its labels."
    return Table("Cases by split", columns, tuple(rows), numeric, note)


def _annotated_table(cohort: Cohort) -> Table | None:
    """Cases that annotate each structure, per split; None where all annotate all."""
    labelled = [case for case in cohort.cases if case.label]
    if not any(case.annotated for case in labelled):
        return None
    splits = [name for name in (*SPLITS, "") if any(case.split == name for case in labelled)]
    rows = []
    for name, value in cohort.label_names.items():
        counts = Counter(case.split for case in labelled if value in cohort.annotated(case))
        rows.append((words(name), *(number(counts[split]) for split in splits), number(counts.total())))
    columns = ("Structure", *(split or "unassigned" for split in splits), "All")
    note = "The others do not tell of it: nothing is trained or measured on it there."
    return Table("Cases with the structure contoured", columns, tuple(rows), (False, *[True] * (len(splits) + 1)), note)


def _geometry(cases: Sequence[Case]) -> Picture | None:
    panels: dict[str, Mapping[str, Sequence[float]]] = {}
    volumes = [case for case in cases if case.kind == "volume"]
    flat = [case for case in cases if case.kind == "radiograph"]
    for group, unit, names in ((volumes, "voxels", AXES), (flat, "pixels", AXES[:2])):
        spaced = [case for case in group if case.spacing_mm]
        if spaced:
            spacings = {name: [round(c.spacing_mm[a], 3) for c in spaced] for a, name in enumerate(names)}
            panels[f"Spacing (mm) of {len(spaced)}"] = spacings
        if group:
            panels[f"Size ({unit}) of {len(group)}"] = {
                name: [float(c.shape[a]) for c in group] for a, name in enumerate(names)
            }
    return histograms(panels, f"Distribution of {' and '.join(panels)} over {len(cases)} cases.") if panels else None


def _grid_table(cases: Sequence[Case]) -> Table:
    """The commonest grids."""
    grids = Counter((c.shape, tuple(round(s, 3) for s in c.spacing_mm), c.orientation) for c in cases)
    rows = []
    for (shape, spacing, orientation), count in grids.most_common(8):
        sizes = page.join_sizes(spacing) if spacing else "unknown"
        rows.append((words(page.join_sizes(shape)), words(sizes), words(orientation), number(count)))
    note = capped(len(grids), len(rows), "grids", "cohort.csv")
    return Table(
        "Commonest grids", ("Size", "Spacing (mm)", "Axes", "Cases"), tuple(rows), (False,) * 3 + (True,), note
    )


def _finding_table(cases: Sequence[Case]) -> Table:
    found: dict[tuple[str, str], list[tuple[str, Finding]]] = defaultdict(list)
    for case in cases:
        for finding in case.findings:
            found[finding.severity, finding.code].append((case.case_id, finding))
    rows = []
    for (severity, code), hits in sorted(found.items(), key=lambda item: (item[0][0] != "warning", -len(item[1]))):
        names = ", ".join(dict.fromkeys(case_id for case_id, _ in hits[:3])) + (" …" if len(hits) > 3 else "")
        tone = "warn" if severity == "warning" else ""
        measured = [finding.number for _, finding in hits if finding.number is not None]
        numbers = (number(min(measured, default=None)), number(max(measured, default=None)))
        example = hits[0][1]
        counted = (number(len(hits)), *numbers, number(example.threshold))
        rows.append((words(code), words(severity, tone=tone), *counted, words(example.message), words(names)))
    columns = ("Finding", "Severity", "Times", "Least", "Most", "Threshold", "For example", "Cases")
    return Table("Findings of the quality check", columns, tuple(rows), (False,) * 2 + (True,) * 4 + (False,) * 2)


def _duplicate_table(cases: Sequence[Case]) -> Table | None:
    """Images that are there twice, those of two patients first."""
    hits = [
        (finding.severity != "warning", finding.number or 0.0, case, finding)
        for case in cases
        for finding in case.findings
        if finding.code in ("duplicate", "near_duplicate")
    ]
    if not hits:
        return None
    rows = []
    for _, _, case, finding in sorted(hits, key=lambda hit: (*hit[:2], hit[2].case_id))[: page.MAX_ROWS]:
        tone = "warn" if finding.severity == "warning" else ""
        place = ", ".join(filter(None, (case.split or "unassigned", case.site)))
        rows.append((words(case.case_id), words(case.patient_id), words(place), words(finding.message, tone=tone)))
    note = capped(len(hits), len(rows), "findings", "cohort.csv")
    return Table("Images that are there twice", ("Case", "Patient", "Split, site", "What"), tuple(rows), (), note)


def _privacy(about: Mapping[str, Any]) -> str:
    """One sentence on what became of names and dates."""
    if not about:
        return ""
    dates = "shifted, by one number of days for each patient" if about.get("dates") == "shift" else "dropped"
    return (
        "DICOM identifiers are keyed pseudonyms, free text and private elements are not kept, dates are "
        f"{dates}; names of other files are {about.get('names_of_files')}. Declared burnt-in text is "
        f"{about.get('burned_in_text')}; pixels are not searched for text."
    )


def _reject_table(rejects: Sequence[Mapping[str, str]]) -> Table:
    shown = rejects[: page.MAX_ROWS]
    rows = [(words(Path(r["source"]).name), words(r["code"]), words(without_folders(r["reason"]))) for r in shown]
    note = capped(len(rejects), len(shown), "refused inputs", "rejects.csv")
    return Table("Refused inputs", ("Source", "Code", "Why"), tuple(rows), (False,) * 3, note, sortable=True)
