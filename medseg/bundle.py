"""The bundle: everything needed to predict with a trained model, and nothing more, in one folder.

`weights.safetensors`, `config.yaml`, `plan.yaml`, `MODEL_CARD.md`, for a calibrated classifier `verdict.json`, where
its activation maps were measured `explanation.json`, where a distance from the training cohort was fitted
`distance.safetensors`, and `bundle.json` with what the model is and the SHA-256 of every other file. Nothing in it is
pickled, and nothing of it is used before its hash is checked.

Joined folds of a cross-validation have one `weights-<n>.safetensors` each instead, and `evidence` in `bundle.json`:
what the out-of-fold predictions say. Such a bundle is of schema version 2, any other of version 1.
"""

import hashlib
import importlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.config import Config, dump_config, load_config
from medseg.feature_distance import CohortDistance, read_distance, write_distance
from medseg.files import (
    UserError,
    default_workspace,
    dump_json,
    plain,
    read_json,
    replacing,
    sha256_file,
    write_json,
    write_text,
)
from medseg.model_card import model_card
from medseg.plan import Plan, read_plan, write_plan
from medseg.runs import find_run
from medseg.verdict import Verdict, read_verdict, write_verdict

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION, JOINED_VERSION = 1, 2
WEIGHTS = "weights.safetensors"
VERDICT, EXPLANATION, DISTANCE = "verdict.json", "explanation.json", "distance.safetensors"
_FILES = ("config.yaml", "plan.yaml", "MODEL_CARD.md")
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
    """

    folder: Path
    config: Config
    plan: Plan
    labels: Mapping[str, int]
    sha256: str
    facts: Mapping[str, Any] = field(repr=False)
    verdict: Verdict | None = None
    distance: CohortDistance | None = field(default=None, repr=False)

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
        """What is known of each joined fold: `run_id`, `fold`, `weights` (a file's name), `temperature`; else ()."""
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


def save_bundle(
    folder: Path,
    *,
    state_dict: "Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]",
    config: Config,
    plan: Plan,
    run_id: str,
    cohort_sha256: str,
    metrics: Mapping[str, Any],
    calibration: Mapping[str, float] | None = None,
    operating_point: Mapping[str, Any] | None = None,
    members: Sequence[Mapping[str, Any]] = (),
    evidence: Mapping[str, Any] | None = None,
    attached: Mapping[str, str] | None = None,
    verdict: Verdict | None = None,
    distance: CohortDistance | None = None,
) -> Path:
    """Write a bundle: built beside `folder`, then renamed onto it, so that a reader sees the old one or the new one.

    Args:
        state_dict: the network's weights, or those of each joined fold; anything on any device.
        metrics: what was measured on it, for `bundle.json` and the model card.
        calibration: `{"temperature": …}` for the logits of a classifier.
        operating_point: `{"target": class name, "threshold": probability}`.
        verdict: takes the place of the two.
        members: facts of each joined fold, in the order of the weights. evidence: see `Bundle.evidence`.
        attached: more files, by name, with their text.
        distance: of each network, in the order of the weights.

    Raises:
        UserError: the folder cannot be written.
    """
    facts: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": config.name,
        "version": package_version(),
        "run_id": run_id,
        "task": config.task.kind,
        "labels": config.task.labels,
        "channels": config.task.channels,
        "cohort_sha256": cohort_sha256,
        "metrics": metrics,
        "calibration": calibration,
        "operating_point": operating_point,
        "simulated": config.ingest.simulated,
    }
    states = {WEIGHTS: state_dict} if isinstance(state_dict, Mapping) else _numbered(state_dict)
    if members:
        facts["schema_version"] = JOINED_VERSION
        facts["members"] = [{**about, "weights": name} for about, name in zip(members, states, strict=True)]
        facts["evidence"] = evidence or {}
    others = [*states, *(attached or {})]
    with _new_folder(folder) as part:
        for name, state in states.items():
            write_weights(part / name, state)
        for name, text in (attached or {}).items():
            write_text(part / name, text)
        if distance is not None:
            facts["feature_distance"] = distance.facts()
            others.append(write_distance(part / DISTANCE, distance).name)
        _write_about(part, facts, config, plan, verdict, others)
    return folder


