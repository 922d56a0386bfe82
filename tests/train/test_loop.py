"""The loop learns, resumes bit for bit, and says what is wrong."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import radiograph_cohort, segmentation_cohort, tiny_config, tiny_radiograph_config

from medseg.cohort import Cohort
from medseg.config import Config, TrainConfig, load_config
from medseg.data.batches import BatchSource
from medseg.data.cache import load_examples
from medseg.files import UserError, resource_dir
from medseg.losses import build_loss
from medseg.models import build_from_config
from medseg.plan import Plan
from medseg.train import loop
from medseg.train.checkpoints import load_checkpoint, save_checkpoint
from medseg.train.cohort_check import check_cohort
from medseg.train.loop import Training, resume_training, start_training, train_loop
from medseg.train.planning import make_plan
from medseg.train.schedule import learning_rate
from medseg.train.validate import validate

CPU = torch.device("cpu")


def _train(
    config: Config, cohort: Cohort, folder: Path, *, stop_at: int | None = None, resume: bool = False
) -> Training:
    plan = make_plan(config, cohort)
    cache = folder / "cache"
    examples = load_examples(cohort, cohort.split("train"), plan, cache)
    held = load_examples(cohort, cohort.split("val"), plan, cache)
    torch.manual_seed(0)
    net = build_from_config(
        config.model,
        spatial_dims=config.task.spatial_dims,
        in_channels=1,
        out_channels=config.task.out_channels,
    )
    training = start_training(net, config.train)
    if resume:
        resume_training(training, folder / "checkpoints")
    loss = build_loss(config.loss, [1] * config.task.out_channels)
    source = BatchSource(
        examples, plan.patch_size, plan.batch_size, config.augment, foreground_share=0.5, seed=config.seed
    )
    train_loop(
        training,
        source,
        loss,
        config.train,
        folder=folder / "checkpoints",
        device=CPU,
        bf16=config.train.precision == "bf16",
        validate=lambda m: validate(m, loss, held, plan, config.task.labels, device=CPU, bf16=False),
        on_epoch=lambda figures: None,
        stop=lambda: training.step == stop_at,
    )
    return training


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return segmentation_cohort(tmp_path_factory.mktemp("boxes"))


def test_the_figures_kept_are_those_of_the_weights_kept(boxes: Cohort, tmp_path: Path) -> None:
    config = tiny_config("train.epochs=6", "train.learning_rate=0.05", "train.ema_decay=0.1", "train.select=best")
    plan = make_plan(config, boxes)
    training = _train(config, boxes, tmp_path)
    held = load_examples(boxes, boxes.split("val"), plan, tmp_path / "cache")
    assert training.best_state is not None
    training.average.load_state_dict(training.best_state)
    loss = build_loss(config.loss)
    again = validate(training.average, loss, held, plan, config.task.labels, device=CPU, bf16=False)
    assert training.kept["val_score"] == max(row["val_score"] for row in training.history)
    assert training.kept["val_score"] == pytest.approx(again["val_score"], abs=1e-6)
    assert training.kept["val_loss"] == pytest.approx(again["val_loss"], rel=1e-5)
    training.history = [{"epoch": 1, "val_score": 0.3}, {"epoch": 2}, {"epoch": 3, "val_score": 0.2}]
    training.best_score = 0.3
    assert training.kept["epoch"] == 1
    training.best_state = None
    assert training.kept["epoch"] == 3


def test_a_small_network_learns_the_boxes(boxes: Cohort, tmp_path: Path) -> None:
    config = tiny_config(
        "train.epochs=40", "train.learning_rate=0.02", "train.ema_decay=0.9", "augment={probability: 0}"
    )
    history = _train(config, boxes, tmp_path).history
    assert history[-1]["train_loss"] < 0.35 * history[0]["train_loss"]
    assert history[-1]["val_score"] > 0.85
    assert 0 <= history[-1]["data_wait_share"] < 1


def test_a_small_network_learns_the_disc(tmp_path: Path) -> None:
    config = tiny_radiograph_config("train.epochs=25", "train.learning_rate=0.01", "train.ema_decay=0.9")
    cohort = radiograph_cohort(tmp_path / "cohort", 40)
    assert _train(config, cohort, tmp_path).history[-1]["val_auc"] > 0.9


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_stopped_run_resumed_equals_an_uninterrupted_one_bit_for_bit(
    boxes: Cohort, tmp_path: Path, stop_at: int
) -> None:
    config = tiny_config("train.steps_per_epoch=4")
    whole = _train(config, boxes, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _train(config, boxes, tmp_path / "parts", stop_at=stop_at)
    resumed = _train(config, boxes, tmp_path / "parts", resume=True)
    assert resumed.step == whole.step == 8
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, resumed.net.state_dict()[name]), name
    for name, value in whole.average.state_dict().items():
        assert torch.equal(value, resumed.average.state_dict()[name]), name
    same = ("train_loss", "val_score", "val_loss", "learning_rate")
    for mine, theirs in zip(whole.history, resumed.history, strict=True):
        assert [mine[key] for key in same] == [theirs[key] for key in same]


def test_resume_without_checkpoint_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable checkpoint"):
        load_checkpoint(tmp_path)


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, {"step": step, "x": torch.ones(2)})
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step_000000002.pt", "step_000000003.pt"]
    newest = tmp_path / "step_000000003.pt"
    newest.write_bytes(newest.read_bytes()[:50])
    assert load_checkpoint(tmp_path)["step"] == 2


def test_a_diverging_loss_is_one_sentence(boxes: Cohort, tmp_path: Path) -> None:
    config = tiny_config("train.learning_rate=1.0e+30", "train.optimizer=sgd", "train.warmup_steps=0")
    with pytest.raises(UserError, match=r"train\.learning_rate"):
        _train(config, boxes, tmp_path)


def test_a_step_whose_bf16_gradient_is_no_number_is_made_in_fp32(
    boxes: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, precisions = loop._gradients, list[bool]()

    def damaged(*given: Any, bf16: bool) -> Any:
        precisions.append(bf16)
        value, norm = whole(*given, bf16=bf16)
        return value, norm * math.nan if bf16 and len(precisions) == 3 else norm

    monkeypatch.setattr(loop, "_gradients", damaged)
    training = _train(tiny_config("train.precision=bf16", "train.steps_per_epoch=4"), boxes, tmp_path)
    assert precisions[:4] == [True, True, True, False]
    assert all(precisions[4:])
    assert all(weight.isfinite().all() for weight in training.net.parameters())


@pytest.mark.parametrize("schedule", ["poly", "cosine", "constant"])
def test_learning_rate_warms_up_and_follows_from_the_step(schedule: str) -> None:
    config = TrainConfig(schedule=schedule, learning_rate=0.1, warmup_steps=10)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] < 0.01 or schedule == "constant"


def test_every_shipped_config_trains_two_steps() -> None:
    for path in sorted(resource_dir("configs").glob("*.yaml")):
        config = load_config(path)
        dims, classifies = config.task.spatial_dims, config.task.kind == "classification"
        size = (64, 64) if dims == 2 else (16, 16, 16)
        model = config.model
        if model.name == "dynunet":  # a quarter as wide: most configs have this network, and its width is not the point
            model = model.model_copy(update={"channels": tuple(n // 4 for n in model.channels)})
        net = build_from_config(
            model,
            spatial_dims=dims,
            in_channels=len(config.task.channels),
            out_channels=config.task.out_channels,
        )
        training = start_training(net, config.train)
        loss = build_loss(config.loss, [1] * config.task.out_channels)
        image = torch.randn(2, len(config.task.channels), *size)
        target = torch.tensor([0, 1]) if classifies else torch.randint(0, 2, (2, 1, *size)).float()
        for _ in range(2):
            value = loss(net(image), target)
            training.optimizer.zero_grad()
            value.backward()
            training.optimizer.step()
            assert math.isfinite(float(value.detach())), path.name


def test_plan_takes_what_the_config_fixes_and_gives_reasons(boxes: Cohort) -> None:
    fixed = make_plan(tiny_config(), boxes)
    assert fixed.patch_size == (16, 16, 16)
    assert fixed.reasons["patch_size"] == "set in the config"
    free = make_plan(tiny_config("plan={}"), boxes)
    assert isinstance(free, Plan)
    assert free.spacing_mm == (1.5, 1.5, 2.0)
    assert free.patch_size == (24, 16, 16)
    assert set(free.reasons) == {"spacing_mm", "patch_size", "batch_size", "normalise"}


@pytest.mark.parametrize(
    ("model", "patch"),
    [
        ("{name: unet, channels: [4, 8, 8, 8, 8], strides: [2, 2, 2, 2]}", (32, 16, 16)),
        ("{name: swin_unetr}", (64, 32, 32)),
        ("{name: dynunet, channels: [4, 8, 8], strides: [[4, 4, 1], 4]}", (32, 16, 16)),
        ("{name: unetpp, depth: 2}", (24, 16, 16)),
    ],
)
def test_the_planned_patch_is_one_that_the_network_takes(boxes: Cohort, model: str, patch: tuple[int, ...]) -> None:
    config = tiny_config("plan={}", f"model={model}")
    planned = make_plan(config, boxes).patch_size
    assert planned == patch == config.model.legal_size(patch)


def test_a_class_that_the_split_lacks_is_named(tmp_path: Path) -> None:
    cohort = radiograph_cohort(tmp_path, 8)
    only_normal = tuple(case for case in cohort.cases if case.target == "normal")
    with pytest.raises(UserError, match="'tb' is missing from split 'train'"):
        check_cohort(tiny_radiograph_config(), Cohort(tmp_path, only_normal, cohort.label_names))


def test_another_task_than_the_cohorts_is_named(boxes: Cohort) -> None:
    with pytest.raises(UserError, match=r"task\.labels"):
        check_cohort(tiny_config("task.labels={head: 1, tail: 2, body: 3}"), boxes)
    with pytest.raises(UserError, match=r"task\.channels"):
        check_cohort(tiny_config("task.channels=[t1, t2]"), boxes)
