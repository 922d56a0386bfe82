"""One outcome per case of the split: measured, or failed with the reason. None is dropped on the way."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.cohort import Case, Cohort
from medseg.files import UserError, read_json, write_json, write_rows

USABLE = ("done", "flagged")


@dataclass(frozen=True)
class Outcome:
    """What the evaluation knows about one case.

    Attributes:
        reason: why the case could not be measured; empty when it was.
        score: 0 (worst) to 1; the order of review. 0 for a failed case.
        figures: numbers by column name; NaN where a figure is not defined.
        target, predicted: class names, or sets of labels as `label_sets` writes them; probs: probability by class name
            (classification).
        pred: the predicted mask (segmentation).
        not_annotated: labels of which the case's label map does not tell; they have no figures.
    """

    case: Case
    reason: str = ""
    score: float = 0.0
    figures: Mapping[str, float] = field(default_factory=dict)
    target: str = ""
    predicted: str = ""
    probs: Mapping[str, float] = field(default_factory=dict)
    pred: Path | None = None
    not_annotated: tuple[str, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether there are figures."""
        return not self.reason


def read_result(predictions: Path, case_id: str) -> dict[str, Any]:
    """The prediction's `result.json` of one case.

    Raises:
        UserError: there is none, it cannot be read, or it says that the case was rejected or failed.
    """
    path = predictions / case_id / "result.json"
    if not path.is_file():
        raise UserError("no prediction was made for this case; predict it again.")
    result = read_json(path)
    if not isinstance(result, dict) or "status" not in result:
        raise UserError(f"its {path.name} holds no status; predict the case again.")
    if result["status"] not in USABLE:
        raise UserError(f"prediction {result['status']}: {result.get('reason') or 'no reason was recorded'}")
    return result


def reason_of(error: UserError, *folders: Path) -> str:
    """The sentence of an error, paths shortened to what lies below the folders: tables of cases leave the machine."""
    text = str(error)
    for folder in folders:
        text = text.replace(f"{folder}/", "")
    return text


def write_outcomes(cohort: Cohort, outcomes: Sequence[Outcome], predictions: Path, out: Path) -> dict[str, Path]:
    """Write `cases.csv` (in order of case_id) and `cases.json` (worst first, failed cases before all others)."""
    names: dict[str, None] = {}
    for outcome in outcomes:
        names.update(dict.fromkeys(outcome.figures))
    columns = ["case_id", "site", "status", "reason", "score", "target", "predicted", *names]
    rows = [_row(outcome, names) for outcome in sorted(outcomes, key=lambda o: o.case.case_id)]
    ranked = sorted(outcomes, key=lambda o: (o.measured, o.score, o.case.case_id))
    entries = [_entry(cohort, outcome, predictions) for outcome in ranked]
    return {
        "cases_csv": write_rows(out / "cases.csv", columns, rows),
        "cases_json": write_json(out / "cases.json", entries),
    }


def read_outcomes(evaluated: Path) -> list[Outcome]:
    """The outcomes that `write_outcomes` left in a folder with `cases.json` and `predictions/`.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        return [_outcome(entry, evaluated / "predictions") for entry in read_json(evaluated / "cases.json")]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{evaluated / 'cases.json'} is no table of cases ({error}); evaluate again.") from error


def _outcome(entry: Mapping[str, Any], predictions: Path) -> Outcome:
    file = predictions / entry["case_id"] / "result.json"
    patient = str(read_json(file)["patient_id"]) if file.is_file() else ""
    figures = {name: math.nan if value is None else float(value) for name, value in entry["metrics"].items()}
    return Outcome(
        Case(entry["case_id"], patient or entry["case_id"], (), site=entry["site"], label=entry["label"] or ""),
        reason=entry["reason"],
        score=float(entry["score"] or 0.0),
        figures=figures,
        target=entry["target"] or "",
        predicted=entry["predicted"] or "",
        probs=entry["probs"],
        pred=Path(entry["pred"]) if entry["pred"] else None,
        not_annotated=tuple(entry.get("not_annotated", ())),
    )


def _row(outcome: Outcome, names: Mapping[str, None]) -> dict[str, object]:
    row: dict[str, object] = {
        "case_id": outcome.case.case_id,
        "site": outcome.case.site,
        "status": "measured" if outcome.measured else "failed",
        "reason": outcome.reason,
        "score": _cell(outcome.score),
        "target": outcome.target,
        "predicted": outcome.predicted,
    }
    return row | {name: _cell(outcome.figures.get(name, math.nan)) for name in names}


def _cell(number: float) -> float | None:
    return float(f"{number:.6g}") if math.isfinite(number) else None


def _entry(cohort: Cohort, outcome: Outcome, predictions: Path) -> dict[str, object]:
    case = outcome.case
    explanation = predictions / case.case_id / "explanation"
    return {
        "case_id": case.case_id,
        "site": case.site,
        "score": outcome.score,
        "reason": outcome.reason,
        "images": [path.absolute() for path in cohort.image_paths(case)],
        "label": path.absolute() if (path := cohort.label_path(case)) else None,
        "pred": outcome.pred.absolute() if outcome.pred else None,
        "explanation": explanation.absolute() if (explanation / "explanation.json").is_file() else None,
        "metrics": outcome.figures,
        "target": outcome.target or None,
        "predicted": outcome.predicted or None,
        "probs": outcome.probs,
        "not_annotated": outcome.not_annotated,
    }
