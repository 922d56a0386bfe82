"""Inference, explanation, export, report and tracking."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from medseg.config.fields import Count, Positive, Share, Strict

MethodName = Literal[
    "gradcam",
    "gradcampp",
    "hirescam",
    "layercam",
    "eigencam",
    "scorecam",
    "fullgrad",
    "occlusion",
    "gradients",
]


class ChangeConfig(Strict):
    """How volumes of one patient are compared over time.

    `cv_percent` is the test-retest noise of a label's volume where it is known: the standard deviation of repeated
    measurements in percent of the volume. What `medseg models calibrate` measured, on repeat scans at most
    `retest_days` apart, goes before it. Examinations that span less than `min_days` are given no rate per year.
    """

    cv_percent: dict[str, Positive] = Field(default={})
    retest_days: Annotated[int, Field(ge=0)] = 30
    min_days: Count = 90


class PredictConfig(Strict):
    """Inference. `overlap` of neighbouring windows; `mirror_axes`: logits are averaged over flips along them
    (0 = left-right of a volume, rows of a radiograph).

    `memory_gb`: what blended logits may take, in GB (1e9 bytes), beside image, label map and the network's own need.
    `air_below`: windows with no voxel from it on are answered as if they held even air, which is quicker and may change
    labels; in HU where the plan normalises by HU (`ct`), else in standard deviations after normalisation.
    `precision`: `bf16` has the network compute in bfloat16 (autocast), and `auto` where it segments and the hardware
    multiplies in it. Logits are averaged and blended as fp32 in any case, and activation maps are made in fp32.
    `min_similarity`: correlation of two examinations, once aligned, below which the earlier mask is no prior.
    """

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    window_batch: Count = 1
    mirror_axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] = ()
    memory_gb: Positive = 4.0
    air_below: float | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    min_similarity: Share = 0.7
    change: ChangeConfig = ChangeConfig()


class MethodConfig(Strict):
    """Settings of single explanation methods.

    `score_channels`: Score-CAM takes this many channels, those with the largest variance; one forward pass each.
    `occlusion_window`: side of the covered window as a share of the image's; `batch_size`: of perturbed copies.
    """

    score_channels: Count = 64
    occlusion_window: Annotated[float, Field(gt=0, le=1)] = 0.2
    batch_size: Count = 16


class ExplainChecksConfig(Strict):
    """The pass mark of an explanation: one threshold per check (null switches it off), and how it is measured.

    `energy`: least share of the map inside the region, which is dilated by `dilate_px` of the network's grid.
    `deletion`, `insertion`: least gain over random maps of the same coarseness, as area between the curves of the
    probability. `road`: least (LeRF - MoRF) / 2 of the probability. `randomisation`: largest rank correlation that
    may remain when all weights are drawn anew. `stability`: least correlation after shifts of `shift_px`.
    `agreement`: least rank correlation with the map of `agreement_with`.

    `steps`: points of each curve; `random_maps`: how many they are held against; `stages`: of the randomisation.
    A batch item of more than `max_voxels` is not perturbed (no deletion, insertion and ROAD), which takes
    33 runs of the network by default.
    """

    energy: Annotated[float, Field(ge=0, le=1)] | None = 0.5
    deletion: Annotated[float, Field(ge=-1, le=1)] | None = 0.0
    insertion: Annotated[float, Field(ge=-1, le=1)] | None = 0.0
    road: Annotated[float, Field(ge=-1, le=1)] | None = 0.0
    randomisation: Annotated[float, Field(ge=0, le=1)] | None = 0.5
    stability: Annotated[float, Field(ge=-1, le=1)] | None = 0.7
    agreement: Annotated[float, Field(ge=-1, le=1)] | None = 0.2
    dilate_px: Annotated[int, Field(ge=0)] = 4
    steps: Annotated[int, Field(ge=2)] = 4
    random_maps: Count = 2
    stages: Count = 2
    shift_px: Count = 2
    agreement_with: MethodName = "fullgrad"
    max_voxels: Count = 300_000
    seed: int = 0


class RankConfig(Strict):
    """What is compared, when a classifier has been trained, to find out which maps explain it best.

    `cases` of the validation split, dealt evenly over classes and sites, are explained by each of `methods` at the
    layers that end the `stages` coarsest resolutions; 0 cases compare nothing. Folds share the cases between them, as
    many for each.
    """

    cases: Annotated[int, Field(ge=0)] = 6
    methods: Annotated[tuple[MethodName, ...], Field(min_length=1)] = ("gradcam", "hirescam", "layercam", "fullgrad")
    stages: Count = 2


class ExplainConfig(Strict):
    """Activation maps: method, layer (`bottleneck`, `last` or a module's dotted name) and for how many cases.

    `auto` is what measured best by `rank` and stands in the bundle; without such a figure it is `gradcam` at `layer`.
    With another layer than `last` the methods are compared at that one alone.

    `cases` says which: the `first` by id, a `random` choice (the same for the same seed of the checks), or for
    classifiers the most `doubtful` (lowest probability of the predicted class, or of the least certain answer about a
    label where labels are not exclusive). A null `target` explains what is predicted. `on_failure`: a map that fails a
    check is shown with the failure named, or withheld (not written).
    """

    method: Literal["auto"] | MethodName = "auto"
    layer: str = "last"
    rank: RankConfig = RankConfig()
    target: str | None = None
    max_cases: Annotated[int, Field(ge=0)] = 20
    cases: Literal["first", "random", "doubtful"] = "first"
    methods: MethodConfig = MethodConfig()
    checks: ExplainChecksConfig = ExplainChecksConfig()
    on_failure: Literal["show", "withhold"] = "show"

    def settled(self, chosen: Mapping[str, str] | None) -> "ExplainConfig":
        """With a method in the place of `auto`: that of `chosen` (`method` and `layer`), where something was."""
        if self.method != "auto":
            return self
        return self.model_copy(update=dict(chosen) if chosen else {"method": "gradcam"})


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
    """Results as DICOM, for scans that came as DICOM.

    `segments` gives codes to labels; of a classifier, the `type` of the class to refer names its verdict.

    `segmentation`: `binary` has one frame per label and slice, and every viewer reads it; `labelmap` has one per
    slice, which is far smaller with many labels, but only recent viewers read it.
    """

    segmentation: Literal["binary", "labelmap"] = "binary"
    segments: dict[str, SegmentConfig] = Field(default={})


class TrackingConfig(Strict):
    """MLflow: a null `uri` means sqlite under the workspace. `register` names the model; empty registers nothing."""

    uri: str | None = None
    experiment: str = "medseg"
    register_as: str = ""
    system_metrics: bool = True
