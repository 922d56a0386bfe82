"""The command line: the verbs, in the order of the road. No algorithm here."""

import json
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Literal, NoReturn, cast

import typer

from medseg import screen
from medseg.files import UserError, default_workspace, disk_trouble, dump_json
from medseg.result import EXIT_INTERNAL, EXIT_USAGE, Result

EXIT_INTERRUPTED = 130  # the shell's convention for Ctrl-C
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
models_app = typer.Typer(
    help="Trained models: list, show, join, prune, calibrate, promote, export.", no_args_is_help=True
)
data_app = typer.Typer(help="Public datasets: list, show, fetch.", no_args_is_help=True)

Workspace = Annotated[
    Path | None, typer.Option("--workspace", help="Where medseg keeps everything [MEDSEG_WORKSPACE, else ./workspace].")
]
Json = Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one field of the config.")]
CohortDir = Annotated[Path, typer.Option("--cohort", help="Cohort folder.")]
ConfigArg = Annotated[str, typer.Argument(metavar="CONFIG", help="Path, or name of a file in configs/.")]
ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="Bundle folder, run id, or models:/NAME@ALIAS.")]
Split = Annotated[Literal["train", "val", "test"], typer.Option(help="Which cases of the cohort.")]


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

    then = _command("train", config or "CONFIG", workspace, cohort=cohort)
    _finish(lambda: road.ingest(source, cohort, labels, config, sets or [], _workspace(workspace)), as_json, then)


