"""New studies in a PACS, segmented once each, their results stored beside them."""

from pathlib import Path

from prefect import flow

from flows.artifacts import leave_artifacts
from flows.attempts import call_step
from flows.identity import name_by_step, workspace_folder
from flows.steps import FLOW_OPTIONS
from medseg import pacs_watch
from medseg.result import Result


@flow(name="medseg-watch-pacs", flow_run_name=name_by_step, **FLOW_OPTIONS)
def watch_pacs_flow(model: str, url: str, out: str, stable_s: float = 60.0, workspace: str | None = None) -> Result:
    """Look for studies that match, segment those that are complete, store the results; once each, over any restart.

    Args:
        model: bundle folder, run id, or `models:/NAME@ALIAS`.
        url: `dicomweb://HOST[:PORT]/PATH?RULE`; neither a password nor a patient may stand in it.
        out: folder of the masks and ledgers, one folder a study.
        stable_s: how many seconds a study must not have grown before it is taken.
        workspace: by default `MEDSEG_WORKSPACE`.
    """
    place = workspace_folder(workspace)

    def step() -> Result:
        return pacs_watch.run(model, url, Path(out), place, stable_s=stable_s)

    return leave_artifacts(call_step("watch_pacs", place, step, restartable=True, gpu=True), place)
