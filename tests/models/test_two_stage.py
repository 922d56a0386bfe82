"""The two-stage classifier: its views, what learns and what stays, and maps of the whole image."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from synthetic import radiograph_cohort, tiny_radiograph_config
from torch import Tensor, nn

from medseg.config import MethodConfig, TwoStageConfig
from medseg.explain import EXPLAINERS, explain
from medseg.explain.hooks import captured, frozen
from medseg.files import UserError, read_json, read_rows
from medseg.losses import WithLosses, losses_of
from medseg.models import build_model
from medseg.models.two_stage import VIEWS, TwoStage, _quadrants
from medseg.road import train

DENSENET = {"name": "densenet", "init_features": 8, "growth_rate": 4, "block_config": (2, 2)}
RESNET = {"name": "resnet", "depth": 18, "init_features": 4}
SMALL: dict[str, Any] = {"hidden": 32, "code": 16, "classifier": (12,), "dropout": 0.0}
LAST = "backbones.1.layer4.1"


def build(**params: Any) -> TwoStage:
    torch.manual_seed(0)
    settings = {"backbones": (DENSENET, RESNET), **SMALL, **params}
    net = build_model("two_stage", spatial_dims=2, in_channels=1, out_channels=3, **settings)
    assert isinstance(net, TwoStage)
    return net


def image(batch: int = 2, side: int = 32) -> Tensor:
    return torch.randn(batch, 1, side, side, generator=torch.Generator().manual_seed(1))


def test_quadrants_put_together_are_the_image() -> None:
    x = image(3, 8)
    upper_left, upper_right, lower_left, lower_right = _quadrants(x).split(3)
    assert torch.equal(
        torch.cat([torch.cat([upper_left, upper_right], 3), torch.cat([lower_left, lower_right], 3)], 2), x
    )


def test_evaluation_sees_what_one_batch_of_all_views_shows() -> None:
    """In training the views go through a backbone together, else apart: without dropout and with fixed norms alike."""
    net, x = build().eval(), image()
    with torch.no_grad():
        logits = net(x)
        net.training = True  # of this module alone: norms keep their running statistics
        output = net(x)
    assert isinstance(output, WithLosses)
    torch.testing.assert_close(output.logits, logits)


def test_a_mark_in_one_quadrant_changes_the_features_of_that_view_and_of_the_whole() -> None:
    net, x = build(backbones=(RESNET,)).eval(), image(1)
    marked = x.clone()
    marked[:, :, 20:26, 2:8] += 3  # lower left
    seen: list[Tensor] = []
    handle = net.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        net(x), net(marked)
    handle.remove()
    changed = [not torch.equal(a, b) for a, b in zip(*(features.chunk(VIEWS, 1) for features in seen), strict=True)]
    assert changed == [False, False, True, False, True]


def test_frozen_backbones_stay_bit_for_bit_and_the_rest_learns(tmp_path: Path) -> None:
    source = build(backbones=(RESNET,))
    path = tmp_path / "w.safetensors"
    save_file({n: v.contiguous() for n, v in source.backbones[0].state_dict().items()}, path)
    net = build(backbones=({**RESNET, "weights": str(path)},), frozen=True).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    losses_of(nn.CrossEntropyLoss(), net(image()), torch.tensor([0, 1]))["loss"].backward()
    optimizer.step()
    still = {name for name, value in net.state_dict().items() if torch.equal(value, before[name])}
    assert still == {name for name in before if name.startswith("backbones.")}


def test_frozen_backbones_need_weights() -> None:
    with pytest.raises(UserError, match=r"backbones\.1 begins with random weights"):
        build(backbones=({**DENSENET, "weights": "w.safetensors"}, RESNET), frozen=True)


def test_features_are_not_made_easy_to_rebuild() -> None:
    """Cut off from the code, the reconstruction says nothing to the backbones: its target is held fixed."""
    net = build()
    nn.init.zeros_(net.encoder[0].weight)
    output = net(image())
    output.losses["reconstruction"].backward()
    assert not any(p.grad is not None and p.grad.any() for p in net.backbones.parameters())
    assert net.decoder[-1].bias.grad.any()


def test_the_loss_is_the_sum_of_named_parts() -> None:
    net, target = build(reconstruction_weight=0.5), torch.tensor([0, 2])
    output, criterion = net(image()), nn.CrossEntropyLoss()
    found = losses_of(criterion, output, target)
    assert set(found) == {"loss", "reconstruction_loss"}
    torch.testing.assert_close(found["loss"], criterion(output.logits, target) + found["reconstruction_loss"])
    twice = build(reconstruction_weight=1.0)(image()).losses["reconstruction"]
    torch.testing.assert_close(2 * found["reconstruction_loss"], twice)
    assert set(losses_of(criterion, output.logits, target)) == {"loss"}


@pytest.mark.parametrize("method", EXPLAINERS)
def test_maps_of_a_batch_are_those_of_its_images(method: str) -> None:
    net, x, targets = build().double(), image(3).double(), [2, 0, 1]
    config = MethodConfig(occlusion_window=0.5, score_channels=8)
    together = explain(net, x, method, targets, "last", config=config)
    assert together.shape == (3, 32, 32)
    for one, target, found in zip(x, targets, together, strict=True):
        torch.testing.assert_close(found, explain(net, one[None], method, target, "last", config=config)[0])


def test_a_layer_is_explained_where_it_saw_the_whole_image() -> None:
    """The activation kept is that of the run on the shrunk whole, not of the quadrants."""
    net, x = build().eval(), image()
    with frozen(net), captured(net, LAST) as activation:
        net(x)
    with frozen(net), captured(net, LAST) as alone:
        net.backbones[1](nn.functional.avg_pool2d(x, 2))
    assert activation.value is not None
    assert alone.value is not None
    torch.testing.assert_close(activation.value, alone.value)


def test_bf16_is_close_to_fp32() -> None:
    # Sides that leave the deepest layer four positions: oneDNN's bf16 kernels read unwritten memory at two.
    net, x = build().eval(), image(side=64)
    with torch.no_grad():
        exact = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(x)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses_of(nn.CrossEntropyLoss(), net.train()(x), torch.tensor([0, 1]))
    found["loss"].backward()
    assert found["reconstruction_loss"].dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_quadrants_must_be_legal_for_every_backbone() -> None:
    config = TwoStageConfig(backbones=({"name": "inception_v3"}, RESNET))  # type: ignore[arg-type]
    assert (config.smallest_size, config.legal_size((7, 301))) == (150, (150, 302))


@pytest.mark.slow
def test_the_road_trains_it_from_the_weights_of_its_parts(tmp_path: Path) -> None:
    torch.manual_seed(5)
    resnet = build_model("resnet", spatial_dims=2, in_channels=3, out_channels=9, depth=18, init_features=4)
    path = tmp_path / "w.safetensors"
    save_file({n: v.contiguous() for n, v in resnet.state_dict().items()}, path)
    part = f"{{name: resnet, depth: 18, init_features: 4, weights: {path}, weights_skip: [fc]}}"
    small = "{name: densenet, init_features: 8, growth_rate: 4, block_config: [2, 2]}"
    radiograph_cohort(tmp_path / "cohort", 24)
    model = f"model={{name: two_stage, backbones: [{small}, {part}], hidden: 32, code: 16, classifier: [12]}}"
    sets = ("train.epochs=3", "train.warmup_steps=0", "train.learning_rate=0.003", "tracking.register_as=''")
    done = train(tiny_radiograph_config(model, "plan.size_px=64", *sets), tmp_path / "cohort", tmp_path / "space")
    record = read_json(done.paths["run"] / "pretrained.json")
    assert list(record) == ["backbones.1"]
    assert record["backbones.1"]["summed"] == ["conv1.weight"]
    history = [{name: float(row[name]) for name in row if row[name]} for row in read_rows(done.paths["history"])]
    assert history[-1]["train_reconstruction_loss"] < history[0]["train_reconstruction_loss"]
    assert all(row["train_reconstruction_loss"] < row["train_loss"] for row in history)