def with_verdict(
    bundle: Bundle, folder: Path, verdict: Verdict, *, run_id: str | None = None, config: Config | None = None
) -> Path:
    """Write a bundle with the weights and plan of another and a new verdict; `folder` may be the other's own.

    Args:
        run_id: the run that calibrated it; by default it stays that of the other. The run that trained the weights
            and the bundle they came from are kept in `bundle.json`.
        config: the config with the settings of this verdict; by default the other's.

    Raises:
        UserError: the folder cannot be written.
    """
    return _rewritten(bundle, folder, _facts_from(bundle, run_id), config or bundle.config, verdict)


def with_retest(bundle: Bundle, folder: Path, retest: Mapping[str, Any], *, run_id: str) -> Path:
    """Write a bundle with the weights and plan of another and its measured test-retest noise (see `Bundle.retest`).

    Args:
        run_id: the run that measured it.

    Raises:
        UserError: the folder cannot be written.
    """
    facts = {**_facts_from(bundle, run_id), "retest": retest}
    return _rewritten(bundle, folder, facts, bundle.config, bundle.verdict)


def with_explanation(bundle: Bundle, folder: Path, explanation: Mapping[str, Any]) -> Path:
    """Write a bundle as it is but for what was measured of its activation maps; `folder` may be its own.

    Raises:
        UserError: the folder cannot be written.
    """
    facts = {**_facts_from(bundle), "explained_by": {**explanation["chosen"], "n": explanation["n"]}}
    return _rewritten(bundle, folder, facts, bundle.config, bundle.verdict, explanation)


def _rewritten(
    bundle: Bundle,
    folder: Path,
    facts: dict[str, Any],
    config: Config,
    verdict: Verdict | None,
    explanation: Mapping[str, Any] | None = None,
) -> Path:
    """Weights, plan and attached files of a bundle with other facts about them."""
    new = (*_FILES, VERDICT, *([EXPLANATION] if explanation is not None else []))
    kept = [name for name in bundle.facts["files"] if name not in new]
    with _new_folder(folder) as part:
        for name in kept:
            shutil.copyfile(bundle.folder / name, part / name)
        if explanation is not None:
            kept.append(write_json(part / EXPLANATION, explanation).name)
        _write_about(part, facts, config, bundle.plan, verdict, kept)
    return folder


def with_weights(
    bundle: Bundle, folder: Path, states: "Sequence[Mapping[str, Tensor]]", adapted: Mapping[str, Any], *, run_id: str
) -> Path:
    """Write a bundle with the config and plan of another and other weights, without its calibration, its verdict, its
    distance from the training cohort and what was measured of its activation maps.

    Args:
        states: the weights, of joined folds those of each.
        adapted: what they were adapted to, for `bundle.json` and the model card.
        run_id: the run that adapted it; see `with_verdict`.

    Raises:
        UserError: the folder cannot be written.
    """
    facts = {**_facts_from(bundle, run_id), "calibration": None, "operating_point": None, "adapted": adapted}
    for measured in ("explained_by", "feature_distance"):
        facts.pop(measured, None)
    names = [str(member["weights"]) for member in bundle.members] or [WEIGHTS]
    kept = [name for name in bundle.facts["files"] if name not in (*_FILES, VERDICT, EXPLANATION, DISTANCE, *names)]
    with _new_folder(folder) as part:
        for name, state in zip(names, states, strict=True):
            write_weights(part / name, state)
        for name in kept:
            shutil.copyfile(bundle.folder / name, part / name)
        _write_about(part, facts, bundle.config, bundle.plan, None, [*names, *kept])
    return folder


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
    _verify(folder, facts)
    config = load_config(folder / "config.yaml")
    verdict = read_verdict(folder / VERDICT) if VERDICT in facts["files"] else None
    distance = read_distance(folder / DISTANCE) if DISTANCE in facts["files"] else None
    plan = read_plan(folder / "plan.yaml")
    return Bundle(folder, config, plan, config.task.labels, facts["sha256"], facts, verdict, distance)


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


