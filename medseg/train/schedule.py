"""Learning rate as a function of the global step alone."""

import math

from medseg.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then the configured decay to (almost) zero at `total_steps`.

    Args:
        step: 0-based global step.
        total_steps: steps of the whole training.
    """
    warm = min(config.warmup_steps, total_steps // 2)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, total_steps - warm)
    if config.schedule == "poly":
        return config.learning_rate * float((1 - done) ** 0.9)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate
