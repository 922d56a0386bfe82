"""Registered models: versions of bundles under a name, and the aliases that point at them."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from medseg.config import TrackingConfig
from medseg.files import UserError, default_workspace, read_json
from medseg.tracking.store import Store, open_store

_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+|latest))?")
_AUDITS, _OVERRIDES = "medseg.audits", "medseg.overrides"
_SHA256 = re.compile(r"[0-9a-f]{64}")  # it names a folder, so nothing else may stand there


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model.

    Attributes:
        run_id: the run that trained it. mlflow_run_id: the same run in MLflow.
        created: time of registration, UTC.
        description: the model card.
        audits: one per audited cohort and split: `{cohort_sha256, split, items: {name: status}}`.
        overrides: why it was promoted although items had not passed, by alias: `{alias: {item: reason}}`.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    mlflow_run_id: str
    bundle_sha256: str
    created: str
    description: str
    audits: tuple[Mapping[str, Any], ...] = ()
    overrides: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        """`models:/NAME/VERSION`."""
        return f"models:/{self.name}/{self.version}"


def list_models(workspace: Path | None = None, config: TrackingConfig | None = None) -> tuple[ModelVersion, ...]:
    """All versions of all models that medseg registered, by name, the newest first."""
    store = _open(workspace, config)
    found: list[ModelVersion] = []
    for model in _pages(store.client.search_registered_models):
        found += _versions(store, model.name)
    return tuple(sorted(found, key=lambda version: (version.name, -version.version)))


def show_model(
    name: str, workspace: Path | None = None, config: TrackingConfig | None = None
) -> tuple[ModelVersion, ...]:
    """All versions of one model, the newest first. Raises UserError naming the models there are."""
    store = _open(workspace, config)
    found = sorted(_versions(store, name), key=lambda version: -version.version)
    if not found:
        known = ", ".join(sorted(model.name for model in _pages(store.client.search_registered_models)))
        raise UserError(f"model {name!r} is not registered (registered: {known or 'none'}); correct the name.")
    return tuple(found)


def find_version(uri: str, workspace: Path | None = None, config: TrackingConfig | None = None) -> ModelVersion:
    """The version meant by `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `models:/NAME/latest` or `models:/NAME`.

    Raises:
        UserError: the address has another form, or there is no such model, version or alias.
    """
    parts = _URI.fullmatch(uri)
    if parts is None:
        raise UserError(f"model {uri!r} is not of the form models:/NAME@ALIAS or models:/NAME/VERSION.")
    versions = show_model(parts["name"], workspace, config)
    if parts["alias"]:
        chosen = [version for version in versions if parts["alias"] in version.aliases]
    elif parts["version"] in (None, "latest"):
        chosen = [versions[0]]
    else:
        chosen = [version for version in versions if version.version == int(parts["version"])]
    if not chosen:
        known = ", ".join("@".join((str(version.version), *version.aliases)) for version in versions)
        raise UserError(f"model {uri!r} does not exist (versions with their aliases: {known}); choose one of these.")
    return chosen[0]


def set_alias(
    name: str, alias: str, version: int, workspace: Path | None = None, config: TrackingConfig | None = None
) -> ModelVersion:
    """Point `models:/NAME@ALIAS` at a version; it leaves the version it pointed at before.

    Raises:
        UserError: no such version, or the alias is malformed or reserved.
    """
    from mlflow.exceptions import MlflowException

    find_version(f"models:/{name}/{version}", workspace, config)
    try:
        _open(workspace, config).client.set_registered_model_alias(name, alias, str(version))
    except MlflowException as error:
        if error.get_http_status_code() >= 500:
            raise
        raise UserError(
            f"alias {alias!r} is not allowed; use letters, digits, '_' and '-', but neither 'latest' nor v1, v2, …."
        ) from error
    return find_version(f"models:/{name}/{version}", workspace, config)


def record_audit(
    bundle_sha256: str, audit: Mapping[str, Any], workspace: Path | None = None, config: TrackingConfig | None = None
) -> tuple[ModelVersion, ...]:
    """Keep an audit with every registered version of a bundle, in place of an earlier one of the same cases.

    Args:
        audit: `{cohort_sha256, split, items: {name: status}}`.

    Returns:
        The versions; none when the bundle is not registered.
    """
    store = _open(workspace, config)
    found = [version for version in list_models(workspace, config) if version.bundle_sha256 == bundle_sha256]
    for version in found:
        others = [a for a in version.audits if any(a[key] != audit[key] for key in ("cohort_sha256", "split"))]
        text = json.dumps([*others, {**audit, "audited": datetime.now(UTC).isoformat(timespec="seconds")}])
        store.client.set_model_version_tag(version.name, str(version.version), _AUDITS, text)
    return tuple(find_version(version.uri, workspace, config) for version in found)


def record_override(
    version: ModelVersion,
    alias: str,
    reasons: Mapping[str, str],
    workspace: Path | None = None,
    config: TrackingConfig | None = None,
) -> None:
    """Keep with a version why an alias was moved to it although items of its audit had not passed."""
    told = {**version.overrides, alias: dict(reasons)}
    client = _open(workspace, config).client
    client.set_model_version_tag(version.name, str(version.version), _OVERRIDES, json.dumps(told))


def fetch_model(uri: str, workspace: Path | None = None, config: TrackingConfig | None = None) -> Path:
    """The bundle folder of a registered model, downloaded once into `<workspace>/models/<hash of the bundle>`.

    Whoever loads the bundle checks its hashes.

    Raises:
        UserError: no such model, its files are out of reach, or they are not the bundle that was registered.
    """
    version = find_version(uri, workspace, config)
    target = (workspace or default_workspace()) / "models" / version.bundle_sha256
    if (target / "bundle.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _downloaded(version, _open(workspace, config), target.parent) as bundle:
        found = read_json(bundle / "bundle.json").get("sha256")
        if found != version.bundle_sha256:
            raise UserError(f"{version.uri} holds bundle {found}, not {version.bundle_sha256}; register it again.")
        try:
            bundle.rename(target)
        except OSError:
            if not (target / "bundle.json").is_file():  # else another process was faster
                raise
    return target


def version_facts(version: Any) -> ModelVersion:
    """MLflow's ModelVersion as plain facts."""
    tags = version.tags or {}
    return ModelVersion(
        name=version.name,
        version=int(version.version),
        aliases=tuple(sorted(version.aliases or ())),
        run_id=tags.get("medseg.run_id", ""),
        mlflow_run_id=version.run_id or "",
        bundle_sha256=tags.get("medseg.bundle_sha256", ""),
        created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        description=version.description or "",
        audits=tuple(json.loads(tags.get(_AUDITS, "[]"))),
        overrides=json.loads(tags.get(_OVERRIDES, "{}")),
    )


@contextmanager
def _downloaded(version: ModelVersion, store: Store, parent: Path) -> Iterator[Path]:
    """Download a version beside its place in the cache and yield the bundle folder in it."""
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    scratch = Path(tempfile.mkdtemp(prefix=".part-", dir=parent))
    try:
        try:
            # By the place of the files: MLflow would look up a `models:` address in its global store, not in this one.
            place = store.client.get_model_version_download_uri(version.name, str(version.version))
            folder = Path(mlflow.artifacts.download_artifacts(place, dst_path=str(scratch), tracking_uri=store.uri))
            described = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))
            bundle = folder / described["flavors"]["python_function"]["data"]
        except (MlflowException, OSError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{version.uri} cannot be downloaded ({reason}); check the store's artifacts.") from error
        yield bundle
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _versions(store: Store, name: str) -> list[ModelVersion]:
    from mlflow.exceptions import MlflowException

    quoted = name.replace("'", "''")
    try:
        found = [version_facts(v) for v in _pages(store.client.search_model_versions, f"name='{quoted}'")]
    except MlflowException as error:
        if error.get_http_status_code() >= 500:
            raise
        return []
    aliases = store.client.get_registered_model(name).aliases if found else {}
    return [
        replace(version, aliases=tuple(sorted(a for a, number in aliases.items() if int(number) == version.version)))
        for version in found
        if _SHA256.fullmatch(version.bundle_sha256)
    ]


def _pages(search: Any, text: str | None = None) -> Iterator[Any]:
    token = None
    while True:
        page = search(text, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _open(workspace: Path | None, config: TrackingConfig | None) -> Store:
    return open_store(workspace or default_workspace(), config or TrackingConfig())
