"""The verbs about what lies on a shelf: trained models and public datasets."""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from medseg.config import AuditItem
from medseg.files import UserError, replacing
from medseg.result import Result
from medseg.tracking import ModelVersion, find_version, record_override, set_alias
from medseg.tracking import list_models as registered_models

GUARDED = "champion"
"""The alias that a classifier has to earn."""


def list_models(workspace: Path) -> Result:
    """All registered versions, the newest first."""
    versions = registered_models(workspace)
    if not versions:
        return Result("models", "done", text="No model is registered yet; `medseg train` registers one.")
    return Result("models", "done", {}, {"models": len(versions)}, rows=[_row(version) for version in versions])


def show_model(model: str, workspace: Path) -> Result:
    """The card of a model, with its facts as figures."""
    from medseg.bundle import load_bundle

    bundle = load_bundle(model, workspace)
    figures = {"name": bundle.name, "sha256": bundle.sha256, "run": bundle.run_id, **dict(bundle.facts["metrics"])}
    text = (bundle.folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    return Result("models", "done", {"bundle": bundle.folder}, figures, bundle.run_id, text=text)


def promote_model(model: str, alias: str, workspace: Path, overrides: Sequence[str] = ()) -> Result:
    """Point `models:/NAME@ALIAS` at a version, given as `models:/NAME/VERSION` or by the run that trained it.

    A classifier becomes `champion` only when every item that its config requires has passed an audit and failed
    none, or with a reason for each item that has not, which is kept with the version.

    Args:
        overrides: `item: reason`, one for each required item that has not passed.

    Raises:
        UserError: no such version, an alias that is not allowed, or required items that have neither passed nor a
            reason.
    """
    version = find_version(model, workspace) if model.startswith("models:/") else _version_of_run(model, workspace)
    reasons = _overridden(overrides)
    open_items = _open_items(version, workspace) if alias == GUARDED else {}
    if idle := sorted(set(reasons) - set(open_items)):
        raise UserError(f"--override {idle[0]!r}: it is no item that stands in the way of {alias!r}; leave it out.")
    if barred := [f"{name} ({status})" for name, status in open_items.items() if name not in reasons]:
        raise UserError(
            f"{version.uri} does not become {alias!r}: {', '.join(barred)}. Run `medseg evaluate {version.uri} "
            '--cohort DIR --audit`, or give a reason for each with --override "item: reason".'
        )
    if reasons:  # before the alias moves: one without its reasons must never be seen
        record_override(version, alias, reasons, workspace)
    moved = set_alias(version.name, alias, version.version, workspace)
    figures: dict[str, object] = {"model": moved.uri, "alias": alias, "address": f"models:/{moved.name}@{alias}"}
    if reasons:
        figures["overridden"] = reasons
    return Result("models", "done", {}, figures, moved.run_id)


def export_model(model: str, out: Path, workspace: Path) -> Result:
    """Write a model as one file: `.zip` holds the bundle, `.pt2` the network as a torch.export program.

    Raises:
        UserError: another suffix.
    """
    from medseg.bundle import load_bundle

    bundle = load_bundle(model, workspace)
    if out.suffix == ".zip":
        with replacing(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(path for path in bundle.folder.rglob("*") if path.is_file()):
                archive.write(file, f"{bundle.name}/{file.relative_to(bundle.folder)}")
    elif out.suffix == ".pt2":
        _export_program(bundle.folder, out, workspace)
    else:
        raise UserError(f"--out {out.name}: the suffix must be .zip (bundle) or .pt2 (torch.export program).")
    return Result("models", "done", {"model": out}, {"size_mb": round(out.stat().st_size / 1e6, 2)}, bundle.run_id)


def list_data() -> Result:
    """The public datasets with a manifest."""
    from medseg.ingest.manifests import list_manifests, load_manifests

    columns = ("name", "kind", "modality", "cases", "config")
    rows = [{name: row[name] for name in columns} for row in list_manifests(load_manifests())]
    return Result("data", "done", rows=rows)


def show_data(name: str) -> Result:
    """Terms, files, labels and the way into a cohort."""
    from medseg.ingest.manifests import find_manifest, show

    return Result("data", "done", text=show(find_manifest(name)))


def fetch_data(name: str, out: Path) -> Result:
    """Download, verify and unpack a dataset into `out`; a broken download is taken up where it stopped."""
    from medseg.ingest.fetch import fetch
    from medseg.ingest.manifests import find_manifest

    return fetch(find_manifest(name), out).as_result()


def _overridden(overrides: Sequence[str]) -> dict[str, str]:
    """Item to reason. Raises UserError for an item without a reason or one that is none."""
    reasons = {}
    for override in overrides:
        name, _, reason = (part.strip() for part in override.partition(":"))
        if name not in get_args(AuditItem) or not reason:
            names = ", ".join(get_args(AuditItem))
            raise UserError(f'--override {override!r} is not of the form "item: reason" with an item among {names}.')
        reasons[name] = reason
    return reasons


def _open_items(version: ModelVersion, workspace: Path) -> dict[str, str]:
    """The required items of a classifier that have not passed, with their state.

    Of several audits, of other cohorts or splits, a failed item counts, and a passed one where none failed it.
    """
    from medseg.bundle import load_bundle

    config = load_bundle(version.uri, workspace).config
    if config.task.kind != "classification" or config.task.spatial_dims != 2:
        return {}  # there is no audit for other models
    found: dict[str, str] = {}
    for name in config.audit.required:
        told = {audit["items"].get(name, "not assessable") for audit in version.audits}
        state = next((status for status in ("fail", "pass", "not assessable") if status in told), "not audited")
        if state != "pass":
            found[name] = {"fail": "failed"}.get(state, state)
    return found


def _export_program(folder: Path, out: Path, workspace: Path) -> None:
    import torch

    from medseg.bundle import load_bundle
    from medseg.predict import load_network

    bundle = load_bundle(folder, workspace)
    net = load_network(bundle, torch.device("cpu"))  # where the program is to run is not known
    image = torch.zeros(1, len(bundle.config.task.channels), *bundle.plan.patch_size)
    with replacing(out) as temporary:
        torch.export.save(torch.export.export(net, (image,)), temporary)


def _row(version: ModelVersion) -> dict[str, object]:
    return {
        "model": version.name,
        "version": version.version,
        "aliases": ", ".join(version.aliases),
        "run": version.run_id,
        "created": re.sub(r"\..*", "", version.created),
    }


def _version_of_run(run_id: str, workspace: Path) -> ModelVersion:
    for version in registered_models(workspace):
        if run_id in (version.run_id, version.mlflow_run_id):
            return version
    raise UserError(f"run {run_id!r} has no registered model; set tracking.register_as in its config, or check the id.")
