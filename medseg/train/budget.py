"""What fits: the choice of patch, batch and memory mode under a budget, by the law of `memory_law`.

Measuring is passed in as a function, so that this file is arithmetic alone.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from medseg.files import UserError
from medseg.train.memory_law import Candidate, Law, Measure, Measured, TooLarge, fit_law

_AIM = 0.95  # of the budget: the law's own error must fit in
_FIRST_VOXELS = {"cpu": 100_000, "cuda": 2_000_000}  # of the first size measured
_LARGEST_SHARE = 0.6  # of the wanted patch: sizes measured for the law stay well below it
_STEPS = 3
_TRIES = 5


@dataclass(frozen=True)
class Choice:
    """What to train with.

    Attributes:
        predicted_gb, predicted_seconds: peak and time of a step by the law, before the choice itself was measured.
        measured: None where there was no time for it.
        laws: by mode. notes: why, by field of the plan.
    """

    candidate: Candidate
    mode: str
    predicted_gb: float
    predicted_seconds: float
    measured: Measured | None
    laws: Mapping[str, Law]
    notes: Mapping[str, str]

    def law_facts(self, device: str, budget_gb: float) -> dict[str, Any]:
        """The laws as a plan states them."""
        return {
            "law": "peak GB = fixed_gb + gb_per_mvoxel * million voxels a step, at least floor_gb (validation)",
            "device": device,
            "budget_gb": round(budget_gb, 3),
            "modes": {mode or "only": _facts(law) for mode, law in self.laws.items()},
        }


class Chooser:
    """Measures laws as they are needed and chooses by them, within a time.

    Args:
        candidates: from the most wanted on, each smaller than the one before.
        modes: from the fastest on; `("",)` for a network without the choice.
        budget_gb: bound of the peak.
        measure: trains a few steps.
        shrink: a legal patch of about this share of a candidate's voxels, None where there is none smaller.
        device_type: cpu or cuda. seconds: about what measuring may take. clock: tells the time in seconds.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        modes: Sequence[str],
        budget_gb: float,
        measure: Measure,
        shrink: Callable[[Candidate, float], Candidate | None],
        *,
        device_type: str = "cpu",
        seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.candidates, self.modes, self.budget_gb = candidates, modes, budget_gb
        self.measure, self.shrink, self.device_type = measure, shrink, device_type
        self.clock, self.ends_at = clock, clock() + seconds
        self.laws: dict[str, Law] = {}

    def choose(self) -> Choice:
        """The fastest mode in which the wanted patch fits, in batches of 2 at least unless 1 is wanted; else the mode
        that lets the largest candidate fit.

        Raises:
            UserError: nothing fits; it names what would.
            TooLarge: the device could not run even the smallest size.
        """
        wanted = self.candidates[0]
        if len(self._law_sizes(wanted)) < 2:
            return self._choose_directly()
        best: tuple[Candidate, str] | None = None
        for mode in self.modes:
            self.laws[mode] = self._measure_law(wanted, mode)
            found = self._largest(mode, self.candidates)
            if found and (best is None or found.voxels > best[0].voxels):
                best = found, mode
            if found and found.patch == wanted.patch and found.batch >= min(2, wanted.batch):
                best = found, mode
                break
        if best is None:
            raise UserError(self._nothing_fits())
        return self._confirm(*best)

    def _choose_directly(self) -> Choice:
        """Steps too small for a law: each candidate is measured itself."""
        peaks = []
        for candidate in self.candidates:
            for mode in self.modes:
                measured = self.measure(candidate, mode, _STEPS)
                peaks.append(measured)
                if measured.peak_gb <= self.budget_gb:
                    notes = {"memory_gb": "measured at once: a step is too small for a growth law"}
                    return Choice(candidate, mode, measured.peak_gb, measured.step_seconds, measured, {}, notes)
        least = min(peaks, key=lambda one: one.peak_gb)
        raise UserError(
            f"plan.memory_gb {self.budget_gb:.3g}: {least.candidate} was measured at {least.peak_gb:.2f} GB, of which "
            f"nearly all are libraries and weights; set plan.memory_gb to {_up(least.peak_gb)} or more."
        )

    def _law_sizes(self, wanted: Candidate) -> list[Candidate]:
        first = min(wanted.voxels / 16, _FIRST_VOXELS[self.device_type])
        limit = _LARGEST_SHARE * wanted.voxels
        sizes: list[Candidate] = []
        for factor in (1, 4, 16):
            made = self.shrink(wanted, min(first * factor, limit) / wanted.voxels)
            if made and made.voxels < 0.7 * wanted.voxels and (not sizes or made.voxels > 1.3 * sizes[-1].voxels):
                sizes.append(made)
        return sizes

    def _measure_law(self, wanted: Candidate, mode: str) -> Law:
        points: list[Measured] = []
        overhead = 0.0
        for size in self._law_sizes(wanted):
            if len(points) >= 2:
                law = fit_law(points)
                expected = overhead + _STEPS * law.seconds_per_mvoxel * size.voxels / 1e6
                if law.predict(size.voxels) > 0.8 * self.budget_gb or expected > self.ends_at - self.clock():
                    break
            started = self.clock()
            try:
                points.append(self.measure(size, mode, _STEPS))
            except TooLarge:
                if len(points) < 2:
                    raise
                break
            overhead = max(0.0, self.clock() - started - _STEPS * points[-1].step_seconds)
        return fit_law(points)

    def _largest(self, mode: str, candidates: Sequence[Candidate]) -> Candidate | None:
        fitting = self.laws[mode].fitting(_AIM * self.budget_gb)
        return next((one for one in candidates if one.voxels <= fitting), None)

    def _confirm(self, candidate: Candidate, mode: str) -> Choice:
        """Measure the choice; where it exceeds the budget, correct the law by it and go down."""
        notes: dict[str, str] = {"memory_mode": self._why(candidate, mode)} if mode else {}
        predicted, small = self.laws[mode].predict(candidate.voxels), self.laws[mode].points
        for _ in range(_TRIES):
            law = self.laws[mode]
            step = law.seconds_per_mvoxel * candidate.voxels / 1e6
            left = self.ends_at - self.clock()
            if 2 * step > max(left, 20.0):
                notes["memory_gb"] = (
                    f"not measured: a step would take about {step:.0f} s and plan.probe_seconds is nearly spent; "
                    "predicted_memory_gb extrapolates the law"
                )
                return Choice(candidate, mode, predicted, step, None, self.laws, notes)
            try:
                measured = self.measure(candidate, mode, _STEPS if _STEPS * step < max(left, 20.0) else 2)
            except TooLarge:
                measured = Measured(candidate, mode, 1.1 * self.budget_gb, 1.1 * self.budget_gb, step)
            if measured.peak_gb <= self.budget_gb:
                notes.setdefault(
                    "memory_gb", "measured in a fresh process: training steps, then the largest validation case"
                )
                return Choice(candidate, mode, predicted, step, measured, self.laws, notes)
            self.laws[mode] = fit_law([*small, measured])
            notes["memory_gb"] = (
                f"{candidate} was measured at {measured.peak_gb:.2f} GB, over the budget of {self.budget_gb:.2f}; "
                "taken down"
            )
            found = self._largest(mode, [one for one in self.candidates if one.voxels < 0.9 * candidate.voxels])
            if found is None:
                break
            candidate, predicted = found, self.laws[mode].predict(found.voxels)
        raise UserError(self._nothing_fits())

    def _why(self, candidate: Candidate, mode: str) -> str:
        faster = self.modes[: self.modes.index(mode)]
        if not faster:
            return f"{mode!r} is the fastest, and the patch fits"
        wanted = self.candidates[0]
        beside = ", ".join(f"{m} would take {self.laws[m].predict(wanted.voxels):.2f} GB" for m in faster)
        return (
            f"{beside} for {wanted}; {mode!r} is the fastest with which {'it' if candidate == wanted else 'most'} fits"
        )

    def _nothing_fits(self) -> str:
        """One sentence: what was asked, what it takes in each mode, and what would fit."""
        wanted, smallest = self.candidates[0], self.candidates[-1]
        takes = ", ".join(
            f"{law.predict(smallest.voxels):.2f} GB" + (f" in memory mode {mode}" if mode else "")
            for mode, law in self.laws.items()
        )
        frugal = min(self.laws, key=lambda mode: self.laws[mode].predict(smallest.voxels))
        law, aim = self.laws[frugal], _AIM * self.budget_gb
        remedies = []
        if (voxels := law.fitting(aim)) and smallest.batch > 1:
            one = replace(smallest, batch=1)
            if one.voxels <= voxels:
                remedies.append("plan.batch_size 1")
        shares = (voxels / smallest.voxels * part for part in (1.0, 0.85, 0.7, 0.5))
        fits = next((m for m in (self.shrink(smallest, s) for s in shares if s > 0) if m and m.voxels <= voxels), None)
        if fits:
            remedies.append(f"plan.patch_size {list(fits.patch)} (about {law.predict(fits.voxels):.2f} GB)")
        growing = law.predict(smallest.voxels) - law.fixed_gb
        if growing > 0 and aim > law.fixed_gb:
            remedies.append(f"about {math.floor(100 * (aim - law.fixed_gb) / growing)} % of the channels")
        remedies.append(f"plan.memory_gb {_up(law.predict(smallest.voxels) / _AIM)}")
        what = "even " if smallest != wanted else ""
        return (
            f"plan.memory_gb {self.budget_gb:.3g}: {what}{smallest} takes {takes}, by measurements of smaller steps; "
            f"what would fit: {', or '.join(remedies)}."
        )


def _facts(law: Law) -> dict[str, Any]:
    rows = [{"patch_size": p.candidate.patch, "batch_size": p.candidate.batch, **_rounded(p)} for p in law.points]
    return {
        "fixed_gb": round(law.fixed_gb, 3),
        "gb_per_mvoxel": float(f"{law.gb_per_mvoxel:.4g}"),
        "floor_gb": round(law.floor_gb, 3),
        "residual": None if law.residual is None else round(law.residual, 4),
        "measured": rows,
    }


def _rounded(point: Measured) -> dict[str, float]:
    numbers = asdict(point)
    return {name: round(numbers[name], 4) for name in ("step_gb", "peak_gb", "step_seconds")}


def _up(gb: float) -> float:
    return math.ceil(10 * gb) / 10
