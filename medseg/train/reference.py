"""What radiographs of other sources are made to look like: histogram and sharpness of the training cases."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Case, Cohort
from medseg.config import AppearanceConfig
from medseg.data.appearance import detail_of, landmarks_of
from medseg.data.lung_view import LungView
from medseg.data.preprocess import prepare
from medseg.images import read_image
from medseg.plan import Appearance, Plan
from medseg.train.fingerprint import spread
from medseg.volume import Volume

_SIX_DIGITS = "{:.6g}"


def with_appearance(
    plan: Plan, config: AppearanceConfig, cohort: Cohort, cases: Sequence[Case], lungs: LungView | None = None
) -> Plan:
    """The plan with its appearance, what it matches measured on the plan's grid over at most 64 of the cases.

    Landmarks are means over the cases; the contrast of each octave of detail is a median, taken after the histogram.

    Args:
        lungs: what of a radiograph is visible; by default all.
    """
    if config == AppearanceConfig():
        return plan
    asked = config.model_dump(exclude={"match_sharpness"})
    looks = Appearance(**{**asked, "histogram": "none" if config.histogram == "landmarks" else config.histogram})
    if config.histogram == "landmarks":
        found = _measure(landmarks_of, replace(plan, appearance=looks), cohort, cases, lungs)
        looks = replace(looks, histogram="landmarks", landmarks=_rounded(found.mean(axis=0)))
    if config.match_sharpness:
        found = _measure(detail_of, replace(plan, appearance=looks), cohort, cases, lungs)
        looks = replace(looks, detail_sd=_rounded(np.median(found, axis=0)))
    reasons = {**plan.reasons, "appearance": "set in the config; what it matches is measured on the training cases"}
    return replace(plan, appearance=looks, reasons=reasons)


def _measure(
    measure: Callable[[NDArray[np.float32]], NDArray[np.float64]],
    plan: Plan,
    cohort: Cohort,
    cases: Sequence[Case],
    lungs: LungView | None,
) -> NDArray[np.float64]:
    """(cases, figures) of the prepared images; of several channels the mean."""

    def of(case: Case) -> NDArray[np.float64]:
        channels: Sequence[Volume] = [read_image(path) for path in cohort.image_paths(case)]
        if lungs is not None:
            channels = lungs.show(channels, cohort.label_path(case))
        image = prepare(channels, plan).image
        return np.asarray(np.mean([measure(channel) for channel in image], axis=0))

    with ThreadPoolExecutor(2) as pool:
        return np.stack(list(pool.map(of, spread(cases))))


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(_SIX_DIGITS.format(value)) for value in values)
