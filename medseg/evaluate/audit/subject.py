"""What is audited: one classifier on labelled cases, with the lung fields of those cases where they are known."""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Case, Cohort
from medseg.config import AuditConfig, LungsConfig
from medseg.data import lungs as masks
from medseg.evaluate.scoring import Change, Scorer
from medseg.images import read_image
from medseg.progress import progress
from medseg.verdict import Verdict, margins
from medseg.volume import Volume

FindLungs = Callable[[Case, Volume], NDArray[np.generic] | None]
Array = NDArray[np.float64]

SEED = 0
"""Of samples, folds and bootstraps: the same cohort and model always give the same audit."""

_MASK_SIDE = 512  # lung fields are kept no larger than this; they are grown by more than a pixel of it


@dataclass(frozen=True)
class Subject:
    """A classifier and the cases that its audit is made on.

    Attributes:
        cases: labelled, of the audited split.
        sample: labelled cases of all splits, for small networks that are trained for the audit.
        find_lungs: lung fields of a case on the grid of its image, above 0 inside, or None where they are not known.
        limits: of plausible lung fields.
    """

    scorer: Scorer
    cohort: Cohort
    cases: Sequence[Case]
    sample: Sequence[Case]
    labels: Mapping[str, int]
    verdict: Verdict
    config: AuditConfig
    find_lungs: FindLungs | None = None
    limits: LungsConfig = field(default_factory=LungsConfig)
    _lungs: dict[str, masks.Mask | str] = field(default_factory=dict, repr=False)

    @cached_property
    def probs(self) -> Array:
        """Calibrated probability of the positive class of each case, unchanged images."""
        return self.score(self.cases, None, "Scoring")

    @cached_property
    def truth(self) -> NDArray[np.bool_]:
        """Whether each case is of the positive class."""
        return self.truth_of(self.cases)

    @property
    def patients(self) -> list[str]:
        """Of the cases."""
        return [case.patient_id for case in self.cases]

    def truth_of(self, cases: Sequence[Case]) -> NDArray[np.bool_]:
        """Whether each of some cases is of the positive class."""
        return np.array([case.target == self.verdict.positive for case in cases], dtype=bool)

    def score(self, cases: Sequence[Case], change: Change | None, what: str, *, lungs_before: bool = False) -> Array:
        """Calibrated probability of the positive class of some cases, with their images changed.

        A model that finds lungs first finds them in the changed image, or with `lungs_before` in the unchanged one.
        """
        logits = self.scorer.score(self.cohort, cases, change, lungs_before=lungs_before, what=what)
        return self.verdict.probability(margins(logits, self.labels[self.verdict.positive]))

    def with_lungs(self, cases: Sequence[Case]) -> tuple[list[Case], dict[str, int]]:
        """The cases with plausible lung fields, and why the others have none, counted."""
        reasons: dict[str, int] = defaultdict(int)
        usable = []
        with progress("Finding lung fields", len(cases)) as shown:
            for case in cases:
                found = self._find(case)
                if isinstance(found, str):
                    reasons[found] += 1
                else:
                    usable.append(case)
                shown.advance()
        return usable, dict(reasons)

    def lungs(self, case: Case, shape: tuple[int, ...]) -> masks.Mask:
        """The lung fields of a case that `with_lungs` returned, on a grid of `shape` over the image."""
        found = self._find(case)
        assert not isinstance(found, str), "asked for lung fields of a case without"
        return masks.fit(found, shape)

    def dilated(self, case: Case, shape: tuple[int, ...]) -> masks.Mask:
        """The lung fields grown by `audit.dilate` of the longer side."""
        return masks.dilate(self.lungs(case, shape), self.config.dilate * max(shape))

    def hull(self, case: Case, shape: tuple[int, ...]) -> masks.Mask:
        """The convex hull of the grown lung fields: their shape, and what disease does to it, is gone."""
        return masks.convex(self.dilated(case, shape))

    def _find(self, case: Case) -> masks.Mask | str:
        """The lung fields, or why they cannot be used."""
        if case.case_id not in self._lungs:
            self._lungs[case.case_id] = self._found(case)
        return self._lungs[case.case_id]

    def _found(self, case: Case) -> masks.Mask | str:
        image = read_image(self.cohort.image_paths(case)[0])
        array = self.find_lungs(case, image) if self.find_lungs is not None else None
        if array is None:
            return "no lung mask"
        scale = min(1.0, _MASK_SIDE / max(image.array.shape))
        mask = masks.fit(np.asarray(array).astype(np.bool_), tuple(max(1, round(n * scale)) for n in image.array.shape))
        return "implausible lung mask" if any(masks.check(mask, self.limits)) else masks.lung_fields(mask)


def sample_cases(cases: Sequence[Case], most: int) -> list[Case]:
    """At most `most` cases, dealt evenly from every site and class, in order of case_id; always the same ones."""
    strata: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in sorted(cases, key=lambda c: c.case_id):
        strata[(case.site, case.target)].append(case)
    for key, members in strata.items():
        random.Random(f"{SEED}/{key}").shuffle(members)
    chosen: list[Case] = []
    while len(chosen) < most and any(strata.values()):
        for members in strata.values():
            if members and len(chosen) < most:
                chosen.append(members.pop())
    return sorted(chosen, key=lambda c: c.case_id)
