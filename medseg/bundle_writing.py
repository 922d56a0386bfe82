"""Write bundles: a new one, or one made from another. What they hold is said in `medseg.bundle`."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.bundle import Bundle
from medseg.bundle_files import (
    ABOUT,
    DISTANCE,
    EXPLANATION,
    JOINED_VERSION,
    LUNGS,
    SCHEMA_VERSION,
    VERDICT,
    WEIGHTS,
    digest,
)
from medseg.config import Config, dump_config
from medseg.feature_distance import CohortDistance, write_distance
from medseg.files import UserError, replacing, sha256_file, write_json, write_text
from medseg.model_card import model_card
from medseg.plan import Plan, write_plan
from medseg.verdict import Verdict, write_verdict

if TYPE_CHECKING:
    from torch import Tensor


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
    lungs: Bundle | None = None,
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
        lungs: the lung model, which is copied.

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
    if lungs is not None:
        facts["lungs"] = lungs.identity()
    with _new_folder(folder) as part:
        _copy_lungs(lungs, part)
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
    measured = {name: explanation[name] for name in ("n", "split")}
    facts = {**_facts_from(bundle), "explained_by": {**explanation["chosen"], **measured}}
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
    new = (*ABOUT, VERDICT, *([EXPLANATION] if explanation is not None else []))
    kept = [name for name in bundle.facts["files"] if name not in new]
    with _new_folder(folder) as part:
        for name in kept:
            shutil.copyfile(bundle.folder / name, part / name)
        _copy_lungs(bundle.lungs, part)
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
    kept = [name for name in bundle.facts["files"] if name not in (*ABOUT, VERDICT, EXPLANATION, DISTANCE, *names)]
    with _new_folder(folder) as part:
        for name, state in zip(names, states, strict=True):
            write_weights(part / name, state)
        for name in kept:
            shutil.copyfile(bundle.folder / name, part / name)
        _copy_lungs(bundle.lungs, part)
        _write_about(part, facts, bundle.config, bundle.plan, None, [*names, *kept])
    return folder


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


def copy_bundle(bundle_dir: Path, folder: Path) -> Path:
    """The bundle under another name: copied beside it, then renamed; the hashes are checked when it is loaded.

    Raises:
        UserError: the folder cannot be written.
    """
    part = folder.with_name(f".part-{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.copytree(bundle_dir, part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another folder.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


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
    names = [*others, *ABOUT]
    if verdict is not None:
        facts["calibration"] = {"method": verdict.method, "id": verdict.id}
        facts["operating_point"] = {"target": verdict.positive, "threshold": verdict.threshold}
        write_verdict(part / VERDICT, verdict)
        names.append(VERDICT)
    write_text(part / "config.yaml", dump_config(config))
    write_plan(part / "plan.yaml", plan)
    write_text(part / "MODEL_CARD.md", model_card(facts, config, plan, verdict))
    facts["files"] = {name: sha256_file(part / name) for name in names}
    write_json(part / "bundle.json", {**facts, "sha256": digest(facts)})


def _copy_lungs(lungs: Bundle | None, part: Path) -> None:
    if lungs is not None:
        shutil.copytree(lungs.folder, part / LUNGS)
