"""What the explanations of many cases passed, per method and check, with intervals."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg.files import read_json

FILE = "explanation.json"
"""In a prediction folder; the file of the same name in a case's folder is about that case."""
DRAWS = 2000


def summarise(explanations: Iterable[tuple[str, Mapping[str, Any]]], seed: int = 0) -> dict[str, Any]:
    """Share of cases that pass, by method and check.

    Args:
        explanations: patient and content of the case's `explanation.json`.

    Returns:
        By `method` (or `method/layer`, where one method was used at several layers): `maps`, `no_evidence`,
        `all_passed` and `checks` by name: `threshold`, `mean` of the values, and as in `share_passing`.
        A map without evidence passes nothing and is not among the `n` of a check.
    """
    grouped: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for patient, about in explanations:
        grouped.setdefault(f"{about['method']}/{about['layer']}", []).append((patient, about))
    return {name: _of_method(group, seed) for name, group in sorted(grouped.items())}


def share_passing(passed: Sequence[bool], patients: Sequence[str], seed: int = 0) -> dict[str, float | int | None]:
    """`share` of cases with its 95 % percentile bootstrap interval over patients; None bounds for a single patient."""
    if not passed:
        return {"n": 0, "share": None, "ci_low": None, "ci_high": None}
    values = np.asarray(passed, dtype=np.float64)
    _, owner = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    count = int(owner.max()) + 1
    low = high = None
    if count > 1:
        drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS)[:, owner]
        low, high = (float(v) for v in np.percentile(drawn @ values / drawn.sum(axis=1), [2.5, 97.5]))
    return {"n": len(values), "share": float(values.mean()), "ci_low": low, "ci_high": high}


def read_summary(predictions: Path) -> dict[str, Any]:
    """The cohort-level result that the step `explain` left in a prediction folder, small enough for a bundle.

    Raises:
        UserError: there is none, or it is damaged.
    """
    found: dict[str, Any] = read_json(predictions / FILE)
    return found


def _of_method(group: Sequence[tuple[str, Mapping[str, Any]]], seed: int) -> dict[str, Any]:
    names = list(dict.fromkeys(name for _, about in group for name in about["checks"]))
    judged = [(patient, about) for patient, about in group if about.get("passed") is not None]
    return {
        "maps": len(group),
        "no_evidence": sum(not about["evidence"] for _, about in group),
        "withheld": sum(bool(about.get("withheld")) for _, about in group),
        "all_passed": share_passing([about["passed"] for _, about in judged], [p for p, _ in judged], seed),
        "checks": {name: _of_check(name, group, seed) for name in names},
    }


def _of_check(name: str, group: Sequence[tuple[str, Mapping[str, Any]]], seed: int) -> dict[str, Any]:
    made = [(patient, about["checks"][name]) for patient, about in group if name in about["checks"]]
    known = [(patient, check) for patient, check in made if check["passed"] is not None]
    return {
        "threshold": made[0][1]["threshold"],
        "mean": float(np.mean([check["value"] for _, check in known])) if known else None,
        **share_passing([check["passed"] for _, check in known], [patient for patient, _ in known], seed),
    }
