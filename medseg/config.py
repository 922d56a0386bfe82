"""The configuration: one frozen tree, loaded from YAML, with every default in one place.

YAML is data only: at most one `extends:` (a sibling file, or a name in configs/), no interpolation, no class paths.
`--set a.b=c` is the only override. An unknown key or a wrong value fails at load with the field's path.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medseg.files import UserError, resource_dir

_WHOLE = ("labels", "segments")  # replaced, not merged, by a config that extends another

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Strict(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskConfig(Strict):
    """What is learnt. `labels` maps names to values; background 0 is implied for segmentation."""

    kind: Literal["segmentation", "classification"]
    labels: dict[str, Annotated[int, Field(ge=0, le=65535)]] = Field(min_length=1)
    channels: tuple[str, ...] = ("image",)
    spatial_dims: Literal[2, 3] = 3

    @model_validator(mode="after")
    def _check_labels(self) -> "TaskConfig":
        values = sorted(self.labels.values())
        start = 1 if self.kind == "segmentation" else 0
        if values != list(range(start, start + len(values))):
            raise ValueError(f"label values must be {start}, {start + 1}, … without gaps, not {values}")
        return self

    @property
    def out_channels(self) -> int:
        """Channels of the network's logits: labels and background, or classes."""
        return len(self.labels) + (self.kind == "segmentation")


class SplitConfig(Strict):
    """Shares of val and test; whole patients or whole sites move together."""

    val: Share = 0.1
    test: Share = 0.2
    by: Literal["patient", "site"] = "patient"
    seed: int = 0


class TableConfig(Strict):
    """Column names of a labels CSV; an empty name means that the table has no such column."""

    image: str = "image"
    label: str = "label"
    target: str = "target"
    patient: str = "patient_id"
    site: str = "site"
    split: str = "split"


FindingCode = Literal[
    "anisotropic", "burned_in_text", "colour", "detector_spacing", "few_levels",
    "few_pixels", "few_voxels", "for_processing", "form_mismatch", "form_mirrored", "gantry_tilt", "implausible_extent",
    "implausible_spacing", "no_orientation", "not_frontal_chest", "not_hounsfield", "secondary_capture",
    "spacing_unknown", "view_unknown",
]  # fmt: skip


