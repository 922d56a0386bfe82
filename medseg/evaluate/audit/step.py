"""The step `audit`: a classifier and a labelled cohort in, `audit.json` out."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from medseg.evaluate.audit.cohort_items import check_duplicates, name_sites
from medseg.evaluate.audit.item import TITLES, Item, Status, worst
from medseg.evaluate.audit.model_items import (
    SiteScore,
    check_blacked_out,
    check_borders,
    check_masks,
    check_sites,
    check_subgroups,
    score_sites,
)
from medseg.evaluate.audit.subject import Subject
from medseg.files import UserError, write_json
from medseg.result import Result

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Elsewhere:
    """What tells how the model does at sites that it was not trained on.

    Attributes:
        trained_sites: where its training cases come from; None when that is not known, and no site counts as unseen.
        left_out: scores of models trained by the same recipe without one site.
    """

    trained_sites: Collection[str] | None = None
    left_out: Sequence[SiteScore] = ()


def run(subject: Subject, out: Path, *, split: str, bundle_facts: Mapping[str, Any], elsewhere: Elsewhere) -> Result:
    """Ask every item and write `out/audit.json`.

    Args:
        split: named in the file.
        bundle_facts: what names the model.

    Returns:
        Figures: the overall status, the number of items by status, and each item's value. Never `partial`: an item
        that fails is a finding, not a failure of the audit.

    Raises:
        UserError: the cases hold one class only, or an image is missing or damaged.
    """
    started = time.monotonic()
    if len(set(subject.truth.tolist())) < 2:
        raise UserError(
            f"the {len(subject.cases)} labelled cases of split {split!r} hold one class only; add the other."
        )
    items = [_timed(ask, subject) for ask in _ASKED]
    items.append(_timed(lambda s: _sites(s, elsewhere), subject))
    order = list(TITLES)
    items.sort(key=lambda item: order.index(item.name))
    status = overall(items, subject.config.required)
    tree: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "status": status,
        "required": list(subject.config.required),
        "items": [{**asdict(item), "title": item.title, "question": item.question} for item in items],
        "bundle": dict(bundle_facts),
        "cohort_sha256": subject.cohort.sha256,
        "split": split,
        "n_cases": len(subject.cases),
        "n_sample": len(subject.sample),
        "settings": subject.config.model_dump(mode="json", exclude={"lungs"}),
        "lung_masks": subject.find_lungs is not None,
        "seconds": round(time.monotonic() - started, 1),
    }
    paths = {"audit_json": write_json(out / "audit.json", tree)}
    figures: dict[str, object] = {"audit": status}
    for wanted in ("pass", "fail", "not assessable"):
        figures[f"audit_items_{wanted.replace(' ', '_')}"] = sum(item.status == wanted for item in items)
    figures |= {f"audit_{item.name}": round(item.value, 5) for item in items if item.value is not None}
    figures["audit_seconds"] = tree["seconds"]
    rows = [
        {"item": i.name, "status": i.status, "value": _shown(i.value), "limit": i.limit, "why": i.sentence}
        for i in items
    ]
    return Result("audit", "done", paths, figures, rows=rows)


def overall(items: Sequence[Item], required: Sequence[str]) -> Status:
    """The worst status among the required items."""
    return worst([item.status for item in items if item.name in required])


def _sites(subject: Subject, elsewhere: Elsewhere) -> Item:
    known = elsewhere.trained_sites
    unseen = {case.site for case in subject.cases if known is not None and case.site and case.site not in known}
    own = score_sites(subject, subject.cases, trained_without="", unseen=unseen)
    return check_sites(subject, [*own, *elsewhere.left_out])


def _timed(ask: Callable[[Subject], Item], subject: Subject) -> Item:
    started = time.monotonic()
    item = ask(subject)
    return replace(item, seconds=round(time.monotonic() - started, 2))


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


_ASKED: tuple[Callable[[Subject], Item], ...] = (
    check_duplicates, check_borders, check_subgroups, check_blacked_out, check_masks, name_sites,
)  # fmt: skip
