"""The step `pretrain`: radiographs and a plan in, the weights of an encoder out. No label is read into a loss."""

from functools import partial

from torch import Tensor, nn

from medseg.bundle_writing import write_weights
from medseg.cohort import Cohort
from medseg.config import Config, dump_config
from medseg.data.batches import BatchSource
from medseg.data.cache import load_examples
from medseg.data.lung_view import LungView
from medseg.files import UserError, write_text
from medseg.models.layout import placed
from medseg.models.sparse_masked import SparseMaskedModel
from medseg.plan import Plan, write_plan
from medseg.result import Result
from medseg.runs import RunFolder
from medseg.tracking import Tracker
from medseg.train.history import log_epoch
from medseg.train.loop import resume_training, start_training, train_loop
from medseg.train.step import build_network, prepare_torch
from medseg.train.stopping import stop_between_steps

WEIGHTS = "encoder.safetensors"


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
    """Train the network of a config to fill in hidden patches of the cohort's training images; write its weights.

    Schedule, batches and augmentation are those of `train` and `augment`. The weights have the network's names, its
    head as it was at random: `model.weights` takes them.

    Args:
        lungs: what the classifier will see of a radiograph.

    Raises:
        UserError: the task is not one of radiographs, the network no single encoder, or its maps do not divide the
            image.
        KeyboardInterrupt: stopped by the user; the state is saved.
    """
    if config.task.spatial_dims != 2:
        raise UserError(f"task.spatial_dims {config.task.spatial_dims}: masked modelling is for radiographs, 2.")
    if not config.model.classifies or config.model.name == "two_stage":
        raise UserError(f"model.name {config.model.name!r} is no single encoder; pretrain a classifier such as resnet.")
    if tuple(cohort.channels) != config.task.channels:
        raise UserError(f"task.channels {list(config.task.channels)} differ from the cohort's {list(cohort.channels)}.")
    device, bf16 = prepare_torch(config)
    write_text(folder.path / "config.yaml", dump_config(config))
    write_plan(folder.path / "plan.yaml", plan)
    cases, cache = cohort.split("train"), folder.workspace / "cache"
    examples = load_examples(cohort, cases, plan, cache, label_maps=False, lungs=lungs, what="training cases")
    source = BatchSource(
        examples,
        plan.patch_size,
        plan.batch_size,
        config.augment.model_copy(update={"mixup": 0.0}),  # there is no target to mix
        foreground_share=0.0,
        seed=config.seed,
        device=device,
    )
    about = config.pretrain
    net = build_network(config, plan)
    model = SparseMaskedModel(net, len(config.task.channels), plan.patch_size, about.mask_share, about.width)
    training = start_training(placed(model, device), config.train)
    if resume:
        resume_training(training, folder.path / "checkpoints")
    with stop_between_steps() as stop:
        train_loop(
            training,
            source,
            _MeanLoss(),
            config.train,
            folder=folder.path / "checkpoints",
            device=device,
            bf16=bf16,
            validate=None,
            on_epoch=partial(log_epoch, training, folder.path / "history.csv", tracker),
            stop=stop,
        )
    assert isinstance(training.average, SparseMaskedModel)
    weights = write_weights(folder.path / WEIGHTS, training.average.net.state_dict())
    figures = {"train_loss": training.history[-1]["train_loss"], "cases": len(examples), "patch_px": model.patch}
    paths = {"weights": weights, "history": folder.path / "history.csv", "run": folder.path}
    return Result("models", "done", paths, figures, folder.id).write(folder.path)


class _MeanLoss(nn.Module):
    """The mean of the losses that the model puts out itself; there is no target."""

    def forward(self, losses_B: Tensor, *targets: Tensor) -> Tensor:
        return losses_B.mean()
