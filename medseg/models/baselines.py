"""The field's usual networks, as MONAI builds them."""

from typing import Any

from monai.networks import nets
from torch import nn

from medseg.config import DenseNetConfig, DynUNetConfig, SegResNetConfig, UNetConfig
from medseg.files import UserError

# Layers per dense block and (initial features, growth rate) of Huang et al. 2017, table 1.
_DENSE_BLOCKS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32), 264: (6, 12, 64, 48)}


def build_unet(config: UNetConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """Residual U-Net with instance norm and PReLU."""
    if len(config.strides) != len(config.channels) - 1:
        raise UserError(
            f"model.strides has {len(config.strides)} entries for {len(config.channels)} channels; "
            f"give {len(config.channels) - 1}."
        )
    module: nn.Module = nets.UNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        channels=config.channels,
        strides=config.strides,
        num_res_units=config.num_res_units,
        norm="instance",
        dropout=config.dropout,
    )
    return module


def build_dynunet(config: DynUNetConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """nnU-Net's plain convolutional U-Net: 3x3x3 kernels, stride 2 between levels, instance norm, leaky ReLU."""
    levels = len(config.channels)
    module: nn.Module = nets.DynUNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=[3] * levels,
        strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1),
        filters=list(config.channels),
        norm_name=("instance", {"affine": True}),
        deep_supervision=False,
    )
    return module


def build_segresnet(config: SegResNetConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """Residual encoder-decoder with group norm (8 groups)."""
    module: nn.Module = nets.SegResNet(
        spatial_dims=spatial_dims,
        init_filters=config.init_filters,
        in_channels=in_channels,
        out_channels=out_channels,
        blocks_down=config.blocks_down,
        blocks_up=config.blocks_up,
    )
    return module


def build_densenet(config: DenseNetConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """DenseNet classifier; batch norm, global average pooling, one linear layer."""
    blocks: Any = config.block_config or _DENSE_BLOCKS[config.depth]
    module: nn.Module = nets.DenseNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        init_features=config.init_features,
        growth_rate=config.growth_rate,
        block_config=blocks,
        dropout_prob=config.dropout,
    )
    return module