class IngestConfig(Strict):
    """How sources become cases.

    `modality`, `description` (a regular expression, found anywhere, in any case), `min_slices` and `plane` choose DICOM
    series; of a series with several volumes (echoes, b-values, time points) `volumes` takes all or the first. Gantry
    `tilt` is corrected by resampling, or such series are refused. A single modality is also taken to be that of NIfTI
    files, which name none.

    `label_threshold` turns a grey mask into a binary one (values above it are 1); `target_names` maps the table's
    class cells to names of `task.labels`; `simulated` says so on every page.

    `refuse` lists the findings that keep a scan out; all others travel with the case. `radiograph_window` applies
    the VOI look-up table or window of DICOM radiographs instead of keeping every level the detector stored.

    `names` says what becomes of the names of NIfTI, PNG and JPEG files: `keyed` replaces them, as those of DICOM
    always are; `kept` keeps them; `auto` replaces them where DICOM is among the sources. `dates` of examinations are
    shifted, by one number of days for all of a patient, or dropped.
    """

    modality: tuple[str, ...] = ()
    description: str = ""
    min_slices: Count = 3
    plane: tuple[Literal["axial", "coronal", "sagittal"], ...] = ()
    volumes: Literal["all", "first"] = "all"
    tilt: Literal["correct", "refuse"] = "correct"
    table: TableConfig = TableConfig()
    target_names: dict[str, str] = {}
    label_threshold: int | None = None
    simulated: bool = False
    refuse: tuple[FindingCode, ...] = ("not_frontal_chest", "not_hounsfield", "implausible_extent", "form_mirrored")
    radiograph_window: Literal["none", "voi"] = "none"
    names: Literal["auto", "kept", "keyed"] = "auto"
    dates: Literal["shift", "drop"] = "shift"
    split: SplitConfig = SplitConfig()

    @field_validator("description")
    @classmethod
    def _check_pattern(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
        return pattern


class PlanConfig(Strict):
    """What the planner may not choose itself: a null is chosen from the cohort and recorded with its reason."""

    spacing_mm: tuple[Positive, ...] | None = None
    size_px: Annotated[int, Field(ge=32, le=2048)] | None = None
    patch_size: tuple[Count, ...] | None = None
    batch_size: Count | None = None
    normalise: Literal["auto", "zscore", "ct"] = "auto"
    memory_gb: Positive | None = None


class UNetConfig(Strict):
    """Residual U-Net of MONAI (Kerfoot et al. 2018): one convolution stage per entry of `channels`."""

    name: Literal["unet"] = "unet"
    channels: tuple[Count, ...] = (32, 64, 128, 256)
    strides: tuple[Count, ...] = (2, 2, 2)
    num_res_units: Annotated[int, Field(ge=0)] = 2
    dropout: Share = 0.0


class DynUNetConfig(Strict):
    """The network of nnU-Net (Isensee et al. 2021), as MONAI's DynUNet."""

    name: Literal["dynunet"] = "dynunet"
    channels: tuple[Count, ...] = (32, 64, 128, 256)


class SegResNetConfig(Strict):
    """SegResNet without the autoencoder branch (Myronenko 2018)."""

    name: Literal["segresnet"] = "segresnet"
    init_filters: Count = 16
    blocks_down: tuple[Count, ...] = (1, 2, 2, 4)
    blocks_up: tuple[Count, ...] = (1, 1, 1)


class UNetPPConfig(Strict):
    """U-Net++ (Zhou et al. 2020) in 2D or 3D; patch sizes must be multiples of 2**depth (the papers' depth is 4).

    A null `features` means 32, doubled from level to level up to 512. With `deep_supervision` every level has a head:
    the network can be pruned, and `inference` may average all heads instead of taking the deepest one (`fast`).
    """

    name: Literal["unetpp"] = "unetpp"
    depth: Annotated[int, Field(ge=1, le=5)] = 3
    features: tuple[Count, ...] | None = None
    norm: Literal["instance", "group", "batch"] = "instance"
    down: Literal["max", "conv"] = "max"
    up: Literal["transposed", "linear"] = "transposed"
    scse: bool = False
    deep_supervision: bool = False
    inference: Literal["fast", "average"] = "fast"


class DenseNetConfig(Strict):
    """DenseNet (Huang et al. 2017) in 2D or 3D; `depth` chooses the published layer counts."""

    name: Literal["densenet"] = "densenet"
    depth: Literal[121, 169, 201, 264] = 121
    init_features: Count = 64
    growth_rate: Count = 32
    block_config: tuple[Count, ...] | None = None
    dropout: Share = 0.0


ModelConfig = Annotated[
    UNetConfig | DynUNetConfig | SegResNetConfig | UNetPPConfig | DenseNetConfig, Field(discriminator="name")
]


class DiceCEConfig(Strict):
    """Soft Dice over foreground classes, batch-wise, plus cross-entropy."""

    name: Literal["dice_ce"] = "dice_ce"
    dice_weight: NotNegative = 1.0
    ce_weight: NotNegative = 1.0


class CrossEntropyConfig(Strict):
    """Cross-entropy; `balance` weighs each class by its inverse frequency in the training split."""

    name: Literal["cross_entropy"] = "cross_entropy"
    balance: bool = False
    label_smoothing: Share = 0.0


LossConfig = Annotated[DiceCEConfig | CrossEntropyConfig, Field(discriminator="name")]


class AugmentConfig(Strict):
    """Ranges from which parameters are drawn per item; 0 switches a kind off.

    `flip_axes` are array axes after canonical orientation (0 = left-right for volumes; 0 = rows for radiographs).
    """

    probability: Share = 0.8
    rotate_deg: NotNegative = 15.0
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.15
    translate: Annotated[float, Field(ge=0, lt=1)] = 0.05
    flip_axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] = ()
    brightness: NotNegative = 0.1
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.15
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.2
    noise_sd: NotNegative = 0.05


class TrainConfig(Strict):
    """The loop. The learning rate follows from the global step alone, so a resumed run keeps its curve."""

    epochs: Count = 100
    steps_per_epoch: Count | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive = 1e-3
    weight_decay: NotNegative = 1e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    schedule: Literal["poly", "cosine", "constant"] = "cosine"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    clip_norm: Positive = 12.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    foreground_share: Share = 0.5
    validate_every: Count = 5
    select: Literal["last", "best"] = "last"
    checkpoint_minutes: Positive = 10.0
    deterministic: bool = False


class PredictConfig(Strict):
    """Inference. `overlap` of neighbouring windows; `mirror` averages over flips along the given axes."""

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    window_batch: Count = 1
    mirror_axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] = ()


class ExplainConfig(Strict):
    """Activation maps: method, layer (`bottleneck`, `last` or a module's dotted name) and for how many cases."""

    method: Literal["gradcam", "hirescam", "layercam", "gradients"] = "gradcam"
    layer: str = "last"
    target: str | None = None
    max_cases: Annotated[int, Field(ge=0)] = 20


class ReportConfig(Strict):
    """How many cases are drawn, worst first, and for how many an interactive slice viewer is written."""

    max_cases: Annotated[int, Field(ge=0)] = 12
    viewer_cases: Annotated[int, Field(ge=0)] = 3


