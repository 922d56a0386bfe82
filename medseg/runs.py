"""The identity of a run: one id for its folder `runs/<id>/`, its MLflow run and its flow run.

`run.json` says what the run is, where it stands and on what it ran. A process that works on a run holds a lock on its
folder; the system drops that lock when the process dies, however it dies, so a run that says RUNNING without a lock is
dead. The lock needs no heartbeat and works across containers that share the file system.
"""

import errno
import fcntl
import os
import platform
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Literal

from medseg.files import UserError, read_json, write_json

Status = Literal["CREATED", "RUNNING", "FINISHED", "FAILED", "INTERRUPTED"]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PACKAGES = (
    "medseg", "torch", "monai", "numpy", "scipy", "nibabel", "pydicom", "highdicom", "mlflow", "prefect",
)  # fmt: skip
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}  # some network file systems have none


@dataclass(frozen=True)
class RunFolder:
    """One run on disk: `path` is `<workspace>/runs/<id>`."""

    id: str
    path: Path
    workspace: Path


def new_run_id(name: str) -> str:
    """A new id, such as `20261121-101500-hippocampus-3f2a`: sorts by time (UTC), says what it is, is unique."""
    slug = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_")[:60] or "run"
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{slug}-{secrets.token_hex(2)}"


def create_run(workspace: Path, name: str, run_id: str | None = None, **facts: object) -> RunFolder:
    """Make `runs/<id>/run.json` with status CREATED; work on it starts with `medseg.tracking.track`.

    Args:
        name: what is run, usually the name of the config.
        run_id: identity given from outside; letters, digits, `.`, `_` and `-`. By default a new one.
        facts: more entries of run.json, such as `step`, `seed`, `cohort_sha256`.

    Raises:
        UserError: the id is taken or cannot name a folder; the workspace cannot be written.
    """
    if run_id is not None and not _ID.fullmatch(run_id):
        raise UserError(f"run id {run_id!r} cannot name a folder; use letters, digits, '.', '_' and '-', 128 at most.")
    folder = _make_folder(workspace, name, run_id)
    about: dict[str, object] = {"id": folder.id, "name": name, "status": "CREATED", "created": utc_now()}
    about |= {"git": git_revision(), "machine": machine_facts(), "packages": package_versions(), **facts}
    write_json(folder.path / "run.json", about)
    return folder


def read_run(folder: RunFolder) -> dict[str, Any]:
    """The content of run.json. Raises UserError when it is missing or not JSON."""
    about = read_json(folder.path / "run.json")
    if not isinstance(about, dict):
        raise UserError(f"{folder.path / 'run.json'} holds no facts of a run; restore it, or start a new run.")
    return about


def update_run(folder: RunFolder, **facts: object) -> None:
    """Set entries of run.json, atomically; None removes one. Only the process that holds the run may call it."""
    about = {**read_run(folder), **facts}
    write_json(folder.path / "run.json", {key: value for key, value in about.items() if value is not None})


def find_run(workspace: Path, run_id: str) -> RunFolder:
    """The run with this id. Raises UserError that lists the nearest ids there are."""
    folder = RunFolder(run_id, workspace / "runs" / run_id, workspace)
    if _ID.fullmatch(run_id) and (folder.path / "run.json").is_file():
        return folder
    known = [run.id for run in list_runs(workspace)]
    near = get_close_matches(run_id, known, n=3, cutoff=0.4) or known[:3]
    hint = f"nearest: {', '.join(near)}" if near else "there is no run yet; `medseg train` makes one"
    raise UserError(f"run {run_id!r} is not in {workspace / 'runs'} ({hint}).")


def list_runs(workspace: Path) -> tuple[RunFolder, ...]:
    """All runs of a workspace, the newest id first."""
    found = sorted((workspace / "runs").glob("*/run.json"), reverse=True)
    return tuple(RunFolder(path.parent.name, path.parent, workspace) for path in found)


@contextmanager
def hold_run(folder: RunFolder, wait_s: float = 2.0) -> Iterator[None]:
    """Hold the run for this process until the block ends.

    Args:
        wait_s: how long another process may still hold it.

    Raises:
        UserError: another process holds the run.
    """
    try:
        file = (folder.path / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"{folder.path} cannot be written ({error.strerror}); choose a folder you may write to."
        ) from error
    with file:
        end = time.monotonic() + wait_s
        while not _try_lock(file):
            if time.monotonic() >= end:
                pid = read_run(folder).get("pid", "unknown")
                raise UserError(
                    f"run {folder.id!r} is being worked on by process {pid}; wait for it, or stop it first."
                )
            time.sleep(0.05)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a forked child has the file too


def process_facts() -> dict[str, object]:
    """This process's id and start time (UTC), for people who look for it."""
    import psutil

    started = datetime.fromtimestamp(psutil.Process().create_time(), UTC)
    return {"pid": os.getpid(), "process_started": started.isoformat(timespec="seconds")}


def machine_facts() -> dict[str, object]:
    """Cores this process may use, memory in GB, GPU names, system; nothing that names the machine."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = min(psutil.virtual_memory().total, container_memory())
    return {
        "cores": cores,
        "memory_gb": round(memory / 1e9, 1),
        "gpus": _gpu_names(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


@cache
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def git_revision() -> str:
    """Commit of the source checkout, with `-dirty` when tracked files differ; empty outside a checkout."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists() or not (checkout / "pyproject.toml").is_file():
        return ""
    revision = _git(checkout, "rev-parse", "HEAD")
    if not revision:
        return ""
    return f"{revision}-dirty" if _git(checkout, "status", "--porcelain", "--untracked-files=no") else revision


def utc_now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _make_folder(workspace: Path, name: str, run_id: str | None) -> RunFolder:
    while True:
        chosen = run_id or new_run_id(name)
        path = workspace / "runs" / chosen
        try:
            path.mkdir(parents=True)
        except FileExistsError as error:
            if run_id is None and path.exists():
                continue  # two runs in one second drew one suffix
            raise UserError(
                f"run id {chosen!r} is taken in {workspace / 'runs'}; resume it, or give another."
            ) from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"{path} cannot be made ({reason}); choose a --workspace you may write to.") from error
        return RunFolder(chosen, path, workspace)


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def container_memory() -> int:
    """Memory limit of the control group in bytes, or the largest integer where there is none."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return sys.maxsize


def _gpu_names() -> list[str]:
    """From the driver's own files: loading torch for this would cost seconds."""
    described = [path.read_text(errors="replace") for path in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    return sorted(name.strip() for text in described for name in re.findall(r"^Model:(.*)$", text, re.MULTILINE))


def _git(checkout: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
