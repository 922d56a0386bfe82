import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from medseg import services
from medseg.files import UserError
from medseg.guard import living
from medseg.services import HOST, Services, running_services, up


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as busy:
        busy.bind((HOST, 0))
        busy.listen(1)
        yield busy.getsockname()[1]


def get(url: str, body: object = None) -> object:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
        return json.loads(response.read())


def group_is_gone(leader: int) -> bool:
    return not living(leader)


def port_is_free(url: str) -> bool:
    return not services.answers(url) and services._claim_ports(any=int(url.rsplit(":", 1)[1])) != {}


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


def check_both_serve(running: Services, workspace: Path) -> None:
    experiments = get(f"{running.mlflow_uri}/api/2.0/mlflow/experiments/search?max_results=5")
    assert isinstance(experiments, dict)
    assert experiments["experiments"][0]["artifact_location"].startswith((workspace / "artifacts").as_uri())
    assert (workspace / "mlflow.db").is_file()

    assert get(f"{running.prefect_api_url}/flows/filter", body={}) == []
    ui = get(f"{running.prefect_ui_url}/ui-settings")
    assert isinstance(ui, dict)
    assert ui["api_url"] == running.prefect_api_url, "Prefect's pages must ask this server, not the default port"
    assert (workspace / "prefect" / "prefect.db").is_file()


def test_pair_serves_from_the_workspace_and_a_killed_server_is_noticed(tmp_path: Path) -> None:
    workspace = tmp_path / "work space"
    with running_services(workspace) as running:
        assert running.failure() is None
        check_both_serve(running, workspace)
        mlflow = next(pid for pid in living(running.pids["mlflow"]) if pid != running.pids["mlflow"])
        os.kill(mlflow, signal.SIGKILL)
        assert wait_until(lambda: running.failure() is not None, 60)
        cause = str(running.failure())
        assert "MLflow server was killed by SIGKILL" in cause
        assert str(workspace / "logs" / "mlflow.log") in cause
        assert "Uvicorn running" in cause, "the end of its log belongs to the message"

    assert all(group_is_gone(pid) for pid in running.pids.values())
    assert port_is_free(running.mlflow_uri)
    assert port_is_free(running.prefect_ui_url)


UP = """
from pathlib import Path
from medseg.files import dump_json
from medseg.services import up
print(dump_json(up(Path({workspace!r}), mlflow_port=0, prefect_port=0)))
"""


