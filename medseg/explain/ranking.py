"""Which method at which layer explains best: measured over cases, not chosen by fame."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.config import ExplainChecksConfig, MethodConfig
from medseg.explain import LAYERLESS, explain_score
from medseg.explain.passmark import AT_MOST, CHECKS, Explained, measure
from medseg.explain.perturb import Probe
from medseg.explain.summary import share_passing
from medseg.metrics import pointing_hit
from medseg.statistics import summarise

Candidate = tuple[str, str]
"""Method and layer."""

Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Ranked:
    """One candidate. `score`: 0 loses against all others in everything, 1 wins everything; with its 95 % interval.

    Attributes:
        means: mean of each figure over the cases for which it is defined.
    """

    method: str
    layer: str
    score: float
    ci_low: float
    ci_high: float
    n: int
    means: dict[str, float] = field(default_factory=dict)


def candidates_of(methods: Sequence[str], layers: Sequence[str]) -> list[Candidate]:
    """Every method at every layer; a method in which the layer plays no part only once."""
    found = [(method, layer) for method in methods if method not in LAYERLESS for layer in layers]
    return found + [(method, "input") for method in methods if method in LAYERLESS]


def measure_candidate(
    probe: Probe,
    candidate: Candidate,
    checks: ExplainChecksConfig,
    config: MethodConfig,
    mask: NDArray[np.generic] | None = None,
) -> dict[str, float | None]:
    """Values of the configured checks for one image, and with a mask the pointing game; None without evidence.

    Agreement is left out: it says as much of the other method. `mask` is where the evidence is known to be.
    """
    method, layer = candidate
    found = explain_score(probe.net, probe.x_1CDHW, probe.score, method, layer, size="layer", config=config)
    explained = Explained(probe, method, layer, found, mask, config)
    asked = checks.model_copy(update={"agreement": None})
    names = [name for name, facts in _empty(asked, mask).items() if facts]
    if not explained.evidence:
        return dict.fromkeys(names)
    figures: dict[str, float | None] = {name: facts["value"] for name, facts in measure(explained, asked).items()}
    if mask is not None:
        figures["pointing"] = pointing_hit(explained.values, mask)
    return figures


def rank_methods(measured: Mapping[Candidate, Sequence[Figures]], seed: int = 0) -> list[Ranked]:
    """Order candidates by how often they beat the others, best first.

    For each case and figure a candidate's place among the others is counted: the share that it beats, ties as half;
    no value (no evidence) loses against every value. The score is the mean over figures, then over cases, so a
    figure with a small range counts as much as one with a large range. The interval is bootstrapped over cases.

    Args:
        measured: per candidate one mapping of figures per case, cases in the same order; `randomisation` is better
            when smaller, every other figure when larger.

    Raises:
        ValueError: candidates were measured on different numbers of cases, or there are none.
    """
    counts = {len(cases) for cases in measured.values()}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"candidates were measured on {sorted(counts)} cases; measure all on the same ones.")
    n = counts.pop()
    names = list(dict.fromkeys(name for cases in measured.values() for case in cases for name in case))
    values_FMN = np.array(
        [[[_better(name, case.get(name)) for case in cases] for cases in measured.values()] for name in names]
    )
    places_FMN = _places(values_FMN)
    scores_MN = places_FMN.mean(axis=0)
    owners = [f"{number:09d}" for number in range(n)]
    ranked = []
    for row, (candidate, cases) in enumerate(measured.items()):
        score = summarise(scores_MN[row].tolist(), owners, seed=seed)
        means = {name: [v for case in cases if (v := case.get(name)) is not None] for name in names}
        ranked.append(
            Ranked(
                *candidate,
                score.mean,
                score.ci_low,
                score.ci_high,
                n,
                {name: float(np.mean(found)) for name, found in means.items() if found},
            )
        )
    return sorted(ranked, key=lambda one: -one.score)


def describe(
    ranked: Sequence[Ranked],
    measured: Mapping[Candidate, Sequence[Figures]],
    patients: Sequence[str],
    config: ExplainChecksConfig,
) -> list[dict[str, Any]]:
    """A row per candidate, best first: its score, and by check what `summary` says of the maps of a prediction folder.

    Args:
        patients: to whom each case belongs.
    """
    rows = []
    for one in ranked:
        cases = measured[one.method, one.layer]
        names = [name for name in CHECKS if any(name in case for case in cases)]
        checks = {name: _described(name, [case.get(name) for case in cases], patients, config) for name in names}
        bare = sum(all(value is None for value in case.values()) for case in cases)
        score = {"score": one.score, "ci_low": one.ci_low, "ci_high": one.ci_high}
        rows.append({"method": one.method, "layer": one.layer, **score, "no_evidence": bare, "checks": checks})
    return rows


def _described(
    name: str, values: Sequence[float | None], patients: Sequence[str], config: ExplainChecksConfig
) -> dict[str, Any]:
    threshold = getattr(config, name)
    known = [(value, patient) for value, patient in zip(values, patients, strict=True) if value is not None]
    passed = [_better(name, value) >= _better(name, threshold) for value, _ in known]
    mean = float(np.mean([value for value, _ in known])) if known else None
    owners = [patient for _, patient in known]
    return {"threshold": threshold, "mean": mean, **share_passing(passed, owners, config.seed)}


def _places(values_FMN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the other candidates that each one beats."""
    others = values_FMN.shape[1] - 1
    if others == 0:
        return np.ones_like(values_FMN)
    own, other = values_FMN[:, :, None], values_FMN[:, None]
    places: NDArray[np.float64] = ((own > other).sum(axis=2) + ((own == other).sum(axis=2) - 1) / 2) / others
    return places


def _better(name: str, value: float | None) -> float:
    if value is None:
        return -np.inf
    return -value if name in AT_MOST else value


def _empty(checks: ExplainChecksConfig, mask: NDArray[np.generic] | None) -> dict[str, Any]:
    """Which figures a candidate without evidence has nothing to say about."""
    asked = {name: getattr(checks, name) is not None for name in ("deletion", "insertion", "road", "randomisation")}
    known = mask is not None
    asked |= {"stability": checks.stability is not None, "energy": known and checks.energy is not None}
    return asked | {"pointing": known}
