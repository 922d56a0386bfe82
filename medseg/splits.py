"""Splits and folds of a cohort: dealt by whole patients (or sites), alike in their strata, from a seed."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from medseg.cohort import Case, Cohort
from medseg.files import UserError


def assign_splits(
    cases: Sequence[Case], *, val: float, test: float, seed: int, by: Literal["patient", "site"] = "patient"
) -> tuple[Case, ...]:
    """Give every case without a split one of train, val, test; whole patients (or whole sites) move together.

    Groups are shuffled by `seed` and dealt within strata (site and target), so that each split holds about the same
    share of every stratum. Cases that come with a split keep it, and so does the rest of their patient.

    Args:
        val, test: wanted shares of the groups, 0 to 1, val + test < 1.
        by: `patient`, or `site` for site-disjoint splits (strata are then not used).
    """
    group_of = {case.case_id: (case.patient_id if by == "patient" else case.site) for case in cases}
    fixed: dict[str, str] = {}
    for case in cases:
        if case.split and fixed.setdefault(group_of[case.case_id], case.split) != case.split:
            raise UserError(
                f"case {case.case_id!r} is given split {case.split!r}, but another case of its {by} is given "
                f"{fixed[group_of[case.case_id]]!r}; put them in one split."
            )
    strata: dict[tuple[str, ...], set[str]] = defaultdict(set)
    first_case = {group_of[case.case_id]: case for case in reversed(cases)}
    for group, case in first_case.items():
        if group not in fixed:
            strata[(case.site, case.target) if by == "patient" else ()].add(group)
    chosen = dict(fixed)
    carry = {"test": 0.0, "val": 0.0}  # what rounding owed earlier strata, so that totals stay right
    for stratum in sorted(strata):
        groups = sorted(strata[stratum])
        random.Random(f"{seed}/{stratum}").shuffle(groups)
        for name, share in (("test", test), ("val", val)):
            wanted = share * len(strata[stratum]) + carry[name]
            count = min(len(groups), max(0, round(wanted)))
            carry[name] = wanted - count
            chosen.update((group, name) for group in groups[:count])
            groups = groups[count:]
        chosen.update((group, "train") for group in groups)
    return tuple(replace(case, split=chosen[group_of[case.case_id]]) for case in cases)


def assign_folds(
    cases: Sequence[Case], folds: int, *, seed: int, by: Literal["patient", "site"] = "patient"
) -> dict[str, int]:
    """Deal the cases that are not of the test split into folds; whole patients (or whole sites) stay together.

    Groups are taken in an order shuffled by `seed`, the largest first, each to the fold that has the fewest cases of
    its stratum (site and target), and of those to the smallest; so folds are alike in size and strata.

    Returns:
        case_id to fold, 0 to folds - 1, for every case of train and val.

    Raises:
        UserError: there are fewer patients or sites than folds, or a case has no site.
    """
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in sorted(cases, key=lambda case: case.case_id):
        if case.split in ("train", "val"):
            groups[case.patient_id if by == "patient" else case.site].append(case)
    if by == "site" and "" in groups:
        raise UserError(f"train.folds_by 'site': case {groups[''][0].case_id!r} has no site; use 'patient'.")
    if len(groups) < folds:
        raise UserError(f"train.folds {folds}: train and val hold {len(groups)} {by}s only; choose fewer folds.")
    order = sorted(groups)
    random.Random(f"{seed}/folds").shuffle(order)
    order.sort(key=lambda group: -len(groups[group]))
    sizes, strata = [0] * folds, [Counter[tuple[str, str]]() for _ in range(folds)]
    chosen: dict[str, int] = {}
    for group in order:
        stratum = (groups[group][0].site if by == "patient" else "", groups[group][0].target)
        fold = min(range(folds), key=lambda k: (strata[k][stratum], sizes[k], k))
        sizes[fold] += len(groups[group])
        strata[fold][stratum] += len(groups[group])
        chosen.update((case.case_id, fold) for case in groups[group])
    return chosen


def take_fold(
    cohort: Cohort, fold: int, folds: int, *, seed: int, by: Literal["patient", "site"] = "patient"
) -> Cohort:
    """The cohort as one fold of a cross-validation sees it: val is the fold, train the others, test as it was.

    Its hash stays that of the cohort: the cases are the same, and the folds follow from them and `seed`.
    """
    chosen = assign_folds(cohort.cases, folds, seed=seed, by=by)
    names = {case_id: "val" if number == fold else "train" for case_id, number in chosen.items()}
    cases = tuple(replace(case, split=names.get(case.case_id, case.split)) for case in cohort.cases)
    return replace(cohort, cases=cases)
