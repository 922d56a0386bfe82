"""Lung masks with a known answer: their geometry, when they cannot be lungs, and what they leave of an image."""

import numpy as np
import pytest

from medseg.config import LungsConfig, validate_config
from medseg.data.lung_view import LungFields, LungView, visible
from medseg.data.lungs import box, check, convex, dilate, fit, inside_only, lung_fields, outside_only
from medseg.data.phantom import draw_radiographs, render_radiograph
from medseg.data.preprocess import prepare
from medseg.files import UserError
from medseg.ingest.scan import Refused
from medseg.plan import Appearance, Plan
from medseg.volume import Volume

SIZE = 100
ROWS, COLUMNS = np.mgrid[:SIZE, :SIZE]


def ellipse(row: float, column: float, height: float, width: float) -> np.ndarray:
    return ((ROWS - row) / height) ** 2 + ((COLUMNS - column) / width) ** 2 < 1


RIGHT, LEFT = ellipse(50, 28, 30, 15), ellipse(52, 72, 28, 13)


def codes(mask: np.ndarray, **limits: object) -> list[str]:
    return [finding.code for finding in check(mask, LungsConfig(**limits))]  # type: ignore[arg-type]


def test_mask_geometry_has_its_known_answers() -> None:
    mask = np.zeros((40, 40), bool)
    mask[10:30, 6:16] = mask[10:30, 24:34] = True
    hull = convex(mask)
    assert hull[10:30, 6:34].all()
    assert hull.sum() == 20 * 28
    grown = dilate(mask, 2)
    assert grown[8, 10]
    assert grown[20, 4]
    assert not grown[7, 10]
    assert not grown[8, 4], "a corner is farther than 2"
    crumbled = mask.copy()
    crumbled[0, 0], crumbled[15, 10] = True, False
    np.testing.assert_array_equal(lung_fields(crumbled), mask)
    half = fit(mask, (20, 20))
    np.testing.assert_array_equal(fit(half, (40, 40)), mask)
    image = np.arange(1600).reshape(40, 40)
    assert inside_only(image, mask)[~mask].max() == 0
    assert (outside_only(image, mask)[~mask] == image[~mask]).all()
    line = np.zeros((9, 9), bool)
    line[4, 2:7] = True
    np.testing.assert_array_equal(convex(line), line)
    assert box(mask).sum() == 20 * 28
    assert box(mask)[10:30, 6:34].all()
    assert not box(np.zeros((4, 4), bool)).any()


def test_the_lungs_of_simulated_thoraces_are_plausible() -> None:
    for params in draw_radiographs(3, 12):
        assert codes(render_radiograph(params, 128).lung_mask > 0) == []


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (RIGHT | LEFT, []),
        (RIGHT | LEFT | ellipse(80, 50, 1.5, 1.5), []),  # a crumb
        (np.zeros((SIZE, SIZE), bool), ["lungs_area", "lungs_parts"]),
        (np.ones((SIZE, SIZE), bool), ["lungs_area", "lungs_parts", "lungs_at_border"]),
        (ellipse(30, 30, 8, 6) | ellipse(30, 70, 8, 6), ["lungs_area"]),
        (RIGHT, ["lungs_parts"]),
        (RIGHT | LEFT | ellipse(50, 50, 60, 3), ["lungs_parts"]),  # grown together
        (RIGHT | LEFT | ellipse(90, 72, 7, 9), ["lungs_parts"]),  # gas in the stomach
        (RIGHT | ellipse(52, 72, 9, 9), ["lungs_asymmetry"]),
        (ellipse(25, 45, 20, 25) | ellipse(75, 55, 20, 25), ["lungs_askew"]),
        (ellipse(50, 0, 30, 30) | ellipse(50, 99, 30, 30), ["lungs_at_border"]),
    ],
)
def test_each_fault_is_found_and_named(mask: np.ndarray, expected: list[str]) -> None:
    assert codes(mask) == expected


