"""The results of one evaluated split: tables from `metrics.json` and `cases.json`, and the cases drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medseg.report import page
from medseg.report.cases import CaseView, draw_cases
from medseg.report.charts import roc_chart
from medseg.report.page import Cell, Picture, Table, capped, estimate, metric, number, words
from medseg.report.sources import read_list, read_mapping, without_folders

CLASS_FIGURES = ("dice", "hd95_mm", "surface_dice", "volume_error_ml")
RATE_FIGURES = ("auc", "accuracy", "sensitivity", "specificity", "precision", "f1")
QUALITY_FIGURES = ("ece", "brier", "nll")


@dataclass(frozen=True)
class SplitView:
    """Everything that the page shows of one evaluated split."""

    name: str
    lead: str
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]
    cases: Table
    drawn: tuple[CaseView, ...]
    note: str


ORIENTATION = (
    "Slices pass through the middle of the structure, in radiological order: the patient’s right is on the left of "
    "the picture."
)


@dataclass
class Budget:
    """Pictures and viewers left for the page; the test split comes first."""

    pictures: int
    viewers: int


def show_split(folder: Path, name: str, labels: Mapping[str, int], budget: Budget) -> SplitView:
    metrics = read_mapping(folder / "metrics.json")
    cases = sorted(read_list(folder / "cases.json"), key=_order)
    drawn = draw_cases(cases, folder, labels, pictures=budget.pictures, viewers=budget.viewers)
    budget.pictures -= len(drawn)
    budget.viewers -= sum(case.viewer is not None for case in drawn)
    tables = _figure_tables(metrics)
    tables += [
        table for table in (_trust_table(metrics), _site_table(metrics), _location_table(metrics)) if table is not None
    ]
    tables += _check_tables(read_mapping(folder / "predictions" / "explanation.json", missing={}))
    roc = metrics.get("roc") or {}
    of_roc = (metrics.get("per_class") or {}).get(metrics.get("positive"), metrics)
    area = (of_roc.get("auc") or {}).get("value")
    pictures = [roc_chart(roc["fpr"], roc["tpr"], area)] if roc.get("fpr") else []
    table = _case_table(cases, {case.case_id for case in drawn}, f"evaluation/{name}/cases.csv")
    volumes = any(str(image).endswith((".nii", ".nii.gz")) for case in cases[:1] for image in case.get("images") or ())
    note = capped(len(cases), len(drawn), "cases", "the table above")
    note = " ".join(filter(None, (note, ORIENTATION if volumes else "")))
    return SplitView(name, _lead(metrics, name, len(cases)), tuple(tables), tuple(pictures), table, tuple(drawn), note)


def _order(case: Mapping[str, Any]) -> tuple[bool, float, str]:
    score = case.get("score")
    failed = not page.is_number(score) or bool(case.get("reason"))
    return not failed, float(score) if score is not None and page.is_number(score) else 0.0, str(case.get("case_id"))


def _lead(metrics: Mapping[str, Any], name: str, count: int) -> str:
    total = metrics.get("n_cases", count)
    failed = len(metrics.get("failed") or ())
    text = f"{total} {'case' if total == 1 else 'cases'} of the split “{name}”"
    text += f", of which {failed} could not be measured and enter no mean." if failed else "."
    dice = metrics.get("mean_dice")
    if dice is not None and page.is_number(dice):
        text += f" Mean Dice over the classes {page.format_number(dice, 3)}."
    return text


def _figure_tables(metrics: Mapping[str, Any]) -> list[Table]:
    if metrics.get("task") == "segmentation":
        return [_class_table(metrics)]
    return [_label_table(metrics)] if metrics.get("task") == "multi_label" else _rate_tables(metrics)


def _class_table(metrics: Mapping[str, Any]) -> Table:
    classes: Mapping[str, Mapping[str, Any]] = metrics.get("classes") or {}
    present = {name for figures in classes.values() for name in figures}
    names = [name for name in CLASS_FIGURES if name in present] + sorted(present - set(CLASS_FIGURES))
    rows = []
    for label, figures in classes.items():
        first = next((f for f in figures.values() if isinstance(f, Mapping)), {})
        cells = [estimate(figures.get(name), metric(name)[1]) for name in names]
        rows.append((words(label), *cells, number(first.get("n"))))
    tolerance = metrics.get("surface_dice_tolerance_mm")
    note = "Mean over cases with its 95 % interval below (bootstrap over patients)."
    if tolerance is not None:
        note += f" Surface Dice at a tolerance of {tolerance:g} mm."
    if metrics.get("annotated"):
        note += " Not every case has all structures contoured: a row rests on those in which its structure is."
    columns = ("Class", *(metric(name)[0] for name in names), "Cases")
    return Table(
        "Agreement with the reference by class", columns, tuple(rows), (False, *[True] * (len(names) + 1)), note
    )


def _label_table(metrics: Mapping[str, Any]) -> Table:
    """A row per label of a task whose labels are not exclusive, and their means."""
    names = ("auc", "sensitivity", "specificity")
    found: Mapping[str, Mapping[str, Any]] = metrics.get("per_label") or {}
    rows = [
        (words(label), *(estimate(of.get(name), metric(name)[1]) for name in names), number(of.get("n_positive")))
        for label, of in found.items()
    ]
    rows.append(
        (words("Mean of the labels"), *(estimate(metrics.get(name), metric(name)[1]) for name in names), words(""))
    )
    note = (
        f"Each with its 95 % interval below, over {metrics.get('n', 0)} cases. The labels are not exclusive: each is "
        f"called from a probability of {metrics.get('threshold', 0.5):.3g} on. A label that no case or every case has "
        "is left out of the means for which it has no figure."
    )
    columns = ("Label", *(metric(name)[0] for name in names), "Cases with it")
    return Table("Agreement with the known labels", columns, tuple(rows), (False, *[True] * (len(names) + 1)), note)


def _rate_tables(metrics: Mapping[str, Any]) -> list[Table]:
    rates = [name for name in RATE_FIGURES if name in metrics]
    cells = [estimate(metrics[name], metric(name)[1]) for name in rates]
    threshold = metrics.get("threshold")
    note = "Each with its 95 % interval below."
    if metrics.get("per_class"):
        note += " AUC, sensitivity and specificity are means over the classes, each against all others."
    elif threshold is not None:
        note += (
            f" Positive is {metrics.get('positive') or 'the second class'}, from a probability of {threshold:.3g} on."
        )
    heads = tuple(metric(name)[0] for name in rates)
    tables = [Table("Agreement with the known class", heads, (tuple(cells),), (True,) * len(heads), note)]
    if metrics.get("per_class"):
        tables.append(_one_against_the_rest(metrics))
    classes, confusion = list(metrics.get("classes") or ()), metrics.get("confusion") or []
    if confusion and len(confusion) == len(classes):
        tables.append(_confusion_table(classes, confusion))
    if quality := metrics.get("calibration"):
        heads = tuple(metric(name)[0] for name in QUALITY_FIGURES)
        line = tuple(estimate(quality.get(name), metric(name)[1]) for name in QUALITY_FIGURES)
        note = (
            f"How far the probabilities of {metrics.get('positive') or 'the second class'} are from the shares that "
            "they promise: 0 is best."
        )
        tables.append(Table("Are the probabilities true?", heads, (line,), (True,) * len(heads), note))
    return tables


def _one_against_the_rest(metrics: Mapping[str, Any]) -> Table:
    """A row per class of more than two."""
    names = tuple(name for name in RATE_FIGURES if name != "accuracy")
    rows = [
        (words(label), *(estimate(found.get(name), metric(name)[1]) for name in names), number(found.get("n")))
        for label, found in metrics["per_class"].items()
    ]
    note = "Each with its 95 % interval below."
    if metrics.get("positive") is not None:
        note += (
            f" A case is called {metrics['positive']} from a probability of {metrics['threshold']:.3g} on, else the "
            f"most probable other class; the curve below is that of {metrics['positive']}."
        )
    columns = ("Class", *(metric(name)[0] for name in names), "Cases")
    return Table("Each class against all others", columns, tuple(rows), (False, *[True] * (len(names) + 1)), note)


def _confusion_table(classes: Sequence[str], confusion: Sequence[Sequence[int]]) -> Table:
    rows = []
    for name, counts in zip(classes, confusion, strict=True):
        total = sum(counts)
        shares = [f"{count / total:.0%}" if total else "" for count in counts]
        cells = (replace(number(count), detail=share) for count, share in zip(counts, shares, strict=True))
        rows.append((words(f"is {name}"), *cells))
    columns = ("", *(f"called {name.replace('_', ' ')}" for name in classes))  # so that a long name has two lines
    note = "Below each number of cases its share of the row."
    return Table("Confusion", columns, tuple(rows), (False, *[True] * len(classes)), note)


def _trust_table(metrics: Mapping[str, Any]) -> Table | None:
    """How well the model knew how good it is; None where it is not calibrated for that."""
    known: Mapping[str, Mapping[str, Any]] = metrics.get("expected_dice") or {}
    names = ("spearman", "pearson", "mean_error", "absolute_error", "calibration_error", "coverage")
    rows = [
        (words(label), *(number(found.get(name), 3) for name in names), number(found.get("n")))
        for label, found in known.items()
    ]
    heads = ("Rank correlation", "Correlation", "Mean error", "Mean absolute error", "Calibration error", "In interval")
    note = "Expected minus reached Dice; the interval is meant to hold the Dice of nine cases in ten."
    numeric = (False, *[True] * (len(names) + 1))
    return (
        Table("Did the expected Dice come true?", ("Class", *heads, "Cases"), tuple(rows), numeric, note)
        if rows
        else None
    )


def _site_table(metrics: Mapping[str, Any]) -> Table | None:
    sites: Mapping[str, Mapping[str, Any]] = metrics.get("sites") or {}
    if not sites:
        return None
    names = [name for name in dict.fromkeys(key for figures in sites.values() for key in figures) if name != "n"]
    partly = bool(metrics.get("annotated"))
    rows = [
        (words(site), *(_counted(figures.get(name), name, partly) for name in names), number(figures.get("n")))
        for site, figures in sites.items()
    ]
    columns = ("Site", *(metric(name)[0] for name in names), "Cases")
    return Table("By site", columns, tuple(rows), (False, *[True] * (len(names) + 1)))


def _counted(figure: Any, name: str, partly: bool) -> Cell:
    """An estimate; with the number of cases that it rests on, where not every case counts."""
    cell = estimate(figure, metric(name)[1])
    if not partly or not isinstance(figure, Mapping):
        return cell
    return replace(cell, detail=", ".join(filter(None, (cell.detail, f"n = {figure.get('n')}"))))


def _location_table(metrics: Mapping[str, Any]) -> Table | None:
    location: Mapping[str, Any] = metrics.get("localisation") or {}
    names = [name for name in location if name != "n"]
    if not names:
        return None
    cells = tuple(estimate(location[name], metric(name)[1]) for name in names)
    note = (
        f"Over {location.get('n', 'all')} cases with a known place of the finding. A map that knows nothing has "
        "the mask’s share of the image as energy inside it."
    )
    columns = tuple(metric(name)[0] for name in names)
    return Table("Do the activation maps lie on the finding?", columns, (cells,), (True,) * len(names), note)


def _check_tables(summary: Mapping[str, Any]) -> list[Table]:
    """What the activation maps passed; a table for each method and layer."""
    tables = []
    for made_by, found in summary.items():
        everything = {"mean": None, "threshold": None, **found["all_passed"]}
        rows = [
            (words(name.replace("_", " ")), number(facts["mean"], 2), number(facts["threshold"], 2), *_passing(facts))
            for name, facts in [*found["checks"].items(), ("all of them", everything)]
        ]
        bare = found["no_evidence"]
        note = f"{found['maps']} maps by {made_by}" + (f", {bare} of them without evidence." if bare else ".")
        columns = ("Check", "Mean", "Mark", "Share of maps that pass", "Maps")
        tables.append(
            Table("Do the activation maps pass their checks?", columns, tuple(rows), (False, *[True] * 4), note)
        )
    return tables


def _passing(facts: Mapping[str, Any]) -> tuple[Cell, Cell]:
    return estimate({"value": facts["share"], **{k: facts[k] for k in ("ci_low", "ci_high")}}, 2), number(facts["n"])


def _case_table(cases: Sequence[Mapping[str, Any]], drawn: set[str], where: str) -> Table:
    shown = cases[: page.MAX_ROWS]
    names = list(dict.fromkeys(key for case in shown for key in case.get("metrics") or {}))
    classified = any(case.get("predicted") for case in shown)
    failed = any(case.get("reason") for case in shown)
    rows = []
    for case in shown:
        case_id, figures = str(case["case_id"]), case.get("metrics") or {}
        cells: list[Cell] = [words(case_id, href=f"#{page.anchor(case_id)}" if case_id in drawn else "")]
        cells.append(number(case.get("score"), 3))
        if failed:
            reason = without_folders(str(case.get("reason") or ""))
            cells.append(words(reason, tone="bad" if reason else ""))
        if classified:
            wrong = case.get("target") != case.get("predicted")
            cells += [words(case.get("target")), words(case.get("predicted"), tone="bad" if wrong else "")]
        cells += [number(figures.get(name), metric(name)[1]) for name in names]
        rows.append(tuple(cells))
    texts = [*(["Not measured because"] if failed else []), *(["Is", "Called"] if classified else [])]
    heads = ("Case", "Score", *texts, *(metric(name)[0] for name in names))
    numeric = (False, True, *[False] * len(texts), *[True] * len(names))
    note = capped(len(cases), len(shown), "cases, worst first,", where)
    return Table("All cases, worst first", heads, tuple(rows), numeric, note, sortable=True)
