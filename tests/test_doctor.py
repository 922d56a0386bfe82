import http.server
import importlib.metadata
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from medseg import doctor
from medseg.doctor import Diagnosis, Finding
from medseg.files import dump_json
from medseg.result import EXIT_DONE, EXIT_USAGE


class _Server(http.server.BaseHTTPRequestHandler):
    """Answers /health; `/late` is an hour behind, `/locked` asks who you are, anything else is not there."""

    def do_GET(self) -> None:
        codes = {"/health": 200, "/api/health": 200, "/late/health": 200, "/locked/health": 401}
        self.send_response_only(codes.get(self.path, 404))
        self.send_header("Date", formatdate(time.time() - 3600 * self.path.startswith("/late"), usegmt=True))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server_url() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)


def test_this_machine_is_fit_and_every_finding_is_complete(tmp_path: Path) -> None:
    findings = doctor.diagnose(tmp_path / "new" / "workspace")
    assert [finding for finding in findings if finding.status == "fail"] == []
    codes = [finding.code for finding in findings]
    assert len(set(codes)) == len(codes)
    assert {"python", "package-monai", "torch", "flows", "disk", "mlflow", "prefect", "locale"} <= set(codes)
    assert all(finding.remedy for finding in findings if finding.status != "ok")
    assert not (tmp_path / "new").exists(), "a diagnosis changes nothing"


def test_a_failure_exits_with_2_and_keeps_its_findings_in_the_json() -> None:
    ok = Finding("python", "ok", "Python 3.12")
    warn = Finding("disk", "warn", "3 GB free", "free space")
    fail = Finding("torch", "fail", "torch is missing", "pip install torch")
    assert Diagnosis("doctor", "done", findings=(ok, warn)).exit_code == EXIT_DONE
    unfit = Diagnosis("doctor", "partial", findings=(ok, warn, fail))
    assert unfit.exit_code == EXIT_USAGE
    assert json.loads(dump_json(unfit))["findings"][2] == {
        "code": "torch", "status": "fail", "what": "torch is missing", "remedy": "pip install torch",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), "fail"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "fail")]
)
def test_python_range(version: tuple[int, int], status: str) -> None:
    assert doctor.check_python(version).status == status


def test_required_packages_are_those_of_the_project_without_extras() -> None:
    names = {requirement.name for requirement in doctor.required_packages()}
    assert {"torch", "monai", "mlflow", "prefect"} <= names
    assert "torchvision" not in names


def test_packages_missing_old_and_fitting() -> None:
    version = importlib.metadata.version("pydicom")
    wanted = [Requirement("no-such-package>=1"), Requirement("pydicom<2"), Requirement(f"pydicom=={version}")]
    missing, old, fitting = doctor.check_packages(wanted)
    assert (missing.status, missing.code) == ("fail", "package-no-such-package")
    assert 'pip install "no-such-package>=1"' in missing.remedy
    assert old.status == "fail"
    assert version in old.what
    assert "<2" in old.what
    assert fitting == Finding("package-pydicom", "ok", f"pydicom {version}")


def test_a_package_that_does_not_load_is_told_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor.check_torch()
    assert finding.status == "fail"
    assert "libtorch is broken" in finding.what


def test_workspace_below_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = doctor.check_writable(tmp_path / "file" / "workspace")
    assert finding.status == "fail"
    assert "--workspace" in finding.remedy
    assert doctor.check_writable(tmp_path).status == "ok"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_workspace_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    assert doctor.check_writable(tmp_path / "ws").status == "fail"


def test_disk_levels(tmp_path: Path) -> None:
    free_gb = shutil.disk_usage(tmp_path).free / 1e9
    assert doctor.check_disk(tmp_path / "not-yet", low_gb=free_gb / 2, least_gb=0).status == "ok"
    assert doctor.check_disk(tmp_path, low_gb=free_gb * 2, least_gb=0).status == "warn"
    assert doctor.check_disk(tmp_path, low_gb=free_gb * 2, least_gb=free_gb * 2).status == "fail"