def write_weights(path: Path, state_dict: Mapping[str, "Tensor"]) -> Path:
    """Write tensors on any device as safetensors, atomically."""
    from safetensors.torch import save_file

    own = {name: value.detach().cpu().contiguous().clone() for name, value in state_dict.items()}
    with replacing(path) as temporary:
        save_file(own, temporary, metadata={"format": "pt"})
    return path


def check_target(folder: Path) -> None:
    """A bundle may take the place of nothing and of another bundle only. Raises UserError where it would of more."""
    if folder.exists() and not (folder / "bundle.json").is_file() and not _is_empty(folder):
        raise UserError(f"--out {folder} exists and is no bundle; name a new folder.")


def package_version() -> str:
    """The installed version of medseg."""
    try:
        return version("medseg")
    except PackageNotFoundError:
        return "unknown"


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that replaces it when the block ends well."""
    check_target(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".part-{folder.name}-", dir=folder.parent))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{folder} cannot be written ({reason}); choose a folder you may write to.") from error
    try:
        yield part
        part.chmod(0o755)
        old = part.with_name(f"{part.name}-old")
        if folder.exists():
            folder.rename(old)
        os.replace(part, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _facts_from(bundle: Bundle, run_id: str | None = None) -> dict[str, Any]:
    """The facts of a bundle for one made from it, by a run where one is named."""
    facts = {name: value for name, value in bundle.facts.items() if name not in ("sha256", "files")}
    if run_id is not None:
        facts |= {"run_id": run_id, "trained_in": facts.get("trained_in", bundle.run_id), "made_from": bundle.sha256}
    return facts


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _numbered(states: "Sequence[Mapping[str, Tensor]]") -> "dict[str, Mapping[str, Tensor]]":
    return {f"weights-{number}.safetensors": state for number, state in enumerate(states)}


def _write_about(
    part: Path, facts: dict[str, Any], config: Config, plan: Plan, verdict: Verdict | None, others: Sequence[str]
) -> None:
    """Everything but what lies there already, the `others`; `bundle.json` last, since it vouches for the rest."""
    names = [*others, *_FILES]
    if verdict is not None:
        facts["calibration"] = {"method": verdict.method, "id": verdict.id}
        facts["operating_point"] = {"target": verdict.positive, "threshold": verdict.threshold}
        write_verdict(part / VERDICT, verdict)
        names.append(VERDICT)
    write_text(part / "config.yaml", dump_config(config))
    write_plan(part / "plan.yaml", plan)
    write_text(part / "MODEL_CARD.md", model_card(facts, config, plan, verdict))
    facts["files"] = {name: sha256_file(part / name) for name in names}
    write_json(part / "bundle.json", {**facts, "sha256": _digest(facts)})


def _digest(facts: Mapping[str, Any]) -> str:
    """Hash over all facts but the hash itself, independent of their order."""
    tree = plain({name: value for name, value in facts.items() if name != "sha256"})
    return hashlib.sha256(dump_json(sorted(tree.items())).encode()).hexdigest()


def _verify(folder: Path, facts: Any) -> None:
    where = folder / "bundle.json"
    if not isinstance(facts, dict) or facts.get("schema_version") not in (SCHEMA_VERSION, JOINED_VERSION):
        known = f"{SCHEMA_VERSION} or {JOINED_VERSION}"
        raise UserError(f"{where} is not of schema version {known}; train the model with this version.")
    needed = {*_FILES, *(member["weights"] for member in facts.get("members") or ({"weights": WEIGHTS},))}
    if facts.get("sha256") != _digest(facts) or not _whole(facts.get("files"), needed):
        raise UserError(f"{where} was changed since the bundle was made; copy the bundle again from its run.")
    for name, digest in facts["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing; copy the bundle again from its run.")
        if sha256_file(path) != digest:
            raise UserError(f"{path} differs from its hash in bundle.json; copy the bundle again from its run.")


def _whole(files: object, needed: set[str]) -> bool:
    """Every needed file is listed, and none that lies elsewhere."""
    return isinstance(files, dict) and needed <= set(files) and all(Path(name).name == name for name in files)
