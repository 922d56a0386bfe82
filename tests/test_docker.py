"""What can be known of the image and the compose file without a container engine."""

import importlib.metadata
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
PINNED_TAG = re.compile(r"[\w./-]+:\d+\.\d+(\.\d+)?(-[\w.-]+)?")
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


@dataclass
class Stage:
    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction: str) -> str | None:
        return next((rest for name, rest in reversed(self.steps) if name == instruction), None)


def read_stages() -> tuple[dict[str, str], dict[str, Stage]]:
    """The arguments before the first stage, and the stages by name, of the Dockerfile."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in filter(None, (line.strip() for line in text.replace("\\\n", " ").splitlines())):
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            current = stages[name] = Stage(name, base)
        elif current is None:
            key, value = rest.split("=", 1)
            arguments[key] = value
        else:
            current.steps.append((instruction, rest))
    return arguments, stages


ARGUMENTS, STAGES = read_stages()
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OWN = [name for name, service in SERVICES.items() if "build" in service]


def lineage(name: str) -> list[Stage]:
    """The stage and those it starts from, outermost first."""
    stage = STAGES[name]
    return [*(lineage(stage.base) if stage.base in STAGES else []), stage]


def image_environment(target: str) -> dict[str, str]:
    settings = " ".join(rest for stage in lineage(target) for name, rest in stage.steps if name == "ENV")
    return dict(re.findall(r"(\w+)=(\S+)", settings))


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [str(value)]


def test_targets_are_built_from_one_pinned_base_and_cpu_is_the_default() -> None:
    assert PINNED_TAG.fullmatch(ARGUMENTS["PYTHON_IMAGE"])
    assert ARGUMENTS["PYTHON_IMAGE"].startswith("python:3.12")
    external = {stage.base for stage in STAGES.values()} - STAGES.keys()
    assert external == {"${PYTHON_IMAGE}"}
    assert list(STAGES)[-1] == "cpu"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_target_runs_as_a_fixed_user_behind_tini_and_carries_no_secret(target: str) -> None:
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", STAGES[target].steps[-1][1])
    assert STAGES[target].steps[-1][0] == "USER"
    runtime = STAGES["runtime"]
    uid, gid = STAGES[target].steps[-1][1].split(":")
    assert f"useradd --uid {uid} --gid {gid}" in " ".join(rest for _, rest in runtime.steps)
    assert runtime.last("ENTRYPOINT") == '["/usr/bin/tini", "--"]'
    assert runtime.last("CMD") == '["medseg", "--help"]'
    environment = image_environment(target)
    assert environment["MEDSEG_WORKSPACE"] == "/workspace" == runtime.last("WORKDIR")
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == environment["DO_NOT_TRACK"] == "true"
    assert not [name for name in environment if re.search("PASSWORD|TOKEN|SECRET|KEY", name)]


def test_both_targets_install_the_lock_and_then_the_package_alike() -> None:
    assert STAGES["cpu"].last("RUN") == STAGES["cuda"].last("RUN")
    assert STAGES["packages-cpu"].last("RUN") == STAGES["packages-cuda"].last("RUN")
    install = STAGES["packages-cpu"].last("RUN") or ""
    assert "--constraint requirements.lock --requirement runtime.txt" in install
    assert "--no-deps /wheels/*.whl && pip check" in (STAGES["cpu"].last("RUN") or "")
    for target in ("cpu", "cuda"):
        assert STAGES[target].last("COPY") == f"--from=packages-{target} /opt/venv /opt/venv"


def copied(stage: Stage) -> list[str]:
    lines = [rest for name, rest in stage.steps if name in ("COPY", "ADD") and "--from" not in rest]
    return [source for line in lines for source in line.split()[:-1]]


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    sources = {source for stage in STAGES.values() for source in copied(stage)}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    admitted = {line[1:] for line in ignore if line.startswith("!")}
    assert ignore[1] == "*", "everything is left out that is not named"
    assert sources == admitted
    assert [source for source in sorted(sources) if not (ROOT / source).exists()] == []
    used = {
        match for stage in STAGES.values() for _, rest in stage.steps for match in re.findall(r"from=([\w-]+)", rest)
    }
    assert used <= STAGES.keys()


def test_the_list_of_runtime_packages_comes_out_of_the_project(tmp_path: Path) -> None:
    """The command of the Dockerfile itself, run here."""
    venv, *rest = (STAGES["requirements"].last("RUN") or "").split("&&")
    assert venv.strip() == "python -m venv /opt/venv"
    command = "&&".join(rest)
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, env={"PATH": path})
    lines = (tmp_path / "runtime.txt").read_text().splitlines()
    assert any(line.startswith("torch") for line in lines)
    assert not any(line.startswith(("ruff", "pytest", "torchvision")) for line in lines)
    assert re.fullmatch(r"psycopg2-binary==[\d.]+", lines[-1])


def test_services_build_existing_targets_under_a_tag_of_this_version() -> None:
    version = importlib.metadata.version("medseg")
    for name in OWN:
        build = SERVICES[name]["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / "Dockerfile"
        assert build["target"] in STAGES
        assert SERVICES[name]["image"] == f"medseg:{version}-{build['target']}"
    for name in SERVICES.keys() - OWN:
        assert PINNED_TAG.fullmatch(SERVICES[name]["image"]), name


def test_every_service_network_volume_and_file_referred_to_exists() -> None:
    for name, service in SERVICES.items():
        assert set(service.get("depends_on", {})) <= SERVICES.keys(), name
        assert set(service.get("networks", [])) <= COMPOSE["networks"].keys(), name
        for volume in service.get("volumes", []):
            source = VARIABLE.sub("", volume).split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).is_file(), volume
            elif source:
                assert source in COMPOSE["volumes"], volume
        addressed = re.findall(r"(?:@|http://)([a-z]+):\d+", " ".join(strings(service.get("environment", {}))))
        assert set(addressed) <= SERVICES.keys(), name


def test_dependencies_wait_for_what_they_need() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other], f"{name} waits for the health of {other}, which has no check"
            else:
                assert how["condition"] == "service_completed_successfully"
                assert SERVICES[other]["restart"] == "no", f"{other} would never be completed"


def test_ports_are_open_to_this_machine_only_and_the_database_to_none() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"prefect", "mlflow"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert COMPOSE["networks"]["database"] == {"internal": True}
    assert SERVICES["postgres"]["networks"] == ["database"]


def test_variables_are_declared_and_secrets_have_no_default() -> None:
    example = dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / "env.example").read_text(), re.MULTILINE))
    used = {match[1]: match for text in strings(SERVICES) for match in VARIABLE.finditer(text)}
    assert used.keys() | {"COMPOSE_PROFILES"} == example.keys()
    for text in strings(SERVICES):
        for name, how, default in VARIABLE.findall(text):
            if how == "-":
                assert default == example[name], f"two defaults for {name}"
    required = {match[1] for text in strings(SERVICES) for match in VARIABLE.finditer(text) if match[2] == "?"}
    assert {name for name, value in example.items() if not value} == required
    assert {name for name in example if "PASSWORD" in name} <= required


def test_workers_differ_in_profile_and_device_alone() -> None:
    cpu, gpu = SERVICES["worker"], SERVICES["worker-gpu"]
    assert (cpu["profiles"], gpu["profiles"]) == (["cpu"], ["gpu"])
    differing = {key for key in cpu.keys() | gpu.keys() if cpu.get(key) != gpu.get(key)}
    assert differing == {"profiles", "build", "image", "deploy"}
    assert cpu["command"][cpu["command"].index("--pool") + 1] == "medseg"
    assert SERVICES["deploy"]["command"] == ["medseg", "deploy", "--pool", "medseg"]


def test_own_containers_have_no_privileges() -> None:
    for name in OWN:
        assert SERVICES[name]["cap_drop"] == ["ALL"], name
        assert SERVICES[name]["security_opt"] == ["no-new-privileges:true"], name
        assert "user" not in SERVICES[name], "the image's own user serves"


def test_mlflow_accepts_the_name_by_which_workers_call_it() -> None:
    uri = SERVICES["worker"]["environment"]["MLFLOW_TRACKING_URI"]
    allowed = SERVICES["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert uri.removeprefix("http://") in allowed
    assert "*" not in allowed


def test_init_script_makes_the_databases_that_the_servers_open(tmp_path: Path) -> None:
    """The script runs, with a `psql` that writes down what it is told."""
    psql = tmp_path / "psql"
    psql.write_text('#!/bin/bash\nprintf "%s\\n" "$@" >> "$LOG"\ncat >> "$LOG"\n')
    psql.chmod(0o755)
    passwords = {"PREFECT_DB_PASSWORD": "p'1", "MLFLOW_DB_PASSWORD": "m 2"}
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "LOG": str(tmp_path / "log"), **passwords}
    script = [str(DOCKER / "postgres-init.sh")]  # executable, else the image would source it into its own shell
    subprocess.run(script, env={**environment, "POSTGRES_USER": "postgres"}, check=True)
    told = (tmp_path / "log").read_text()
    for name in ("prefect", "mlflow"):
        assert f"name={name}\n" in told
        assert f"password={passwords[name.upper() + '_DB_PASSWORD']}\n" in told
        uris = " ".join(strings(SERVICES[name]["environment"]))
        assert re.search(rf"postgresql\+\w+://{name}:\${{{name.upper()}_DB_PASSWORD}}@postgres:5432/{name}\b", uris)
    unset = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert unset.returncode != 0, "a missing variable must stop the script"
