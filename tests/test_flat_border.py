"""Borders that are one plane of the scan: found, straightened, used only where references and predictions say so."""

from pathlib import Path

import numpy as np
import pytest

from medseg.evaluate.earned import Pair, choose
from medseg.flat_border import AXES, array_axis, find_border, flatten_border, slice_counts
from medseg.images import read_image, write_nifti
from medseg.metrics import dice
from medseg.predict.postprocess import apply, apply_all
from medseg.volume import Volume

LABELS = {"head": 1, "body": 4}
AFFINE = np.diag([-1.0, 1.0, 2.0, 1.0])


def drawn(border: int = 11) -> np.ndarray:
    """An ellipsoid; what lies below `border` on axis 1 is the body, the rest the head."""
    i, j, k = np.mgrid[:18, :24, :14]
    inside = ((i - 9) / 7) ** 2 + ((j - 12) / 10) ** 2 + ((k - 7) / 5) ** 2 < 1
    return np.where(inside, np.where(j < border, 4, 1), 0).astype(np.uint8)


def slanted(border: int, slope: float) -> np.ndarray:
    i, j, _ = np.mgrid[:18, :24, :14]
    found = drawn(border)
    found[found > 0] = np.where(j < border + slope * (i - 9), 4, 1)[found > 0]
    return found


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("turned", [False, True])
def test_a_flat_border_is_found_and_stays(axis: int, turned: bool) -> None:
    labels = np.moveaxis(drawn(), 1, axis)
    labels = np.flip(labels, axis) if turned else labels
    border = find_border(slice_counts(labels, axis), 1, 4)
    assert border is not None
    assert border.misplaced == 0
    assert border.first_below == turned
    assert border.start == (labels.shape[axis] - 11 if turned else 11)
    assert flatten_border(labels, 1, 4, axis) is labels


def test_the_plane_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.choice(np.array([0, 1, 4, 7], np.uint16), (6, 9, 5))
        best = min(
            sum(((labels == low)[:, k:]).sum() + ((labels == high)[:, :k]).sum() for low, high in [pair])
            for k in range(10)
            for pair in [(1, 4), (4, 1)]
        )
        border = find_border(slice_counts(labels, 1), 1, 4)
        assert border is not None
        assert border.misplaced == pytest.approx(best / np.isin(labels, (1, 4)).sum())
        flat = flatten_border(labels, 1, 4, 1)
        assert (flat != labels).sum() == best
        assert flat.dtype == labels.dtype
        for untouched in (0, 7):
            np.testing.assert_array_equal(flat == untouched, labels == untouched)


def test_a_slanted_border_is_straightened_about_its_middle() -> None:
    given = slanted(11, 0.4)
    kept = given.copy()
    np.testing.assert_array_equal(flatten_border(given, 1, 4, 1), drawn(11))
    np.testing.assert_array_equal(given, kept)


def test_where_a_label_is_missing_nothing_is_done() -> None:
    labels = np.where(drawn() == 4, 4, 0).astype(np.uint8)
    assert find_border(slice_counts(labels, 1), 1, 4) is None
    assert flatten_border(labels, 1, 4, 1) is labels


def test_directions_follow_the_scan_and_not_the_array() -> None:
    turned = np.array([[0, 0, 1.0, 0], [-1.2, 0.1, 0, 0], [0.1, 2, 0, 0], [0, 0, 0, 1]])
    assert [array_axis(AFFINE, direction) for direction in AXES] == [0, 1, 2]
    assert [array_axis(turned, direction) for direction in AXES] == [2, 0, 1]


def write(folder: Path, refs: list[np.ndarray], preds: list[np.ndarray]) -> list[Pair]:
    pairs = []
    for number, arrays in enumerate(zip(refs, preds, strict=True)):
        paths = [folder / f"{kind}-{number}.nii.gz" for kind in ("ref", "pred")]
        for path, array in zip(paths, arrays, strict=True):
            write_nifti(path, Volume(array, AFFINE))
        pairs.append(Pair(f"p{number}", paths[1], paths[0]))
    return pairs


def test_a_border_that_references_draw_flat_earns_its_place(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    borders = rng.integers(9, 15, 8)
    pairs = write(
        tmp_path,
        [drawn(b) for b in borders],
        [slanted(b, s) for b, s in zip(borders, rng.uniform(-0.5, 0.5, 8), strict=True)],
    )
    choices = choose(pairs, LABELS, apply)
    flat = [choice for choice in choices if choice["operation"] == "flat_border"]
    assert [(c["label"], c["other"], c["axis"], c["used"], c["n"]) for c in flat] == [("head", "body", "AP", True, 8)]
    assert flat[0]["dice_after"] == 1
    assert flat[0]["dice_before"] < 0.98
    pred, ref = read_image(pairs[0].pred), read_image(pairs[0].ref)
    cleaned = apply_all(pred, LABELS, [choice for choice in choices if choice["used"]])
    np.testing.assert_array_equal(cleaned.array, ref.array)
    turned = Volume(np.ascontiguousarray(np.moveaxis(pred.array, 1, 2)), AFFINE[:, [0, 2, 1, 3]])
    again = apply_all(turned, LABELS, [choice for choice in choices if choice["used"]])
    np.testing.assert_array_equal(np.moveaxis(again.array, 2, 1), ref.array)


def test_a_border_that_is_not_flat_is_never_tried(tmp_path: Path) -> None:
    refs = [slanted(b, 0.5) for b in (10, 11, 12, 13)]
    assert not [c for c in choose(write(tmp_path, refs, refs), LABELS, apply) if c["operation"] == "flat_border"]


def test_a_flat_border_that_predictions_have_already_is_not_used(tmp_path: Path) -> None:
    refs = [drawn(b) for b in (10, 11, 12, 13)]
    found = [c for c in choose(write(tmp_path, refs, refs), LABELS, apply) if c["operation"] == "flat_border"]
    assert [(c["used"], c["changed"]) for c in found] == [(False, 0)]


def test_a_border_that_moves_away_from_the_reference_is_not_used(tmp_path: Path) -> None:
    """Predictions err on one side by so much that the plane of most voxels is further off than they are."""
    refs, preds = [], []
    for border in (10, 11, 12, 13):
        refs.append(drawn(border))
        pred = drawn(border)
        pred[:12, border : border + 3][pred[:12, border : border + 3] > 0] = 4
        preds.append(pred)
    pairs = write(tmp_path, refs, preds)
    found = [c for c in choose(pairs, LABELS, apply) if c["operation"] == "flat_border"]
    assert [c["used"] for c in found] == [False]
    assert found[0]["dice_after"] < found[0]["dice_before"] < 1
    assert dice(preds[0] == 1, refs[0] == 1) < 1
