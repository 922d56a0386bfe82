"""The items of the audit that ask the model: changed images, groups of patients, sites."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Case
from medseg.data import lungs as masks
from medseg.data.imputation import fill_in
from medseg.evaluate.audit.borders import CHANGES
from medseg.evaluate.audit.cohort_items import name_classes_without_lungs
from medseg.evaluate.audit.item import Item, figures_of, judged, missing
from medseg.evaluate.audit.subject import SEED, Subject
from medseg.evaluate.subgroups import auc, read_groups, tabulate
from medseg.statistics import Estimate, aucs, bootstrap_rows, summarise
from medseg.volume import Volume

Array = NDArray[np.float64]

_MASKS = {"tight": "lungs", "dilated": "dilated", "convex": "hull"}
_NO_LUNGS = "No case has plausible lung masks; name a lung model or a folder of masks in audit.lungs."


@dataclass(frozen=True)
class SiteScore:
    """How a model does at one site.

    Attributes:
        trained_without: the site left out of its training; empty for the audited model.
        unseen: whether the model was trained without this site.
    """

    trained_without: str
    site: str
    unseen: bool
    auc: Estimate
    sensitivity: Estimate
    specificity: Estimate
    n_positive: int


def check_borders(subject: Subject) -> Item:
    """Mean absolute change of the probability under the worst change of borders and corners."""
    unit = "mean change of the probability"
    before = subject.probs
    called = before >= subject.verdict.threshold
    rows, worst = [], None
    for name, change in CHANGES.items():

        def changed(number: int, image: Volume, change: Any = change) -> Volume:
            return replace(image, array=change(image.array))

        after = subject.score(subject.cases, changed, f"Borders: {name}")
        shift = np.abs(after - before)
        mean = summarise(shift.tolist(), subject.patients, seed=SEED)
        found = Estimate(mean.mean, mean.ci_low, mean.ci_high, mean.n)
        flips = float(((after >= subject.verdict.threshold) != called).mean())
        area = auc(after, subject.truth, subject.patients, seed=SEED)
        rows.append(
            {"change": name, "mean_change": found.value, "ci_low": found.ci_low, "ci_high": found.ci_high,
             "verdicts_changed": flips, "auc": area.value}
        )  # fmt: skip
        if worst is None or found.value > worst[1].value:
            worst = (name, found)
    assert worst is not None
    name, found = worst
    sentence = f"With images {name}, the probability changes by {found.value:.3f} on average."
    if name.startswith("“") or name.startswith("corners"):
        sentence = f"With {name}, the probability changes by {found.value:.3f} on average."
    config = subject.config
    return judged(
        "borders", found, config.max_border_shift, "below", config.decide_by, sentence, unit=unit, details=rows
    )


def check_blacked_out(subject: Subject) -> Item:
    """AUC of the model, and of a small network trained for it, on images without lungs.

    The model sees them black, and filled in from what is round them; the small network has learnt from black ones.
    """
    config, unit = subject.config, "AUC"
    usable, _ = subject.with_lungs(subject.cases)
    truth = subject.truth_of(usable)
    if not 0 < truth.sum() < len(truth):
        return missing("lungs_blacked_out", config.max_blacked_out, "below", _NO_LUNGS, unit=unit)
    patients = [case.patient_id for case in usable]
    asked: dict[str, Estimate] = {}
    for how, hide in (("blacked out", masks.outside_only), ("filled in", _fill_inside)):
        after = subject.score(usable, _cut(subject, usable, hide, "hull"), f"Lungs {how}", lungs_before=True)
        asked[how] = _either_way(auc(after, truth, patients, seed=SEED))
    sample, _ = subject.with_lungs(subject.sample)
    probe = name_classes_without_lungs(subject, sample)
    rows = [{"who": f"this model, lungs {how}", **figures_of(area)} for how, area in asked.items()]
    rows.append({"who": "a small network trained on images with the lungs blacked out", **figures_of(probe)})
    how = max(asked, key=lambda name: asked[name].value)
    found, who = asked[how], "the model still tells"
    if probe.value > found.value:
        how, found, who = "blacked out", probe, "a small network trained on such images tells"
    sentence = f"With the lungs {how}, {who} the classes apart with an AUC of {found.value:.2f}; chance is 0.50."
    return judged(
        "lungs_blacked_out", found, config.max_blacked_out, "below", config.decide_by, sentence, unit=unit,
        details=rows, at_best="not assessable" if np.isnan(probe.value) else "pass",
    )  # fmt: skip


def check_masks(subject: Subject) -> Item:
    """AUC lost outside the dilated lung fields; whole, tight, dilated and convex masks side by side.

    What a mask hides is filled in from what it leaves. Black counts for nothing, since a network that has never seen a
    black rim fails there whatever it reads; it is shown for the dilated mask.
    """
    config, unit = subject.config, "AUC lost outside the dilated lungs"
    usable, reasons = subject.with_lungs(subject.cases)
    truth, patients = subject.truth_of(usable), [case.patient_id for case in usable]
    if not 0 < truth.sum() < len(truth):
        return missing("masks", config.max_masked_loss, "below", _NO_LUNGS, unit=unit)
    scores = {"whole": subject.score(usable, None, "Whole images")}
    hidings = [(name, _fill_outside, kind) for name, kind in _MASKS.items()]
    for name, hide, kind in [*hidings, ("dilated, black outside", masks.inside_only, "dilated")]:
        cut = _cut(subject, usable, hide, kind)  # the network is asked, not the lung model before it
        scores[name] = subject.score(usable, cut, f"Masks: {name}", lungs_before=True)
    rows: list[Mapping[str, Any]] = []
    for name, probs in scores.items():
        area = auc(probs, truth, patients, seed=SEED)
        shift = float(np.abs(probs - scores["whole"]).mean())
        rows.append({"mask": name, **figures_of(area), "mean_change": shift})
    lost = bootstrap_rows(
        lambda w: aucs(truth, scores["whole"], w) - aucs(truth, scores["dilated"], w), patients, seed=SEED
    )
    sentence = f"Seeing the dilated lungs alone costs the model {lost.value:.2f} of its AUC."
    if lost.value <= 0:
        sentence = "Seeing the dilated lungs alone costs the model nothing of its AUC."
    if reasons:
        sentence += " Left out: " + ", ".join(f"{n} with {why}" for why, n in reasons.items()) + "."
    return judged("masks", lost, config.max_masked_loss, "below", config.decide_by, sentence, unit=unit, details=rows)


def check_subgroups(subject: Subject) -> Item:
    """The largest shortfall in AUC of a group against all others."""
    config, unit = subject.config, "AUC behind the others"
    groups = read_groups(subject.cohort, subject.cases)
    probs, truth = subject.probs, subject.truth
    table = tabulate(probs, truth, subject.verdict.threshold, groups, subject.patients, seed=SEED)
    worst: tuple[str, Estimate] | None = None
    for factor, of_case in groups.items():
        for group in sorted({name for name in of_case if name}):
            inside = np.array([name == group for name in of_case])
            outside = np.array([bool(name) and name != group for name in of_case])
            if not all(_enough(truth[part], config.min_group) for part in (inside, outside)):
                continue
            gap = bootstrap_rows(partial(_gap, truth, probs, outside, inside), subject.patients, seed=SEED)
            if worst is None or gap.value > worst[1].value:
                worst = (f"{factor} {group}", gap)
    rows = [_flat(row) for row in table]
    if worst is None:
        why = f"There are not two groups with {config.min_group} cases of each class to compare."
        return replace(missing("subgroups", config.max_subgroup_gap, "below", why, unit=unit), details=rows)
    name, found = worst
    sentence = f"The group furthest behind is {name}: its AUC is {found.value:.2f} below that of the others."
    if found.value <= 0:
        sentence = "No group falls behind the others."
    return judged(
        "subgroups", found, config.max_subgroup_gap, "below", config.decide_by, sentence, unit=unit, details=rows
    )


def score_sites(
    subject: Subject, cases: Sequence[Case], *, trained_without: str, unseen: Collection[str]
) -> list[SiteScore]:
    """How a model does at each site of some cases, at the threshold it came with; `unseen` names sites it knows not."""
    probs, truth = subject.score(cases, None, "Sites"), subject.truth_of(cases)
    patients, sites = [case.patient_id for case in cases], [case.site for case in cases]
    rows = tabulate(probs, truth, subject.verdict.threshold, {"site": sites}, patients, seed=SEED)
    return [
        SiteScore(
            trained_without,
            row["group"],
            row["group"] in unseen,
            Estimate(**row["auc"]),
            Estimate(**row["sensitivity"]),
            Estimate(**row["specificity"]),
            row["n_positive"],
        )
        for row in rows
    ]


def check_sites(subject: Subject, scores: Sequence[SiteScore]) -> Item:
    """The lowest AUC at any site; at best not assessable while no site was left out of the training."""
    config, unit = subject.config, "lowest AUC at a site"
    limit = config.min_site_auc
    rows = [
        {"trained": f"without {s.trained_without}" if s.trained_without else "this model", "site": s.site,
         "unseen": "yes" if s.unseen else "no", **figures_of(s.auc), "sensitivity": s.sensitivity.value,
         "specificity": s.specificity.value}
        for s in scores
    ]  # fmt: skip
    counted = [
        s for s in scores if min(s.n_positive, s.auc.n - s.n_positive) >= config.min_group and not np.isnan(s.auc.value)
    ]
    unseen = [s for s in counted if s.unseen]
    # A model trained without one site is asked about that site; how it does at home says nothing about this model.
    asked = [s for s in counted if s.unseen or not s.trained_without]
    if len({s.site for s in scores}) < 2 and not unseen:
        why = "The cases come from fewer than two sites, so nothing shows how the model does elsewhere."
        return replace(missing("sites", limit, "above", why, unit=unit), details=rows)
    if not asked:
        why = f"No site has {config.min_group} cases of each class."
        return replace(missing("sites", limit, "above", why, unit=unit), details=rows)
    lowest = min(asked, key=lambda s: s.auc.value)
    how = "for the same recipe trained without it" if lowest.trained_without else "which it was not trained on"
    where = f"{lowest.site}, {how}" if lowest.unseen else lowest.site
    sentence = f"The lowest AUC is {lowest.auc.value:.2f}, at {where}."
    if few := sorted({s.site for s in scores} - {s.site for s in counted}):
        sentence += f" Not counted, with fewer than {config.min_group} cases of a class: {', '.join(few)}."
    if not unseen:
        sentence += (
            " No site was left out of training: set audit.leave_one_site_out, or audit on a cohort from elsewhere."
        )
    return judged(
        "sites", lowest.auc, limit, "above", config.decide_by, sentence, unit=unit, details=rows,
        at_best="pass" if unseen else "not assessable",
    )  # fmt: skip


def _gap(
    truth: NDArray[np.bool_], probs: Array, others: NDArray[np.bool_], group: NDArray[np.bool_], weights: Array
) -> Array:
    """AUC of the others less that of the group, for each row of weights (draws, n)."""
    areas = [aucs(truth[part], probs[part], weights[:, part]) for part in (others, group)]
    return areas[0] - areas[1]


def _cut(subject: Subject, cases: Sequence[Case], how: Any, kind: str) -> Any:
    mask_of = {"lungs": subject.lungs, "dilated": subject.dilated, "hull": subject.hull}[kind]

    def changed(number: int, image: Volume) -> Volume:
        return replace(image, array=how(image.array, mask_of(cases[number], image.array.shape)))

    return changed


def _fill_outside(image: NDArray[Any], mask: masks.Mask) -> NDArray[Any]:
    return fill_in(image, ~mask)


def _fill_inside(image: NDArray[Any], mask: masks.Mask) -> NDArray[Any]:
    return fill_in(image, mask)


def _either_way(found: Estimate) -> Estimate:
    """An AUC below one half tells the classes apart as well, the other way round."""
    if not found.value < 0.5:
        return found
    return Estimate(1 - found.value, 1 - found.ci_high, 1 - found.ci_low, found.n)


def _enough(truth: NDArray[np.bool_], least: int) -> bool:
    return min(int(truth.sum()), int((~truth).sum())) >= least


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = {"group": f"{row['factor']} {row['group']}", **figures_of(Estimate(**row["auc"]))}
    flat |= {name: row[name]["value"] for name in ("sensitivity", "specificity")}
    return {**flat, "n_positive": row["n_positive"]}
