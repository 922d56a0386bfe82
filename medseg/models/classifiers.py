"""Classifiers: DenseNet and ResNet in 2D and 3D from MONAI, the others in 2D from torchvision.

With those, all nine networks that Rahman et al. 2020 compared (arXiv:2007.14895) can be built: ResNet18, 50 and 101,
CheXNet (a DenseNet121), Inception v3, VGG19, DenseNet201, SqueezeNet and MobileNet.

torchvision is an optional extra and is imported only when one of its networks is built.
"""

import importlib
import importlib.metadata
from typing import Any

import torch
from monai.networks import nets
from torch import nn

from medseg.config import (
    DenseNetConfig,
    InceptionConfig,
    MobileNetConfig,
    ResNetConfig,
    SqueezeNetConfig,
    VGGConfig,
)
from medseg.files import UserError

# Layers per dense block (Huang et al. 2017, arXiv:1608.06993, table 1).
_DENSE_BLOCKS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32), 264: (6, 12, 64, 48)}
# Kind of block, and blocks per stage (He et al. 2016, arXiv:1512.03385, table 1).
_RESIDUAL_BLOCKS = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}


def build_densenet(config: DenseNetConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """DenseNet classifier; batch norm, global average pooling, one linear layer."""
    module: nn.Module = nets.DenseNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        init_features=config.init_features,
        growth_rate=config.growth_rate,
        block_config=config.block_config or _DENSE_BLOCKS[config.depth],
        dropout_prob=config.dropout,
    )
    return module


def build_resnet(config: ResNetConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """ResNet classifier of the paper's layout: stem of stride 2, projection shortcuts without bias.

    In 2D its weights have the names and shapes of torchvision's ResNet.
    """
    kind, blocks = _RESIDUAL_BLOCKS[config.depth]
    module: nn.Module = nets.ResNet(
        block=kind,
        layers=list(blocks),
        block_inplanes=[config.init_features * 2**stage for stage in range(4)],
        spatial_dims=spatial_dims,
        n_input_channels=in_channels,
        conv1_t_stride=2,
        num_classes=out_channels,
        bias_downsample=False,
    )
    return module


def build_vgg(config: VGGConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """VGG classifier with its three linear layers."""
    build = getattr(_torchvision(config.name), config.variant)
    return _for_channels(build(num_classes=out_channels, dropout=config.dropout), in_channels)


def build_inception_v3(config: InceptionConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """Inception v3 classifier with one output in training too: the auxiliary head is left out.

    torchvision draws the last layer's weights with a deviation of 0.1, so that logits of 2,048 features begin at ±2;
    they are drawn anew, as those of the other networks.
    """
    net = _torchvision(config.name).inception_v3(
        num_classes=out_channels,
        aux_logits=False,
        transform_input=False,
        init_weights=True,
        dropout=config.dropout,
    )
    net.fc.reset_parameters()
    return _for_channels(net, in_channels)


def build_squeezenet(config: SqueezeNetConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """SqueezeNet classifier; its head is a 1x1 convolution and a ReLU, so that no logit is below 0."""
    build = getattr(_torchvision(config.name), config.variant)
    return _for_channels(build(num_classes=out_channels, dropout=config.dropout), in_channels)


def build_mobilenet_v2(config: MobileNetConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """MobileNet V2 classifier: inverted residuals, global average pooling, one linear layer."""
    build = _torchvision(config.name).mobilenet_v2
    return _for_channels(build(num_classes=out_channels, width_mult=config.width, dropout=config.dropout), in_channels)


def _torchvision(network: str) -> Any:
    """`torchvision.models`. Raises UserError when it is not installed, or is made for another torch."""
    try:
        return importlib.import_module("torchvision.models")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "torchvision":
            raise
        raise UserError(
            f"model.name {network!r} is built by torchvision, which is not installed; "
            "install it with pip install 'medseg[vision]', or choose 'densenet' or 'resnet'."
        ) from error
    except (ImportError, RuntimeError, OSError, AttributeError) as error:  # its compiled part does not match torch's
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"model.name {network!r} is built by torchvision, whose version "
            f"{importlib.metadata.version('torchvision')} does not load beside torch {torch.__version__} ({reason}); "
            "install the torchvision that was built for this torch, or choose 'densenet' or 'resnet'."
        ) from error


def _for_channels(net: nn.Module, in_channels: int) -> nn.Module:
    """Give the first convolution, made for 3 channels, the image's; drawn anew by the rule of He et al. 2015."""
    name, first = next((name, part) for name, part in net.named_modules() if isinstance(part, nn.Conv2d))
    if first.in_channels == in_channels:
        return net
    conv = nn.Conv2d(
        in_channels,
        first.out_channels,
        (first.kernel_size[0], first.kernel_size[1]),
        (first.stride[0], first.stride[1]),
        first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    net.set_submodule(name, conv)
    return net
