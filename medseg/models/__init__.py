"""Networks by name. `MODELS` is the one registry: adding a network is one file, one config class and one line here.

Shape legend: B batch, C channels, D H W the spatial axes in array order (H W for 2D), K classes.
"""

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError
from torch import nn

from medseg.config import (
    AttentionUNetConfig,
    DenseNetConfig,
    DynUNetConfig,
    InceptionConfig,
    MedNeXtConfig,
    MobileNetConfig,
    ModelConfig,
    NetworkConfig,
    PriorUNetConfig,
    ResNetConfig,
    ReversibleUNetConfig,
    SegResNetConfig,
    SqueezeNetConfig,
    SwinUNETRConfig,
    TwoStageConfig,
    UNetConfig,
    UNetPPConfig,
    VGGConfig,
)
from medseg.files import UserError
from medseg.models.baselines import (
    build_attention_unet,
    build_dynunet,
    build_mednext,
    build_segresnet,
    build_swin_unetr,
    build_unet,
)
from medseg.models.classifiers import (
    build_densenet,
    build_inception_v3,
    build_mobilenet_v2,
    build_resnet,
    build_squeezenet,
    build_vgg,
)
from medseg.models.prior_unet import build_prior_unet
from medseg.models.reversible_unet import build_reversible_unet
from medseg.models.two_stage import build_two_stage
from medseg.models.unetpp import build_unetpp

Builder = Callable[[Any, int, int, int], nn.Module]

MODELS: dict[str, tuple[type[NetworkConfig], Builder]] = {
    "unet": (UNetConfig, build_unet),
    "attention_unet": (AttentionUNetConfig, build_attention_unet),
    "dynunet": (DynUNetConfig, build_dynunet),
    "segresnet": (SegResNetConfig, build_segresnet),
    "swin_unetr": (SwinUNETRConfig, build_swin_unetr),
    "mednext": (MedNeXtConfig, build_mednext),
    "unetpp": (UNetPPConfig, build_unetpp),
    "reversible_unet": (ReversibleUNetConfig, build_reversible_unet),
    "prior_unet": (PriorUNetConfig, build_prior_unet),
    "densenet": (DenseNetConfig, build_densenet),
    "resnet": (ResNetConfig, build_resnet),
    "vgg": (VGGConfig, build_vgg),
    "inception_v3": (InceptionConfig, build_inception_v3),
    "squeezenet": (SqueezeNetConfig, build_squeezenet),
    "mobilenet_v2": (MobileNetConfig, build_mobilenet_v2),
    "two_stage": (TwoStageConfig, build_two_stage),
}


def build_model(name: str, *, spatial_dims: int, in_channels: int, out_channels: int, **params: Any) -> nn.Module:
    """Build a registered network with random weights from the global torch generator.

    Pretrained weights are another step: `medseg.models.pretrained.load_pretrained`.

    Args:
        name: key of `MODELS`.
        params: fields of the network's config class.

    Returns:
        A module x_BCDHW -> logits_BKDHW (segmentation) or logits_BK (classification). In training some give more:
        logits by level, or `medseg.losses.WithLosses`.

    Raises:
        UserError: unknown name or parameter, or a network that this number of axes or this installation cannot have.
    """
    if name not in MODELS:
        raise UserError(f"model.name {name!r} is not registered; choose one of {', '.join(MODELS)}.")
    config_class, builder = MODELS[name]
    try:
        config = config_class(**params)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        where = f", parameter {field!r}" if field else ""
        raise UserError(f"model {name!r}{where}: {problem['msg'].removeprefix('Value error, ')}.") from error
    return _build(config, builder, spatial_dims, in_channels, out_channels)


def build_from_config(config: ModelConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """`build_model` for an already validated config."""
    return _build(config, MODELS[config.name][1], spatial_dims, in_channels, out_channels)


def _build(
    config: NetworkConfig, builder: Builder, spatial_dims: int, in_channels: int, out_channels: int
) -> nn.Module:
    if problem := config.dims_problem(spatial_dims):
        raise UserError(f"task.spatial_dims: {problem}.")
    return builder(config, spatial_dims, in_channels, out_channels)