def test_a_finding_says_by_how_much_and_limits_move_it() -> None:
    mask = RIGHT | ellipse(52, 72, 9, 9)
    (found,) = check(mask, LungsConfig())
    ratio = ellipse(52, 72, 9, 9).sum() / RIGHT.sum()
    assert (found.severity, found.number, found.threshold) == ("warning", pytest.approx(ratio, abs=1e-4), 0.3)
    assert codes(mask, min_ratio=0.1) == []
    assert codes(RIGHT | LEFT, area=(0.3, 0.5)) == ["lungs_area"]
    askew = ellipse(45, 28, 30, 15) | ellipse(56, 72, 28, 13)
    assert codes(askew) == []
    assert codes(askew, max_askew=0.2) == ["lungs_askew"]


@pytest.mark.parametrize("kind", ["none", "tight", "dilated", "convex", "box"])
def test_what_is_visible_is_untouched_and_the_rest_is_as_dark_as_it_gets(kind: str) -> None:
    image = np.random.default_rng(0).integers(7, 4000, (SIZE, SIZE)).astype(np.uint16)
    fields = RIGHT | LEFT
    (seen,) = visible([Volume(image, np.eye(4))], LungFields(fields), LungsConfig(mask=kind, dilate=0.05))  # type: ignore[arg-type]
    grown = dilate(fields, 5)
    inside = {
        "none": np.ones_like(fields),
        "tight": fields,
        "dilated": grown,
        "convex": convex(grown),
        "box": box(grown),
    }[kind]
    assert seen.array.dtype == image.dtype
    np.testing.assert_array_equal(seen.array[inside], image[inside])
    assert (seen.array[~inside] == image.min()).all()
    assert fields[~inside].sum() == 0


def test_of_a_box_the_network_sees_the_rectangle_and_nothing_else() -> None:
    image = np.random.default_rng(0).integers(7, 4000, (SIZE, SIZE)).astype(np.uint16)
    fields = RIGHT | LEFT
    seen = visible([Volume(image, np.eye(4))], LungFields(fields), LungsConfig(mask="box", dilate=0.05))
    plan = Plan(2, (32, 32), 1, size_px=(32, 32), normalise="zscore", appearance=Appearance(crop_padding=True))
    prepared = prepare(seen, plan)
    rows, columns = (np.flatnonzero(dilate(fields, 5).any(axis)) for axis in (1, 0))
    assert prepared.content == (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    assert prepared.image.shape == (1, 32, 32)


def test_a_view_needs_masks_only_where_it_hides_something() -> None:
    image = Volume(np.full((8, 8), 3, np.uint8), np.eye(4))
    assert LungView(LungsConfig()).show([image]) == (image,)
    with pytest.raises(Refused, match="no lung mask"):
        LungView(LungsConfig(mask="tight")).show([image])
    labels = np.zeros((8, 8), np.uint8)
    labels[2:6, 1:3], labels[2:6, 5:7] = 1, 2  # right and left lung as labels of their own
    view = LungView(LungsConfig(mask="tight"), segment=lambda _: labels)
    found = view.find(image)
    assert found is not None
    np.testing.assert_array_equal(found.mask, labels > 0)
    keys = {LungView(LungsConfig(mask=mask, dilate=by)).key for mask in ("tight", "convex") for by in (0.0, 0.1)}  # type: ignore[arg-type]
    assert len(keys) == 4
    assert LungView(LungsConfig(area=(0.2, 0.3))).key == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lungs": {"model": "x"}}, "are for classifiers"),
        ({"lungs": {"area": [0.5, 0.2]}}, "must rise"),
        (
            {
                "task": {"kind": "classification", "labels": {"no": 0, "yes": 1}, "spatial_dims": 2},
                "model": {"name": "densenet"},
                "loss": {"name": "cross_entropy"},
                "lungs": {"mask": "tight"},
                "plan": {"appearance": {"match_sharpness": True}},
            },
            "cannot match what lungs.mask 'tight' shows",
        ),
        ({"lungs": {}, "task": {"kind": "segmentation", "labels": {"lung": 1}}}, "those of radiographs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, object], words: str) -> None:
    tree = {
        "name": "x",
        "task": {"kind": "segmentation", "labels": {"lung": 1}, "spatial_dims": 2},
        "model": {"name": "unetpp"},
        "loss": {"name": "dice_ce"},
    }
    with pytest.raises(UserError, match=words):
        validate_config({**tree, **change}, "x")
