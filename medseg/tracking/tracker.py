"""What a step may say about its run while it works."""

import json
import math
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medseg.cohort import Cohort
from medseg.files import UserError, dump_json, read_json
from medseg.runs import RunFolder, package_versions
from medseg.tracking.registry import ModelVersion, version_facts
from medseg.tracking.store import Store, without_credentials

LOADER = "medseg.predict.pyfunc"  # its `_load_pyfunc` opens a bundle

_MAX_NAME, _MAX_PARAM, _MAX_DIGEST, _MAX_DESCRIPTION = 250, 6000, 36, 5000  # MLflow's limits
_PARAMS_PER_CALL, _METRICS_PER_CALL = 100, 1000
_RETRY_AFTER_S = 60.0  # MLflow itself tries for two minutes each time
_REQUIRED = ("medseg", "torch", "monai", "numpy", "scipy", "nibabel", "pydicom", "mlflow")


class Tracker:
    """One run in MLflow.

    While the store is out of reach, what was to be logged is kept and sent later: a training of days does not die of
    a server that restarts. What MLflow refuses as wrong is raised at once.

    Attributes:
        mlflow_run_id: the id MLflow gave the run.
        url: the run's page, for people.
    """

    def __init__(self, store: Store, run: RunFolder, experiment_id: str, mlflow_run_id: str) -> None:
        self.mlflow_run_id = mlflow_run_id
        self.url = store.run_url(experiment_id, mlflow_run_id)
        self._store, self._run, self._experiment_id = store, run, experiment_id
        self._waiting: list[Callable[[], object]] = []
        self._retry_at = 0.0

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log a nested mapping under dotted names; lists as JSON, long values cut, passwords in addresses dropped."""
        from mlflow.entities import Param

        flat = [Param(_name(key), _cut(_shown(value), _MAX_PARAM)) for key, value in flatten(params).items()]
        for chunk in _chunks(flat, _PARAMS_PER_CALL):
            self._send(partial(self._client.log_batch, self.mlflow_run_id, params=chunk))

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log finite numbers at a step; the others are named in the tag `medseg.not_finite`."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        rows = [Metric(_name(name), value, now_ms, step) for name, value in finite.items()]
        for chunk in _chunks(rows, _METRICS_PER_CALL):
            self._send(partial(self._client.log_batch, self.mlflow_run_id, metrics=chunk))
        if dropped := sorted(set(metrics) - set(finite)):
            self.set_tag("medseg.not_finite", f"step {step}: {', '.join(dropped)}")

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Keep a file, or a folder with all below it, under `folder` among the run's artifacts.

        Raises:
            UserError: there is no such file.
        """
        if not path.exists():
            raise UserError(f"{path} is missing, so it cannot be kept with run {self._run.id!r}; run its step again.")
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        self._send(lambda: path.exists() and log(self.mlflow_run_id, str(path), folder or None))

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as the artifact `name`."""
        self._send(partial(self._client.log_text, self.mlflow_run_id, text, name))

    def set_tag(self, name: str, value: str) -> None:
        """Set one tag."""
        self._send(partial(self._client.set_tag, self.mlflow_run_id, name, value))

    def log_cohort(self, cohort: Cohort, context: str) -> None:
        """Name the cohort as the run's input by its hash and counts; nothing of a patient, site or path.

        Args:
            context: what it is used for: train, or a split that is evaluated.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=f"cohort-{cohort.sha256[:8]}",
            digest=cohort.sha256[:_MAX_DIGEST],
            source_type="medseg-cohort",
            source=json.dumps({"sha256": cohort.sha256}),
            profile=json.dumps(_profile(cohort)),
        )
        used = DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
        self._send(partial(self._client.log_inputs, self.mlflow_run_id, [used]))

    def log_bundle(self, bundle_dir: Path, register_as: str) -> ModelVersion | None:
        """Keep the bundle as an MLflow model that loads without pickle; register it where a name is given.

        Returns:
            The new version, or None when `register_as` is empty.
        """
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        about = read_json(bundle_dir / "bundle.json")
        tags = {"medseg.bundle_sha256": str(about["sha256"]), "medseg.run_id": self._run.id}
        model = self._client.create_logged_model(
            self._experiment_id, "bundle", source_run_id=self.mlflow_run_id, tags=tags, model_type="medseg"
        )
        with tempfile.TemporaryDirectory(prefix="medseg-") as scratch:
            folder = Path(scratch) / "model"
            _save_model(bundle_dir, folder, model, self.mlflow_run_id, tags)
            self._client.log_model_artifacts(model.model_id, str(folder))
        self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        self._client.log_outputs(self.mlflow_run_id, [LoggedModelOutput(model.model_id, step=0)])
        return self._register(register_as, model, bundle_dir, tags) if register_as else None

    def close(self, status: str, cause: str = "", details: str = "") -> bool:
        """Send what waits and end the run with MLflow's `status`; False when the store was out of reach.

        Args:
            cause: why it failed, in one line. details: the artifact failure.txt.
        """
        from mlflow.exceptions import MlflowException

        self._retry_at = 0.0
        try:
            if cause:
                self.set_tag("medseg.failure", cause)
                self.log_text(details, "failure.txt")
            self._send(partial(self._client.set_terminated, self.mlflow_run_id, status))
        except (MlflowException, OSError):
            return False
        return not self._waiting

    @property
    def _client(self) -> Any:
        return self._store.client

    def _register(self, name: str, model: Any, bundle_dir: Path, tags: dict[str, str]) -> ModelVersion:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name, tags={"medseg": "bundle"})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        card = bundle_dir / "MODEL_CARD.md"
        made = self._client.create_model_version(
            name,
            model.artifact_location,  # sqlite would look up `models:/<id>` in MLflow's global store, not in this one
            run_id=self.mlflow_run_id,
            tags=tags,
            description=_cut(card.read_text(encoding="utf-8"), _MAX_DESCRIPTION) if card.is_file() else None,
            model_id=model.model_id,
        )
        return version_facts(made)

    def _send(self, action: Callable[[], object]) -> None:
        """Do this after all that waits; where the store is out of reach, leave it for a later call."""
        from mlflow.exceptions import MlflowException

        self._waiting.append(action)
        if time.monotonic() < self._retry_at:
            return
        while self._waiting:
            try:
                self._waiting[0]()
            except (MlflowException, OSError) as error:
                if isinstance(error, MlflowException) and error.get_http_status_code() < 500:
                    del self._waiting[0]
                    raise
                if not self._retry_at:
                    reason = " ".join(str(error).split())[:200]
                    print(f"Warning: MLflow is out of reach ({reason}); logs are kept and sent later.", file=sys.stderr)
                self._retry_at = time.monotonic() + _RETRY_AFTER_S
                return
            del self._waiting[0]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names; an empty mapping stays as a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _save_model(bundle_dir: Path, folder: Path, model: Any, mlflow_run_id: str, tags: dict[str, str]) -> None:
    """Write the bundle in MLflow's model format: data and the name of its loader, no code object."""
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    described = Model(run_id=mlflow_run_id, model_uuid=model.model_id, model_id=model.model_id, metadata=tags)
    described.signature = ModelSignature(inputs=Schema([ColSpec(DataType.string, "path")]))
    versions = package_versions()
    mlflow.pyfunc.save_model(
        folder,
        loader_module=LOADER,
        data_path=str(bundle_dir),
        mlflow_model=described,
        pip_requirements=[f"{name}=={versions[name].partition('+')[0]}" for name in _REQUIRED],  # less +cpu, +cu130
    )
    for cached in folder.rglob("__pycache__"):
        shutil.rmtree(cached)


def _profile(cohort: Cohort) -> dict[str, object]:
    return {
        "num_rows": len(cohort.cases),
        "patients": len({case.patient_id for case in cohort.cases}),
        "splits": Counter(case.split or "unassigned" for case in cohort.cases),
        "labels": list(cohort.label_names),
        "channels": list(cohort.channels),
    }


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else dump_json(value)
    return without_credentials(text)


def _name(text: str) -> str:
    return re.sub(r"[^/\w.\- :]", "_", text)[:_MAX_NAME]


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _chunks(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
