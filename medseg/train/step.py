"""The step `train`: cohort and plan in, bundle out."""

import sys
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from medseg.bundle import Bundle
from medseg.bundle_writing import save_bundle
from medseg.cohort import Cohort
from medseg.config import Config, dump_config
from medseg.data.batches import BatchSource
from medseg.data.cache import Example, load_examples
from medseg.data.lung_view import LungView
from medseg.feature_distance import CohortDistance
from medseg.files import UserError, write_json, write_text
from medseg.losses import build_loss, guessing_loss
from medseg.models import build_from_config
from medseg.models.layout import placed
from medseg.models.pretrained import load_pretrained
from medseg.plan import Plan, write_plan
from medseg.result import Result
from medseg.runs import RunFolder
from medseg.tracking import Tracker
from medseg.train.adversary import make_adversary
from medseg.train.cohort_check import check_cohort
from medseg.train.device import check_compiler, choose_device, device_name, peak_memory_gb, reset_peak_memory, use_bf16
from medseg.train.distance import fit_cohort_distance
from medseg.train.history import log_epoch
from medseg.train.loop import Training, resume_training, start_training, train_against, train_loop
from medseg.train.pooling import completed
from medseg.train.stopping import stop_between_steps
from medseg.train.temperature import calibrate_voxels
from medseg.train.validate import validate
from medseg.unlearned import not_learned

_MEMORY_TOLERANCE = 0.10


def run(
    config: Config,
    cohort: Cohort,
    plan: Plan,
    folder: RunFolder,
    tracker: Tracker,
    *,
    resume: bool = False,
    lungs: LungView | None = None,
) -> Result:
    """Train on the cohort's train split, watch the val split, write `runs/<id>/bundle`.

    Args:
        folder: the run's folder; checkpoints and the history go there.
        tracker: the run in MLflow.
        resume: go on from the newest checkpoint.
        lungs: what a classifier of radiographs sees; its lung model goes into the bundle. By default all.

    Raises:
        UserError: a split is empty, a class is missing from it, the plan or the pretrained weights do not fit the
            network, there is nothing to resume, or no two sites to train against.
        KeyboardInterrupt: stopped by the user; the state is saved.
    """
    check_cohort(config, cohort)
    config = with_plan(config, plan)
    if problem := config.model.size_problem(plan.patch_size):
        raise UserError(f"plan.patch_size: {problem}.")
    device, bf16 = prepare_torch(config)
    write_text(folder.path / "config.yaml", dump_config(config))
    write_plan(folder.path / "plan.yaml", plan)
    tracker.log_artifact(folder.path / "config.yaml")
    tracker.log_artifact(folder.path / "plan.yaml")

    cache = folder.workspace / "cache"
    load = partial(
        load_examples,
        cohort,
        plan=plan,
        cache=cache,
        multi_label=config.task.multi_label,
        label_maps=config.task.kind == "segmentation",
        lungs=lungs,
    )
    similarity = config.predict.min_similarity if config.model.takes_prior else None
    train_examples = load(cohort.split("train"), min_similarity=similarity, what="training cases")
    has_val = any(case.split == "val" for case in cohort.cases)
    val_examples = load(cohort.split("val"), what="validation cases") if has_val else []
    reset_peak_memory(device)
    net = build_network(config, plan)
    if not resume:
        _set_pretrained(net, config, folder, tracker)
    training, source, loss = assemble(config, plan, net, train_examples, device)
    if config.train.site_adversary:
        train_against(training, make_adversary(training.net, train_examples, plan, config.train.site_adversary))
    if resume:
        resume_training(training, folder.path / "checkpoints")
    labels, begun = config.task.labels, training.step
    with stop_between_steps() as stop:
        train_loop(
            training,
            source,
            loss,
            config.train,
            folder=folder.path / "checkpoints",
            device=device,
            bf16=bf16,
            validate=(
                partial(validate, loss=loss, examples=val_examples, plan=plan, labels=labels, device=device, bf16=bf16)
                if val_examples
                else None
            ),
            on_epoch=partial(log_epoch, training, folder.path / "history.csv", tracker),
            stop=stop,
        )
    memory = _hold_contract(plan, device, tracker, training.step) if training.step > begun else {}
    if training.best_state is not None:
        training.average.load_state_dict(training.best_state)
    calibration = None
    if config.train.fold is not None and config.task.kind == "segmentation":
        calibration = calibrate_voxels(training.average, val_examples, plan, device, seed=config.seed)
        tracker.log_metrics({f"oof_{name}": value for name, value in calibration.items()}, step=0)
    model = lungs.model if lungs is not None else None
    most = config.train.distance_cases
    distance = fit_cohort_distance(
        training.average, train_examples, val_examples, plan, config.predict, device, most_cases=most
    )
    guessing = guessing_loss(config.loss, _class_counts(config, train_examples), len(train_examples))
    metrics = {name: value for name, value in training.kept.items() if name.startswith(("val_", "train_"))}
    metrics |= {} if guessing is None else {"guessing_loss": guessing}
    _warn(not_learned(metrics), tracker)
    return _finish(config, cohort, plan, folder, training, metrics, memory, calibration, distance, model)


def with_plan(config: Config, plan: Plan) -> Config:
    """The config with those fields of `model` that the plan chose, where the config left them null."""
    return config.model_copy(update={"model": completed(config.model, plan.network)}) if plan.network else config


