"""Where runs are tracked: sqlite under the workspace, or a server. The rest of medseg does not see the difference."""

import hashlib
import logging
import os
import re
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medseg.config import TrackingConfig
from medseg.files import UserError

LOCAL_UI = "http://127.0.0.1:5000"  # where `medseg up` serves the workspace
_HEALTH_TIMEOUT_S = 10


@dataclass(frozen=True)
class Store:
    """An open tracking store and model registry.

    Attributes:
        uri: address with its credentials, for MLflow only.
        client: an MlflowClient; every call names its run.
        artifacts: folder for artifacts of new experiments; None where a server decides.
    """

    uri: str
    client: Any
    artifacts: Path | None

    def run_url(self, experiment_id: str, mlflow_run_id: str) -> str:
        """The run's page; for a local store, where `medseg up` shows it."""
        server = without_credentials(self.uri).rstrip("/") if _is_server(self.uri) else LOCAL_UI
        return f"{server}/#/experiments/{experiment_id}/runs/{mlflow_run_id}"

    def experiment_id(self, name: str) -> str:
        """The experiment with this name; made, or restored from the bin, if need be."""
        found = self.client.get_experiment_by_name(name)
        where = self.artifacts.as_uri() if self.artifacts else None
        inside = found is not None and f"{found.artifact_location.rstrip('/')}/".startswith(f"{where}/")
        if found is not None and where and not inside:
            # The workspace was moved, or another server made the experiment: its artifacts are out of reach.
            name = f"{name}-{hashlib.sha256(where.encode()).hexdigest()[:6]}"
            found = self.client.get_experiment_by_name(name)
        if found is None:
            return self._create_experiment(name, where)
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _create_experiment(self, name: str, where: str | None) -> str:
        from mlflow.exceptions import MlflowException

        try:
            return str(self.client.create_experiment(name, artifact_location=where))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return str(self.client.get_experiment_by_name(name).experiment_id)  # another run was faster


def tracking_uri(workspace: Path, config: TrackingConfig) -> str:
    """`tracking.uri`, else MLFLOW_TRACKING_URI, else sqlite in the workspace.

    Raises:
        UserError: `tracking.uri` carries a password; the config is copied into runs, bundles and MLflow.
    """
    if config.uri and config.uri != without_credentials(config.uri):
        raise UserError(
            f"tracking.uri {without_credentials(config.uri)!r} carries a user or password, and configs are copied; "
            "give the whole address in MLFLOW_TRACKING_URI instead."
        )
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or _local_uri(workspace)


def open_store(workspace: Path, config: TrackingConfig) -> Store:
    """Open the store; the first time, a local one makes its tables (some seconds).

    Raises:
        UserError: the address is of a kind that MLflow no longer keeps runs in, or the server does not answer.
    """
    uri = tracking_uri(workspace, config)
    if urlsplit(uri).scheme in ("", "file"):
        raise UserError(
            f"tracking.uri {uri!r} is a folder; MLflow keeps runs in a database: remove it, or give a server."
        )
    if _is_server(uri):
        _check_answers(uri)
        return Store(uri, _client(uri), None)
    workspace.mkdir(parents=True, exist_ok=True)
    if uri == _local_uri(workspace) and not (workspace / "mlflow.db").exists():
        print("Making the tables of mlflow.db (once in a workspace) ...", file=sys.stderr, flush=True)
    return Store(uri, _client(uri), workspace.absolute() / "artifacts")


def store_name(uri: str, workspace: Path) -> str:
    """What run.json calls a store: no credentials, and the same after the workspace was moved."""
    return without_credentials(uri).replace(str(workspace.absolute()), "<workspace>")


def without_credentials(uri: str) -> str:
    """A text with user and password cut out of the addresses in it."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", uri)


def _local_uri(workspace: Path) -> str:
    return f"sqlite:///{workspace.absolute() / 'mlflow.db'}"


@cache
def _client(uri: str) -> Any:
    """An MlflowClient, quiet and without telemetry. MLflow takes a second to import, so it is imported here."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    os.environ["MLFLOW_UV_AUTO_DETECT"] = "false"  # a uv.lock in the current folder is not the model's
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri, uri)


def _is_server(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


def _check_answers(uri: str) -> None:
    """MLflow would retry for minutes; whoever mistyped the address learns it at once."""
    try:
        urllib.request.urlopen(f"{without_credentials(uri).rstrip('/')}/health", timeout=_HEALTH_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answers; whether it lets us in is seen with the first call
    except (OSError, ValueError) as error:
        if "CERTIFICATE" in str(error):
            return  # MLflow has settings of its own for certificates
        raise UserError(
            f"tracking.uri {without_credentials(uri)!r}: no MLflow server answers ({error}); "
            "start it, correct the address, or remove it to keep runs in the workspace."
        ) from error
