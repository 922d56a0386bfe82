"""The MLflow and the Prefect server on this machine, started together and stopped together.

Both listen on the loopback address only and keep everything under the workspace. They run as child processes, so
that neither library is imported here. Each stands behind a guard (`medseg.guard`), so that even `kill -9` leaves no
orphan.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from medseg.files import UserError
from medseg.guard import GRACE_S, living
from medseg.result import Result

HOST = "127.0.0.1"
_START_S = 180.0  # the first start creates both databases, which a loaded machine does slowly
_TAIL_LINES = 15


@dataclass(frozen=True)
class _Server:
    name: str
    process: subprocess.Popen[bytes]
    log: Path
    health_url: str

    def failure(self) -> str | None:
        """Why this server is no longer running, with the end of its log; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        return f"The {self.name} server {_manner(code)}; its log {self.log} ends with:\n{_tail(self.log)}"


@dataclass(frozen=True)
class Services:
    """Both servers, answering.

    Attributes:
        mlflow_uri: for `MLFLOW_TRACKING_URI`, and the address of MLflow's pages.
        prefect_api_url: for `PREFECT_API_URL`.
        prefect_ui_url: the address of Prefect's pages.
        pids: process id of each server's guard, which leads the server's process group; by `mlflow`, `prefect`.
        logs: the folder with `mlflow.log` and `prefect.log`.
    """

    mlflow_uri: str
    prefect_api_url: str
    prefect_ui_url: str
    pids: Mapping[str, int]
    logs: Path
    _servers: tuple[_Server, ...] = field(repr=False, default=())

    @property
    def environment(self) -> dict[str, str]:
        """What another process needs in its environment to use these servers."""
        return {"MLFLOW_TRACKING_URI": self.mlflow_uri, "PREFECT_API_URL": self.prefect_api_url}

    def failure(self) -> str | None:
        """Why one of the servers is no longer running; None while both run."""
        return next((cause for server in self._servers if (cause := server.failure())), None)


def up(workspace: Path, mlflow_port: int = 5000, prefect_port: int = 4200) -> Result:
    """Run both servers until Ctrl-C or SIGTERM, then stop them.

    Args:
        workspace: where databases, artifacts and logs are kept; created if missing.
        mlflow_port: port on 127.0.0.1; 0 takes any free one.
        prefect_port: port on 127.0.0.1; 0 takes any free one.

    Returns:
        The addresses that were served and the folder of the logs.

    Raises:
        UserError: a port is taken, or the workspace cannot be written.
        ChildProcessError: a server did not start or died; the other one has been stopped.
    """
    _say("Starting the MLflow and Prefect servers …")
    with _sigterm_as_interrupt(), running_services(workspace, mlflow_port, prefect_port) as services:
        with suppress(KeyboardInterrupt):
            _announce(services)
            _watch(services)
        _say("Stopping both servers …")
    figures = {"mlflow_uri": services.mlflow_uri, "prefect_api_url": services.prefect_api_url}
    return Result("up", "done", paths={"logs": services.logs}, figures=figures)


@contextmanager
def running_services(workspace: Path, mlflow_port: int = 0, prefect_port: int = 0) -> Iterator[Services]:
    """Both servers, answering for as long as the block runs.

    Runs and flow runs are kept in `workspace` between calls: `mlflow.db` and `artifacts/` are the very files that
    medseg uses without a server, so one may change between the two at any time.

    Raises:
        UserError: a port is taken, or the workspace cannot be written.
        ChildProcessError: a server ended before it answered, or did not answer in time.
    """
    workspace = workspace.absolute()
    ports = _claim_ports(mlflow=mlflow_port, prefect=prefect_port)
    logs = _make_folder(workspace / "logs")
    servers: list[_Server] = []
    try:
        servers.append(_start_mlflow(workspace, ports["mlflow"], logs))
        servers.append(_start_prefect(workspace, ports["prefect"], logs))
        _await_answers(servers)
        yield Services(
            mlflow_uri=f"http://{HOST}:{ports['mlflow']}",
            prefect_api_url=f"http://{HOST}:{ports['prefect']}/api",
            prefect_ui_url=f"http://{HOST}:{ports['prefect']}",
            pids={server.name.lower(): server.process.pid for server in servers},
            logs=logs,
            _servers=tuple(servers),
        )
    finally:
        _stop(servers)


