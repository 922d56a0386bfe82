"""`models prune`: the table tells the truth about every level, and the saved bundle is the level it names."""

from pathlib import Path

import pytest
import torch
from synthetic import segmentation_cohort, tiny_config
from torch import nn

from medseg import pruning, road
from medseg.bundle import load_bundle
from medseg.files import UserError
from medseg.predict import load_network

UNETPP = "model={name: unetpp, depth: 2, features: [4, 8, 8], deep_supervision: true}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path]:
    folder = tmp_path_factory.mktemp("prune")
    segmentation_cohort(folder / "cohort")
    config = tiny_config(UNETPP, "train.epochs=12", "train.learning_rate=0.02", "train.ema_decay=0.9")
    result = road.train(config, folder / "cohort", folder / "ws")
    return folder / "ws", result.run_id, folder / "cohort"


def test_deep_supervision_trains_and_the_smallest_level_inside_the_limit_is_saved(
    trained: tuple[Path, str, Path],
) -> None:
    workspace, run_id, cohort = trained
    result = pruning.run(run_id, cohort, workspace, max_dice_loss=1.0)
    levels = result.rows
    assert [row["level"] for row in levels] == [1, 2]
    assert levels[0]["parameters"] < levels[1]["parameters"]
    assert levels[0]["gflop"] < levels[1]["gflop"]
    assert result.figures["level"] == 1, "a limit of 1 admits the smallest"

    whole = load_network(load_bundle(run_id, workspace))
    small = load_network(load_bundle(result.paths["bundle"], workspace))
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        assert torch.equal(small(image), whole(image, level=1)), "the bundle is head 1 of the whole network"


def test_a_level_s_cost_is_measured() -> None:
    small, large = nn.Conv3d(1, 4, 3), nn.Conv3d(1, 64, 3)
    (gflop, _, least_mb), (more_gflop, ms, mb) = pruning._costs([small, large], (1, 64, 64, 64))
    assert more_gflop == pytest.approx(16 * gflop, rel=0.01) == pytest.approx(2e-9 * 27 * 64 * 62**3, rel=0.01)
    assert mb >= 0.9 * 4e-6 * 64 * 62**3 > least_mb
    assert ms > 0


def test_no_loss_allowed_keeps_a_level_as_good_as_the_whole(trained: tuple[Path, str, Path]) -> None:
    workspace, run_id, cohort = trained
    result = pruning.run(run_id, cohort, workspace, max_dice_loss=0.0)
    assert result.figures["mean_dice"] >= result.rows[-1]["mean_dice"]


def test_a_network_without_heads_is_refused(tmp_path: Path) -> None:
    cohort = segmentation_cohort(tmp_path / "cohort")
    run_id = road.train(tiny_config("train.epochs=1"), cohort.folder, tmp_path / "ws").run_id
    with pytest.raises(UserError, match=r"model\.deep_supervision"):
        pruning.run(run_id, cohort.folder, tmp_path / "ws")
