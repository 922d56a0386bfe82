"""Training with `train.compile`: the same training, but for rounding."""

from pathlib import Path

import pytest
import torch
from synthetic import segmentation_cohort, tiny_config, tiny_radiograph_config
from torch._dynamo.utils import counters

from medseg.data.cache import load_examples
from medseg.files import UserError
from medseg.train import step
from medseg.train.device import check_compiler
from medseg.train.loop import train_loop
from medseg.train.planning import make_plan

CPU = torch.device("cpu")


def _trained(folder: Path, *overrides: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The averaged weights after two steps, and the losses of both.

    By SGD: AdamW moves a weight whose gradient is 0 but for rounding as far as any other.
    """
    steps = ("train.epochs=2", "train.steps_per_epoch=1", "train.optimizer=sgd", "train.learning_rate=0.01")
    config = tiny_config(*steps, "train.precision=fp32", *overrides)
    cohort = segmentation_cohort(folder / "cohort")
    plan = make_plan(config, cohort)
    examples = load_examples(cohort, cohort.split("train"), plan, folder / "cache")
    torch.manual_seed(0)
    training, source, loss = step.assemble(config, plan, step.build_network(config, plan), examples, CPU)
    figures: list[float] = []
    train_loop(
        training, source, loss, config.train, folder=folder, device=CPU, bf16=False, validate=None,
        on_epoch=lambda row: figures.append(row["train_loss"]), stop=lambda: False,
    )  # fmt: skip
    return training.average.state_dict(), figures


@pytest.mark.slow
def test_a_compiled_training_is_the_same_training(tmp_path: Path) -> None:
    counters.clear()
    plain, losses = _trained(tmp_path / "plain")
    before = counters["stats"].copy()
    compiled, compiled_losses = _trained(tmp_path / "compiled", "train.compile=true")
    # Its kernels may round as the plain ones do, so only the compiler can say that it ran.
    assert not before["unique_graphs"]
    assert counters["stats"]["unique_graphs"]
    assert compiled_losses == pytest.approx(losses, rel=1e-3)
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-2, atol=1e-4)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="no C\\+\\+ compiler was found; install g\\+\\+"):
        check_compiler(CPU)


def test_a_training_against_the_site_is_not_compiled() -> None:
    with pytest.raises(UserError, match="compile"):
        tiny_radiograph_config("train.compile=true", "train.site_adversary=0.5")
