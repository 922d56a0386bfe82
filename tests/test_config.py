"""One config: every shipped file loads, and every mistake is named by its field."""

from pathlib import Path

import pytest
import yaml

from medseg.config import dump_config, load_config, validate_config
from medseg.files import UserError, resource_dir

NAMES = sorted(path.stem for path in resource_dir("configs").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configs_load_and_survive_a_round_trip(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    assert validate_config(yaml.safe_load(dump_config(config)), "copy") == config


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("train.epoch=3", "train.epoch is not a known field"),
        ("train.epochs=0", "train.epochs"),
        ("train.learning_rate=fast", "train.learning_rate"),
        ("model.name=vnet", "model"),
        ("task.labels={a: 1, b: 3}", "label values"),
        ("model={name: densenet}", "model.name"),
        (
            "model={name: dynunet, strides: [2, 2, 2]}\nplan.patch_size=[20, 16, 16]",
            r"patch_size: \(20, 16, 16\) does not fit dynunet.*set it to \(24, 16, 16\)",
        ),
        (
            "model={name: segresnet}\nplan.patch_size=[8, 8, 8]",
            r"more than one position at the bottom; set it to \(16, 8, 8\)",
        ),
        ("model={name: dynunet, strides: [[2, 2], 2, 2]}", "task.spatial_dims: .*needs 3 numbers in each list"),
        ("model={name: dynunet, kernels: [3, 2, 3, 3]}", "odd"),
        ("seed", "field.path=value"),
        ("name.first=x", "is a value"),
        ("tasks.kind=x", "tasks is not a known field"),
    ],
)
def test_mistakes_are_named(override: str, field: str) -> None:
    with pytest.raises(UserError, match=field):
        load_config("hippocampus", override.split("\n"))


def test_overrides_reach_the_tree() -> None:
    config = load_config("hippocampus", ["train.epochs=3", "plan.patch_size=[16, 8, 8]", "predict.overlap=0.25"])
    assert (config.train.epochs, config.plan.patch_size, config.predict.overlap) == (3, (16, 8, 8), 0.25)


def test_config_is_frozen() -> None:
    config = load_config("hippocampus")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


def test_extends_merges_one_level_and_replaces_a_model_of_another_name(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: hippocampus\nname: child\ntrain: {epochs: 7}\nmodel: {name: segresnet}\n")
    config = load_config(child)
    parent = load_config("hippocampus")
    assert config.train == parent.train.model_copy(update={"epochs": 7})
    assert config.model.name == "segresnet"
    grandchild = tmp_path / "grandchild.yaml"
    grandchild.write_text("extends: child\nname: grandchild\n")
    with pytest.raises(UserError, match="one level"):
        load_config(grandchild)


def test_codes_belong_to_labels_and_are_left_behind_with_them(tmp_path: Path) -> None:
    config = load_config("hippocampus")
    assert config.export.segments["anterior"].type.value == "5366008"
    with pytest.raises(UserError, match=r"export\.segments names 'anteriour'.*anterior, posterior"):
        load_config("hippocampus", ["export.segments.anteriour={}"])
    with pytest.raises(UserError, match=r"export\.segments\.anterior\.type\.value"):
        load_config("hippocampus", ["export.segments.anterior.type.value=two words"])
    overridden = load_config("hippocampus", ["task.labels={whole: 1, posterior: 2}"])
    child = tmp_path / "child.yaml"
    child.write_text("extends: hippocampus\nname: child\ntask: {labels: {whole: 1, posterior: 2}}\n")
    for changed in (overridden, load_config(child)):
        assert changed.export.segments == {"posterior": config.export.segments["posterior"]}


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", ""])
def test_files_that_are_no_config_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_config(path)


def test_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(UserError, match="hippocampus"):
        load_config("hipocampus")
