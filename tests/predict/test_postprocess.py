"""Post-processing on label maps whose answer is seen at a glance."""

import numpy as np
import pytest

from medseg.predict.postprocess import OPERATIONS, apply, apply_all


def scene() -> np.ndarray:
    """Label 1: a hollow box and three crumbs of 1, 2 and 8 voxels; label 2: one voxel inside the box."""
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[2:9, 2:9, 2:9] = 1
    labels[4:7, 4:7, 4:7] = 0
    labels[5, 5, 5] = 2
    labels[15, 15, 15] = 1
    labels[12, 3, 3:5] = 1
    labels[15:17, 2:4, 10:12] = 1
    return labels


def test_the_largest_component_stays() -> None:
    labels = scene()
    found = apply(labels, 1, "largest_component")
    assert (found == 1).sum() == 7**3 - 3**3
    assert found[5, 5, 5] == 2
    assert found[15, 15, 15] == 0
    assert labels[15, 15, 15] == 1, "the map that was given stays as it was"


def test_only_background_fills_a_hole() -> None:
    found = apply(scene(), 1, "fill_holes")
    assert (found == 1).sum() == (scene() == 1).sum() + 3**3 - 1
    assert found[5, 5, 5] == 2
    open_box = scene()
    open_box[5, 5, 7:9] = 0
    assert np.array_equal(apply(open_box, 1, "fill_holes"), open_box), "a hole with a way out is none"


@pytest.mark.parametrize(("min_ml", "left"), [(0.0, 11), (0.004, 10), (0.006, 8), (0.016, 8), (0.017, 0), (9.0, 0)])
def test_objects_below_a_volume_go_and_the_largest_never_does(min_ml: float, left: int) -> None:
    found = apply(scene(), 1, "remove_small", voxel_ml=0.002, min_ml=min_ml)
    assert (found == 1).sum() == 7**3 - 3**3 + left


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_whole_structure_and_an_absent_one_are_left_alone(name: str) -> None:
    labels = np.zeros((9, 9), np.uint16)
    labels[2:5, 2:5] = 300
    assert np.array_equal(apply(labels, 300, name, voxel_ml=1.0, min_ml=2.0), labels)
    assert np.array_equal(apply(labels, 7, name, voxel_ml=1.0, min_ml=2.0), labels)
    assert apply(labels, 300, name).dtype == np.uint16


def test_corners_connect() -> None:
    labels = np.zeros((4, 4), np.uint8)
    labels[0, 0] = labels[1, 1] = labels[3, 0] = 1
    assert (apply(labels, 1, "largest_component") == 1).sum() == 2


def test_choices_are_applied_in_their_order() -> None:
    choices = [{"label": "thing", "operation": "largest_component"}, {"label": "thing", "operation": "fill_holes"}]
    found = apply_all(scene(), {"thing": 1}, choices)
    assert (found == 1).sum() == 7**3 - 1
    assert np.array_equal(apply_all(scene(), {"thing": 1}, []), scene())
