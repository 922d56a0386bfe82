"""Do activation maps lie where the finding is known to be? Maps against lesion masks."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from medseg.evaluate.outcomes import Outcome
from medseg.files import UserError, read_json
from medseg.images import read_image
from medseg.label_sets import read_set
from medseg.metrics import energy_in_mask, pointing_hit
from medseg.statistics import summarise

FIGURES = ("energy_in_mask", "mask_share", "pointing_hit", "evidence")


def locate(outcome: Outcome, predictions: Path, lesions: Path) -> dict[str, float]:
    """Figures of one case's map against `lesions/<case_id>.png` or `.nii.gz`.

    Returns:
        `energy_in_mask`: share of the map's positive values inside the mask; `mask_share`: the mask's share of the
        image, which a map without knowledge would reach; `pointing_hit`; `evidence`: 1 when the map has a positive
        value, else 0. Nothing when the case has no lesion, no map or a withheld one, or a map of another
        class than its own.

    Raises:
        UserError: a mask or a map cannot be read, or their shapes differ.
    """
    case_id = outcome.case.case_id
    mask_path = next((p for p in (lesions / f"{case_id}.png", lesions / f"{case_id}.nii.gz") if p.is_file()), None)
    folder = predictions / case_id / "explanation"
    if mask_path is None or not (folder / "explanation.json").is_file():
        return {}
    mask = read_image(mask_path).array.astype(bool)
    explained = read_json(folder / "explanation.json")
    own = (outcome.target, *read_set(outcome.target))  # the class of the case, or one of its labels
    if explained.get("withheld") or not mask.any() or (outcome.target and explained.get("target") not in own):
        return {}
    activation = read_map(folder)
    if activation.shape != mask.shape:
        raise UserError(f"{mask_path} has shape {mask.shape}, the map {activation.shape}; give the mask of this image.")
    return {
        "energy_in_mask": energy_in_mask(activation, mask),
        "mask_share": float(mask.mean()),
        "pointing_hit": pointing_hit(activation, mask),
        "evidence": float(activation.max() > 0),
    }


def read_map(folder: Path) -> np.ndarray:
    """The raw map of an explanation folder: `map.npy` (row, column) or `map.nii.gz` (i, j, k), float32."""
    flat = folder / "map.npy"
    try:
        return np.load(flat, allow_pickle=False) if flat.is_file() else read_image(folder / "map.nii.gz").array
    except (OSError, ValueError) as error:
        raise UserError(f"{flat} cannot be read ({error}); explain the case again.") from error


def total(outcomes: Sequence[Outcome], *, seed: int = 0) -> dict[str, object]:
    """Each figure over the `n` cases that have a lesion and a map of their own class, with interval."""
    located = [outcome for outcome in outcomes if FIGURES[0] in outcome.figures]
    patients = [outcome.case.patient_id for outcome in located]
    return {"n": len(located)} | {
        name: asdict(summarise([outcome.figures[name] for outcome in located], patients, seed=seed)) for name in FIGURES
    }
