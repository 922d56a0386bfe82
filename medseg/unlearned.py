"""What a training did not teach its network, as the figures of its last epoch tell."""

import re
from collections.abc import Mapping
from typing import Any

_NOT_FOUND = 0.01
"""Mean Dice on validation below which a structure counts as not found."""
_AS_GUESSED = 0.99
"""Share of the loss of guessing from which on a classifier counts as guessing."""


def not_learned(metrics: Mapping[str, Any]) -> list[str]:
    """A sentence for whatever was not learned, none where all was.

    Args:
        metrics: of a bundle: `val_dice_<label>`, or `train_loss`, the losses that are part of it (`train_<name>_loss`)
            and `guessing_loss`.
    """
    dice = {name.removeprefix("val_dice_"): value for name, value in metrics.items() if name.startswith("val_dice_")}
    missing = [label for label, value in dice.items() if value < _NOT_FOUND]
    found = []
    if missing:
        found.append(
            f"not found in the validation cases: {', '.join(missing)} (mean Dice below {_NOT_FOUND}); train longer "
            "(train.epochs), or with deep supervision (model.deep_supervision) where the network has it."
        )
    guessing = metrics.get("guessing_loss")
    if guessing is not None:
        losses = {name: value for name, value in metrics.items() if re.fullmatch(r"train_(\w+_)?loss", name)}
        loss = 2 * losses["train_loss"] - sum(losses.values())  # less those that it includes
        if loss >= _AS_GUESSED * guessing:
            found.append(
                f"the training loss, {loss:.3f}, is that of guessing, {guessing:.3f}: lower train.learning_rate, train "
                "longer (train.epochs), or choose a network with norms (model.name)."
            )
    return found
