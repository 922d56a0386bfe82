"""A classifier that is asked about the image and its mirror image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import radiograph_cohort, tiny_radiograph_config

from medseg.bundle import load_bundle
from medseg.bundle_writing import save_bundle
from medseg.config import PredictConfig
from medseg.evaluate.scoring import Scorer
from medseg.files import UserError
from medseg.images import read_image, write_png
from medseg.models import build_from_config
from medseg.models.sliding import class_logits
from medseg.predict import Predictor
from medseg.train.planning import make_plan


class Corner(torch.nn.Module):
    """Logits that depend on where things are: the first pixel and the sum of the first column."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.stack([x_BCHW[:, 0, 0, 0], x_BCHW[:, 0, :, 0].sum(1)], 1)


def test_logits_are_the_mean_over_all_flips() -> None:
    net, x = Corner(), torch.randn(2, 1, 4, 5)
    ways = [x, x.flip(2), x.flip(3), x.flip(2, 3)]
    torch.testing.assert_close(class_logits(net, x, (0, 1)), sum(net(way) for way in ways) / 4)
    torch.testing.assert_close(class_logits(net, x, (1,)), (net(x) + net(x.flip(3))) / 2)
    assert torch.equal(class_logits(net, x), net(x))


def test_prediction_and_scoring_ask_alike_and_left_and_right_do_not_matter(tmp_path: Path) -> None:
    cohort = radiograph_cohort(tmp_path / "cohort")
    config = tiny_radiograph_config("predict.mirror_axes=[1]")
    plan = make_plan(config, cohort)
    torch.manual_seed(0)
    net = build_from_config(config.model, spatial_dims=2, in_channels=1, out_channels=2).eval()
    about: dict[str, Any] = {"config": config, "plan": plan, "run_id": "r", "cohort_sha256": "c" * 64, "metrics": {}}
    bundle = load_bundle(save_bundle(tmp_path / "bundle", state_dict=net.state_dict(), **about))
    predictor, case = Predictor(bundle), cohort.cases[0]
    path, mirrored = cohort.image_paths(case)[0], tmp_path / "mirrored.png"
    write_png(mirrored, read_image(path).array[:, ::-1].astype(np.uint16))
    probs = predictor.predict_file(path).probs
    assert predictor.predict_file(mirrored).probs == pytest.approx(probs, abs=1e-5)
    scored = Scorer(net, plan, mirror_axes=config.predict.mirror_axes).score(cohort, [case])[0]
    assert np.log(probs["tb"] / probs["normal"]) == pytest.approx(scored[1] - scored[0], abs=1e-4)
    once = Scorer(net, plan).score(cohort, [case])[0]
    assert once[1] - once[0] != pytest.approx(scored[1] - scored[0], abs=1e-5), "the network itself tells them apart"


def test_an_axis_that_a_radiograph_does_not_have_is_refused() -> None:
    assert PredictConfig(mirror_axes=(2,)).mirror_axes == (2,)
    with pytest.raises(UserError, match=r"predict\.mirror_axes \[2\]: the axes of an image are 0 to 1"):
        tiny_radiograph_config("predict.mirror_axes=[2]")
