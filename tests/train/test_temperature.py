"""The temperature of a fold, on voxels whose probabilities are known."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg.cohort import Case
from medseg.data.cache import Example
from medseg.plan import Plan
from medseg.train.temperature import VOXELS_PER_CASE, calibrate_voxels

PLAN = Plan(3, (16, 16, 16), 1, spacing_mm=(1.0, 1.0, 1.0))


class TooSure(nn.Module):
    """The image holds the true logit of label 1; the network puts out three times that."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), 3.0 * x], 1)


def examples(count: int) -> list[Example]:
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        image = rng.normal(0, 1.5, (1, 16, 16, 16)).astype(np.float32)
        label = (rng.random((16, 16, 16)) < 1 / (1 + np.exp(-image[0]))).astype(np.uint8)
        found.append(Example(Case(f"c{number}", f"p{number}", ()), image, label, (), -1))
    return found


def test_over_confidence_is_measured_and_taken_back() -> None:
    found = calibrate_voxels(TooSure(), examples(6), PLAN, torch.device("cpu"))
    assert found["temperature"] == pytest.approx(3.0, rel=0.1)
    assert found["voxels"] == 6 * VOXELS_PER_CASE
    assert found["ece_before"] > 0.1
    assert found["ece_after"] < 0.03


def test_one_case_has_no_other_half_to_be_measured_on() -> None:
    found = calibrate_voxels(TooSure(), examples(1), PLAN, torch.device("cpu"))
    assert "ece_after" not in found
    assert found["temperature"] == pytest.approx(3.0, rel=0.3)


def test_the_same_seed_draws_the_same_voxels() -> None:
    cases = examples(2)
    assert calibrate_voxels(TooSure(), cases, PLAN, torch.device("cpu"), seed=1) == calibrate_voxels(
        TooSure(), cases, PLAN, torch.device("cpu"), seed=1
    )
