"""What a flow run leaves in Prefect's pages: a table of figures and a link to the run in MLflow."""

from collections.abc import Mapping
from pathlib import Path

from prefect.artifacts import create_link_artifact, create_table_artifact

from medseg.files import plain
from medseg.result import Result
from medseg.runs import find_run
from medseg.tracking import run_url
from medseg.tracking.failure import scrub


def leave_artifacts(result: Result, workspace: Path) -> Result:
    """Leave the figures as table `medseg-<step>`, and the link `medseg-<step>-run` to the run if there is one.

    Prefect takes no underscore in these keys.

    Text loses paths outside the workspace: they may carry names of patients.

    Returns:
        `result`.
    """
    rows = [{"figure": name, "value": _cell(value, workspace)} for name, value in _flat(plain(result.figures)).items()]
    about = f"{result.step}: {result.status}" + (f", run {result.run_id}" if result.run_id else "")
    key = f"medseg-{result.step.replace('_', '-')}"
    create_table_artifact(rows, key=key, description=about)
    url = run_url(find_run(workspace, result.run_id)) if result.run_id else ""
    if url:
        create_link_artifact(url, result.run_id, key=f"{key}-run", description="The run in MLflow")
    return result


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _cell(value: object, workspace: Path) -> object:
    """A number as it is, a list in one cell, text without paths."""
    if isinstance(value, list):
        return ", ".join(str(_cell(item, workspace)) for item in value)
    return scrub(value, workspace) if isinstance(value, str) else value
