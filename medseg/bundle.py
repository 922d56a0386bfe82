"""The bundle: everything needed to predict with a trained model, and nothing more, in one folder.

`weights.safetensors`, `config.yaml`, `plan.yaml`, `MODEL_CARD.md`, for a calibrated classifier `verdict.json`, where
its activation maps were measured `explanation.json`, where a distance from the training cohort was fitted
`distance.safetensors`, and `bundle.json` with what the model is and the SHA-256 of every other file. Nothing in it is
pickled, and nothing of it is used before its hash is checked.

A classifier that looks for lung fields carries its lung model in `lungs/`, a bundle of its own that `bundle.json` names
by hash.

Joined folds of a cross-validation have one `weights-<n>.safetensors` each instead, and `evidence` in `bundle.json`:
what the out-of-fold predictions say. Such a bundle is of schema version 2, any other of version 1.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.bundle_files import DISTANCE, EXPLANATION, LUNGS, VERDICT, WEIGHTS, verify
from medseg.config import Config, load_config
from medseg.feature_distance import CohortDistance, read_distance
from medseg.files import (
    UserError,
    default_workspace,
    read_json,
)
from medseg.plan import Plan, read_plan
from medseg.runs import find_run
from medseg.verdict import Verdict, read_verdict

if TYPE_CHECKING:
    from torch import Tensor

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Bundle:
    """A trained model on disk, verified.

    Attributes:
        folder: where it lies.
        labels: label name to value (segmentation) or class name to index.
        sha256: over `bundle.json`, and through it over every file; names this model in results and ledgers.
        facts: the content of `bundle.json`.
        verdict: calibration and operating point of a classifier; None for other models and bundles without one.
        distance: how far a scan lies from the training cohort; None for bundles without it.
        lungs: the lung model of a classifier that has one.
    """

    folder: Path
    config: Config
    plan: Plan
    labels: Mapping[str, int]
    sha256: str
    facts: Mapping[str, Any] = field(repr=False)
    verdict: Verdict | None = None
    distance: CohortDistance | None = field(default=None, repr=False)
    lungs: "Bundle | None" = None

    @property
    def name(self) -> str:
        """Name of the experiment that made it."""
        return self.config.name

    @property
    def run_id(self) -> str:
        """The run that trained it."""
        return str(self.facts["run_id"])

    @property
    def temperature(self) -> float:
        """Divisor of the logits before the softmax, from the calibration; 1 without one."""
        return float((self.facts["calibration"] or {}).get("temperature", 1.0))

    @property
    def operating_point(self) -> tuple[str, float] | None:
        """Class and threshold: that class is called when its probability reaches the threshold."""
        point = self.facts["operating_point"]
        return (str(point["target"]), float(point["threshold"])) if point else None

    @property
    def members(self) -> tuple[Mapping[str, Any], ...]:
        """What is known of each joined network: `run_id`, `fold`, `seed`, `weights` (file), `temperature`; else ()."""
        return tuple(self.facts.get("members") or ())

    @property
    def evidence(self) -> Mapping[str, Any]:
        """What the out-of-fold predictions say, for predicting and for people; empty unless folds were joined."""
        found: Mapping[str, Any] = self.facts.get("evidence") or {}
        return found

    @property
    def trained_sites(self) -> Sequence[str] | None:
        """Where the cases of training and validation come from; None when that was not recorded."""
        about = self.verdict.fitted if self.verdict else self.facts.get("adapted") or {}
        return about.get("trained_sites")

    @property
    def retest(self) -> Mapping[str, Any]:
        """The test-retest noise of its volumes: `labels` (see `medseg.change.Retest`), `within_days`, `cohort_sha256`;
        empty where it was not measured."""
        found: Mapping[str, Any] = self.facts.get("retest") or {}
        return found

    @property
    def explanation(self) -> Mapping[str, Any]:
        """What was measured of the activation maps, with the method and layer chosen; empty where nothing was."""
        known = EXPLANATION in self.facts["files"]
        found: Mapping[str, Any] = read_json(self.folder / EXPLANATION) if known else {}
        return found

    def identity(self) -> dict[str, str]:
        """Name, hash and run, as results quote them."""
        return {"name": self.name, "sha256": self.sha256, "run_id": self.run_id}

    def predict(self, scan: str | Path) -> Any:
        """Segment or classify one scan: a file, or the folder of one DICOM series.

        Returns:
            A `medseg.predict.Prediction`: mask on the scan's own grid, volumes in ml, probabilities, flags.

        Raises:
            UserError: the path holds no scan, several scans, or one that the model cannot take.
        """
        return self._predictor.predict_file(Path(scan))

    @cached_property
    def _predictor(self) -> Any:
        # By name, since predict stands above bundle and imports go down only; this door is for people, who
        # should not have to know two modules.
        return importlib.import_module("medseg.predict").Predictor(self)


def load_bundle(path_or_id: str | Path, workspace: Path | None = None) -> Bundle:
    """Load and verify a bundle.

    Args:
        path_or_id: a bundle folder or the folder of a run; a run id; or `models:/NAME@ALIAS`.
        workspace: where runs and registered models are looked up.

    Raises:
        UserError: there is none, a file is missing, or one differs from the hash recorded for it.
    """
    folder = find_bundle(str(path_or_id), workspace or default_workspace())
    facts = read_json(folder / "bundle.json")
    verify(folder, facts)
    config = _read_config(folder / "config.yaml")
    verdict = read_verdict(folder / VERDICT) if VERDICT in facts["files"] else None
    distance = read_distance(folder / DISTANCE) if DISTANCE in facts["files"] else None
    plan, lungs = read_plan(folder / "plan.yaml"), _load_lungs(folder, facts)
    return Bundle(folder, config, plan, config.task.labels, facts["sha256"], facts, verdict, distance, lungs)


def find_bundle(name: str, workspace: Path) -> Path:
    """The bundle folder meant by a folder, a run id or a registered model; raises UserError when there is none."""
    if name.startswith("models:"):
        from medseg.tracking import fetch_model  # loads mlflow, which a bundle on disk does not need

        return fetch_model(name, workspace)
    path = Path(name)
    if not path.is_dir():
        if not _RUN_ID.fullmatch(name):
            raise UserError(f"model {name!r} is neither a bundle folder, nor a run id, nor models:/NAME@ALIAS.")
        try:
            path = find_run(workspace, name).path
        except UserError as error:
            raise UserError(f"model {name!r} is no bundle folder and no models:/NAME@ALIAS, and {error}") from error
    for folder in (path, path / "bundle"):
        if (folder / "bundle.json").is_file():
            return folder
    raise UserError(f"{path} holds no bundle (no bundle.json); finish its training, or name another model.")


def read_weights(bundle: Bundle, name: str = WEIGHTS) -> dict[str, "Tensor"]:
    """The weights, or those of the joined fold whose file is `name`, on the CPU. Raises UserError when damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = bundle.folder / name
    try:
        weights: dict[str, Tensor] = load_file(path, device="cpu")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy the bundle again.") from error
    return weights


def _read_config(path: Path) -> Config:
    """The resolved config; a bundle older than `predict.precision` goes on predicting as it was evaluated, in fp32."""
    config = load_config(path)
    if "precision" in config.predict.model_fields_set:
        return config
    return config.model_copy(update={"predict": config.predict.model_copy(update={"precision": "fp32"})})


def _load_lungs(folder: Path, facts: Mapping[str, Any]) -> Bundle | None:
    """The lung model in a bundle, if `bundle.json` names one."""
    if not (named := facts.get("lungs")):
        return None
    if not (folder / LUNGS / "bundle.json").is_file():
        raise UserError(f"{folder / LUNGS} is missing; copy the bundle again from its run.")
    lungs = load_bundle(folder / LUNGS)
    if lungs.sha256 != named["sha256"]:
        raise UserError(f"{folder / LUNGS} is another model than bundle.json names; copy the bundle again.")
    return lungs
