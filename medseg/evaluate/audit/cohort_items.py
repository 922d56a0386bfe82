"""The items of the audit that need no model: twins in the cohort, and what an image tells about its site."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Case
from medseg.data import lungs as masks
from medseg.data.preprocess import prepare
from medseg.evaluate.audit.item import Item, figures_of, judged, missing
from medseg.evaluate.audit.probe import name_unseen
from medseg.evaluate.audit.subject import SEED, Subject
from medseg.images import read_image
from medseg.ingest.duplicates import fingerprint, pairs
from medseg.progress import progress
from medseg.statistics import Estimate, aucs, bootstrap_rows, wilson

_SHOWN = 50
_READERS = 2
Array = NDArray[np.float64]
View = Callable[[NDArray[Any], masks.Mask], NDArray[Any]]

VIEWS: dict[str, View | None] = {
    "whole": None,
    "lungs only": masks.inside_only,
    "lungs blacked out": masks.outside_only,
}
"""What the small network sees; the second argument is the convex hull of the dilated lung fields."""


def check_duplicates(subject: Subject) -> Item:
    """Twins across splits, sites or patients in the whole cohort, each pair once."""
    cohort, limit = subject.cohort, subject.config.max_twins
    with ThreadPoolExecutor(_READERS) as pool, progress("Comparing images", len(cohort.cases)) as shown:
        prints = {}
        jobs = pool.map(lambda case: fingerprint(read_image(cohort.image_paths(case)[0])), cohort.cases)
        for case, made in zip(cohort.cases, jobs, strict=True):
            prints[case.case_id] = made
            shown.advance()
    rows: list[dict[str, Any]] = []
    touched: set[str] = set()
    for one, other, share in pairs(cohort.cases, prints):
        across = _across(one, other)
        if across:
            touched |= {one.case_id, other.case_id}
            rows.append({"case": one.case_id, "twin": other.case_id, "across": across, "alike": round(1 - share, 4)})
    rows.sort(key=lambda row: (-row["alike"], row["case"]))
    found = wilson(len(touched), len(cohort.cases))
    sentence = (
        f"{len(touched)} of {found.n} images have a twin in another split, or of another patient."
        if touched
        else f"None of the {found.n} images has a twin in another split or of another patient."
    )
    # All images were compared with all: a count, not a sample, so the value decides whatever the interval.
    return judged("duplicates", found, limit, "below", "value", sentence, unit="share of images", details=rows[:_SHOWN])


def name_sites(subject: Subject) -> Item:
    """AUC with which a small network names the site, the classes apart so that disease cannot give the site away."""
    config = subject.config
    unit = "AUC"
    known = [case for case in subject.sample if case.site]
    sites = sorted({case.site for case in known})
    if len(sites) < 2:
        why = "The cohort has fewer than two sites with a name, so there is none to tell from another."
        return missing("site_named", config.max_site_named, "below", why, unit=unit)
    usable, reasons = subject.with_lungs(known)
    rows, worst = [], None
    for view, cut in VIEWS.items():
        cases = known if cut is None else usable
        found = _name(subject, cases, [sites.index(case.site) for case in cases], view, "site")
        rows.append({"image": view, **figures_of(found)})
        if worst is None or np.isnan(worst[1].value) or found.value > worst[1].value:
            worst = (view, found)
    assert worst is not None
    view, found = worst
    sentence = f"From {_IMAGES[view]}, a small network names the site with an AUC of {found.value:.2f}."
    if np.isnan(found.value):
        sentence = "Some site has too few cases for a small network to learn it."
    bare = not usable or any(row["auc"] is None for row in rows)
    if bare and not np.isnan(found.value):
        sentence += " Without lung masks, masked images could not be tried."
    if reasons:
        rows.append({"image": "left out: " + ", ".join(f"{n} {why}" for why, n in reasons.items())})
    return judged(
        "site_named", found, config.max_site_named, "below", config.decide_by, sentence, unit=unit,
        details=rows, at_best="not assessable" if bare else "pass",
    )  # fmt: skip


_IMAGES = {
    "whole": "whole images",
    "lungs only": "images of the lungs alone",
    "lungs blacked out": "images with the lungs blacked out",
}


def name_classes_without_lungs(subject: Subject, cases: Sequence[Case]) -> Estimate:
    """AUC with which a small network, trained on nothing else, names the class once the lungs are blacked out."""
    return _name(subject, cases, subject.truth_of(cases).astype(np.int64).tolist(), "lungs blacked out", "class")


def _name(subject: Subject, cases: Sequence[Case], classes: Sequence[int], view: str, what: str) -> Estimate:
    config = subject.config
    nothing = Estimate(float("nan"), float("nan"), float("nan"), len(cases))
    if not cases:
        return nothing
    _, index = np.unique(np.array(classes), return_inverse=True)
    patients = [case.patient_id for case in cases]
    try:
        probs = name_unseen(
            _small_images(subject, cases, VIEWS[view]),
            index,
            patients,
            folds=config.probe_folds,
            epochs=config.probe_epochs,
            learning_rate=config.probe_learning_rate,
            seed=SEED,
            what=f"Naming the {what}, {view}",
        )
    except ValueError:  # too few patients in a class
        return nothing
    strata = subject.truth_of(cases) if what == "site" else np.zeros(len(cases), dtype=bool)
    return bootstrap_rows(lambda weights: mean_auc(probs, index, strata, weights), patients, seed=SEED)


def mean_auc(probs: Array, index: NDArray[np.int64], strata: NDArray[np.bool_], weights: Array) -> Array:
    """Mean over strata (by their cases) of the mean AUC of each name against the rest, for each row of weights.

    Where no stratum holds two names (each site has one class only), all cases are taken together: what gives the site
    away and what gives the class away cannot be told apart then, which is the fault that is looked for.

    Args:
        probs: (n, K). index: (n,) the true name. strata: (n,). weights: (draws, n).

    Returns:
        (draws,), NaN where a name is missing from a stratum that has it.
    """
    total, size = np.zeros(len(weights)), 0
    parts = [strata == stratum for stratum in (False, True)]
    if all(len(set(index[inside].tolist())) < 2 for inside in parts):
        parts = [np.ones(len(strata), dtype=bool)]
    for inside in parts:
        names = sorted(set(index[inside].tolist()))
        if len(names) < 2:
            continue
        # of two names one says it all: their probabilities sum to 1
        asked = names[1:] if probs.shape[1] == 2 else names
        areas = [aucs(index[inside] == name, probs[inside, name], weights[:, inside]) for name in asked]
        total += inside.sum() * np.mean(areas, axis=0)
        size += int(inside.sum())
    return total / size if size else np.full(len(weights), np.nan)


def _small_images(subject: Subject, cases: Sequence[Case], cut: View | None) -> NDArray[np.float32]:
    """(n, side, side), normalised per image as the model's plan says."""
    side = subject.config.probe_size
    plan = replace(subject.scorer.plan, size_px=(side, side), patch_size=(side, side))

    def small(case: Case) -> NDArray[np.float32]:
        image = read_image(subject.cohort.image_paths(case)[0])
        if cut is not None:
            image = replace(image, array=cut(image.array, subject.hull(case, image.array.shape)))
        prepared: NDArray[np.float32] = prepare([image], plan).image[0]
        return prepared

    with ThreadPoolExecutor(_READERS) as pool:
        return np.stack(list(pool.map(small, cases)))


def _across(one: Case, other: Case) -> str:
    """Between what two twins lie; empty within one patient of one split."""
    kinds = [
        ("split", one.split != other.split),
        ("site", bool(one.site and other.site and one.site != other.site)),
        ("patient", one.patient_id != other.patient_id),
    ]
    return ", ".join(name for name, differs in kinds if differs)
