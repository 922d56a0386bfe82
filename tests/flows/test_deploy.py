import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from synthetic import segmentation_cohort

from flows.deployments import AUTOMATION, OFFERS, deploy_all
from medseg.files import UserError
from medseg.services import running_services


@contextmanager
def server_at(address: str) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: address}):
        yield


def registered(client: SyncPrefectClient) -> dict[str, Any]:
    """All that `deploy` makes, without times of change."""
    unstable = {"updated", "last_polled", "status", "pull_steps", "global_concurrency_limit"}
    found: dict[str, Any] = {"pool": client.read_work_pool("medseg").model_dump(exclude={"updated", "status"})}
    for offer in OFFERS:
        deployment = client.read_deployment_by_name(f"{offer.flow.name}/medseg")
        schedules = [schedule.model_dump(exclude={"updated"}) for schedule in deployment.schedules]
        found[offer.flow.name] = {**deployment.model_dump(exclude=unstable), "schedules": schedules}
    found["automations"] = [a.model_dump() for a in client.read_automations_by_name(AUTOMATION)]
    return found


@contextmanager
def worker(address: str, log: Path) -> Iterator[None]:
    """A worker as a site starts it, in a folder that is not the workspace."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "medseg", "--type", "process"]
    environment = {**os.environ, "PREFECT_API_URL": address, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=log.parent) as process,
    ):
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)


def run_deployment(client: SyncPrefectClient, name: str, parameters: dict[str, Any], timeout_s: float) -> FlowRun:
    deployment = client.read_deployment_by_name(name)
    run = client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        run = client.read_flow_run(run.id)
        if run.state is not None and run.state.is_final():
            break
        time.sleep(0.5)
    return run


@pytest.mark.slow
def test_deployed_twice_is_deployed_once_and_a_worker_runs_it(tmp_path: Path) -> None:
    workspace = tmp_path / "work space"
    with running_services(workspace) as services, server_at(services.prefect_api_url):
        result = deploy_all("medseg", workspace)
        with get_client(sync_client=True) as client:
            first = registered(client)
            assert result.figures["deployments"] == [f"{offer.flow.name}/medseg" for offer in OFFERS]
            check_settings(first, workspace)

            deploy_all("medseg", workspace)
            assert registered(client) == first

            site_changes(client)
            changed = registered(client)
            assert changed != first
            deploy_all("medseg", workspace)
            assert registered(client) == changed, "what a site has set stays"

            segmentation_cohort(workspace / "cohorts" / "tiny", 6)
            with worker(services.prefect_api_url, tmp_path / "worker.log"):
                run = run_deployment(client, "medseg-report/medseg", {"target": "cohorts/tiny"}, 300)
        assert run.state is not None
        assert run.state.is_completed(), (run.state, (tmp_path / "worker.log").read_text())
        assert (workspace / "cohorts" / "tiny" / "report" / "index.html").is_file()


def check_settings(found: dict[str, Any], workspace: Path) -> None:
    assert found["pool"]["type"] == "process"
    assert len(found["automations"]) == 1
    scheduled = {name for name, about in found.items() if name.startswith("medseg-") and about["schedules"]}
    assert scheduled == {"medseg-ingest", "medseg-train", "medseg-predict", "medseg-watch-pacs"}
    for name in scheduled:
        assert [schedule["active"] for schedule in found[name]["schedules"]] == [False]
    for offer in OFFERS:
        about = found[offer.flow.name]
        assert about["enforce_parameter_schema"]
        environment = about["job_variables"]["env"]
        assert environment["MEDSEG_WORKSPACE"] == about["job_variables"]["working_dir"] == str(workspace)
        assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


def site_changes(client: SyncPrefectClient) -> None:
    """Switch the nightly prediction on, point it elsewhere, and switch the automation off."""
    from prefect.client.schemas.actions import DeploymentUpdate

    nightly = client.read_deployment_by_name("medseg-predict/medseg")
    client.update_deployment_schedule(nightly.id, nightly.schedules[0].id, active=True)
    client.update_deployment(nightly.id, DeploymentUpdate(parameters={**nightly.parameters, "scans": ["pacs"]}))
    client.pause_automation(client.read_automations_by_name(AUTOMATION)[0].id)


@pytest.mark.parametrize(
    ("address", "remedy"), [("http://127.0.0.1:9/api", "no Prefect server answers"), ("", "PREFECT_API_URL is not set")]
)
def test_without_a_server_the_remedy_is_named(tmp_path: Path, address: str, remedy: str) -> None:
    with server_at(address), pytest.raises(UserError, match=rf"{remedy}.*medseg up"):
        deploy_all("medseg", tmp_path)


def test_parameters_of_new_deployments_fit_their_flows() -> None:
    for offer in OFFERS:
        offer.flow.validate_parameters({**offer.parameters})
