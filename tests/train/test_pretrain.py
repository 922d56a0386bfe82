"""From images without labels to weights that a classifier starts from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from synthetic import radiograph_cohort, segmentation_cohort, tiny_config, tiny_radiograph_config

from medseg import road
from medseg.cohort import Cohort, write_cohort
from medseg.config import Config
from medseg.files import UserError
from medseg.folds import _common, _first_difference, as_trained
from medseg.models.pretrained import load_pretrained
from medseg.result import Result
from medseg.runs import find_run, read_run
from medseg.train.planning import make_plan
from medseg.train.step import build_network

SETTINGS = ("pretrain={mask_share: 0.5, width: 32}", "train.epochs=2", 'tracking.register_as=""')


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cohort, Config, Result]:
    """A workspace, a cohort without labels, the config and the result of pretraining on it."""
    place = tmp_path_factory.mktemp("pretrained")
    cohort = radiograph_cohort(place / "cohort")
    bare = tuple(replace(case, target="") for case in cohort.cases)
    cohort = write_cohort(replace(cohort, cases=bare), [], {"made_by": "tests"})
    config = tiny_radiograph_config(*SETTINGS)
    return place, cohort, config, road.pretrain(config, cohort.folder, place)


def test_the_weights_are_those_that_a_classifier_starts_from(pretrained: tuple[Path, Cohort, Config, Result]) -> None:
    place, cohort, config, result = pretrained
    weights = result.paths["weights"]
    model = config.model.model_copy(update={"weights": str(weights)})
    torch.manual_seed(5)
    net = build_network(config, make_plan(config, cohort))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    about = load_pretrained(net, model)
    assert about is not None
    assert about.skipped == ()
    kept = load_file(weights)
    assert kept.keys() == before.keys()
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    assert not torch.equal(before["features.conv0.weight"], kept["features.conv0.weight"])
    assert read_run(find_run(place, result.run_id))["status"] == "FINISHED"
    assert result.figures["cases"] == len(cohort.split("train"))


def test_a_finished_pretraining_resumed_changes_nothing(pretrained: tuple[Path, Cohort, Config, Result]) -> None:
    place, cohort, config, result = pretrained
    before = Path(str(result.paths["weights"])).read_bytes()
    again = road.pretrain(config, cohort.folder, place, resume=result.run_id)
    assert Path(str(again.paths["weights"])).read_bytes() == before


def test_what_measures_a_fold_is_not_looked_at(pretrained: tuple[Path, Cohort, Config, Result]) -> None:
    place, cohort, _, _ = pretrained
    config = tiny_radiograph_config(*SETTINGS, "train.epochs=1", "train.fold=1", "train.folds=2")
    result = road.pretrain(config, cohort.folder, place)
    seen = as_trained(config, cohort).split("train")
    assert result.figures["cases"] == len(seen) < len(cohort.split("train")) + len(cohort.split("val"))
    assert read_run(find_run(place, result.run_id))["fold"] == 1
    assert "pretrain-" in result.run_id
    assert "-fold1-" in result.run_id


@pytest.mark.parametrize(
    ("first", "second", "field"),
    [
        ("a.safetensors", "b.safetensors", ""),
        ("a.safetensors", "null", "model.weights"),
        ("a.safetensors", "hub", "model.weights"),
        ("hub", "hub", ""),
    ],
)
def test_folds_may_start_from_weights_of_their_own(first: str, second: str, field: str) -> None:
    one, other = (tiny_radiograph_config(f"model.weights={weights}") for weights in (first, second))
    assert _first_difference(_common(one), _common(other)) == field


def test_volumes_and_networks_of_several_parts_are_refused(
    pretrained: tuple[Path, Cohort, Config, Result], tmp_path: Path
) -> None:
    cohort = segmentation_cohort(tmp_path / "cohort", 4)
    with pytest.raises(UserError, match=r"task\.spatial_dims 3"):
        road.pretrain(tiny_config('tracking.register_as=""'), cohort.folder, pretrained[0])
    two = tiny_radiograph_config("model={name: two_stage}", "plan.size_px=64", 'tracking.register_as=""')
    with pytest.raises(UserError, match="'two_stage' is no single encoder"):
        road.pretrain(two, pretrained[1].folder, pretrained[0])
