"""The whole tree: one experiment."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medseg.config.fields import Strict
from medseg.config.ingest import IngestConfig
from medseg.config.lungs import LungsConfig
from medseg.config.models import ModelConfig
from medseg.config.results import ExplainConfig, ExportConfig, PredictConfig, ReportConfig, TrackingConfig
from medseg.config.training import (
    AppearanceConfig,
    AugmentConfig,
    LossConfig,
    PlanConfig,
    PretrainConfig,
    TrainConfig,
)
from medseg.config.verdict import AuditConfig, VerdictConfig
from medseg.label_sets import EMPTY, SEPARATOR

_LOSSES = {"segmentation": "dice_ce", "classification": "cross_entropy"}


class TaskConfig(Strict):
    """What is learnt. `labels` maps names to values; background 0 is implied for segmentation.

    With `multi_label` the labels of a classification are not exclusive: a case has any number of them, which its
    target names joined by `|` (`none`: it has none of them), and each label gets a probability of its own. It needs the
    loss `binary_cross_entropy`, and there is neither a verdict nor an audit.
    """

    kind: Literal["segmentation", "classification"]
    labels: dict[str, Annotated[int, Field(ge=0, le=65535)]] = Field(min_length=1)
    multi_label: bool = False
    channels: tuple[str, ...] = ("image",)
    spatial_dims: Literal[2, 3] = 3

    @model_validator(mode="after")
    def _check_labels(self) -> "TaskConfig":
        values = sorted(self.labels.values())
        start = 1 if self.kind == "segmentation" else 0
        if values != list(range(start, start + len(values))):
            raise ValueError(f"label values must be {start}, {start + 1}, … without gaps, not {values}")
        return self

    @model_validator(mode="after")
    def _check_multi_label(self) -> "TaskConfig":
        if not self.multi_label:
            return self
        if self.kind != "classification":
            raise ValueError(f"multi_label is for task.kind 'classification', not {self.kind!r}; leave it out")
        if len(self.labels) < 2:
            raise ValueError("multi_label needs two or more labels; one finding is a classification in two classes")
        for name in self.labels:
            if name == EMPTY or SEPARATOR in name or name != name.strip() or not name:
                raise ValueError(
                    f"label {name!r} cannot stand in a cell with several labels; rename it: no {SEPARATOR!r}, no space "
                    f"around it, and {EMPTY!r} means that there is no label"
                )
        return self

    @property
    def measured_as(self) -> Literal["segmentation", "classification", "multi_label"]:
        """Which figures tell what a model of this task is worth."""
        return "multi_label" if self.multi_label else self.kind

    @property
    def out_channels(self) -> int:
        """Channels of the network's logits: labels and background, or classes."""
        return len(self.labels) + (self.kind == "segmentation")


