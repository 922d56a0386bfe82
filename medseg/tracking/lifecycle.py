"""A run from its start to its end, however it ends.

Whatever happens, a run that is dead is neither RUNNING nor FINISHED: an exception or a signal is recorded on the way
out; after a SIGKILL or the out-of-memory killer, a watcher process records it; after a power cut, the next run in the
workspace does.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from medseg.config import TrackingConfig
from medseg.files import UserError, write_text
from medseg.runs import (
    RunFolder,
    Status,
    git_revision,
    hold_run,
    list_runs,
    process_facts,
    read_run,
    update_run,
    utc_now,
)
from medseg.tracking.failure import Failure, describe_failure
from medseg.tracking.store import Store, open_store, store_name, tracking_uri
from medseg.tracking.tracker import Tracker

NO_CLEAN_END = "killed (no clean end): SIGKILL, out of memory or power cut"
_MLFLOW_STATUS: dict[Status, str] = {"FINISHED": "FINISHED", "FAILED": "FAILED", "INTERRUPTED": "KILLED"}
_WATCHER_EXIT_S = 10
_SYSTEM_METRICS_EVERY_S = 10


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came: stop as on Ctrl-C."""


@contextmanager
def track(
    run: RunFolder, config: TrackingConfig, *, tags: Mapping[str, str] | None = None, resume: bool = False
) -> Iterator[Tracker]:
    """Work on a run: RUNNING inside the block, and at its end FINISHED, FAILED or INTERRUPTED with the cause.

    MLflow's id of the run and its page are written into run.json.

    Args:
        tags: more tags of the MLflow run.
        resume: re-open the MLflow run named in run.json.

    Raises:
        UserError: another process works on the run, the store is out of reach, or `register_as` is malformed.
    """
    if any(sign in config.register_as for sign in "/:@"):
        raise UserError(f"tracking.register_as {config.register_as!r} may not hold '/', ':' or '@'; rename it.")
    uri = tracking_uri(run.workspace, config)
    with hold_run(run), _watched(run, uri) as say_ended:
        update_run(run, status="RUNNING", failure=None, ended=None, **process_facts())
        tracker: Tracker | None = None
        try:
            with _signals_raise():
                store = open_store(run.workspace, config)
                close_dead_runs(run.workspace, config)
                tracker = _open_run(store, run, config, dict(tags or {}), resume)
                with _system_metrics(tracker, uri, config.system_metrics, resume):
                    yield tracker
        except BaseException as error:
            status: Status = "FAILED" if isinstance(error, Exception) else "INTERRUPTED"
            failure = describe_failure(error, run.workspace)
            with suppress(UserError):  # a full disk must not hide the error that is on its way out
                write_text(run.path / "failure.txt", failure.full)
                _end(run, tracker, status, failure)
                say_ended()
            raise
        _end(run, tracker, "FINISHED")
        say_ended()


def close_dead_runs(workspace: Path, config: TrackingConfig) -> tuple[str, ...]:
    """Mark runs FAILED whose process is gone, on disk and in MLflow, and close those that MLflow missed the end of.

    Runs tracked in another store than the one meant by `config` are left alone.

    Returns:
        The ids of the runs that were closed.
    """
    store = store_name(tracking_uri(workspace, config), workspace)
    closed = []
    for run in list_runs(workspace):
        with suppress(UserError):  # an unreadable run.json is not this run's trouble
            about = read_run(run)
            unfinished = about.get("status") == "RUNNING" or about.get("mlflow_open")
            if unfinished and about.get("mlflow_store", store) == store and close_dead_run(run, config, wait_s=0):
                closed.append(run.id)
    return tuple(closed)


def close_dead_run(run: RunFolder, config: TrackingConfig, wait_s: float = 60.0) -> bool:
    """Mark one run FAILED if it is RUNNING without a process, and tell MLflow.

    Args:
        wait_s: how long its process may still need to die.

    Returns:
        True when the run was closed; False when it was closed before, is alive, or MLflow is out of reach.
    """
    from mlflow.exceptions import MlflowException

    try:
        with hold_run(run, wait_s):
            return _close_dead(run, config)
    except (UserError, MlflowException, OSError):
        return False


def run_url(run: RunFolder) -> str:
    """The run's page in MLflow, or an empty text before it was tracked; for a local store, where `medseg up` is."""
    return str(read_run(run).get("mlflow_url", ""))


