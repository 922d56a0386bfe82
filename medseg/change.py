"""Volumes of one patient over time, and how much of a change is noise; pure functions.

Noise is what repeated scans of an unchanged patient show: the within-subject standard deviation, here in percent of the
volume, since larger structures vary by more. Two measurements of one thing differ by less than 1.96·√2 times that in
95 % of cases (Bland & Altman 1999, Stat Methods Med Res 8:135). The band of a rate of change is the same law for a
straight line through any number of examinations; for two it is that figure divided by the years between them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from medseg.exams import DAYS_PER_YEAR

_Z95 = 1.959963984540054  # 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Retest:
    """The test-retest noise of one structure's volume.

    Attributes:
        cv_percent: within-subject standard deviation in percent of the volume; cv_low, cv_high: its 95 % interval, or
            None where it was stated and not measured.
        patients, scans: what it was measured on; 0 where it was stated.
    """

    cv_percent: float
    cv_low: float | None = None
    cv_high: float | None = None
    patients: int = 0
    scans: int = 0

    @property
    def repeatability_percent(self) -> float:
        """By how much two measurements of an unchanged structure differ at most, in 95 % of cases."""
        return math.sqrt(2) * _Z95 * self.cv_percent


@dataclass(frozen=True)
class Change:
    """What became of one structure's volume.

    Attributes:
        volumes_ml: at each examination, in the order of time.
        difference_ml, difference_percent: last minus first; band_ml, band_percent: the noise of a difference of two.
        per_year_ml, per_year_percent: slope of the straight line of least squares, the latter in percent of the line's
            own volume at the first examination; None where the examinations span too little time.
        per_year_band_ml, per_year_band_percent: the noise of the slope. Bands are None where no noise is known.
        verdict: whether the slope (without one, the difference) is within the band; `unknown` without a band.
    """

    volumes_ml: tuple[float, ...]
    difference_ml: float
    difference_percent: float | None
    band_ml: float | None
    band_percent: float | None
    per_year_ml: float | None
    per_year_percent: float | None
    per_year_band_ml: float | None
    per_year_band_percent: float | None
    verdict: Literal["within the noise", "beyond the noise", "unknown"]


def measure_retest(groups: Sequence[Sequence[float]]) -> Retest | None:
    """The noise of a structure from repeated measurements.

    Args:
        groups: volumes of one patient each, from scans between which nothing can have changed; one volume tells
            nothing, and where the structure was not found once, its patient is left out.

    Returns:
        None where no patient has two volumes.
    """
    from scipy import stats

    kept = [np.asarray(group, dtype=np.float64) for group in groups if len(group) > 1 and min(group) > 0]
    freedom = sum(len(group) - 1 for group in kept)
    if not freedom:
        return None
    squares = float(sum(((group / group.mean() - 1) ** 2).sum() for group in kept))
    low, high = (math.sqrt(squares / float(stats.chi2.ppf(q, freedom))) for q in (0.975, 0.025))
    scans = sum(len(group) for group in kept)
    return Retest(100 * math.sqrt(squares / freedom), 100 * low, 100 * high, len(kept), scans)


def measure_change(days: Sequence[int], volumes_ml: Sequence[float], retest: Retest | None, *, min_days: int) -> Change:
    """Compare the volumes of one structure at two examinations or more.

    Args:
        days: of the examinations, in the order of time, not all the same. volumes_ml: at each of them.
        min_days: examinations that span less are given no rate per year.
    """
    years, volumes = np.asarray(days) / DAYS_PER_YEAR, np.asarray(volumes_ml, dtype=np.float64)
    cv = None if retest is None else retest.cv_percent / 100
    difference, mean = float(volumes[-1] - volumes[0]), float(volumes.mean())
    band = None if cv is None else _Z95 * math.sqrt(2) * cv * mean
    slope = slope_band = at_first = None
    if days[-1] - days[0] >= min_days:
        centred = years - years.mean()
        spread = float((centred**2).sum())
        slope = float((centred * volumes).sum() / spread)
        slope_band = None if cv is None else _Z95 * cv * mean / math.sqrt(spread)
        at_first = mean + slope * float(centred[0]) if volumes[0] > 0 else None
    size, noise = (difference, band) if slope is None else (slope, slope_band)
    verdict: Literal["within the noise", "beyond the noise", "unknown"] = "unknown"
    if noise is not None:
        verdict = "within the noise" if abs(size) <= noise else "beyond the noise"
    return Change(
        volumes_ml=tuple(float(v) for v in volumes),
        difference_ml=difference,
        difference_percent=_percent(difference, float(volumes[0])),
        band_ml=band,
        band_percent=_percent(band, float(volumes[0])),
        per_year_ml=slope,
        per_year_percent=_percent(slope, at_first),
        per_year_band_ml=slope_band,
        per_year_band_percent=_percent(slope_band, at_first),
        verdict=verdict,
    )


def known_retests(measured: Mapping[str, Any], stated: Mapping[str, float]) -> dict[str, Retest]:
    """The noise of each label: what was measured (as JSON has it), else what the config states."""
    found = {label: Retest(cv_percent=cv) for label, cv in stated.items()}
    return found | {label: Retest(**facts) for label, facts in measured.items()}


def _percent(part: float | None, whole: float | None) -> float | None:
    return 100 * part / whole if part is not None and whole is not None and whole > 0 else None
