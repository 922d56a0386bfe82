"""The training loop. It reads as prose; what it needs is built in `medseg.train.step`."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medseg.config import TrainConfig
from medseg.data.batches import Batch, BatchSource
from medseg.files import UserError
from medseg.losses import losses_of
from medseg.models.features import features_and_logits
from medseg.progress import progress
from medseg.train.adversary import SiteAdversary
from medseg.train.checkpoints import load_checkpoint, save_checkpoint
from medseg.train.device import peak_memory_gb
from medseg.train.schedule import learning_rate

Validate = Callable[[nn.Module], dict[str, float]]
OnEpoch = Callable[[dict[str, float]], None]


@dataclass
class Training:
    """Everything that changes while training; a checkpoint holds all of it.

    Attributes:
        net: trained by gradient. average: exponential moving average of its weights; validated and saved.
        adversary: a second head that makes the features forget the site, where one is trained against.
        step: finished steps. history: one row an epoch. sums: losses by name and waiting of the unfinished epoch.
    """

    net: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    adversary: SiteAdversary | None = None
    step: int = 0
    best_score: float = -math.inf
    best_state: dict[str, Tensor] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=lambda: {"loss": 0.0, "wait_s": 0.0, "seconds": 0.0})

    @property
    def kept(self) -> dict[str, float]:
        """The row of the epoch whose averaged weights are kept: the best one where it is looked for, else the last."""
        if self.best_state is None:
            return self.history[-1]
        return next(row for row in self.history if row.get("val_score") == self.best_score)

    def state(self) -> dict[str, Any]:
        """The whole state as tensors and plain values."""
        return {
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "adversary": self.adversary.state_dict() if self.adversary else None,
            "step": self.step,
            "best_score": self.best_score,
            "best_state": self.best_state,
            "history": self.history,
            "sums": self.sums,
            "torch_rng": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up where `state` was."""
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.adversary is not None:
            self.adversary.load_state_dict(state["adversary"])
        self.step, self.best_score, self.best_state = state["step"], state["best_score"], state["best_state"]
        self.history, self.sums = state["history"], state["sums"]
        torch.set_rng_state(state["torch_rng"])


def start_training(net: nn.Module, config: TrainConfig) -> Training:
    """A fresh state: optimiser and moving average for `net`."""
    parameters = net.parameters()
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters, config.learning_rate, momentum=0.99, nesterov=True, weight_decay=config.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay)
    average = copy.deepcopy(net).requires_grad_(False)
    return Training(net, average, optimizer)


def train_against(training: Training, adversary: SiteAdversary) -> None:
    """From now on the adversary's head is trained too, and the network against it."""
    training.adversary = adversary
    training.optimizer.add_param_group({"params": list(adversary.parameters())})


def train_loop(
    training: Training,
    source: BatchSource,
    loss: nn.Module,
    config: TrainConfig,
    *,
    folder: Path,
    device: torch.device,
    bf16: bool,
    validate: Validate | None,
    on_epoch: OnEpoch,
    stop: Callable[[], bool],
) -> None:
    """Train to the end, or until `stop()` says so between two steps; the state is on the disk either way.

    Args:
        folder: where checkpoints go: by wall clock, at the end of an epoch with validation, and on a stop.
        validate: scores the averaged network; None when there is no validation split.
        on_epoch: is told the figures of each finished epoch.

    Raises:
        UserError: the loss is not finite.
        KeyboardInterrupt: after the state was saved, when stopped.
    """
    steps_per_epoch = config.steps_per_epoch or source.steps_per_pass
    total = config.epochs * steps_per_epoch
    saved_at = time.monotonic()
    stream = source.stream(training.step, total)
    with progress("Training", total) as shown:
        shown.advance(training.step)
        while training.step < total:
            started = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - started
            losses = _train_step(training, batch, loss, config, total, device, bf16)
            for name, value in losses.items():
                training.sums[name] = training.sums.get(name, 0.0) + value
            training.sums["wait_s"] += waited
            training.sums["seconds"] += time.perf_counter() - started
            training.step += 1
            shown.advance(text=f"loss {losses['loss']:.3f}")
            if training.step % steps_per_epoch == 0:
                figures = _end_epoch(training, config, steps_per_epoch, total, device, validate)
                on_epoch(figures)
            if stop():
                save_checkpoint(folder, training.state())
                raise KeyboardInterrupt("stopped between two steps; the state is saved")
            if time.monotonic() - saved_at > 60 * config.checkpoint_minutes or training.step == total:
                save_checkpoint(folder, training.state())
                saved_at = time.monotonic()