def test_the_innermost_mount_decides_about_sqlite(tmp_path: Path) -> None:
    mounts = [("/", "ext4"), (str(tmp_path), "nfs4"), (str(tmp_path / "local"), "xfs")]
    (tmp_path / "local").mkdir()
    assert doctor.check_filesystem(tmp_path / "ws", mounts).status == "warn"
    assert "nfs4" in doctor.check_filesystem(tmp_path / "ws", mounts).what
    assert doctor.check_filesystem(tmp_path / "local" / "ws", mounts).status == "ok"
    (tmp_path / "link").symlink_to(tmp_path / "local")
    assert doctor.check_filesystem(tmp_path / "link", mounts).status == "ok"


def test_memory_is_the_smaller_of_machine_and_container(tmp_path: Path) -> None:
    machine = doctor.memory_limit_bytes(tmp_path / "none")
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "small").write_text("2000000000\n")
    assert doctor.memory_limit_bytes(tmp_path / "max") == machine > 0
    assert doctor.memory_limit_bytes(tmp_path / "small") == min(machine, 2_000_000_000)
    assert doctor.check_memory(2_000_000_000).status == "warn"
    assert doctor.check_memory(16_000_000_000).status == "ok"


def test_small_shared_memory_is_told(tmp_path: Path) -> None:
    assert doctor.check_shared_memory(tmp_path, least_gb=0.0).status == "ok"
    assert "--shm-size" in doctor.check_shared_memory(tmp_path, least_gb=1e9).remedy
    assert doctor.check_shared_memory(tmp_path / "none").status == "ok"


def test_servers_answer_or_are_told(server_url: str, tmp_path: Path) -> None:
    assert doctor.check_store("", tmp_path).status == "ok"
    assert doctor.check_store("sqlite:////data/mlflow.db", tmp_path).status == "ok"
    assert doctor.check_store(server_url, tmp_path).status == "ok"
    assert doctor.check_prefect(f"{server_url}/api").status == "ok"
    assert doctor.check_prefect(f"{server_url}/locked").status == "ok", "it is there, and asks who comes"
    assert "404" in doctor.check_prefect(f"{server_url}/wrong").what
    late = doctor.check_store(f"{server_url}/late", tmp_path)
    assert late.status == "warn"
    assert 3590 < int(re.findall(r"is (\d+) s away", late.what)[0]) < 3610


def test_silent_and_foreign_servers_fail_with_a_remedy_and_without_the_password(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        finding = doctor.check_store(f"http://user:secret@127.0.0.1:{port}", tmp_path)
    assert finding.status == "fail"
    assert "medseg up" in finding.remedy
    assert "secret" not in finding.what
    with socket.socket() as foreign:
        foreign.bind(("127.0.0.1", 0))
        foreign.listen(1)

        def answer() -> None:
            connection, _ = foreign.accept()
            connection.sendall(b"SSH-2.0-OpenSSH\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        assert doctor.check_prefect(f"http://127.0.0.1:{foreign.getsockname()[1]}/api").status == "fail"
    assert doctor.check_prefect("no address").status == "fail"


@pytest.mark.parametrize(
    ("environment", "status"),
    [
        ({}, "ok"),
        ({"HTTP_PROXY": "http://proxy:3128"}, "warn"),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "localhost, 127.0.0.1"}, "ok"),
        ({"http_proxy": "http://proxy:3128", "NO_PROXY": "*"}, "ok"),
        ({"http_proxy": "http://proxy:3128", "NO_PROXY": "example.org"}, "warn"),
        ({"https_proxy": "http://proxy:3128"}, "ok"),
    ],
)
def test_proxy_before_local_servers(environment: dict[str, str], status: str) -> None:
    assert doctor.check_proxy(environment).status == status


def test_clock_before_the_installation_is_told() -> None:
    assert doctor.check_clock(time.time()).status == "ok"
    past = doctor.check_clock(0.0)
    assert past.status == "warn"
    assert "1970" in past.what


def test_locale_other_than_utf8_is_told() -> None:
    assert doctor.check_locale("utf-8", "UTF-8").status == "ok"
    assert "ANSI_X3.4-1968" in doctor.check_locale("utf-8", "ANSI_X3.4-1968").what


def test_importing_the_doctor_loads_nothing_heavy() -> None:
    heavy = {"torch", "monai", "mlflow", "prefect", "numpy"}
    code = f"import sys, medseg.doctor, medseg.services; print({heavy} & set(sys.modules))"
    assert doctor._probe(code) == (True, "set()")