def _open_run(store: Store, run: RunFolder, config: TrackingConfig, tags: dict[str, str], resume: bool) -> Tracker:
    about = read_run(run)
    if not resume and "mlflow_run_id" in about:
        raise UserError(f"run {run.id!r} was worked on before; resume it, or start a new run.")
    sessions = int(about.get("sessions", 0)) + 1
    tags = {**_tags(run, about, sessions), **tags}
    known = _find_mlflow_run(store, about.get("mlflow_run_id"))
    if known is None:
        known = store.client.create_run(store.experiment_id(config.experiment), run_name=run.id, tags=tags)
    mlflow_run_id, experiment_id = known.info.run_id, known.info.experiment_id
    tracker = Tracker(store, run, experiment_id, mlflow_run_id)
    update_run(
        run,
        sessions=sessions,
        mlflow_run_id=mlflow_run_id,
        mlflow_experiment_id=experiment_id,
        mlflow_store=store_name(store.uri, run.workspace),
        mlflow_url=tracker.url,
        mlflow_open=True,
    )
    if sessions > 1:
        store.client.update_run(mlflow_run_id, status="RUNNING")
        for name, value in tags.items():
            store.client.set_tag(mlflow_run_id, name, value)
        if "medseg.failure" in known.data.tags:
            store.client.delete_tag(mlflow_run_id, "medseg.failure")
    return tracker


def _find_mlflow_run(store: Store, mlflow_run_id: str | None) -> Any:
    """The run in MLflow, or None when this store has none or has it in the bin."""
    from mlflow.exceptions import MlflowException

    if mlflow_run_id is None:
        return None
    try:
        found = store.client.get_run(mlflow_run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return found if found.info.lifecycle_stage == "active" else None


def _tags(run: RunFolder, about: Mapping[str, Any], sessions: int) -> dict[str, str]:
    revision = git_revision()
    tags = {
        "medseg.run_id": run.id,
        "medseg.step": about.get("step", ""),
        "medseg.sessions": str(sessions),
        "medseg.git": revision,
        "mlflow.source.git.commit": revision.removesuffix("-dirty"),
        "mlflow.source.name": "medseg",
        "mlflow.source.type": "LOCAL",
        "prefect.flow_run_id": os.environ.get("PREFECT__FLOW_RUN_ID", ""),
    }
    return {name: str(value) for name, value in tags.items() if value}


def _end(run: RunFolder, tracker: Tracker | None, status: Status, failure: Failure | None = None) -> None:
    """Record the end on disk first, so that the next run can close here what MLflow misses now."""
    update_run(run, status=status, failure=failure.cause if failure else None, ended=utc_now())
    if tracker is None:
        return
    cause, details = (failure.cause, failure.details) if failure else ("", "")
    if tracker.close(_MLFLOW_STATUS[status], cause, details):
        update_run(run, mlflow_open=None)
    else:
        print(f"Warning: MLflow missed the end of run {run.id}; the next run records it.", file=sys.stderr)


def _close_dead(run: RunFolder, config: TrackingConfig) -> bool:
    """Close a run that this process holds, if it is open still."""
    about = read_run(run)
    if about["status"] == "RUNNING":
        update_run(run, status="FAILED", failure=NO_CLEAN_END, ended=utc_now(), mlflow_open=True)
    elif not about.get("mlflow_open"):
        return False
    about = read_run(run)
    store = open_store(run.workspace, config)
    known = _find_mlflow_run(store, about.get("mlflow_run_id"))
    if known is not None:
        if about.get("failure"):
            store.client.set_tag(known.info.run_id, "medseg.failure", about["failure"])
        store.client.set_terminated(known.info.run_id, _MLFLOW_STATUS[about["status"]])
    update_run(run, mlflow_open=None)
    return True


@contextmanager
def _watched(run: RunFolder, uri: str) -> Iterator[Callable[[], None]]:
    """Keep a process that outlives this one and closes the run unless this one says that it has ended.

    It has a session of its own, so Ctrl-C in the terminal does not reach it; the address goes through the
    environment, since it may hold a password.
    """
    watcher = subprocess.Popen(
        [sys.executable, "-m", "medseg.watch", str(run.workspace), run.id],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": uri},
    )
    assert watcher.stdin is not None
    pipe = watcher.stdin
    said: list[bool] = []

    def say_ended() -> None:
        with suppress(OSError):  # the watcher itself may have been killed
            pipe.write(b"ended")
            pipe.close()
        said.append(True)

    try:
        yield say_ended
    finally:
        with suppress(OSError):
            pipe.close()
        if said:  # else it waits for this process to let the run go
            try:
                watcher.wait(_WATCHER_EXIT_S)
            except subprocess.TimeoutExpired:
                watcher.kill()


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `Terminated`, where nobody else handles them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise Terminated(signal.Signals(number).name)

    taken = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _system_metrics(tracker: Tracker, uri: str, wanted: bool, resume: bool) -> Iterator[None]:
    """Sample processor, memory, disk, network and, where its driver is readable, GPU into the run."""
    if not wanted:
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        tracker.mlflow_run_id,
        sampling_interval=_SYSTEM_METRICS_EVERY_S,
        resume_logging=resume,
        tracking_uri=uri,
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
