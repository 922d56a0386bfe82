"""The verbs about things on a shelf: trained models and public datasets."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from medseg.command import CohortDir, ConfigArg, Json, ModelArg, Sets, Workspace, finish, next_command, workspace_of

models_app = typer.Typer(help="Trained models: list, show, join, compare, adapt and more.", no_args_is_help=True)
data_app = typer.Typer(help="Public datasets: list, show, fetch.", no_args_is_help=True)


@models_app.command("list")
def models_list(workspace: Workspace = None, as_json: Json = False) -> None:
    """List registered models."""
    from medseg import shelf

    finish(lambda: shelf.list_models(workspace_of(workspace)), as_json)


@models_app.command("show")
def models_show(model: ModelArg, workspace: Workspace = None, as_json: Json = False) -> None:
    """Show what a model is, what it was measured at, and its card."""
    from medseg import shelf

    then = next_command("predict", model, workspace, "SCANS", out="DIR")
    finish(lambda: shelf.show_model(model, workspace_of(workspace)), as_json, then)


@models_app.command("pretrain")
def models_pretrain(
    config: ConfigArg,
    cohort: CohortDir,
    sets: Sets = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with an interrupted run.")] = None,
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Train an encoder on radiographs without labels; `train` starts from it."""
    from medseg import road

    finish(
        lambda: road.pretrain(road.load(config, sets or []), cohort, workspace_of(workspace), resume=resume), as_json
    )


@models_app.command("join")
def models_join(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Finished folds of one cross-validation.")],
    out: Annotated[Path | None, typer.Option(help="A second place for the bundle.")] = None,
    cohort: Annotated[Path | None, typer.Option(help="Their cohort, for folds of several seeds.")] = None,
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Join the folds of a cross-validation into one model."""
    from medseg import folds

    then = next_command("evaluate", "RUN", workspace, cohort="DIR")
    finish(lambda: folds.join(runs, workspace_of(workspace), cohort=cohort, out=out), as_json, then)


@models_app.command("compare")
def models_compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Evaluated models, by run id or bundle.")],
    out: Annotated[Path, typer.Option(help="Folder of the table and its page.")],
    split: Annotated[Literal["train", "val", "test", "folds"], typer.Option(help="Measured on what.")] = "test",
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Put what several models measured side by side."""
    from medseg import comparison

    finish(lambda: comparison.run(models, workspace_of(workspace), out, split=split), as_json)


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

    finish(lambda: pruning.run(model, cohort, workspace_of(workspace), max_dice_loss=max_dice_loss), as_json)


@models_app.command("adapt")
def models_adapt(
    model: ModelArg,
    cohort: CohortDir,
    split: Annotated[str | None, typer.Option(help="Only these cases of the cohort [all].")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the new bundle [runs/<id>/bundle].")] = None,
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Fit a classifier's batch norms to images of a new site, without labels."""
    from medseg import adaptation

    finish(lambda: adaptation.run(model, cohort, workspace_of(workspace), split=split, out=out), as_json)


@models_app.command("calibrate")
def models_calibrate(
    model: ModelArg,
    cohort: CohortDir,
    out: Annotated[Path | None, typer.Option(help="Folder of the new bundle [runs/<id>/bundle].")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override verdict or predict.change.")
    ] = None,
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Fit a classifier's verdict to labelled cases of a new site; measure a segmentation's test-retest noise."""
    from medseg import calibrations

    finish(lambda: calibrations.run(model, cohort, workspace_of(workspace), out=out, overrides=sets or []), as_json)


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

    finish(lambda: shelf.promote_model(model, alias, workspace_of(workspace), override or []), as_json)


@models_app.command("export")
def models_export(
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="File to write: .zip (bundle) or .pt2 (torch.export).")],
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Write a model as one file."""
    from medseg import shelf

    finish(lambda: shelf.export_model(model, out, workspace_of(workspace)), as_json)


@data_app.command("list")
def data_list(as_json: Json = False) -> None:
    """List the public datasets that medseg knows."""
    from medseg import shelf

    finish(shelf.list_data, as_json)


@data_app.command("show")
def data_show(name: str, as_json: Json = False) -> None:
    """Show terms, files and labels of a dataset, its way to a cohort."""
    from medseg import shelf

    finish(lambda: shelf.show_data(name), as_json)


@data_app.command("fetch")
def data_fetch(
    name: str,
    out: Annotated[Path | None, typer.Option(help="Target folder [WORKSPACE/data/NAME].")] = None,
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Download a dataset, verify it, resume where it stopped."""
    from medseg import shelf

    finish(lambda: shelf.fetch_data(name, out or workspace_of(workspace) / "data" / name), as_json)
