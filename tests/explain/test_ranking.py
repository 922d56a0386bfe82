"""Which method is best: known winners, no matter the range of a figure, and maps without evidence last."""

import numpy as np
import pytest
import torch
from torch import nn

from medseg.config import ExplainChecksConfig, MethodConfig
from medseg.explain.passmark import CHECKS
from medseg.explain.perturb import Probe
from medseg.explain.ranking import candidates_of, measure_candidate, rank_methods
from medseg.explain.targets import Score


def test_candidates_have_a_layerless_method_once() -> None:
    found = candidates_of(["gradcam", "fullgrad"], ["a", "b"])
    assert found == [("gradcam", "a"), ("gradcam", "b"), ("fullgrad", "input")]


def test_ranking_by_hand() -> None:
    """Three candidates, two figures; the small one counts as much, and of randomisation less is more."""
    measured = {
        ("a", "l"): [{"road": 0.003, "randomisation": 0.1}, {"road": 0.002, "randomisation": 0.2}],
        ("b", "l"): [{"road": 0.002, "randomisation": 0.9}, {"road": 0.002, "randomisation": 0.8}],
        ("c", "l"): [{"road": None, "randomisation": None}, {"road": 0.001, "randomisation": 0.5}],
    }
    ranked = rank_methods(measured)
    assert [one.method for one in ranked] == ["a", "b", "c"]
    # case 1: a wins both (1, 1), case 2: ties with b for road (0.75), wins randomisation (1)
    assert ranked[0].score == pytest.approx((1 + (0.75 + 1) / 2) / 2)
    assert ranked[1].score == pytest.approx((0.5 + (0.75 + 0) / 2) / 2)
    assert ranked[0].means == pytest.approx({"road": 0.0025, "randomisation": 0.15})
    assert ranked[2].means == pytest.approx({"road": 0.001, "randomisation": 0.5})
    assert ranked[0].ci_low <= ranked[0].score <= ranked[0].ci_high
    with pytest.raises(ValueError, match="same ones"):
        rank_methods({("a", "l"): [{}], ("b", "l"): []})


class Patch(nn.Module):
    """Class 1 is the mean of one corner; a second layer that is computed and not used puts out noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)
        nn.init.ones_(self.layer.weight)
        self.head = nn.Linear(1, 2)
        self.head.weight.data = torch.tensor([[-5.0], [5.0]])

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x_BCHW)[:, :, :6, :6].flatten(2).mean(2))


def test_a_method_that_points_at_the_evidence_beats_one_that_knows_no_class() -> None:
    """HiResCAM sees the corner; Eigen-CAM the brightest part of the image, which is elsewhere."""
    rng = np.random.default_rng(0)
    mask = np.zeros((24, 24), bool)
    mask[:6, :6] = True
    checks = ExplainChecksConfig(**dict.fromkeys(CHECKS) | {"energy": 0.5, "deletion": 0.0, "road": 0.0})
    measured = {("hirescam", "layer"): [], ("eigencam", "layer"): []}
    for _ in range(3):
        image = rng.random((24, 24)).astype(np.float32)
        image[16:, 16:] += 2
        image[:6, :6] += 1
        probe = Probe(Patch().eval(), torch.from_numpy(image)[None, None], Score(torch.tensor([1])))
        for candidate, found in measured.items():
            found.append(measure_candidate(probe, candidate, checks, MethodConfig(), mask))
    assert set(measured["hirescam", "layer"][0]) == {"energy", "deletion", "road", "pointing"}
    best, worst = rank_methods(measured)
    assert (best.method, worst.method) == ("hirescam", "eigencam")
    assert best.means["energy"] == pytest.approx(1)
    assert best.means["pointing"] == 1
    assert worst.means["pointing"] == 0


def test_no_evidence_has_no_figures() -> None:
    probe = Probe(Patch().eval(), torch.full((1, 1, 24, 24), -3.0), Score(torch.tensor([1])))
    checks = ExplainChecksConfig(**dict.fromkeys(CHECKS) | {"deletion": 0.0})
    found = measure_candidate(probe, ("gradcam", "layer"), checks, MethodConfig(), np.ones((24, 24)))
    assert found == {"deletion": None, "pointing": None}
