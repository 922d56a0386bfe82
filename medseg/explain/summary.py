"""What the explanations of many cases passed, per method and check, with intervals."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medseg import statistics

FILE = "explanation.json"
"""In a prediction folder; the file of the same name in a case's folder is about that case."""


def summarise(explanations: Iterable[tuple[str, Mapping[str, Any]]], seed: int = 0) -> dict[str, Any]:
    """Share of cases that pass, by method and check.

    Args:
        explanations: patient and content of the case's `explanation.json`.

    Returns:
        By `method/layer`: `maps`, `no_evidence`,
        `all_passed` and `checks` by name: `threshold`, `mean` of the values with `mean_interval` (95 %), and as in
        `share_passing`.
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
    found = statistics.summarise(passed, patients, seed=seed)
    low, high = (None if math.isnan(bound) else bound for bound in (found.ci_low, found.ci_high))
    return {"n": found.n, "share": found.mean, "ci_low": low, "ci_high": high}


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
    patients = [patient for patient, _ in known]
    mean = statistics.summarise([check["value"] for _, check in known], patients, seed=seed)
    return {
        "threshold": made[0][1]["threshold"],
        "mean": mean.mean if known else None,
        "mean_interval": {"ci_low": mean.ci_low, "ci_high": mean.ci_high},
        **share_passing([check["passed"] for _, check in known], patients, seed),
    }
