"""Groups of cases by what the cohort knows about them: site, modality, and a table beside the cohort if there is one.

`attributes.csv` in the cohort's folder has a column `case_id` and any of `sex`, `age` (years) and `view`; a cohort
without it has the groups that its own table gives.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Case, Cohort
from medseg.evaluate.calibration import rates
from medseg.files import UserError, read_rows
from medseg.statistics import Estimate, bootstrap_auc

TABLE = "attributes.csv"
FACTORS = ("sex", "age", "view")
_AGES = ((18, "under 18"), (40, "18 to 39"), (60, "40 to 59"), (math.inf, "60 and over"))


def read_groups(cohort: Cohort, cases: Sequence[Case]) -> dict[str, list[str]]:
    """Factor to the group of each case, empty where unknown; a factor with one group only is left out.

    Raises:
        UserError: `attributes.csv` has no column case_id, or an age that is no number.
    """
    found = {"site": [case.site for case in cases], "modality": [case.modality for case in cases]}
    known = _read_table(cohort)
    for factor in FACTORS:
        cells = [known.get(case.case_id, {}).get(factor, "").strip() for case in cases]
        found[factor] = [_age_group(cell) for cell in cells] if factor == "age" else cells
    return {factor: groups for factor, groups in found.items() if len({group for group in groups if group}) > 1}


def tabulate(
    probs: NDArray[np.float64],
    truth: NDArray[np.bool_],
    threshold: float,
    groups: Mapping[str, Sequence[str]],
    patients: Sequence[str],
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Sensitivity, specificity (exact intervals) and AUC (bootstrap over patients) of every group.

    Args:
        probs, truth, groups, patients: one entry per case.
    """
    rows = []
    for factor, of_case in groups.items():
        for group in sorted({name for name in of_case if name}):
            inside = np.array([name == group for name in of_case])
            sensitivity, specificity = rates(probs[inside], truth[inside], threshold)
            owners = [patient for patient, counts in zip(patients, inside, strict=True) if counts]
            rows.append(
                {
                    "factor": factor,
                    "group": group,
                    "n": int(inside.sum()),
                    "n_positive": int(truth[inside].sum()),
                    "sensitivity": asdict(sensitivity),
                    "specificity": asdict(specificity),
                    "auc": asdict(auc(probs[inside], truth[inside], owners, seed=seed)),
                }
            )
    return rows


def auc(probs: NDArray[np.float64], truth: NDArray[np.bool_], patients: Sequence[str], *, seed: int = 0) -> Estimate:
    """Area under the ROC curve with its interval over patients; NaN where a class is missing."""
    return bootstrap_auc(truth, probs, patients, seed=seed)


def _read_table(cohort: Cohort) -> dict[str, dict[str, str]]:
    path = cohort.folder / TABLE
    if not path.is_file():
        return {}
    rows = read_rows(path)
    if rows and "case_id" not in rows[0]:
        raise UserError(f"{path} has no column 'case_id'; name the cases as in cohort.csv.")
    return {row["case_id"]: row for row in rows}


def _age_group(cell: str) -> str:
    if not cell:
        return ""
    try:
        years = float(cell)
    except ValueError as error:
        raise UserError(f"{TABLE}: age {cell!r} is no number of years; correct the cell or leave it empty.") from error
    return next(name for limit, name in _AGES if years < limit)
