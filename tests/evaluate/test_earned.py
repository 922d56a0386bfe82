"""Post-processing is taken up where it helps, left where it harms, and left where it changes nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from medseg.evaluate.earned import Pair, choose
from medseg.images import read_image, write_nifti
from medseg.predict.postprocess import apply
from medseg.volume import Volume

LABELS = {"organ": 1, "spots": 2, "clean": 3}
AFFINE = np.diag([2.0, 2.0, 2.5, 1.0])  # 0.01 ml a voxel


def cases(folder: Path, count: int = 8) -> list[Pair]:
    """`organ` is one box, predicted with crumbs that are no part of it; `spots` are two boxes, both of them real, found
    but for one layer; `clean` is predicted as it is."""
    pairs = []
    rng = np.random.default_rng(5)
    for number in range(count):
        ref = np.zeros((30, 24, 20), np.uint8)
        ref[2:10, 2:10, 2:10] = 1
        ref[14:18, 2:6, 2:6] = 2
        ref[22:27, 2:7, 2:7] = 2
        ref[14:20, 14:20, 2:8] = 3
        pred = ref.copy()
        pred[26, 2:7, 2:7] = 0
        for _ in range(1 + number % 3):
            x, y = rng.integers(1, 12), rng.integers(13, 22)
            pred[x, y, 15] = 1
        for kind, array in (("ref", ref), ("pred", pred)):
            write_nifti(folder / f"{kind}-{number}.nii.gz", Volume(array, AFFINE))
        pairs.append(Pair(f"p{number}", folder / f"pred-{number}.nii.gz", folder / f"ref-{number}.nii.gz"))
    return pairs


def test_each_operation_is_judged_by_what_it_does_to_the_dice(tmp_path: Path) -> None:
    found = choose(cases(tmp_path), LABELS, apply)
    used = [(choice["label"], choice["operation"]) for choice in found if choice["used"]]
    assert len(used) == 1, "what removes the crumbs leaves nothing to remove for another"
    assert used[0][0] == "organ"
    assert used[0][1] in ("largest_component", "remove_small")
    first = found[0]
    assert first["used"]
    assert first["dice_after"] == 1.0
    assert first["dice_before"] < 1.0
    assert (first["n"], first["changed"]) == (8, 8)
    assert first["ci_low"] > 0
    harm = next(c for c in found if (c["label"], c["operation"]) == ("spots", "largest_component"))
    assert not harm["used"]
    assert harm["dice_after"] < harm["dice_before"] - 0.1
    assert harm["ci_high"] < 0
    for choice in found:
        if choice["label"] == "clean":
            assert (choice["used"], choice["changed"]) == (False, 0)
            assert choice["dice_before"] == choice["dice_after"] == 1.0


def test_help_for_most_that_harms_a_few_is_not_taken(tmp_path: Path) -> None:
    """In six of eight cases the smaller object is a crumb, in two it is most of the structure."""
    pairs = cases(tmp_path)
    for pair in pairs[:2]:
        both = np.zeros((30, 24, 20), np.uint8)
        both[2:10, 2:10, 2:10] = 1
        ref = both.copy()
        both[20:29, 10:20, 10:19] = 1
        write_nifti(pair.pred, Volume(both, AFFINE))
        write_nifti(pair.ref, Volume(ref, AFFINE))
    found = choose(pairs, {"organ": 1}, apply)
    largest = next(c for c in found if c["operation"] == "largest_component")
    assert not largest["used"]
    assert largest["ci_low"] < 0


def test_a_case_whose_label_does_not_tell_of_a_structure_says_nothing_about_it(tmp_path: Path) -> None:
    """Of two cases the reference lacks `organ`, which was predicted: counted, they would have a Dice of 0."""
    pairs = cases(tmp_path)
    for number, pair in enumerate(pairs[:2]):
        ref = read_image(pair.ref)
        write_nifti(pair.ref, Volume(np.where(ref.array == 1, 0, ref.array).astype(np.uint8), AFFINE))
        pairs[number] = replace(pair, not_annotated=("organ",))
    first = choose(pairs, LABELS, apply)[0]
    assert (first["label"], first["used"], first["n"], first["dice_after"]) == ("organ", True, 6, 1.0)


def test_one_patient_proves_nothing(tmp_path: Path) -> None:
    pairs = [Pair("only", pair.pred, pair.ref) for pair in cases(tmp_path, 3)]
    assert not any(choice["used"] for choice in choose(pairs, LABELS, apply))
