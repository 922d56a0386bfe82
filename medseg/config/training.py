"""Planning, losses, augmentation and the loop."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medseg.config.fields import Count, NotNegative, Positive, Share, Strict


class AppearanceConfig(Strict):
    """How radiographs of different sources are made to look alike, at training and at prediction; off by default.

    `crop_padding` leaves out constant lines at the border; masks and maps still come out on the radiograph's own grid.
    `histogram` clips grey values to the 1st and 99th percentile (`percentile`), maps eleven percentiles to those of the
    training cases (`landmarks`, Nyúl & Udupa 1999), or equalises `clahe_tiles` tiles a side, whose bins hold at most
    `clahe_limit` times their mean (`clahe`, Zuiderveld 1994). `match_sharpness` brings the contrast of five octaves of
    detail to that of the training cases (in the manner of Philipsen et al. 2015).
    """

    crop_padding: bool = False
    histogram: Literal["none", "percentile", "landmarks", "clahe"] = "none"
    clahe_tiles: Annotated[int, Field(ge=1, le=32)] = 8
    clahe_limit: Annotated[float, Field(ge=1)] = 2.0
    match_sharpness: bool = False


class PlanConfig(Strict):
    """What the planner may not choose itself: a null is chosen from the cohort and recorded with its reason.

    `memory_gb` (1e9 bytes) bounds the peak of training. A null means 90 % of a GPU's free memory; on a CPU 80 % of the
    available memory, and at most 96³ voxels a step. `probe_seconds` is about what measuring may take.
    """

    spacing_mm: tuple[Positive, ...] | None = None
    size_px: Annotated[int, Field(ge=32, le=2048)] | None = None
    patch_size: tuple[Count, ...] | None = None
    batch_size: Count | None = None
    normalise: Literal["auto", "zscore", "zscore_nonzero", "ct"] = "auto"
    appearance: AppearanceConfig = AppearanceConfig()
    memory_gb: Positive | None = None
    probe_seconds: Positive = 60.0


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


class BinaryCrossEntropyConfig(Strict):
    """Binary cross-entropy, the mean over the labels of `task.multi_label`.

    `balance` weighs the present of each label by absent/present in the training split, so that both count alike.
    """

    name: Literal["binary_cross_entropy"] = "binary_cross_entropy"
    balance: bool = False


LossConfig = Annotated[DiceCEConfig | CrossEntropyConfig | BinaryCrossEntropyConfig, Field(discriminator="name")]


class StyleConfig(Strict):
    """Ranges of what scanners and their software change; 0, the default, switches a kind off.

    `amplitude_mix`: largest share of the Fourier amplitude taken from another image of the batch. `random_convolution`:
    largest share of the image filtered by a random kernel. `resolution`: largest share of the pixels along an axis that
    are lost. `sharpness`: of fine detail, at most so much is lost, or as much gained.
    """

    amplitude_mix: Share = 0.0
    random_convolution: Share = 0.0
    resolution: Annotated[float, Field(ge=0, lt=1)] = 0.0
    sharpness: Annotated[float, Field(ge=0, lt=1)] = 0.0


class PriorConfig(Strict):
    """What a network that takes an earlier segmentation sees as one while it trains.

    It is the label of the patient's earlier examination where there is one, brought to the later by a rigid alignment.
    Else it is the case's own label, displaced by up to `shift_voxels` along each axis and warped smoothly by
    displacements with a standard deviation of up to `warp_voxels`. A share `dropout` of the items have none.
    """

    dropout: Share = 0.3
    shift_voxels: NotNegative = 1.5
    warp_voxels: NotNegative = 1.5


class AugmentConfig(Strict):
    """Ranges from which parameters are drawn per item; 0 switches a kind off.

    `flip_axes` are array axes after canonical orientation (0 = left-right for volumes; 0 = rows for radiographs).
    `rotate_deg` holds for all axes that a volume is turned about, or is one number for each (left-right, back-front,
    foot-head): thick slices, and borders drawn along slices, do not stand every turn.
    `prior` is for networks that take an earlier segmentation. `mixup`, for classifiers: images are mixed in pairs, and
    their targets, with shares from Beta(mixup, mixup) (Zhang et al. 2018).
    """

    probability: Share = 0.8
    rotate_deg: NotNegative | tuple[NotNegative, NotNegative, NotNegative] = 15.0
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.15
    translate: Annotated[float, Field(ge=0, lt=1)] = 0.05
    flip_axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] = ()
    brightness: NotNegative = 0.1
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.15
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.2
    noise_sd: NotNegative = 0.05
    style: StyleConfig = StyleConfig()
    prior: PriorConfig = PriorConfig()
    mixup: NotNegative = 0.0


class PretrainConfig(Strict):
    """Sparse masked modelling of radiographs without labels (`medseg models pretrain`; Tian et al. 2023).

    `mask_share` of the patches are hidden; the decoder has `width` channels at its coarsest map.
    """

    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.6
    width: Annotated[int, Field(ge=16)] = 256


class TrainConfig(Strict):
    """The loop. The learning rate follows from the global step alone, so a resumed run keeps its curve.

    A null `fold` trains on the split of the cohort. Else train and val together are dealt into `folds` parts that
    share no patient (or no site), by `ingest.split.seed`; part number `fold`, from 0 on, validates and the others
    train, up to the last step (`select`). The test split is left alone either way.

    `site_adversary` is the weight with which a classifier's features unlearn the site of the training cases (Ganin et
    al. 2016); 0 switches it off.

    `compile` has torch compile the network for its steps (`torch.compile`): the first takes about a minute, on a CPU
    it needs a C++ compiler. The weights differ by rounding from those trained without.

    `distance_cases`: at the end the feature distance (`medseg.feature_distance`) is fitted on so many training cases at
    most, and its limit set on so many validation cases at most, evenly spread; 0 leaves it out.
    """

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
    compile: bool = False
    site_adversary: NotNegative = 0.0
    folds: Annotated[int, Field(ge=2, le=20)] = 5
    fold: Annotated[int, Field(ge=0)] | None = None
    folds_by: Literal["patient", "site"] = "patient"
    distance_cases: Annotated[int, Field(ge=0)] = 200

    @model_validator(mode="after")
    def _check_fold(self) -> "TrainConfig":
        if self.fold is not None and self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} is none of the train.folds {self.folds}, which count from 0")
        if self.fold is not None and self.select == "best":
            raise ValueError("select 'best' lets a fold choose the network that it measures; use 'last'")
        if self.compile and self.site_adversary:
            raise ValueError("site_adversary reads features inside the network, which compile takes apart; use one")
        return self