def answers(url: str, timeout_s: float = 2.0) -> bool:
    """Whether an HTTP GET of `url` succeeds; loopback addresses must not go through a proxy, so none is used."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=timeout_s) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _start_mlflow(workspace: Path, port: int, logs: Path) -> _Server:
    # A file root, not the artifact proxy: runs logged with and without this server then share one layout, and a
    # client on this machine (no other can reach the port) writes files itself. Proxied URIs resolve to it as well.
    artifacts = _make_folder(workspace / "artifacts").as_uri()
    arguments = ["--backend-store-uri", f"sqlite:///{workspace / 'mlflow.db'}"]
    arguments += ["--default-artifact-root", artifacts, "--artifacts-destination", artifacts]
    command = ["mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1", *arguments]
    settings = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # runners for language-model judges; nothing here uses them
    }
    return _start("MLflow", command, settings, workspace, logs / "mlflow.log", f"http://{HOST}:{port}/health")


def _start_prefect(workspace: Path, port: int, logs: Path) -> _Server:
    api = f"http://{HOST}:{port}/api"
    settings = {
        "PREFECT_HOME": str(_make_folder(workspace / "prefect")),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": api,  # its pages would ask port 4200 whatever the port
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }
    command = ["prefect", "server", "start", "--host", HOST, "--port", str(port)]
    return _start("Prefect", command, settings, workspace, logs / "prefect.log", f"{api}/health")


def _start(
    name: str, command: Sequence[str], settings: Mapping[str, str], workspace: Path, log: Path, health_url: str
) -> _Server:
    """Start `python -m command` in the workspace, behind a guard in a process group of its own."""
    # The caller's settings for remote servers must not reach the local ones.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PREFECT_"))}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "medseg.guard", str(workspace), sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**inherited, "DO_NOT_TRACK": "true", **settings},
            start_new_session=True,  # Ctrl-C in the terminal reaches us alone; we stop the servers in order
        )
    return _Server(name, process, log, health_url)


def _await_answers(servers: Sequence[_Server]) -> None:
    deadline = time.monotonic() + _START_S
    waiting = list(servers)
    while waiting:
        for server in servers:
            if cause := server.failure():
                raise ChildProcessError(cause)
        waiting = [server for server in waiting if not answers(server.health_url)]
        if waiting and time.monotonic() > deadline:
            late = waiting[0]
            raise ChildProcessError(
                f"The {late.name} server did not answer at {late.health_url} within {_START_S:.0f} s; "
                f"its log {late.log} ends with:\n{_tail(late.log)}"
            )
        time.sleep(0.1 if waiting else 0.0)


def _watch(services: Services) -> None:
    """Return never: interrupted by the user, or ended by a server's death."""
    while True:
        if cause := services.failure():
            raise ChildProcessError(cause)
        time.sleep(0.5)


def _stop(servers: Sequence[_Server]) -> None:
    for server in servers:
        if server.process.stdin is not None:
            server.process.stdin.close()
    for server in servers:
        try:
            code = server.process.wait(GRACE_S + 5.0)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        if code < 0:  # the guard could not clean up: its group may live on
            with suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
            deadline = time.monotonic() + GRACE_S
            while living(server.process.pid) and time.monotonic() < deadline:  # a signal is sent before it is obeyed
                time.sleep(0.05)


def _claim_ports(**wanted: int) -> dict[str, int]:
    """Check that the ports are free, replacing 0 by a free one; all are held until all are known."""
    ports = {}
    with ExitStack() as held:
        for name, port in wanted.items():
            probe = held.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
                probe.listen(1)
            except (OSError, OverflowError) as error:
                reason = error.strerror if isinstance(error, OSError) else "ports are 0 to 65535"
                raise UserError(
                    f"--{name}-port {port} on {HOST} cannot be used ({reason}); stop what uses it, "
                    f"choose another port, or give --{name}-port 0 for any free one."
                ) from error
            ports[name] = probe.getsockname()[1]
    return ports


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); choose another --workspace.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written; choose another --workspace or change its permissions.")
    return folder


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, which schedulers send, end the block the way Ctrl-C does."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _announce(services: Services) -> None:
    _say(f"MLflow   {services.mlflow_uri}")
    _say(f"Prefect  {services.prefect_ui_url}")
    _say(f"Logs     {services.logs}")
    _say("In another shell, to use them:")
    _say("  export " + " ".join(f"{name}={value}" for name, value in services.environment.items()))
    _say("Ctrl-C stops both.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:]) or "  (the log is empty)"


def _manner(code: int) -> str:
    number = -code if code < 0 else code - 128  # a guard passes on its server's signal as shells do
    if number <= 0:
        return f"stopped with exit code {code}"
    try:
        return f"was killed by {signal.Signals(number).name}"
    except ValueError:
        return f"stopped with exit code {code}"