def prepare_torch(config: Config) -> tuple[torch.device, bool]:
    """Seed torch and set its determinism; the device, and whether to autocast to bfloat16."""
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(config.train.deterministic)
    return device, use_bf16(config.train.precision, device)


def build_network(config: Config, plan: Plan) -> torch.nn.Module:
    """The network, in the plan's memory mode, which changes neither weights nor results: it is no part of a bundle."""
    mode = {"memory": plan.memory_mode} if plan.memory_mode else {}
    return build_from_config(
        config.model.model_copy(update=mode),
        spatial_dims=config.task.spatial_dims,
        in_channels=len(config.task.channels),
        out_channels=config.task.out_channels,
    )


def assemble(
    config: Config, plan: Plan, net: torch.nn.Module, examples: Sequence[Example], device: torch.device
) -> tuple[Training, BatchSource, torch.nn.Module]:
    """State, batches and loss of a training; the probe that measures a plan makes its own from here too."""
    source = BatchSource(
        examples,
        plan.patch_size,
        plan.batch_size,
        config.augment,
        foreground_share=config.train.foreground_share,
        seed=config.seed,
        prior_classes=config.task.out_channels if config.model.takes_prior else 0,
        device=device,
    )
    loss = build_loss(config.loss, _class_counts(config, examples), len(examples)).to(device)
    training = start_training(placed(net, device), config.train)
    if config.train.compile:
        check_compiler(device)
        training.net.compile()  # in place: names and the averaged network stay as they are
    return training, source, loss


def _set_pretrained(net: torch.nn.Module, config: Config, folder: RunFolder, tracker: Tracker) -> None:
    """Start from the weights that the config names, and record in `pretrained.json` what they were: of a network of
    networks, by the part that they are of."""
    found = {name: load_pretrained(net.get_submodule(name), part) for name, part in config.model.parts.items()}
    loaded = {name: one for name, one in found.items() if one is not None}
    if loaded:
        record = loaded if len(found) > 1 else loaded[""]
        tracker.log_artifact(write_json(folder.path / "pretrained.json", record))


def _class_counts(config: Config, examples: Sequence[Example]) -> list[int]:
    if config.task.kind == "segmentation":
        names = {value: name for name, value in config.task.labels.items()}
        for value, name in names.items():
            if not any(len(example.points[value - 1]) for example in examples):
                raise UserError(
                    f"label {name!r} ({value}) occurs in no case of split 'train'; remove it from task.labels, "
                    "or add cases that have it."
                )
        return []
    if config.task.multi_label:
        return [int(count) for count in np.sum([example.target for example in examples], axis=0)]
    return [sum(example.target == value for example in examples) for value in range(config.task.out_channels)]


def _hold_contract(plan: Plan, device: torch.device, tracker: Tracker, step: int) -> dict[str, float]:
    """Compare the real peak with the plan's; says so, and tags the run, where they differ by more than a tenth."""
    promised = plan.predicted_memory_gb or plan.memory_gb
    if promised is None or plan.memory_law.get("device") != device_name(device):
        return {}
    real = peak_memory_gb(device)
    error = promised / real - 1
    figures = {"predicted_memory_gb": promised, "real_peak_memory_gb": real, "memory_error": error}
    tracker.log_metrics(figures, step=step)
    kept = abs(error) <= _MEMORY_TOLERANCE
    tracker.set_tag("medseg.memory_contract", "kept" if kept else f"missed: {promised:.2f} GB planned, {real:.2f} real")
    if not kept:
        print(
            f"Warning: the plan foretold a peak of {promised:.2f} GB, training took {real:.2f} GB; "
            "run `medseg plan` on this machine again.",
            file=sys.stderr,
        )
    return figures


def _warn(sentences: Sequence[str], tracker: Tracker) -> None:
    """Say what was not learned, and tag the run with it."""
    for sentence in sentences:
        print(f"Warning: {sentence}", file=sys.stderr)
    if sentences:
        tracker.set_tag("medseg.not_learned", " ".join(sentences))


def _finish(
    config: Config,
    cohort: Cohort,
    plan: Plan,
    folder: RunFolder,
    training: Training,
    metrics: dict[str, float],
    memory: dict[str, float],
    calibration: dict[str, float] | None,
    distance: CohortDistance | None,
    lungs: Bundle | None,
) -> Result:
    bundle = save_bundle(
        folder.path / "bundle",
        state_dict={name: value.detach().cpu() for name, value in training.average.state_dict().items()},
        config=config,
        plan=plan,
        run_id=folder.id,
        cohort_sha256=cohort.sha256,
        metrics=metrics,
        calibration=calibration,
        lungs=lungs,
        distance=distance,
    )
    figures = {
        **metrics,
        "epochs": len(training.history),
        "train_minutes": round(sum(row["seconds"] for row in training.history) / 60, 2),
        "data_wait_share": sum(r["data_wait_share"] * r["seconds"] for r in training.history)
        / max(sum(r["seconds"] for r in training.history), 1e-9),
        "peak_memory_gb": max(row["peak_memory_gb"] for row in training.history),
        **memory,
    }
    paths = {"bundle": bundle, "history": folder.path / "history.csv", "run": folder.path}
    return Result("train", "done", paths, figures, folder.id).write(folder.path)