class Config(Strict):
    """One experiment."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    task: TaskConfig
    model: ModelConfig
    loss: LossConfig
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ingest: IngestConfig = IngestConfig()
    lungs: LungsConfig | None = None
    plan: PlanConfig = PlanConfig()
    augment: AugmentConfig = AugmentConfig()
    pretrain: PretrainConfig = PretrainConfig()
    train: TrainConfig = TrainConfig()
    verdict: VerdictConfig = VerdictConfig()
    audit: AuditConfig = AuditConfig()
    predict: PredictConfig = PredictConfig()
    explain: ExplainConfig = ExplainConfig()
    export: ExportConfig = ExportConfig()
    report: ReportConfig = ReportConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        classifier = self.model.classifies
        if classifier != (self.task.kind == "classification"):
            raise ValueError(f"model.name {self.model.name!r} does not fit task.kind {self.task.kind!r}")
        self._check_sizes()
        self._check_loss()
        self._check_lungs()
        if isinstance(self.augment.rotate_deg, tuple) and self.task.spatial_dims != 3:
            raise ValueError(
                f"augment.rotate_deg {list(self.augment.rotate_deg)} is for volumes; an image is turned about one axis"
            )
        if self.plan.appearance != AppearanceConfig() and self.task.spatial_dims != 2:
            raise ValueError("plan.appearance is for radiographs, task.spatial_dims 2; leave it out")
        if self.train.site_adversary and (not classifier or self.model.name == "two_stage"):
            raise ValueError(
                f"train.site_adversary {self.train.site_adversary} is for a classifier of one network; set it to 0"
            )
        if self.augment.mixup and (not classifier or self.train.site_adversary):
            raise ValueError(
                f"augment.mixup {self.augment.mixup} is for classifiers, and not beside train.site_adversary: a mixed "
                "image has no site; set it to 0"
            )
        if unknown := sorted(set(self.export.segments) - set(self.task.labels)):
            names = ", ".join(self.task.labels)
            raise ValueError(f"export.segments names {unknown[0]!r}, which is none of task.labels ({names})")
        if unknown := sorted(set(self.predict.change.cv_percent) - set(self.task.labels)):
            names = ", ".join(self.task.labels)
            raise ValueError(f"predict.change.cv_percent names {unknown[0]!r}, which is none of task.labels ({names})")
        if self.ingest.channels and (tuple(self.ingest.channels) != self.task.channels or self.task.spatial_dims != 3):
            names = ", ".join(self.task.channels)
            raise ValueError(
                f"ingest.channels names {', '.join(self.ingest.channels)}; it must name task.channels ({names}), in "
                "their order, of a task with spatial_dims 3"
            )
        if self.verdict.positive is not None and self.verdict.positive not in self.task.labels:
            raise ValueError(f"verdict.positive {self.verdict.positive!r} is none of task.labels")
        if self.verdict.positive is not None and self.task.multi_label:
            raise ValueError(
                f"verdict.positive {self.verdict.positive!r}: with task.multi_label there is no verdict; leave it out"
            )
        return self

    def _check_loss(self) -> None:
        given = self.loss.name
        if self.task.multi_label != (given == "binary_cross_entropy") and self.task.kind == "classification":
            wanted = "binary_cross_entropy" if self.task.multi_label else "cross_entropy"
            raise ValueError(
                f"loss.name {given!r} does not fit task.multi_label {str(self.task.multi_label).lower()}; "
                f"set it to {wanted!r}"
            )
        if not self.task.multi_label and given != _LOSSES[self.task.kind]:
            raise ValueError(f"loss.name {given!r} does not fit task.kind {self.task.kind!r}")

    def _check_lungs(self) -> None:
        if self.lungs is None:
            return
        if self.task.spatial_dims != 2:
            raise ValueError(f"lungs are those of radiographs, not of task.spatial_dims {self.task.spatial_dims}")
        if self.task.kind == "segmentation" and (self.lungs.model or self.lungs.mask != "none"):
            raise ValueError("lungs.model and lungs.mask are for classifiers; a segmentation has the limits only")
        looks = self.plan.appearance
        cropped = self.lungs.mask == "box" and looks.crop_padding
        if self.lungs.mask != "none" and not cropped and (looks.histogram == "landmarks" or looks.match_sharpness):
            raise ValueError(
                f"plan.appearance cannot match what lungs.mask {self.lungs.mask!r} shows, since black is part of it; "
                "use lungs.mask box with plan.appearance.crop_padding, or leave one"
            )

    def _check_sizes(self) -> None:
        model, plan, dims = self.model, self.plan, self.task.spatial_dims
        _refuse("task.spatial_dims", model.dims_problem(dims))
        if plan.patch_size is not None and len(plan.patch_size) == dims == 3 and not model.pooled_by_plan:
            _refuse("plan.patch_size", model.size_problem(plan.patch_size))
        if any(axis >= dims for axis in self.predict.mirror_axes):
            axes = f"0 to {dims - 1}"
            raise ValueError(f"predict.mirror_axes {list(self.predict.mirror_axes)}: the axes of an image are {axes}")
        if plan.size_px is not None and dims == 2:
            _refuse("plan.size_px", model.size_problem((plan.size_px, plan.size_px)))


def _refuse(field: str, problem: str | None) -> None:
    if problem is not None:
        raise ValueError(f"{field}: {problem}")
