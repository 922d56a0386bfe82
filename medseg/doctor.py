"""What this machine lacks for medseg, and how to mend it. Every check is small, alone, and changes nothing."""

import http.client
import importlib.metadata
import json
import locale
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement
from packaging.version import Version

from medseg.files import UserError
from medseg.result import EXIT_USAGE, Result

_GB = 1e9
_NETWORK_FILESYSTEMS = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.sshfs", "glusterfs", "gpfs", "lustre",
    "ncpfs", "nfs", "nfs4", "smb3", "smbfs", "virtiofs",
}  # fmt: skip
_ANEW = "make the environment anew from requirements.lock"
_TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({"threads": torch.get_num_threads(), "cuda_build": torch.version.cuda,
                  "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []}))
"""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        code: the name of the check, stable for scripts: `python`, `torch`, `disk`, `package-monai` …
        status: `ok`; `warn`, medseg works but worse than it could; `fail`, something will not work.
        what: what was found, as one phrase.
        remedy: how to mend it; empty where there is nothing to mend.
    """

    code: str
    status: Literal["ok", "warn", "fail"]
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis(Result):
    """The findings as a step's result; it exits with 2 when one of them is `fail`."""

    findings: tuple[Finding, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 when nothing fails, else 2: the machine is not fit as it is."""
        return EXIT_USAGE if any(finding.status == "fail" for finding in self.findings) else super().exit_code


def run(workspace: Path) -> Diagnosis:
    """Diagnose, and show the findings on stderr as they come."""
    findings = []
    for finding in checks(workspace):
        _show(finding)
        findings.append(finding)
    counts = {status: sum(finding.status == status for finding in findings) for status in ("ok", "warn", "fail")}
    return Diagnosis("doctor", "partial" if counts["fail"] else "done", figures=counts, findings=tuple(findings))


def diagnose(workspace: Path) -> list[Finding]:
    """All findings about this machine, this environment and `workspace`, which is not created."""
    return list(checks(workspace))


def checks(workspace: Path) -> Iterator[Finding]:
    """The findings one by one, the slow ones (torch is loaded in a process of its own) among them."""
    workspace = workspace.absolute()
    yield check_python(sys.version_info[:2])
    yield from check_packages(required_packages())
    yield check_torch()
    yield check_torchvision()
    yield check_flows()
    yield check_dcm2niix()
    yield check_writable(workspace)
    yield check_disk(workspace)
    yield check_filesystem(workspace, [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)])
    yield check_memory(memory_limit_bytes())
    yield check_shared_memory(Path("/dev/shm"))
    yield check_store(os.environ.get("MLFLOW_TRACKING_URI", ""), workspace)
    yield check_prefect(os.environ.get("PREFECT_API_URL", ""))
    yield check_proxy(os.environ)
    yield check_clock(time.time())
    yield check_locale(sys.getfilesystemencoding(), locale.getpreferredencoding(False))


def check_python(version: tuple[int, ...]) -> Finding:
    """Python as (major, minor)."""
    text = ".".join(map(str, version))
    if (3, 11) <= version < (3, 14):
        return Finding("python", "ok", f"Python {text}")
    return Finding("python", "fail", f"Python {text} is not supported", "install Python 3.11, 3.12 or 3.13")


def required_packages() -> list[Requirement]:
    """What medseg requires: of a checkout its pyproject.toml (newer than what pip recorded of it), else the record.

    Raises:
        UserError: there is neither.
    """
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    try:
        if pyproject.is_file():
            lines = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
        else:
            lines = importlib.metadata.requires("medseg") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("medseg is a bare copy of its folder here; install it: pip install PATH_OF_CHECKOUT") from error
    requirements = [Requirement(line) for line in lines]
    return [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]


def check_packages(requirements: Iterable[Requirement]) -> Iterator[Finding]:
    """Each required package: installed, and of a supported version. Nothing is imported."""
    for requirement in requirements:
        code = f"package-{requirement.name}"
        remedy = f'pip install "{requirement}", or {_ANEW}'
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(code, "fail", f"{requirement.name} is not installed", remedy)
            continue
        if Version(version) in requirement.specifier:
            yield Finding(code, "ok", f"{requirement.name} {version}")
        else:
            needed = requirement.specifier
            yield Finding(code, "fail", f"{requirement.name} {version} is installed, {needed} is needed", remedy)


def check_torch() -> Finding:
    """Torch loads here, with how many threads and on which device; in a process of its own, since it may crash."""
    loaded, output = _probe(_TORCH_PROBE)
    if not loaded:
        return Finding("torch", "fail", f"torch does not load ({output})", _ANEW)
    facts: dict[str, Any] = json.loads(output)
    if facts["gpus"]:
        return Finding("torch", "ok", f"torch computes on {', '.join(facts['gpus'])} (CUDA {facts['cuda_build']})")
    what = f"torch computes on the CPU with {facts['threads']} threads"
    if Path("/dev/nvidia0").exists():
        fault = "its driver is too old for it" if facts["cuda_build"] else "torch is built for the CPU only"
        remedy = "update the NVIDIA driver" if facts["cuda_build"] else "install torch from PyPI or a CUDA index"
        return Finding("torch", "warn", f"{what} though this machine has a GPU: {fault}", remedy)
    return Finding("torch", "ok", what)


def check_torchvision() -> Finding:
    """Torchvision is optional, but one that does not fit torch breaks what would do without it."""
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return Finding("torchvision", "ok", "torchvision is not installed (optional)", 'pip install "medseg[vision]"')
    loaded, output = _probe("import torchvision")
    if loaded:
        return Finding("torchvision", "ok", f"torchvision {version}")
    remedy = "pip uninstall torchvision, or install the build that belongs to this torch"
    return Finding("torchvision", "warn", f"torchvision {version} does not load ({output})", remedy)


def check_flows() -> Finding:
    """Prefect's server loads: flows need it even when none is set, and unfit versions of its web framework break it."""
    with tempfile.TemporaryDirectory() as home:
        loaded, output = _probe("import prefect.server.api.server", PREFECT_HOME=home)
    if loaded:
        return Finding("flows", "ok", "Prefect loads with its server")
    return Finding("flows", "fail", f"Prefect's server does not load ({output})", _ANEW)


def check_dcm2niix() -> Finding:
    """The converter that the tests compare DICOM reading with; beside Python, or on the PATH."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if found := shutil.which("dcm2niix", path=places):
        return Finding("dcm2niix", "ok", f"dcm2niix at {found}")
    return Finding("dcm2niix", "ok", "dcm2niix is not installed (optional, for tests)", "pip install dcm2niix")


def check_writable(workspace: Path) -> Finding:
    """A file can be made in the workspace, or in the folder where the workspace would be made."""
    folder = _existing(workspace)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"medseg")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        remedy = "choose another folder: --workspace, or MEDSEG_WORKSPACE"
        return Finding("workspace", "fail", f"{folder} cannot be written ({error.strerror})", remedy)
    return Finding("workspace", "ok", f"{workspace} " + ("can be written" if folder == workspace else "can be made"))


def check_disk(workspace: Path, low_gb: float = 20.0, least_gb: float = 2.0) -> Finding:
    """Free space where the workspace lies or would lie."""
    free_gb = shutil.disk_usage(_existing(workspace)).free / _GB
    status: Literal["ok", "warn", "fail"] = "fail" if free_gb < least_gb else "warn" if free_gb < low_gb else "ok"
    remedy = "" if status == "ok" else "free space, or choose a workspace on a larger disk"
    return Finding("disk", status, f"{free_gb:.0f} GB free in the workspace", remedy)


def check_filesystem(workspace: Path, mounts: Iterable[tuple[str, str]]) -> Finding:
    """Sqlite locks fail on network file systems. `mounts` are (mount point, kind of file system)."""
    place = _existing(workspace).resolve()
    holding = [(Path(point), kind) for point, kind in mounts if place.is_relative_to(point)]
    kind = max(holding, key=lambda mount: len(mount[0].parts), default=(Path("/"), "unknown"))[1]
    if kind not in _NETWORK_FILESYSTEMS:
        return Finding("filesystem", "ok", f"the workspace lies on {kind}")
    remedy = "set MLFLOW_TRACKING_URI to a server, or choose a workspace on a local disk"
    return Finding(
        "filesystem", "warn", f"the workspace lies on {kind}, where sqlite loses runs of several jobs", remedy
    )


def memory_limit_bytes(cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Memory that this process may use: the machine's, or less where a container or job has a limit."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(cgroup.read_text()))
    except (OSError, ValueError):  # no cgroup v2 here, or "max"
        return total


def check_memory(limit_bytes: int) -> Finding:
    """8 GB hold a small 3D network with its data loaders."""
    what = f"{limit_bytes / _GB:.1f} GB of memory"
    if limit_bytes >= 7 * _GB:
        return Finding("memory", "ok", what)
    return Finding("memory", "warn", what, "train with smaller patches (`medseg plan` measures them) and fewer workers")


def check_shared_memory(folder: Path, least_gb: float = 1.0) -> Finding:
    """Data loaders hand over batches through shared memory, of which containers get 64 MB by default."""
    if not folder.is_dir():
        return Finding("shared-memory", "ok", "no shared-memory folder on this system")
    size_gb = shutil.disk_usage(folder).total / _GB
    if size_gb >= least_gb:
        return Finding("shared-memory", "ok", f"{size_gb:.1f} GB of shared memory")
    remedy = "start the container with --shm-size=4g, or train with 0 data-loading workers"
    return Finding("shared-memory", "warn", f"{size_gb:.2f} GB of shared memory stop data loaders", remedy)


def check_store(uri: str, workspace: Path) -> Finding:
    """The MLflow server answers, if one is set; else the database in the workspace serves."""
    if not uri:
        return Finding("mlflow", "ok", f"runs are kept in {workspace / 'mlflow.db'}; MLFLOW_TRACKING_URI is not set")
    if uri.startswith(("http://", "https://")):
        return _check_server("mlflow", "MLflow", "MLFLOW_TRACKING_URI", uri, "/health")
    return Finding("mlflow", "ok", f"runs are kept in {_public(uri)}")


def check_prefect(api_url: str) -> Finding:
    """The Prefect server answers, if one is set; else each flow brings its own."""
    if not api_url:
        return Finding("prefect", "ok", "flows run without a server; PREFECT_API_URL is not set")
    return _check_server("prefect", "Prefect", "PREFECT_API_URL", api_url, "/health")


def check_proxy(environment: Mapping[str, str]) -> Finding:
    """A proxy must not stand between this machine and itself."""
    settings = {name.lower(): value for name, value in environment.items() if value}
    excepted = settings.get("no_proxy", "")
    direct = excepted.strip() == "*" or {"127.0.0.1", "localhost"} <= {host.strip() for host in excepted.split(",")}
    if direct or not settings.keys() & {"http_proxy", "all_proxy"}:
        return Finding("proxy", "ok", "no proxy stands before local servers")
    what = "a proxy is set and local servers are not excepted from it"
    return Finding("proxy", "warn", what, "export NO_PROXY=127.0.0.1,localhost no_proxy=127.0.0.1,localhost")


def check_clock(now_s: float) -> Finding:
    """The clock (seconds since 1970) is not before the installation: run names, certificates and schedules use it."""
    installed_s = Path(__file__).stat().st_mtime
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s))
    if now_s >= installed_s - 86400:
        return Finding("clock", "ok", shown)
    return Finding(
        "clock", "warn", f"the clock says {shown}, before medseg was installed", "set it: timedatectl set-ntp true"
    )


def check_locale(*encodings: str) -> Finding:
    """File names and tables are UTF-8."""
    others = sorted({name for name in encodings if name.lower().replace("-", "") != "utf8"})
    if not others:
        return Finding("locale", "ok", "text is UTF-8")
    return Finding(
        "locale", "warn", f"text is {', '.join(others)}; names with accents may fail", "export LC_ALL=C.UTF-8"
    )


def _check_server(code: str, name: str, variable: str, url: str, path: str) -> Finding:
    """A server answers at `url` + `path`, and its clock agrees with ours. It is asked without credentials."""
    shown = _public(url)
    try:
        with urllib.request.urlopen(shown.rstrip("/") + path, timeout=5) as response:
            date = response.headers.get("Date")
    except urllib.error.HTTPError as refusal:
        if refusal.code not in (401, 403):
            return Finding(code, "fail", f"{shown} answers with HTTP {refusal.code}", f"correct {variable}")
        date = refusal.headers.get("Date")
    except (OSError, ValueError, http.client.HTTPException) as error:
        remedy = f"start it (`medseg up`), or correct {variable}; unset it to do without a server"
        return Finding(code, "fail", f"the {name} server at {shown} does not answer ({error})", remedy)
    apart_s = abs(parsedate_to_datetime(date).timestamp() - time.time()) if date else 0.0
    if apart_s > 60:
        what = f"the clock of the {name} server at {shown} is {apart_s:.0f} s away from this one"
        return Finding(code, "warn", what, "synchronise both clocks with NTP")
    return Finding(code, "ok", f"the {name} server at {shown} answers")


def _public(url: str) -> str:
    """The address without user and password."""
    return re.sub(r"://[^/@]*@", "://", url)


def _probe(code: str, **environment: str) -> tuple[bool, str]:
    """Run Python code in a process of its own: whether it succeeded, and the last line that it printed."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired:
        return False, "no end after 120 s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"


def _existing(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _show(finding: Finding) -> None:
    remedy = f"\n        {finding.remedy}" if finding.remedy and finding.status != "ok" else ""
    print(f"  {finding.status:<4}  {finding.what}{remedy}", file=sys.stderr, flush=True)
