"""What is filled in where something is hidden. The system that is solved is tested with the checks of explanations."""

import numpy as np
import pytest

from medseg.data.imputation import fill_in


def ramp(shape: tuple[int, int], dtype: type = np.uint16) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (500 + 2 * rows + columns).astype(dtype)


@pytest.mark.parametrize("shape", [(60, 48), (900, 700)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_what_is_seen_stays_and_what_is_hidden_follows_its_surroundings(shape: tuple[int, int], dtype: type) -> None:
    image = ramp(shape, np.float32)
    image = (image / image.max() * 250).astype(dtype)
    hidden = np.zeros(shape, bool)
    hidden[shape[0] // 4 : shape[0] // 2, shape[1] // 4 : shape[1] // 2] = True
    spoiled = np.where(hidden, 0, image).astype(dtype)
    filled = fill_in(spoiled, hidden)
    assert filled.dtype == dtype
    np.testing.assert_array_equal(filled[~hidden], image[~hidden])
    # the ramp itself solves the system; noise of 1 % of the range is added
    assert np.abs(filled[hidden].astype(float) - image[hidden]).max() < 0.06 * 250
    assert np.abs(filled[hidden].astype(float) - image[hidden]).mean() < 0.015 * 250


def test_nothing_and_everything_hidden() -> None:
    image = ramp((40, 30))
    assert fill_in(image, np.zeros(image.shape, bool)) is image
    assert (fill_in(image, np.ones(image.shape, bool)) == 500).all()


def test_the_same_seed_fills_the_same_way() -> None:
    image, hidden = ramp((40, 30)), np.zeros((40, 30), bool)
    hidden[5:20] = True
    np.testing.assert_array_equal(fill_in(image, hidden, seed=3), fill_in(image, hidden, seed=3))
    assert (fill_in(image, hidden, seed=3) != fill_in(image, hidden, seed=4)).any()
