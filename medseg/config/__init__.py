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
from medseg.config.ingest import ExamUnit, FindingCode, IngestConfig, SplitConfig, TableConfig
from medseg.config.load import apply_override, dump_config, find_config, load_config, validate_config
from medseg.config.lungs import LungsConfig
from medseg.config.models import (
    AttentionUNetConfig,
    DynUNetConfig,
    MedNeXtConfig,
    ModelConfig,
    PriorUNetConfig,
    ReversibleUNetConfig,
    SegResNetConfig,
    SwinUNETRConfig,
    UNetConfig,
    UNetPPConfig,
)
from medseg.config.network import NetworkConfig
from medseg.config.results import (
    ChangeConfig,
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
    AppearanceConfig,
    AugmentConfig,
    BinaryCrossEntropyConfig,
    CrossEntropyConfig,
    DiceCEConfig,
    LossConfig,
    PlanConfig,
    PretrainConfig,
    PriorConfig,
    StyleConfig,
    TrainConfig,
)
from medseg.config.tree import Config, TaskConfig
from medseg.config.verdict import AuditConfig, AuditItem, VerdictConfig

__all__ = [
    "AppearanceConfig",
    "AttentionUNetConfig",
    "AuditConfig",
    "AuditItem",
    "AugmentConfig",
    "BackboneConfig",
    "BinaryCrossEntropyConfig",
    "ChangeConfig",
    "CodeConfig",
    "Config",
    "CrossEntropyConfig",
    "DenseNetConfig",
    "DiceCEConfig",
    "DynUNetConfig",
    "ExamUnit",
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
    "PretrainConfig",
    "PriorConfig",
    "PriorUNetConfig",
    "RankConfig",
    "ReportConfig",
    "ResNetConfig",
    "ReversibleUNetConfig",
    "SegResNetConfig",
    "SegmentConfig",
    "SplitConfig",
    "SqueezeNetConfig",
    "Strict",
    "StyleConfig",
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
