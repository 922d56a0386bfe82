"""Checkpoints: written atomically, two kept, loaded with `weights_only`."""

from pathlib import Path
from typing import Any

import torch

from medseg.files import UserError, replacing

_KEPT = 2


def save_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """Write `step_<n>.pt` and drop all but the newest two."""
    path = folder / f"step_{state['step']:09d}.pt"
    with replacing(path) as temporary:
        torch.save(state, temporary)
    for old in sorted(folder.glob("step_*.pt"))[:-_KEPT]:
        old.unlink()
    return path


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The newest checkpoint that can be read.

    Raises:
        UserError: there is none; a resume never starts anew in silence.
    """
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        except (RuntimeError, EOFError, OSError):
            continue
    raise UserError(f"{folder} holds no readable checkpoint; start a new run without --resume.")
