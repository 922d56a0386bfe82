"""The command line: the verbs, in the order of the road. No algorithm here."""

import json
import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from medseg.cli_shelf import data_app, models_app
from medseg.command import (
    CohortDir,
    ConfigArg,
    Json,
    ModelArg,
    Sets,
    Split,
    Workspace,
    finish,
    next_command,
    workspace_of,
)
from medseg.result import EXIT_USAGE

# click's UsageError, wherever this version of typer keeps click
_BadUsage = cast(type[Exception], typer.BadParameter.__bases__[0])

app = typer.Typer(
    name="medseg",
    help="From scans to reviewed results: ingest, plan, train, evaluate, predict, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(models_app, name="models")
app.add_typer(data_app, name="data")


@app.command()
def ingest(
    source: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Folders, files, zips, or @FILE, a list of them.")
    ],
    cohort: CohortDir,
    labels: Annotated[Path | None, typer.Option(help="Folder of label maps, or a CSV table.")] = None,
    config: Annotated[str | None, typer.Option(help="Task whose labels are checked: path or name.")] = None,
    sets: Sets = None,
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Turn scans (DICOM, NIfTI, PNG) into a cohort."""
    from medseg import road

    then = next_command("train", config or "CONFIG", workspace, cohort=cohort)
    finish(lambda: road.ingest(source, cohort, labels, config, sets or [], workspace_of(workspace)), as_json, then)


@app.command()
def plan(
    config: ConfigArg, cohort: CohortDir, sets: Sets = None, workspace: Workspace = None, as_json: Json = False
) -> None:
    """Say what would run, its measured memory and estimated time."""
    from medseg import road

    then = next_command("train", config, workspace, cohort=cohort)
    finish(lambda: road.plan(road.load(config, sets or []), cohort, workspace_of(workspace)), as_json, then)


@app.command()
def train(
    config: ConfigArg,
    cohort: CohortDir,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with this run.")] = None,
    sets: Sets = None,
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Train a network; writes runs/<id>/ with the bundle."""
    from medseg import road

    then = next_command("evaluate", "RUN", workspace, cohort=cohort)
    finish(
        lambda: road.train(road.load(config, sets or []), cohort, workspace_of(workspace), resume=resume), as_json, then
    )


@app.command()
def evaluate(
    model: ModelArg,
    cohort: CohortDir,
    split: Split = "test",
    audit: Annotated[bool, typer.Option("--audit", help="Also ask a classifier what it really reads.")] = False,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="AUDIT.B=C", help="Where the audit finds lungs, what it trains."),
    ] = None,
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Measure a model on one split of a labelled cohort."""
    from medseg import road

    then = next_command("predict", model, workspace, "SCANS", out="DIR")
    place = workspace_of(workspace)
    finish(lambda: road.evaluate(model, cohort, place, split=split, audit=audit, overrides=sets or []), as_json, then)


@app.command()
def predict(
    model: ModelArg,
    scans: Annotated[list[str], typer.Argument(metavar="SCANS...", help="Whatever ingest takes, or a cohort.")],
    out: Annotated[Path, typer.Option(help="Where masks and the ledger go.")],
    store: Annotated[
        str | None, typer.Option(metavar="dicomweb://…", help="PACS that gets the DICOM results beside their scans.")
    ] = None,
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Segment or classify scans; the ledger says what became of each."""
    from medseg import road

    then = next_command("report", str(out), workspace)
    finish(lambda: road.predict(model, scans, out, workspace_of(workspace), store_in=store), as_json, then)


@app.command()
def report(
    target: Annotated[str, typer.Argument(metavar="DIR|RUN", help="Run, prediction folder or cohort.")],
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Make the HTML pages of a run, a prediction folder or a cohort."""
    from medseg import road

    finish(lambda: road.report(target, workspace_of(workspace)), as_json)


@app.command()
def up(
    mlflow_port: Annotated[int, typer.Option(help="0 takes any free port.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="0 takes any free port.")] = 4200,
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Start the MLflow and Prefect servers on this machine."""
    from medseg import services

    finish(lambda: services.up(workspace_of(workspace), mlflow_port=mlflow_port, prefect_port=prefect_port), as_json)


@app.command()
def doctor(workspace: Workspace = None, as_json: Json = False) -> None:
    """Say what is missing on this machine and how to mend it."""
    from medseg import doctor as physician

    finish(lambda: physician.run(workspace_of(workspace)), as_json)


@app.command()
def deploy(
    pool: Annotated[str, typer.Option(help="Process work pool; made if missing.")] = "medseg",
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Register the flows as Prefect deployments with their schedules."""
    from flows.deployments import deploy_all

    finish(lambda: deploy_all(pool, workspace_of(workspace)), as_json)


@app.command()
def demo(workspace: Workspace = None, as_json: Json = False) -> None:
    """Walk the whole road on simulated scans, in ten minutes."""
    from medseg import demo as demonstration

    finish(lambda: demonstration.run(workspace_of(workspace)), as_json)


def main() -> None:
    """Entry point: user errors are one sentence and exit with 2, the unforeseen exits with 1."""
    try:
        code = app(standalone_mode=False)
    except _BadUsage as caught:
        error = cast(typer.BadParameter, caught)
        error.show()
        if "--json" in sys.argv:
            print(json.dumps({"status": "error", "kind": "usage", "error": error.format_message()}))
        sys.exit(EXIT_USAGE)
    sys.exit(code)


if __name__ == "__main__":
    main()
