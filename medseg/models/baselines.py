"""The field's usual segmentation networks, as MONAI builds them."""

import importlib.util

import torch
from monai.networks import nets
from torch import Tensor, nn

from medseg.config import (
    AttentionUNetConfig,
    DynUNetConfig,
    MedNeXtConfig,
    SegResNetConfig,
    SwinUNETRConfig,
    UNetConfig,
)
from medseg.files import UserError
from medseg.losses import Heads

# The sizes of Roy et al. 2023 (arXiv:2303.09975): expansions of the encoder and of the bottleneck, blocks of the
# encoder and of the bottleneck. The decoder mirrors the encoder.
_MEDNEXT: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], int]] = {
    "S": ((2, 2, 2, 2), 2, (2, 2, 2, 2), 2),
    "B": ((2, 3, 4, 4), 4, (2, 2, 2, 2), 2),
    "M": ((2, 3, 4, 4), 4, (3, 4, 4, 4), 4),
    "L": ((3, 4, 8, 8), 8, (3, 4, 8, 8), 8),
}


def build_unet(config: UNetConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """Residual U-Net with instance norm and PReLU."""
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


def build_attention_unet(
    config: AttentionUNetConfig, spatial_dims: int, in_channels: int, out_channels: int
) -> nn.Module:
    """Attention U-Net with batch norm; each gate weighs a skip connection per position."""
    module: nn.Module = nets.AttentionUnet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        channels=config.channels,
        strides=config.strides,
        dropout=config.dropout,
    )
    return module


def build_dynunet(config: DynUNetConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """nnU-Net's plain convolutional U-Net: instance norm, leaky ReLU, one strided convolution between levels."""
    strides = config.steps(spatial_dims)
    network = SupervisedDynUNet if config.deep_supervision else nets.DynUNet
    module: nn.Module = network(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=config.kernels_of(spatial_dims),
        strides=[(1,) * spatial_dims, *strides],
        upsample_kernel_size=strides,
        filters=list(config.channels),
        norm_name=("instance", {"affine": True}),
        deep_supervision=config.deep_supervision,
        deep_supr_num=max(1, len(config.channels) - 3),
        res_block=config.res_block,
    )
    return module


class SupervisedDynUNet(nets.DynUNet):  # type: ignore[misc]
    """DynUNet that is trained at the coarser levels of its decoder too, with the weights of Isensee et al. 2021."""

    def forward(self, x_BCDHW: Tensor) -> Tensor | Heads:
        """logits_BKDHW; in training mode those of every head, the coarser enlarged to the image's size."""
        logits: Tensor = super().forward(x_BCDHW)
        self.heads[:] = [torch.zeros(1)] * len(self.heads)  # a network that keeps a graph's tensors cannot be copied
        if not self.training:
            return logits
        heads = logits.unbind(1)
        return Heads(heads, tuple(0.5**level for level in range(len(heads))))


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


def build_swin_unetr(config: SwinUNETRConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """Swin UNETR with patches of 2 positions per axis and instance norm. Raises UserError without einops."""
    if importlib.util.find_spec("einops") is None:
        raise UserError(
            "model.name 'swin_unetr' needs einops, which is not installed; install it with pip install "
            "'medseg[vision]', or choose another network."
        )
    module: nn.Module = nets.SwinUNETR(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        feature_size=config.feature_size,
        depths=config.depths,
        num_heads=config.num_heads,
        window_size=config.window_size,
        dropout_path_rate=config.drop_path,
        use_checkpoint=config.memory == "checkpoint",
    )
    return module


def build_mednext(config: MedNeXtConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """MedNeXt with residual resampling blocks and the paper's group norm of one channel per group."""
    expansions, bottom_expansion, blocks, bottom_blocks = _MEDNEXT[config.size]
    module: nn.Module = nets.MedNeXt(
        spatial_dims=spatial_dims,
        init_filters=config.init_filters,
        in_channels=in_channels,
        out_channels=out_channels,
        encoder_expansion_ratio=expansions,
        decoder_expansion_ratio=expansions[::-1],
        bottleneck_expansion_ratio=bottom_expansion,
        kernel_size=config.kernel_size,
        use_residual_connection=True,
        blocks_down=blocks,
        blocks_bottleneck=bottom_blocks,
        blocks_up=blocks[::-1],
        norm_type="group",
    )
    return module
