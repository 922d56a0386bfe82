"""`medseg deploy`: the flows as deployments on a process work pool, and the automation that ends dead flow runs.

`deploy_all` tells the command that starts a worker. A worker needs medseg installed, since a deployment names its flow
as an importable object and carries no code.
"""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prefect import Flow
from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.deployments.runner import RunnerDeployment
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.schedules import Cron
from prefect.settings import get_current_settings
from prefect.types.entrypoint import EntrypointType
from prefect.workers.process import ProcessWorker

from flows import SETTINGS, compare, road, steps, watch_pacs
from medseg import __version__
from medseg.files import UserError
from medseg.result import Result

AUTOMATION = "medseg: end flow runs whose heartbeat stopped"
_HEARTBEAT = "prefect.flow-run.heartbeat"
_ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended")
_SILENCE_S = 300  # five missed beats


@dataclass(frozen=True)
class _Offer:
    """One deployment: its flow, and where a new one starts from; a site edits both in Prefect's pages.

    `cron` is a schedule that waits to be switched on.
    """

    flow: Flow[..., Result]
    parameters: Mapping[str, object] = field(default_factory=dict)
    cron: str = ""
    at_once: int | None = None


_COHORT = "cohorts/hippocampus"
_MODEL = "models:/hippocampus@champion"
_PACS = "dicomweb://127.0.0.1:8042/dicom-web?Modality=MR"
OFFERS = (
    _Offer(steps.ingest_flow, {"sources": ["incoming"], "cohort": "cohorts/incoming"}, "0 20 * * *", 1),
    _Offer(steps.plan_flow, {"config": "hippocampus", "cohort": _COHORT}),
    _Offer(steps.train_flow, {"config": "hippocampus", "cohort": _COHORT}, "0 22 * * 6", 1),
    _Offer(steps.pretrain_flow, {"config": "tb_lungs_box", "cohort": "cohorts/tb"}),
    _Offer(steps.cross_validate_flow, {"config": "hippocampus", "cohort": _COHORT}),
    _Offer(compare.compare_flow, {"cohort": "cohorts/tb", "lungs_cohort": "cohorts/lungs"}, at_once=1),
    _Offer(steps.evaluate_flow, {"model": _MODEL, "cohort": _COHORT}),
    _Offer(steps.audit_flow, {"model": "models:/tb_radiograph/latest", "cohort": "cohorts/tb"}),
    _Offer(
        steps.predict_flow,
        {"model": _MODEL, "scans": ["incoming"], "out": "predictions/incoming"},
        "0 21 * * *",
        1,
    ),
    _Offer(steps.explain_flow, {"model": _MODEL, "scans": ["incoming"], "out": "predictions/incoming"}, at_once=1),
    _Offer(watch_pacs.watch_pacs_flow, {"model": _MODEL, "url": _PACS, "out": "predictions/pacs"}, "*/5 * * * *", 1),
    _Offer(steps.report_flow, {"target": "predictions/incoming"}),
    _Offer(road.road_flow, {"sources": ["incoming"], "config": "hippocampus", "cohort": _COHORT}, at_once=1),
)
"""The deployments, in the order of the road; their paths are relative to the workspace."""


def deploy_all(pool: str, workspace: Path) -> Result:
    """Register every flow with the server at `PREFECT_API_URL`. Run again, it changes nothing.

    Schedules are registered switched off. Parameters and schedules of a deployment that exists belong to the site and
    stay as they are; where its code lies, its environment and its description are brought up to date.

    Args:
        pool: name of the process work pool, which names the deployments too; made if missing.
        workspace: where the flows of these deployments work; made if missing.

    Raises:
        UserError: no server answers, the pool is of another type, or the workspace cannot be made.
    """
    workspace = workspace.absolute()
    address = get_current_settings().api.url
    if not address:
        raise UserError("PREFECT_API_URL is not set; start the servers with `medseg up` and export what it prints.")
    _make_folder(workspace)
    with get_client(sync_client=True) as client:
        shown = _check_answers(client, address)
        _ensure_pool(client, pool)
        names = [_register(client, offer, pool, workspace) for offer in OFFERS]
        _ensure_automation(client)
    home = shlex.quote(str(workspace / "prefect"))
    start = f"DO_NOT_TRACK=1 prefect worker start --pool {shlex.quote(pool)}"
    worker = f"PREFECT_API_URL={shown} PREFECT_HOME={home} {start}"
    figures = {"deployments": names, "pool": pool, "automation": AUTOMATION, "server": shown, "worker": worker}
    return Result("deploy", "done", {"workspace": workspace}, figures)


