"""In which precision a bundle predicts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_bundle import bundle, classifier, config, plan, write_boxes
from torch import Tensor, nn

from medseg.bundle import Bundle, load_bundle
from medseg.bundle_files import digest
from medseg.explain import explain
from medseg.files import read_json, sha256_file, write_json
from medseg.images import write_png
from medseg.models import precision
from medseg.models.sliding import averaged
from medseg.predict import Predictor

CPU = torch.device("cpu")


def _at(made: Bundle, wanted: str) -> Predictor:
    settings = made.config.predict.model_copy(update={"precision": wanted})
    return Predictor(replace(made, config=made.config.model_copy(update={"predict": settings})), CPU)


def _types(net: nn.Module) -> set[torch.dtype]:
    """Filled with the types of what convolutions put out from here on."""
    seen: set[torch.dtype] = set()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    return seen


@pytest.mark.parametrize(("wanted", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_mask_is_made_in_the_precision_of_the_config(wanted: str, dtype: torch.dtype, tmp_path: Path) -> None:
    scan = write_boxes(tmp_path / "scans", 1)
    made = bundle(tmp_path / "bundle", config(predict={"mirror_axes": [0]}))
    predictor, plain = _at(made, wanted), _at(made, "fp32").predict_file(scan)
    seen = _types(predictor.net)
    found = predictor.predict_file(scan)
    assert seen == {dtype}
    assert found.mask is not None
    assert plain.mask is not None
    assert (found.mask.array != plain.mask.array).mean() < 0.01
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("wanted", "dtype"), [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_auto_leaves_probabilities_of_a_classifier_as_they_are(
    wanted: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    made = bundle(tmp_path / "bundle", classifier(), plan(spatial_dims=2, patch_size=(32, 32)))
    image = np.random.default_rng(0).integers(0, 255, (32, 32)).astype(np.uint8)
    scan = write_png(tmp_path / "scan.png", image)
    predictor = _at(made, wanted)
    seen = _types(predictor.net)
    found, plain = predictor.predict_file(scan), _at(made, "fp32").predict_file(scan)
    assert seen == {dtype}
    assert found.probs == pytest.approx(plain.probs, abs=0.02)


def test_logits_are_averaged_in_fp32_and_maps_made_in_it() -> None:
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 2, 1)).eval()
    seen, window = _types(net), torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad(), precision.autocast("bf16", CPU):
        logits: Tensor = averaged([net], [0])(window)
        assert seen == {torch.bfloat16}
        assert logits.dtype == torch.float32
        seen.clear()
        explain(net, window, "gradcam", 1, "0")
    assert seen == {torch.float32}


def test_a_bundle_that_is_older_than_the_setting_predicts_in_fp32(tmp_path: Path) -> None:
    made = bundle(tmp_path / "bundle")
    assert made.config.predict.precision == "auto"
    file = made.folder / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    assert tree["predict"].pop("precision") == "auto"
    file.write_text(yaml.safe_dump(tree))
    facts = read_json(made.folder / "bundle.json")
    facts["files"]["config.yaml"] = sha256_file(file)
    write_json(made.folder / "bundle.json", {**facts, "sha256": digest(facts)})
    assert load_bundle(made.folder).config.predict.precision == "fp32"


@pytest.mark.parametrize("pays", [False, True])
def test_auto_goes_by_the_hardware(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: pays)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert precision.use_bf16("auto", CPU) == pays
    assert [precision.use_bf16(wanted, CPU) for wanted in ("fp32", "bf16")] == [False, True]


def test_a_batch_of_windows_is_labelled_as_each_by_itself(tmp_path: Path) -> None:
    made = bundle(tmp_path / "bundle", config(predict={"overlap": 0.0}))
    scan = write_boxes(tmp_path / "scans", 1)
    masks = []
    for size in (1, 3):
        one = _at(made, "bf16")
        settings = one.bundle.config.predict.model_copy(update={"window_batch": size})
        one.bundle = replace(one.bundle, config=one.bundle.config.model_copy(update={"predict": settings}))
        mask = one.predict_file(scan).mask
        assert mask is not None
        masks.append(mask.array)
    assert (np.asarray(masks[0]) != masks[1]).mean() < 0.01
