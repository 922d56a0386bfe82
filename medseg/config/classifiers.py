"""One class of settings per classifier of `medseg.models.MODELS`."""

from typing import ClassVar, Literal

from pydantic import field_validator

from medseg.config.fields import Count, Positive, Share
from medseg.config.network import NetworkConfig


class ClassifierConfig(NetworkConfig):
    """A network from an image to one logit per class."""

    classifies: ClassVar[bool] = True


class FlatClassifierConfig(ClassifierConfig):
    """A classifier that torchvision builds, for 2D images only; it needs the extra `vision`."""

    dims: ClassVar[tuple[int, ...]] = (2,)


class DenseNetConfig(ClassifierConfig):
    """DenseNet (Huang et al. 2017) in 2D or 3D; `depth` chooses the published layer counts.

    CheXNet (Rajpurkar et al. 2017) is `depth: 121` with one output per finding; its weights come in by `weights`.
    """

    name: Literal["densenet"] = "densenet"
    depth: Literal[121, 169, 201, 264] = 121
    init_features: Count = 64
    growth_rate: Count = 32
    block_config: tuple[Count, ...] | None = None
    dropout: Share = 0.0

    @property
    def variant(self) -> str:
        return f"densenet{self.depth}"

    @property
    def smallest_size(self) -> int:
        return int(2 ** (len(self.block_config or (0,) * 4) + 1))  # stem, pooling and the transitions halve


class ResNetConfig(ClassifierConfig):
    """ResNet (He et al. 2016) in 2D or 3D, with the stride of a bottleneck in its 3x3 convolution.

    `depth` chooses the published layer counts, `init_features` the channels of the first stage's inner convolutions.
    """

    name: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50, 101, 152] = 50
    init_features: Count = 64

    @property
    def variant(self) -> str:
        return f"resnet{self.depth}"


class VGGConfig(FlatClassifierConfig):
    """VGG (Simonyan & Zisserman 2015), 16 or 19 layers deep; the paper has no batch norm."""

    name: Literal["vgg"] = "vgg"
    depth: Literal[16, 19] = 19
    batch_norm: bool = False
    dropout: Share = 0.5

    @property
    def variant(self) -> str:
        return f"vgg{self.depth}{'_bn' if self.batch_norm else ''}"

    @property
    def smallest_size(self) -> int:
        return 32


class InceptionConfig(FlatClassifierConfig):
    """Inception v3 (Szegedy et al. 2016), published at 299 px, without the auxiliary head.

    The published weights hold that head; leave it out with `weights_skip: [fc, AuxLogits]`.
    """

    published_px: ClassVar[int] = 299

    name: Literal["inception_v3"] = "inception_v3"
    dropout: Share = 0.5

    @property
    def smallest_size(self) -> int:
        return 75


class SqueezeNetConfig(FlatClassifierConfig):
    """SqueezeNet (Iandola et al. 2016); version 1.1 computes 2.4 times less than the paper's 1.0."""

    name: Literal["squeezenet"] = "squeezenet"
    version: Literal["1.0", "1.1"] = "1.1"
    dropout: Share = 0.5

    @field_validator("version", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, float) else value  # YAML takes 1.1 for a number

    @property
    def variant(self) -> str:
        return f"squeezenet{self.version.replace('.', '_')}"

    @property
    def smallest_size(self) -> int:
        return 21


class MobileNetConfig(FlatClassifierConfig):
    """MobileNet V2 (Sandler et al. 2018); `width` multiplies the channels."""

    name: Literal["mobilenet_v2"] = "mobilenet_v2"
    width: Positive = 1.0
    dropout: Share = 0.2