def resume_training(training: Training, folder: Path) -> None:
    """Restore the newest readable checkpoint of `folder`. Raises UserError when there is none."""
    training.restore(load_checkpoint(folder))


def _train_step(
    training: Training,
    batch: Batch,
    loss: nn.Module,
    config: TrainConfig,
    total: int,
    device: torch.device,
    bf16: bool,
) -> dict[str, float]:
    training.net.train()
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate(config, training.step, total)
    objective = _objective(training, batch, loss, training.step / total, device)
    losses, norm = _gradients(training, objective, config, device, bf16=bf16)
    if bf16 and device.type == "cpu" and not torch.isfinite(norm):
        # oneDNN's bf16 kernels for a CPU without AMX read memory that was never written where an axis has two positions
        losses, norm = _gradients(training, objective, config, device, bf16=False)
    value = losses["loss"]
    if not (torch.isfinite(value) and torch.isfinite(norm)):
        what = f"loss is {value.item()}" if not torch.isfinite(value) else f"gradient's norm is {norm.item()}"
        raise UserError(
            f"train.learning_rate {config.learning_rate}: the {what} at step {training.step}; "
            "lower it, or look for damaged images in the cohort's findings."
        )
    training.optimizer.step()
    _average(training, config.ema_decay)
    return {name: float(value) for name, value in losses.items()}


def _objective(
    training: Training, batch: Batch, loss: nn.Module, progress: float, device: torch.device
) -> Callable[[], dict[str, Tensor]]:
    """A function that runs the network on a batch; its `loss` is what the step makes smaller."""
    image = batch.image.to(device, non_blocking=True)
    targets = [part.to(device, non_blocking=True) for part in (batch.target, batch.annotated) if part is not None]
    adversary = training.adversary
    if adversary is None:
        return lambda: losses_of(loss, training.net(image), *targets)
    case_B = torch.tensor([item.index for item in batch.parameters], device=device)

    def against_adversary() -> dict[str, Tensor]:
        features, logits = features_and_logits(training.net, image)
        losses, site_loss = losses_of(loss, logits, *targets), adversary(features, case_B, progress)
        return {**losses, "loss": losses["loss"] + site_loss, "site_loss": site_loss}

    return against_adversary


def _gradients(
    training: Training,
    objective: Callable[[], dict[str, Tensor]],
    config: TrainConfig,
    device: torch.device,
    *,
    bf16: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """Set the clipped gradients of one batch; returns the losses by name, and the norm before clipping."""
    training.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        losses = objective()
    losses["loss"].backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(training.net.parameters(), config.clip_norm)
    return {name: value.detach() for name, value in losses.items()}, norm


@torch.no_grad()
def _average(training: Training, decay: float) -> None:
    """Move the averaged weights; early on the average forgets faster, so that it never lags behind the start."""
    decay = min(decay, (1 + training.step) / (10 + training.step))
    mine, theirs = training.average.state_dict(), training.net.state_dict()
    floats = [name for name, value in mine.items() if value.is_floating_point()]
    torch._foreach_lerp_([mine[n] for n in floats], [theirs[n] for n in floats], 1 - decay)
    for name in mine.keys() - set(floats):
        mine[name].copy_(theirs[name])


def _end_epoch(
    training: Training,
    config: TrainConfig,
    steps: int,
    total: int,
    device: torch.device,
    validate: Validate | None,
) -> dict[str, float]:
    epoch = training.step // steps
    figures = {
        "epoch": float(epoch),
        "step": float(training.step),
        "seconds": training.sums["seconds"],
        **{f"train_{name}": value / steps for name, value in training.sums.items() if name.endswith("loss")},
        "learning_rate": learning_rate(config, training.step - 1, total),
        "data_wait_share": training.sums["wait_s"] / max(training.sums["seconds"], 1e-9),
        "peak_memory_gb": peak_memory_gb(device),
    }
    if validate is not None and (epoch % config.validate_every == 0 or training.step == total):
        figures |= validate(training.average)
        if config.select == "best" and figures["val_score"] > training.best_score:
            training.best_score = figures["val_score"]
            training.best_state = copy.deepcopy(training.average.state_dict())
    training.history.append(figures)
    training.sums = {"loss": 0.0, "wait_s": 0.0, "seconds": 0.0}
    return figures