@contextlib.contextmanager
def up_in_a_shell(workspace: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """`up` in a process of its own, once it has announced its addresses, and the leaders of its servers' groups."""
    command = [sys.executable, "-c", UP.format(workspace=str(workspace))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Ctrl-C"):
                break
        try:
            yield process, [child.pid for child in psutil.Process(process.pid).children()]
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_up_ends_cleanly_on_a_signal(tmp_path: Path, signal_number: int) -> None:
    with up_in_a_shell(tmp_path) as (process, leaders):
        process.send_signal(signal_number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        result = json.loads(output.splitlines()[-1])
        assert result["status"] == "done"
        assert port_is_free(result["figures"]["mlflow_uri"])
        assert len(leaders) == 2
        assert all(group_is_gone(leader) for leader in leaders)
    assert "Application shutdown complete" in (tmp_path / "logs" / "mlflow.log").read_text()


@pytest.mark.slow
def test_up_stops_the_other_server_when_one_is_killed(tmp_path: Path) -> None:
    with up_in_a_shell(tmp_path) as (process, leaders):
        os.kill(leaders[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "ChildProcessError: The Prefect server was killed by SIGKILL" in errors
        assert all(group_is_gone(leader) for leader in leaders)


@pytest.mark.slow
def test_killing_up_itself_leaves_no_orphan(tmp_path: Path) -> None:
    with up_in_a_shell(tmp_path) as (process, leaders):
        process.kill()
        process.communicate(timeout=60)
        assert wait_until(lambda: all(group_is_gone(leader) for leader in leaders), 60)


def test_taken_port_is_one_sentence_and_leaves_nothing(tmp_path: Path, taken_port: int) -> None:
    with pytest.raises(UserError, match=rf"--prefect-port {taken_port} .*in use.*--prefect-port 0"):
        up(tmp_path / "ws", mlflow_port=0, prefect_port=taken_port)
    assert not (tmp_path / "ws").exists()


def test_same_port_twice_and_impossible_port_are_refused() -> None:
    free = services._claim_ports(any=0)["any"]
    with pytest.raises(UserError, match="--prefect-port"):
        services._claim_ports(mlflow=free, prefect=free)
    with pytest.raises(UserError, match="ports are 0 to 65535"):
        services._claim_ports(mlflow=70000)


def test_workspace_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ws").write_text("")
    with pytest.raises(UserError, match=r"ws.*--workspace"), running_services(tmp_path / "ws"):
        pass


def start_plain_server(folder: Path, port: int) -> services._Server:
    """A real server that starts in no time, behind the same guard."""
    command = ["http.server", "--bind", HOST, str(port)]
    return services._start("Plain", command, {}, folder, folder / "plain.log", f"http://{HOST}:{port}/")


def test_server_that_dies_at_start_is_reported_with_its_log(tmp_path: Path, taken_port: int) -> None:
    server = start_plain_server(tmp_path, taken_port)
    with pytest.raises(ChildProcessError, match=r"(?s)stopped with exit code 1.*plain\.log.*Address already in use"):
        services._await_answers([server])
    services._stop([server])


def test_server_that_never_answers_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_START_S", 0.3)
    port = services._claim_ports(any=0)["any"]
    server = services._start("Mute", ["timeit", "-n1", "-r1", "import time; time.sleep(60)"], {}, tmp_path,
                             tmp_path / "mute.log", f"http://{HOST}:{port}/")  # fmt: skip
    with pytest.raises(ChildProcessError, match=r"(?s)did not answer.*the log is empty"):
        services._await_answers([server])
    services._stop([server])
    assert group_is_gone(server.process.pid)


def test_stopping_ends_the_server_and_frees_its_port(tmp_path: Path) -> None:
    server = start_plain_server(tmp_path, services._claim_ports(any=0)["any"])
    services._await_answers([server])
    services._stop([server])
    assert group_is_gone(server.process.pid)
    assert port_is_free(server.health_url.rstrip("/"))


def test_settings_of_remote_servers_do_not_reach_the_local_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "https://prefect.example.org/api")
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql://example.org/mlflow")
    (tmp_path / "show_env.py").write_text("import json, os; print(json.dumps(dict(os.environ)))")
    server = services._start("Env", ["show_env"], {"PREFECT_HOME": "x"}, tmp_path, tmp_path / "env.log", "http://x")
    server.process.wait(60)
    seen = json.loads((tmp_path / "env.log").read_text())
    assert {name for name in seen if name.startswith(("MLFLOW_", "PREFECT_"))} == {"PREFECT_HOME"}
    assert seen["DO_NOT_TRACK"] == "true"
    services._stop([server])


def guard(command: str, folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "medseg.guard", str(folder), sys.executable, "-c", textwrap.dedent(command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_guard_passes_on_the_exit_code_as_a_shell_does(tmp_path: Path) -> None:
    assert guard("raise SystemExit(7)", tmp_path).wait(60) == 7
    assert guard("import os; os.kill(os.getpid(), 9)", tmp_path).wait(60) == 128 + 9


def test_guard_ends_grandchildren_when_its_pipe_closes(tmp_path: Path) -> None:
    parent = """
        import subprocess, sys, time
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(grandchild.pid, flush=True)
        time.sleep(60)
    """
    with guard(parent, tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        grandchild = int(process.stdout.readline())
        assert psutil.pid_exists(grandchild)
        process.stdin.close()
        process.wait(60)
        assert wait_until(lambda: not is_running(grandchild), 60)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
