"""Several configs with several networks, each trained and measured as a run of its own, side by side in one table."""

from collections.abc import Mapping
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_table_artifact

from flows.artifacts import leave_artifacts
from flows.attempts import call_step
from flows.identity import current_run_id, name_new_run, workspace_folder
from flows.steps import FLOW_OPTIONS, cross_validate_flow, evaluate_flow, train_flow
from medseg import comparison
from medseg.result import Result


@flow(name="medseg-compare", flow_run_name=name_new_run, **FLOW_OPTIONS)
def compare_flow(
    cohort: str,
    configs: list[str] | None = None,
    networks: dict[str, list[str]] | None = None,
    lungs_cohort: str | None = None,
    lungs: str = "lungs",
    overrides: list[str] | None = None,
    cross_validate: bool = False,
    workspace: str | None = None,
    run_id: str | None = None,
) -> Result:
    """Train every config with every network, measure each on the test split, and put them into one table.

    Started again, models that are measured are taken as they are, and an unfinished one goes on. The table is an
    artifact; `comparisons/<id>` in the workspace holds it as JSON and as a page.

    Args:
        cohort: folder of the cohort of the classifiers.
        configs: paths or names of configs; by default whole radiographs, and lungs by three kinds of mask.
        networks: overrides by name of the network; by default the nine of the paper.
        lungs_cohort: folder of a cohort with lung masks, on which the lung model is trained and measured first; without
            it `lungs.model` is that of the configs.
        lungs: path or name of the config of the lung model.
        overrides: `a.b=c` for every classifier, as `--set` takes them.
        cross_validate: train and join all folds of every classifier, and compare what they measured out of fold.
        workspace: by default `MEDSEG_WORKSPACE`.
        run_id: id from which those of the runs follow; by default a new one.
    """
    place, identity, sets = workspace_folder(workspace), current_run_id(), list(overrides or [])
    made = []
    if lungs_cohort is not None:
        model = f"{identity}-lungs"
        _measure(lungs, lungs_cohort, [], place, model)
        sets.append(f"lungs.model={model}")
        made.append(_table([model], place, f"{identity}-lungs", "test"))
    models = []
    for config in configs or comparison.EXPERIMENTS:
        for network, changes in (networks or comparison.NETWORKS).items():
            models.append(f"{identity}-{Path(config).stem}-{network}")
            _measure(config, cohort, [*changes, *sets], place, models[-1], cross_validate=cross_validate)
    made.append(_table(models, place, identity, comparison.FOLDS if cross_validate else "test"))
    paths = {name: path for result in reversed(made) for name, path in result.paths.items()}
    return leave_artifacts(Result("compare", "done", paths, {"models": len(models)}), place)


def _measure(
    config: str, cohort: str, sets: list[str], place: Path, run_id: str, *, cross_validate: bool = False
) -> None:
    run = place / "runs" / run_id
    if not (run / "bundle" / "bundle.json").is_file():
        train = cross_validate_flow if cross_validate else train_flow
        train(config, cohort, sets, str(place), run_id=run_id)
    if not cross_validate and not (run / "evaluation" / "test" / "evaluate.json").is_file():
        evaluate_flow(run_id, cohort, "test", str(place))


def _table(models: list[str], place: Path, name: str, split: str) -> Result:
    def step() -> Result:
        return comparison.run(models, place, place / "comparisons" / name, split=split)

    result = call_step("compare", place, step)
    rows: list[Mapping[str, object]] = list(result.rows)
    create_table_artifact([dict(row) for row in rows], key="medseg-comparison", description=f"Measured on {split}")
    return result