class CodeConfig(Strict):
    """A concept by its code; `scheme` names the vocabulary, SCT for SNOMED CT."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # YAML takes SNOMED codes for numbers

    value: Annotated[str, Field(pattern=r"^[^\s\\]{1,16}$")]
    meaning: Annotated[str, Field(pattern=r"^[^\\]{1,64}$")]
    scheme: Annotated[str, Field(pattern=r"^[A-Z0-9_]{1,16}$")] = "SCT"


class SegmentConfig(Strict):
    """What DICOM calls one label: the kind of thing, the thing, and which part or side of it."""

    category: CodeConfig = CodeConfig(value="91723000", meaning="Anatomical Structure")
    type: CodeConfig = CodeConfig(value="85756007", meaning="Tissue")
    modifier: CodeConfig | None = None


class ExportConfig(Strict):
    """Results as DICOM, for scans that came as DICOM. `segments` gives codes to labels.

    `segmentation`: `binary` has one frame per label and slice, and every viewer reads it; `labelmap` has one per
    slice, which is far smaller with many labels, but only recent viewers read it.
    """

    segmentation: Literal["binary", "labelmap"] = "binary"
    segments: dict[str, SegmentConfig] = {}


class TrackingConfig(Strict):
    """MLflow: a null `uri` means sqlite under the workspace. `register` names the model; empty registers nothing."""

    uri: str | None = None
    experiment: str = "medseg"
    register_as: str = ""
    system_metrics: bool = True


class Config(Strict):
    """One experiment."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    task: TaskConfig
    model: ModelConfig
    loss: LossConfig
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ingest: IngestConfig = IngestConfig()
    plan: PlanConfig = PlanConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    predict: PredictConfig = PredictConfig()
    explain: ExplainConfig = ExplainConfig()
    export: ExportConfig = ExportConfig()
    report: ReportConfig = ReportConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        classifier = self.model.name == "densenet"
        if classifier != (self.task.kind == "classification"):
            raise ValueError(f"model.name {self.model.name!r} does not fit task.kind {self.task.kind!r}")
        if classifier != (self.loss.name == "cross_entropy"):
            raise ValueError(f"loss.name {self.loss.name!r} does not fit task.kind {self.task.kind!r}")
        if unknown := sorted(set(self.export.segments) - set(self.task.labels)):
            names = ", ".join(self.task.labels)
            raise ValueError(f"export.segments names {unknown[0]!r}, which is none of task.labels ({names})")
        return self


def load_config(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a configuration from a path or from its name in configs/, apply `a.b=c` overrides, validate.

    Raises:
        UserError: no such file, not YAML, an unknown key or a wrong value; the sentence carries the field's path.
    """
    path = find_config(path_or_name)
    tree = _read_tree(path)
    for override in overrides:
        apply_override(tree, override)
        if override.startswith(("task=", "task.labels")):
            _forget_codes(tree, tree)
    return validate_config(tree, str(path))


def validate_config(tree: Mapping[str, Any], source: str) -> Config:
    """Validate a plain tree. `source` is named in the error."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, source)) from error


def find_config(path_or_name: str | Path) -> Path:
    """The file meant by a path or a name. Raises UserError listing the names there are."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    named = resource_dir("configs") / f"{path_or_name}.yaml"
    if named.is_file():
        return named
    names = ", ".join(sorted(p.stem for p in resource_dir("configs").glob("*.yaml")))
    raise UserError(f"config {str(path_or_name)!r} is neither a file nor one of: {names}.")


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every field shown."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_tree(path: Path, child: Path | None = None) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}); correct the file.") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no mapping of fields; see configs/ for examples.")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if child is not None:
        raise UserError(f"{path}: extends stands in a file that {child} extends already; one level is allowed.")
    sibling = path.parent / f"{parent}.yaml"
    below = _read_tree(sibling if sibling.is_file() else find_config(parent), path)
    _forget_codes(below, tree)
    return _merge(below, tree)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and not _changes_kind(old, value) and key not in _WHOLE:
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _forget_codes(tree: dict[str, Any], changed: Mapping[str, Any]) -> None:
    """Drop from `tree` the codes of labels that are not among the labels of `changed`, where it names any."""
    export, task = tree.get("export"), changed.get("task")
    segments = export.get("segments") if isinstance(export, dict) else None
    labels = task.get("labels") if isinstance(task, dict) else None
    if isinstance(segments, dict) and isinstance(labels, dict):
        tree["export"] = {**tree["export"], "segments": {name: segments[name] for name in segments if name in labels}}


def _changes_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "name" in new and new["name"] != old.get("name")


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `a.b=c` in a plain tree. Raises UserError when it is malformed."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override!r} is not of the form field.path=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not YAML ({error}).") from error
    *parents, last = path.split(".")
    for parent in parents:
        branch = tree.setdefault(parent, {})
        if not isinstance(branch, dict):
            raise UserError(f"--set {override!r}: {parent!r} is a value, not a group of fields.")
        tree = branch
    tree[last] = value


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        place = ".".join(str(part) for part in problem["loc"]) or "config"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{place} is not a known field; remove it or correct its name")
        elif problem["type"] == "missing":
            lines.append(f"{place} is required")
        else:
            shown = repr(problem["input"])
            value = f" (got {shown})" if len(shown) < 80 and not isinstance(problem["input"], dict) else ""
            lines.append(f"{place}: {problem['msg'].removeprefix('Value error, ')}{value}")
    return f"{source}: " + "; ".join(lines) + "."
