"""What every page is made of: tables of cells, numbers as text, pictures as data URIs, and the Jinja templates.

A page is one HTML file that needs nothing else: a content security policy forbids it to load anything.
"""

import math
from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

MAX_ROWS = 500
"""Rows of one table on a page; longer lists are cut, and the page says so."""

METRICS = {
    "mean_dice": ("Mean Dice", 3),
    "dice": ("Dice", 3),
    "iou": ("IoU", 3),
    "surface_dice": ("Surface Dice", 3),
    "hd95_mm": ("HD95 (mm)", 2),
    "volume_error_ml": ("Volume error (ml)", 2),
    "auc": ("AUC", 3),
    "accuracy": ("Accuracy", 3),
    "sensitivity": ("Sensitivity", 3),
    "specificity": ("Specificity", 3),
    "precision": ("Precision", 3),
    "f1": ("F1", 3),
    "ece": ("Calibration error", 3),
    "brier": ("Brier score", 3),
    "nll": ("Log-likelihood, negative", 3),
    "energy": ("Energy in the lungs", 3),
    "energy_in_mask": ("Energy inside the mask", 3),
    "mask_share": ("Mask’s share of the image", 3),
    "pointing_hit": ("Maximum inside the mask", 2),
    "evidence": ("Map has evidence", 2),
    "p": ("p", 3),
}
"""Name and decimal places of the known metrics; others are shown under their own name."""

STATUS_TONES = {"done": "", "FINISHED": "", "flagged": "warn", "rejected": "bad", "failed": "bad", "FAILED": "bad"}


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what is shown. detail: shown smaller below it.
        sort: the number (unrounded) or text by which the column is sorted; None sorts last.
        href: a place on the page, such as `#case-1`.
        tone: `warn`, `bad` or empty.
    """

    text: str
    sort: float | str | None = None
    detail: str = ""
    href: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """One table. `numeric` columns are set to the right; `note` stands below it."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: tuple[bool, ...] = ()
    note: str = ""
    sortable: bool = False


@dataclass(frozen=True)
class Picture:
    """An image inside the page: its data URI, what it shows in words, and its width in CSS pixels."""

    uri: str
    alt: str
    width_px: int = 0


@dataclass(frozen=True)
class Page:
    """A finished page, and what the step reports about it."""

    html: str
    figures: Mapping[str, object]


def words(value: object, sort: str | None = None, *, href: str = "", tone: str = "", detail: str = "") -> Cell:
    """A cell of text; an empty one shows a dash."""
    text = "" if value is None else str(value)
    return Cell(text or "–", sort if sort is not None else text, href=href, tone=tone, detail=detail)


def number(value: Any, digits: int | None = None) -> Cell:
    """A cell of a number; None and non-finite values show a dash and sort last."""
    if not is_number(value):
        return Cell("–")
    return Cell(format_number(value, digits), float(value))


def estimate(value: Any, digits: int | None = None) -> Cell:
    """A cell of `{mean|value, ci_low, ci_high, …}` with its interval below, or of a plain number."""
    if not isinstance(value, Mapping):
        return number(value, digits)
    middle = value.get("mean", value.get("value"))
    cell = number(middle, digits)
    low, high = value.get("ci_low"), value.get("ci_high")
    if low is None or high is None or not (is_number(low) and is_number(high)):
        return cell
    return Cell(cell.text, cell.sort, f"{format_number(low, digits)} to {format_number(high, digits)}")


def metric(name: str) -> tuple[str, int | None]:
    """How a metric is called on the page and its decimal places.

    A key may carry a class: `dice_csf` becomes `Dice csf`.
    """
    if name in METRICS:
        return METRICS[name]
    for known in sorted(METRICS, key=len, reverse=True):
        if name.startswith(f"{known}_"):
            title, digits = METRICS[known]
            return f"{title} {name[len(known) + 1 :]}", digits
    return name.replace("_", " "), None


def is_number(value: object) -> bool:
    """A finite int or float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def format_number(value: float, digits: int | None = None) -> str:
    """With `digits` decimal places; without, three significant digits and integers whole."""
    if digits is not None:
        return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")
    if float(value).is_integer() and abs(value) < 1e9:
        return f"{int(value)}".replace("-", "\N{MINUS SIGN}")
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def join_sizes(sizes: Iterable[float], unit: str = "") -> str:
    """`1 × 1 × 2.5 mm`."""
    return " × ".join(f"{size:g}" for size in sizes) + (f" {unit}" if unit else "")


def capped(count: int, shown: int, what: str, where: str) -> str:
    """The sentence that says that a list was cut, or nothing."""
    return f"{shown} of {count} {what} are shown; all of them are in {where}." if shown < count else ""


def data_uri(content: bytes, media_type: str) -> str:
    """The bytes as a `data:` URI."""
    return f"data:{media_type};base64,{b64encode(content).decode('ascii')}"


def anchor(case_id: str) -> str:
    """A valid element id for a case."""
    return "case-" + "".join(c if c.isalnum() or c in "-_" else f".{ord(c):x}" for c in case_id)


def render(template: str, **context: Any) -> str:
    """Fill `templates/<template>`; everything is escaped unless it is marked safe."""
    return _environment().get_template(template).render(**context)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("medseg.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
