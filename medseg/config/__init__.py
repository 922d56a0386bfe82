"""The configuration: one frozen tree, loaded from YAML, with every default in one place.

YAML is data only: at most one `extends:` (a sibling file, or a name in configs/), no interpolation, no class paths.
`--set a.b=c` is the only override. An unknown key or a wrong value fails at load with the field's path.
"""

from medseg.config.classifiers import (
    BackboneConfig,
    DenseNetConfig,
    InceptionConfig,
    MobileNetConfig,
    ResNetConfig,
    SqueezeNetConfig,
    TwoStageConfig,
    VGGConfig,
)
from medseg.config.fields import Strict
from medseg.config.ingest import FindingCode, IngestConfig, SplitConfig, TableConfig
from medseg.config.load import apply_override, dump_config, find_config, load_config, validate_config
from medseg.config.lungs import LungsConfig
from medseg.config.models import (
    AttentionUNetConfig,
    DynUNetConfig,
    MedNeXtConfig,
    ModelConfig,
    ReversibleUNetConfig,
    SegResNetConfig,
    SwinUNETRConfig,
    UNetConfig,
    UNetPPConfig,
)
from medseg.config.network import NetworkConfig
from medseg.config.results import (
    CodeConfig,
    ExplainChecksConfig,
    ExplainConfig,
    ExportConfig,
    MethodConfig,
    MethodName,
    PredictConfig,
    RankConfig,
    ReportConfig,
    SegmentConfig,
    TrackingConfig,
)
from medseg.config.training import (
    AugmentConfig,
    BinaryCrossEntropyConfig,
    CrossEntropyConfig,
    DiceCEConfig,
    LossConfig,
    PlanConfig,
    TrainConfig,
)
from medseg.config.tree import Config, TaskConfig
from medseg.config.verdict import AuditConfig, AuditItem, VerdictConfig

__all__ = [
    "AttentionUNetConfig",
    "AuditConfig",
    "AuditItem",
    "AugmentConfig",
    "BackboneConfig",
    "BinaryCrossEntropyConfig",
    "CodeConfig",
    "Config",
    "CrossEntropyConfig",
    "DenseNetConfig",
    "DiceCEConfig",
    "DynUNetConfig",
    "ExplainChecksConfig",
    "ExplainConfig",
    "ExportConfig",
    "FindingCode",
    "InceptionConfig",
    "IngestConfig",
    "LossConfig",
    "LungsConfig",
    "MedNeXtConfig",
    "MethodConfig",
    "MethodName",
    "MobileNetConfig",
    "ModelConfig",
    "NetworkConfig",
    "PlanConfig",
    "PredictConfig",
    "RankConfig",
    "ReportConfig",
    "ResNetConfig",
    "ReversibleUNetConfig",
    "SegResNetConfig",
    "SegmentConfig",
    "SplitConfig",
    "SqueezeNetConfig",
    "Strict",
    "SwinUNETRConfig",
    "TableConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainConfig",
    "TwoStageConfig",
    "UNetConfig",
    "UNetPPConfig",
    "VGGConfig",
    "VerdictConfig",
    "apply_override",
    "dump_config",
    "find_config",
    "load_config",
    "validate_config",
]
