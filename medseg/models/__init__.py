"""Networks by name. `MODELS` is the one registry: adding a network is one file, one config class and one line here.

Shape legend: B batch, C channels, D H W the spatial axes in array order (H W for 2D), K classes.
"""

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError
from torch import nn

from medseg.config import (
    DenseNetConfig,
    DynUNetConfig,
    ModelConfig,
    SegResNetConfig,
    Strict,
    UNetConfig,
    UNetPPConfig,
)
from medseg.files import UserError
from medseg.models.baselines import build_densenet, build_dynunet, build_segresnet, build_unet
from medseg.models.unetpp import build_unetpp

Builder = Callable[[Any, int, int, int], nn.Module]

MODELS: dict[str, tuple[type[Strict], Builder]] = {
    "unet": (UNetConfig, build_unet),
    "dynunet": (DynUNetConfig, build_dynunet),
    "segresnet": (SegResNetConfig, build_segresnet),
    "unetpp": (UNetPPConfig, build_unetpp),
    "densenet": (DenseNetConfig, build_densenet),
}


def build_model(name: str, *, spatial_dims: int, in_channels: int, out_channels: int, **params: Any) -> nn.Module:
    """Build a registered network with random weights from the global torch generator.

    Args:
        name: key of `MODELS`.
        params: fields of the network's config class.

    Returns:
        A module x_BCDHW -> logits_BKDHW (segmentation) or logits_BK (classification).

    Raises:
        UserError: unknown name or parameter.
    """
    if name not in MODELS:
        raise UserError(f"model.name {name!r} is not registered; choose one of {', '.join(MODELS)}.")
    config_class, builder = MODELS[name]
    try:
        config = config_class(**params)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"model {name!r}, parameter {field!r}: {problem['msg']}.") from error
    return builder(config, spatial_dims, in_channels, out_channels)


def build_from_config(config: ModelConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """`build_model` for an already validated config."""
    return MODELS[config.name][1](config, spatial_dims, in_channels, out_channels)
