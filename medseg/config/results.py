"""Inference, explanation, export, report and tracking."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from medseg.config.fields import Count, Strict


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
    segments: dict[str, SegmentConfig] = Field(default={})


class TrackingConfig(Strict):
    """MLflow: a null `uri` means sqlite under the workspace. `register` names the model; empty registers nothing."""

    uri: str | None = None
    experiment: str = "medseg"
    register_as: str = ""
    system_metrics: bool = True