@app.command()
def plan(
    config: ConfigArg, cohort: CohortDir, sets: Sets = None, workspace: Workspace = None, as_json: Json = False
) -> None:
    """Say what would run, its measured memory and estimated time."""
    from medseg import road

    then = _command("train", config, workspace, cohort=cohort)
    _finish(lambda: road.plan(road.load(config, sets or []), cohort), as_json, then)


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

    then = _command("evaluate", "RUN", workspace, cohort=cohort)
    _finish(
        lambda: road.train(road.load(config, sets or []), cohort, _workspace(workspace), resume=resume), as_json, then
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

    then = _command("predict", model, workspace, "SCANS", out="DIR")
    place = _workspace(workspace)
    _finish(lambda: road.evaluate(model, cohort, place, split=split, audit=audit, overrides=sets or []), as_json, then)


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

    then = _command("report", str(out), workspace)
    _finish(lambda: road.predict(model, scans, out, _workspace(workspace), store_in=store), as_json, then)


@app.command()
def report(
    target: Annotated[str, typer.Argument(metavar="DIR|RUN", help="Run, prediction folder or cohort.")],
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Make the HTML pages of a run, a prediction folder or a cohort."""
    from medseg import road

    _finish(lambda: road.report(target, _workspace(workspace)), as_json)


app.add_typer(models_app, name="models")
app.add_typer(data_app, name="data")


@models_app.command("list")
def models_list(workspace: Workspace = None, as_json: Json = False) -> None:
    """List registered models."""
    from medseg import shelf

    _finish(lambda: shelf.list_models(_workspace(workspace)), as_json)


@models_app.command("show")
def models_show(model: ModelArg, workspace: Workspace = None, as_json: Json = False) -> None:
    """Show what a model is, what it was measured at, and its card."""
    from medseg import shelf

    then = _command("predict", model, workspace, "SCANS", out="DIR")
    _finish(lambda: shelf.show_model(model, _workspace(workspace)), as_json, then)


@models_app.command("join")
def models_join(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Finished folds of one cross-validation.")],
    out: Annotated[Path | None, typer.Option(help="A second place for the bundle.")] = None,
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Join the folds of a cross-validation into one model."""
    from medseg import folds

    then = _command("evaluate", "RUN", workspace, cohort="DIR")
    _finish(lambda: folds.join(runs, _workspace(workspace), out=out), as_json, then)


@models_app.command("prune")
def models_prune(
    model: ModelArg,
    cohort: CohortDir,
    max_dice_loss: Annotated[float, typer.Option(help="How much mean Dice a smaller level may lose.")] = 0.005,
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Measure every level of a U-Net++; save the smallest one that is good enough."""
    from medseg import pruning

    _finish(lambda: pruning.run(model, cohort, _workspace(workspace), max_dice_loss=max_dice_loss), as_json)


@models_app.command("calibrate")
def models_calibrate(
    model: ModelArg,
    cohort: CohortDir,
    out: Annotated[Path | None, typer.Option(help="Folder of the new bundle [runs/<id>/bundle].")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="VERDICT.B=C", help="Override the verdict.")
    ] = None,
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Fit a classifier's verdict to labelled cases of a new site."""
    from medseg import calibrations

    _finish(lambda: calibrations.run(model, cohort, _workspace(workspace), out=out, overrides=sets or []), as_json)


@models_app.command("promote")
def models_promote(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="models:/NAME/VERSION, or a run id.")],
    alias: Annotated[str, typer.Option(help="The alias to move here.")] = "champion",
    override: Annotated[
        list[str] | None, typer.Option(metavar="ITEM: REASON", help="Why an audit item need not pass; kept.")
    ] = None,
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Move an alias to a version of a registered model."""
    from medseg import shelf

    _finish(lambda: shelf.promote_model(model, alias, _workspace(workspace), override or []), as_json)


@models_app.command("export")
def models_export(
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="File to write: .zip (bundle) or .pt2 (torch.export).")],
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Write a model as one file."""
    from medseg import shelf

    _finish(lambda: shelf.export_model(model, out, _workspace(workspace)), as_json)


@data_app.command("list")
def data_list(as_json: Json = False) -> None:
    """List the public datasets that medseg knows."""
    from medseg import shelf

    _finish(shelf.list_data, as_json)


@data_app.command("show")
def data_show(name: str, as_json: Json = False) -> None:
    """Show terms, files and labels of a dataset, its way to a cohort."""
    from medseg import shelf

    _finish(lambda: shelf.show_data(name), as_json)


@data_app.command("fetch")
def data_fetch(
    name: str,
    out: Annotated[Path | None, typer.Option(help="Target folder [WORKSPACE/data/NAME].")] = None,
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Download a dataset, verify it, resume where it stopped."""
    from medseg import shelf

    _finish(lambda: shelf.fetch_data(name, out or _workspace(workspace) / "data" / name), as_json)


@app.command()
def up(
    mlflow_port: Annotated[int, typer.Option(help="0 takes any free port.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="0 takes any free port.")] = 4200,
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Start the MLflow and Prefect servers on this machine."""
    from medseg import services

    _finish(lambda: services.up(_workspace(workspace), mlflow_port=mlflow_port, prefect_port=prefect_port), as_json)


@app.command()
def doctor(workspace: Workspace = None, as_json: Json = False) -> None:
    """Say what is missing on this machine and how to mend it."""
    from medseg import doctor as physician

    _finish(lambda: physician.run(_workspace(workspace)), as_json)


@app.command()
def deploy(
    pool: Annotated[str, typer.Option(help="Process work pool; made if missing.")] = "medseg",
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Register the flows as Prefect deployments with their schedules."""
    from flows.deployments import deploy_all

    _finish(lambda: deploy_all(pool, _workspace(workspace)), as_json)


@app.command()
def demo(workspace: Workspace = None, as_json: Json = False) -> None:
    """Walk the whole road on simulated scans, in ten minutes."""
    from medseg import demo as demonstration

    _finish(lambda: demonstration.run(_workspace(workspace)), as_json)


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


def _finish(step: Callable[[], Result], as_json: bool, then: str = "") -> None:
    """Run a step, print its result and the command to run `then`, exit with its code."""
    try:
        with redirect_stdout(sys.stderr), _sigterm_interrupts():  # stdout is for the result alone
            result = step()
    except UserError as error:
        _fail("usage", str(error), EXIT_USAGE, as_json)
    except KeyboardInterrupt:
        message = "interrupted; what is finished is kept, see `--resume` for training, else run the same command again."
        _fail("interrupted", message, EXIT_INTERRUPTED, as_json)
    except ChildProcessError as error:
        _fail("internal", str(error), EXIT_INTERNAL, as_json)
    except Exception as error:  # the last line of defence: the cause is shown whole
        if trouble := disk_trouble(error):
            _fail("usage", trouble, EXIT_USAGE, as_json)
        traceback.print_exc()
        _fail("internal", f"{type(error).__name__}: {error}", EXIT_INTERNAL, as_json)
    else:
        print(dump_json(screen.as_tree(result)) if as_json else screen.as_text(result, then))
        sys.exit(result.exit_code)


def _fail(kind: str, message: str, code: int, as_json: bool) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"status": "error", "kind": kind, "error": message}))
    sys.exit(code)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM stops a step as Ctrl-C does, so that it cleans up; steps with an own way to stop keep it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _command(verb: str, subject: str, workspace: Path | None, *more: str, **options: object) -> str:
    """A command to run next, quoted for the shell, in the same workspace."""
    words = ["medseg", verb, subject, *more]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return shlex.join([*words, "--workspace", str(workspace)] if workspace else words)


def _workspace(given: Path | None) -> Path:
    return (given or default_workspace()).absolute()


if __name__ == "__main__":
    main()
