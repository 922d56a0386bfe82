"""One class of settings per network of `medseg.models.MODELS`."""

from typing import Annotated, Literal

from pydantic import Field

from medseg.config.fields import Count, Share, Strict


class UNetConfig(Strict):
    """Residual U-Net of MONAI (Kerfoot et al. 2018): one convolution stage per entry of `channels`."""

    name: Literal["unet"] = "unet"
    channels: tuple[Count, ...] = (32, 64, 128, 256)
    strides: tuple[Count, ...] = (2, 2, 2)
    num_res_units: Annotated[int, Field(ge=0)] = 2
    dropout: Share = 0.0


class DynUNetConfig(Strict):
    """The network of nnU-Net (Isensee et al. 2021), as MONAI's DynUNet."""

    name: Literal["dynunet"] = "dynunet"
    channels: tuple[Count, ...] = (32, 64, 128, 256)


class SegResNetConfig(Strict):
    """SegResNet without the autoencoder branch (Myronenko 2018)."""

    name: Literal["segresnet"] = "segresnet"
    init_filters: Count = 16
    blocks_down: tuple[Count, ...] = (1, 2, 2, 4)
    blocks_up: tuple[Count, ...] = (1, 1, 1)


class UNetPPConfig(Strict):
    """U-Net++ (Zhou et al. 2020) in 2D or 3D; patch sizes must be multiples of 2**depth (the papers' depth is 4).

    A null `features` means 32, doubled from level to level up to 512. With `deep_supervision` every level has a head:
    the network can be pruned, and `inference` may average all heads instead of taking the deepest one (`fast`).
    """

    name: Literal["unetpp"] = "unetpp"
    depth: Annotated[int, Field(ge=1, le=5)] = 3
    features: tuple[Count, ...] | None = None
    norm: Literal["instance", "group", "batch"] = "instance"
    down: Literal["max", "conv"] = "max"
    up: Literal["transposed", "linear"] = "transposed"
    scse: bool = False
    deep_supervision: bool = False
    inference: Literal["fast", "average"] = "fast"


class DenseNetConfig(Strict):
    """DenseNet (Huang et al. 2017) in 2D or 3D; `depth` chooses the published layer counts."""

    name: Literal["densenet"] = "densenet"
    depth: Literal[121, 169, 201, 264] = 121
    init_features: Count = 64
    growth_rate: Count = 32
    block_config: tuple[Count, ...] | None = None
    dropout: Share = 0.0


ModelConfig = Annotated[
    UNetConfig | DynUNetConfig | SegResNetConfig | UNetPPConfig | DenseNetConfig, Field(discriminator="name")
]
