"""Training starts from the weights that the config names, says so, and needs them never again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from synthetic import radiograph_cohort, tiny_radiograph_config

from medseg.bundle import load_bundle, read_weights
from medseg.files import UserError, read_json, sha256_file
from medseg.models import build_from_config
from medseg.predict import load_network
from medseg.road import train

QUIET = ("train.epochs=1", "train.warmup_steps=0", "train.learning_rate=1e-9", "train.weight_decay=0")


@pytest.mark.slow
def test_weights_start_a_run_and_are_not_needed_again(tmp_path: Path) -> None:
    torch.manual_seed(5)
    net = build_from_config(tiny_radiograph_config().model, spatial_dims=2, in_channels=3, out_channels=7)
    path = tmp_path / "w.safetensors"
    save_file({name: value.clone() for name, value in net.state_dict().items()}, path)
    radiograph_cohort(tmp_path / "cohort", 20)
    wrong = tiny_radiograph_config(*QUIET, f"model.weights={path}")
    with pytest.raises(UserError, match=r"2 of another shape \(class_layers.out.weight is \(7, 16\), not \(2, 16\)"):
        train(wrong, tmp_path / "cohort", tmp_path / "space")
    config = tiny_radiograph_config(*QUIET, f"model.weights={path}", "model.weights_skip=[class_layers.out]")
    done = train(config, tmp_path / "cohort", tmp_path / "space")
    run = done.paths["run"]
    record = read_json(run / "pretrained.json")
    assert record["sha256"] == sha256_file(path)
    assert record["summed"] == ["features.conv0.weight"]
    assert record["skipped"] == ["class_layers.out.weight", "class_layers.out.bias"]

    bundle = load_bundle(run)
    trained = read_weights(bundle)
    for name, parameter in net.named_parameters():
        if name == "features.conv0.weight":
            parameter = parameter.sum(1, keepdim=True)
        if not name.startswith("class_layers"):
            torch.testing.assert_close(trained[name], parameter.detach(), rtol=0, atol=1e-6)

    path.unlink()
    assert done.run_id is not None
    train(config, tmp_path / "cohort", tmp_path / "space", resume=done.run_id)
    load_network(load_bundle(run), torch.device("cpu"))