def _check_answers(client: SyncPrefectClient, address: str) -> str:
    """The address without credentials."""
    shown = urlsplit(address)._replace(netloc=urlsplit(address).netloc.rpartition("@")[2]).geturl()
    if (error := client.api_healthcheck()) is not None:
        raise UserError(
            f"PREFECT_API_URL {shown}: no Prefect server answers ({type(error).__name__}); "
            "start one with `medseg up`, or correct the address."
        )
    return shown


def _ensure_pool(client: SyncPrefectClient, pool: str) -> None:
    try:
        found = client.read_work_pool(pool)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=pool, type=ProcessWorker.type, base_job_template=template))
        return
    if found.type != ProcessWorker.type:
        raise UserError(f"--pool {pool!r} is a work pool of type {found.type!r}, not 'process'; choose another name.")


def _register(client: SyncPrefectClient, offer: _Offer, pool: str, workspace: Path) -> str:
    """Register one deployment; returns its full name."""
    name = f"{offer.flow.name}/{pool}"
    try:
        parameters: Mapping[str, Any] = client.read_deployment_by_name(name).parameters
        schedule = None
    except ObjectNotFound:
        parameters = offer.parameters
        schedule = Cron(offer.cron, active=False, slug="medseg") if offer.cron else None
    RunnerDeployment.from_flow(
        offer.flow,
        pool,
        parameters=dict(parameters),
        schedule=schedule,
        concurrency_limit=offer.at_once,
        description=(offer.flow.description or "").partition("\n")[0],
        version=__version__,
        tags=["medseg"],
        work_pool_name=pool,
        job_variables={"env": _environment(workspace), "working_dir": str(workspace)},
        entrypoint_type=EntrypointType.MODULE_PATH,
    ).apply()
    return name


def _environment(workspace: Path) -> dict[str, str]:
    """What a flow's process gets on top of its worker's environment; an address with a password is not passed on."""
    found = {**SETTINGS, "MEDSEG_WORKSPACE": str(workspace), "PREFECT_HOME": str(workspace / "prefect")}
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri and "@" not in urlsplit(uri).netloc:
        found["MLFLOW_TRACKING_URI"] = uri
    return found


def _ensure_automation(client: SyncPrefectClient) -> None:
    """Make the automation or bring it up to date; one that the site switched off stays off."""
    wanted = _end_silent_runs()
    found = client.read_automations_by_name(AUTOMATION)
    if not found:
        client.create_automation(wanted)
    elif _content(found[0]) != _content(wanted):
        client.update_automation(found[0].id, wanted.model_copy(update={"enabled": found[0].enabled}))


def _end_silent_runs() -> AutomationCore:
    """A flow run whose worker died with it would stay Running for ever, and keep its place in every limit.

    The action does not force: a run that has ended stays as it ended.
    """
    return AutomationCore(
        name=AUTOMATION,
        description=f"A flow run of medseg without heartbeat for {_SILENCE_S} s becomes Crashed.",
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": "medseg-*"}),
            after={_HEARTBEAT},
            expect={_HEARTBEAT, *(f"prefect.flow-run.{name}" for name in _ENDS)},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=_SILENCE_S),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message=f"No heartbeat for {_SILENCE_S} s: its process or its machine died."
            )
        ],
    )


def _content(automation: AutomationCore) -> dict[str, Any]:
    return automation.model_dump(include={"description", "trigger", "actions"})


def _make_folder(workspace: Path) -> None:
    try:
        workspace.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{workspace} cannot be made ({error.strerror}); choose another --workspace.") from error
