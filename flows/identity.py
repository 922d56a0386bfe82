"""One identity: the name of a flow run is the id of its run, which is the name in MLflow and the folder in `runs/`."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from prefect import runtime
from prefect.client.orchestration import get_client

from medseg.files import UserError, default_workspace
from medseg.ingest import pacs
from medseg.runs import find_run, new_run_id, read_run


def workspace_folder(given: str | None) -> Path:
    """The workspace a flow works in, absolute; by default `MEDSEG_WORKSPACE`."""
    return Path(given).absolute() if given else default_workspace()


def name_new_run() -> str:
    """Name of a flow run that makes a run: the id it was given, or a new one.

    When Prefect starts a flow run again, its name is the id of its run: it stays if that run can go on.
    """
    given = runtime.flow_run.parameters
    known = given.get("resume") or given.get("run_id")
    if not known and can_go_on(workspace_folder(given.get("workspace")), current_run_id()):
        known = current_run_id()
    return str(known or new_run_id(Path(given["config"]).stem if "config" in given else _step()))


def name_by_step() -> str:
    """Name of a flow run that makes no run: the time and the step."""
    return new_run_id(_step())


def current_run_id() -> str:
    """The id that this flow run carries as its name."""
    return str(runtime.flow_run.name)


def can_go_on(workspace: Path, run_id: str) -> bool:
    """Whether there is such a run and something to go on from: a batch keeps its cases, a training its checkpoints,
    a cross-validation its folds and a comparison its models."""
    if any((workspace / "runs").glob(f"{run_id}-*/run.json")):
        return True
    with suppress(UserError):
        run = find_run(workspace, run_id)
        checkpoints = run.path / "checkpoints"
        return read_run(run).get("step") == "predict" or (checkpoints.is_dir() and any(checkpoints.iterdir()))
    return False


def prefect_tags() -> dict[str, str]:
    """What the run in MLflow says about its flow run."""
    return {"prefect.flow_run_id": str(runtime.flow_run.id), "prefect.flow": str(runtime.flow_run.flow_name)}


def take_name(run_id: str) -> None:
    """Rename this flow run once its run is known: that of the model it evaluated, or of the pages it wrote."""
    if run_id and run_id != current_run_id():
        with get_client(sync_client=True) as client:
            client.set_flow_run_name(runtime.flow_run.id, run_id)


def _step() -> str:
    return str(runtime.flow_run.flow_name).removeprefix("medseg-")


def refuse_named(sources: Sequence[str]) -> None:
    """Raises UserError for an address of a PACS that names a patient: Prefect keeps parameters and shows them."""
    for source in sources:
        if pacs.is_address(source):
            why = "Prefect stores and shows the parameters of a flow (delete this flow run)"
            pacs.refuse_named(source, f"{why}; a named patient's scans are for the command line")
