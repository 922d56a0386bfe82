"""The configuration: one frozen tree, loaded from YAML, with every default in one place.

YAML is data only: at most one `extends:` (a sibling file, or a name in configs/), no interpolation, no class paths.
`--set a.b=c` is the only override. An unknown key or a wrong value fails at load with the field's path.
"""

from medseg.config.fields import Strict
from medseg.config.ingest import FindingCode, IngestConfig, SplitConfig, TableConfig
from medseg.config.load import apply_override, dump_config, find_config, load_config, validate_config
from medseg.config.models import DenseNetConfig, DynUNetConfig, ModelConfig, SegResNetConfig, UNetConfig, UNetPPConfig
from medseg.config.results import (
    CodeConfig,
    ExplainConfig,
    ExportConfig,
    PredictConfig,
    ReportConfig,
    SegmentConfig,
    TrackingConfig,
)
from medseg.config.training import AugmentConfig, CrossEntropyConfig, DiceCEConfig, LossConfig, PlanConfig, TrainConfig
from medseg.config.tree import Config, TaskConfig
from medseg.config.verdict import AuditConfig, AuditItem, VerdictConfig

__all__ = [
    "AuditConfig",
    "AuditItem",
    "AugmentConfig",
    "CodeConfig",
    "Config",
    "CrossEntropyConfig",
    "DenseNetConfig",
    "DiceCEConfig",
    "DynUNetConfig",
    "ExplainConfig",
    "ExportConfig",
    "FindingCode",
    "IngestConfig",
    "LossConfig",
    "ModelConfig",
    "PlanConfig",
    "PredictConfig",
    "ReportConfig",
    "SegResNetConfig",
    "SegmentConfig",
    "SplitConfig",
    "Strict",
    "TableConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainConfig",
    "UNetConfig",
    "UNetPPConfig",
    "VerdictConfig",
    "apply_override",
    "dump_config",
    "find_config",
    "load_config",
    "validate_config",
]
