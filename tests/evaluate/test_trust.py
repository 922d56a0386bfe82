"""Expected Dice held against Dice that were reached: fitted out of fold, measured on new cases."""

from pathlib import Path

import numpy as np
import pytest

from medseg.cohort import Case
from medseg.evaluate.earned import Pair
from medseg.evaluate.outcomes import Outcome
from medseg.evaluate.trust import calibrate, measure, volume_ranges
from medseg.files import write_json
from medseg.images import write_nifti
from medseg.volume import Volume

LABELS = {"organ": 1}


def outcome(folder: Path, name: str, dice: float, **said: object) -> Outcome:
    write_json(folder / name / "result.json", {"confidence": {"organ": said} if said else {}})
    figures = {"dice_organ": dice}
    return Outcome(Case(name, name, ()), figures=figures, pred=folder / name / "mask.nii.gz")


def folds(folder: Path, count: int = 30, parts: int = 3) -> dict[int, list[Outcome]]:
    rng = np.random.default_rng(0)
    found: dict[int, list[Outcome]] = {fold: [] for fold in range(parts)}
    for number in range(count):
        soft = float(rng.uniform(0.6, 0.97))
        dice = float(np.clip(soft - 0.1 + rng.normal(0, 0.02), 0, 1))
        found[number % parts].append(outcome(folder, f"c{number}", dice, soft_dice=soft, entropy=0.2))
    return found


@pytest.mark.parametrize("parts", [3, 1])
def test_what_the_features_promise_is_fitted_to_what_was_reached(tmp_path: Path, parts: int) -> None:
    by_fold = folds(tmp_path, parts=parts)
    by_fold[0].append(outcome(tmp_path, "missed", 0.0))  # nothing was predicted, so there is nothing to trust
    known = calibrate(by_fold, LABELS)["organ"]
    assert known["n"] == 30
    assert known["held_out"]["spearman"] > 0.9
    assert known["held_out"]["absolute_error"] < 0.5 * known["held_out"]["absolute_error_of_mean"]
    assert known["held_out"]["coverage"] >= 0.85


def test_agreement_of_mirrored_passes_is_fitted_where_every_case_has_it(tmp_path: Path) -> None:
    by_fold: dict[int, list[Outcome]] = {0: [], 1: []}
    for number in range(20):
        mirrored = 0.5 + number / 40
        said = {"soft_dice": 0.9, "entropy": 0.2, "mirrored": mirrored}
        by_fold[number % 2].append(outcome(tmp_path, f"c{number}", mirrored - 0.1, **said))
    known = calibrate(by_fold, LABELS)["organ"]
    assert len(known["coefficients"]) == 4
    assert known["held_out"]["spearman"] > 0.9
    by_fold[0].append(outcome(tmp_path, "older", 0.8, soft_dice=0.9, entropy=0.2))
    assert len(calibrate(by_fold, LABELS)["organ"]["coefficients"]) == 3


def test_too_few_cases_promise_nothing(tmp_path: Path) -> None:
    assert calibrate(folds(tmp_path, 6), LABELS) == {}


def test_the_promise_is_measured_on_the_cases_that_carry_one(tmp_path: Path) -> None:
    reached = [0.9, 0.8, 0.6, 0.7]
    outcomes = [
        outcome(
            tmp_path, f"c{k}", dice, expected_dice=dice + 0.05, interval=[dice - 0.1, dice + 0.1 - 0.15 * (k == 3)],
            agreement=1 - dice, entropy=1 - dice, soft_dice=0.9,
        )
        for k, dice in enumerate(reached)
    ]  # fmt: skip
    outcomes += [outcome(tmp_path, "bare", 0.1), outcome(tmp_path, "both_empty", float("nan"), expected_dice=0.5)]
    found = measure(outcomes, LABELS)["organ"]
    assert found["n"] == 4
    assert found["spearman"] == pytest.approx(1)
    assert found["mean_error"] == pytest.approx(0.05)
    assert found["coverage"] == 0.75
    assert found["spearman_agreement"] == pytest.approx(-1)
    assert found["spearman_entropy"] == pytest.approx(1), "a higher entropy is expected to go with a lower Dice"
    assert measure(outcomes[4:5], LABELS) == {}


def test_volumes_of_the_references(tmp_path: Path) -> None:
    pairs = []
    for k, side in enumerate((4, 5, 6, 7, 8)):
        array = np.zeros((10, 10, 10), np.uint8)
        array[:side, :side, :side] = 1
        path = tmp_path / f"{k}.nii.gz"
        write_nifti(path, Volume(array, np.diag([10.0, 10.0, 10.0, 1.0])))  # 1 ml a voxel
        pairs.append(Pair(f"p{k}", path, path))
    found = volume_ranges(pairs, LABELS)["organ"]
    assert (found["median"], found["low"], found["high"], found["n"]) == pytest.approx((216, 64, 512, 5))
    assert found["mad_log"] == pytest.approx(sorted(abs(3 * np.log(s / 6)) for s in (4, 5, 6, 7, 8))[2])
    assert volume_ranges(pairs[:4], LABELS) == {}
