"""One item of the audit: a question, a number with its interval, a limit, and what follows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from medseg.config import AuditItem
from medseg.statistics import Estimate

Status = Literal["pass", "fail", "not assessable"]
Better = Literal["below", "above"]

TITLES: dict[AuditItem, tuple[str, str]] = {
    "sites": ("Every site", "Is the model as good at each site, also at sites that it was not trained on?"),
    "site_named": ("Naming the site", "Can a small network tell from an image which site it comes from?"),
    "lungs_blacked_out": ("Lungs blacked out", "Is there anything left to find once the lungs are gone?"),
    "masks": ("Lungs alone", "Does the model still know when it sees nothing but the lungs?"),
    "duplicates": ("Twins", "Is an image also in another split, or of another patient?"),
    "borders": ("Borders and text", "Does the score move when padding, corners or burned-in text change?"),
    "subgroups": ("Subgroups", "Does any group of patients get worse results than the others?"),
}
"""Title and question of each item, in the order of the page."""


@dataclass(frozen=True)
class Item:
    """What one item of the audit found.

    Attributes:
        status: `not assessable` is no pass.
        value, ci_low, ci_high: of the figure that is judged, with its 95 % interval; None where there is none.
        limit: that it is held against; better: on which side of it the value should lie.
        sentence: what that means. details: rows of figures behind it, all with the same keys.
    """

    name: AuditItem
    status: Status
    sentence: str
    limit: float
    better: Better
    value: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    n: int = 0
    unit: str = ""
    details: Sequence[Mapping[str, Any]] = ()
    seconds: float = 0.0

    @property
    def title(self) -> str:
        """For people."""
        return TITLES[self.name][0]

    @property
    def question(self) -> str:
        """That the item answers."""
        return TITLES[self.name][1]


def judge(found: Estimate, limit: float, better: Better, decide_by: str) -> Status:
    """Whether a figure keeps to its limit.

    With `interval`, the whole interval must keep to it for a pass; a value that does while its interval does not, or
    has no interval, is not assessable: there are too few cases to say. A value beyond the limit fails either way.
    """
    if math.isnan(found.value):
        return "not assessable"
    sign = 1.0 if better == "below" else -1.0
    if sign * (found.value - limit) > 0:
        return "fail"
    if decide_by == "value":
        return "pass"
    bound = found.ci_high if better == "below" else found.ci_low
    if math.isnan(bound) or sign * (bound - limit) > 0:
        return "not assessable"
    return "pass"


def worst(statuses: Sequence[Status]) -> Status:
    """Fail before not assessable before pass; nothing at all is not assessable."""
    for status in ("fail", "not assessable"):
        if status in statuses:
            return "fail" if status == "fail" else "not assessable"
    return "pass" if statuses else "not assessable"


def judged(
    name: AuditItem,
    found: Estimate,
    limit: float,
    better: Better,
    decide_by: str,
    sentence: str,
    *,
    unit: str,
    details: Sequence[Mapping[str, Any]] = (),
    at_best: Status = "pass",
) -> Item:
    """An item from its figure; `at_best` bounds the status from above where part of the item is missing."""
    status = worst([judge(found, limit, better, decide_by), at_best])
    if status == "not assessable" and at_best == "pass" and not math.isnan(found.value):
        sentence += " Its interval reaches beyond the limit: there are too few cases to say."
    return Item(
        name, status, sentence, limit, better, _or_none(found.value), _or_none(found.ci_low), _or_none(found.ci_high),
        found.n, unit, details,
    )  # fmt: skip


def missing(name: AuditItem, limit: float, better: Better, why: str, *, unit: str = "") -> Item:
    """An item that cannot be assessed, and why."""
    return Item(name, "not assessable", why, limit, better, unit=unit)


def figures_of(found: Estimate) -> dict[str, Any]:
    """An AUC as columns of a row of details; None where it is not defined."""
    numbers = {"auc": found.value, "ci_low": found.ci_low, "ci_high": found.ci_high}
    return {**{name: _or_none(value) for name, value in numbers.items()}, "n": found.n}


def _or_none(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None
