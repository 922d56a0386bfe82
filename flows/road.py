"""The whole road as one flow: ingest, plan, train, evaluate, report."""

from prefect import flow

from flows.artifacts import leave_artifacts
from flows.identity import current_run_id, name_new_run, workspace_folder
from flows.steps import FLOW_OPTIONS, evaluate_flow, ingest_flow, plan_flow, report_flow, train_flow
from medseg.result import Result


@flow(name="medseg-road", flow_run_name=name_new_run, **FLOW_OPTIONS)
def road_flow(
    sources: list[str],
    config: str,
    cohort: str,
    labels: str | None = None,
    overrides: list[str] | None = None,
    split: str = "test",
    workspace: str | None = None,
    run_id: str | None = None,
) -> Result:
    """From scans to a reviewed model. Its flow run, its training and its evaluation carry the id of one run.

    Args:
        sources: folders, files or archives of scans; empty when the cohort is made already.
        config: path or name of the config.
        cohort: folder of the cohort.
        labels: folder of label maps, or a CSV table.
        overrides: `a.b=c`, as `--set` takes them.
        split: the split that is measured.
        workspace: by default `MEDSEG_WORKSPACE`.
        run_id: id for the new run; by default a new one.
    """
    identity, place = current_run_id(), str(workspace_folder(workspace))
    done = [ingest_flow(sources, cohort, labels, config, overrides, place)] if sources else []
    done.append(plan_flow(config, cohort, overrides, place))
    done.append(train_flow(config, cohort, overrides, place, run_id=identity))
    done.append(evaluate_flow(identity, cohort, split, place))
    done.append(report_flow(identity, place))
    measured, reported = done[-2:]
    partial = any(result.status == "partial" for result in done)
    paths = {**measured.paths, **reported.paths}
    result = Result("road", "partial" if partial else "done", paths, measured.figures, identity)
    return leave_artifacts(result, workspace_folder(workspace))
