"""One class of settings per classifier of `medseg.models.MODELS`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from medseg.config.fields import Count, NotNegative, Positive, Share
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


BackboneConfig = Annotated[
    DenseNetConfig | ResNetConfig | VGGConfig | InceptionConfig | SqueezeNetConfig | MobileNetConfig,
    Field(discriminator="name"),
]


class TwoStageConfig(ClassifierConfig):
    """Features of several networks, an autoencoder, a small classifier, in the manner of Kayan et al. (2023).

    Every backbone sees the four quadrants of a radiograph and the whole of it at their size; `frozen` ones keep the
    weights that they must then name. `hidden` and `code` are the widths of the autoencoder, `classifier` those of the
    hidden layers behind its code (none: a single-layer perceptron). `reconstruction_weight` is that of the
    autoencoder's own loss beside the classifier's.
    """

    dims: ClassVar[tuple[int, ...]] = (2,)
    published_px: ClassVar[int] = 448

    name: Literal["two_stage"] = "two_stage"
    backbones: Annotated[tuple[BackboneConfig, ...], Field(min_length=1)] = (DenseNetConfig(), ResNetConfig(depth=18))
    frozen: bool = False
    hidden: Count = 512
    code: Count = 64
    classifier: tuple[Count, ...] = (32,)
    dropout: Share = 0.2
    reconstruction_weight: NotNegative = 1.0

    @model_validator(mode="after")
    def _check_frozen(self) -> "TwoStageConfig":
        bare = [number for number, backbone in enumerate(self.backbones) if backbone.weights is None]
        if self.frozen and self.weights is None and bare:
            raise ValueError(
                f"frozen backbones stay as they begin, and backbones.{bare[0]} begins with random weights; name its "
                "weights, or leave out frozen"
            )
        return self

    @property
    def parts(self) -> dict[str, NetworkConfig]:
        return {"": self, **{f"backbones.{n}": backbone for n, backbone in enumerate(self.backbones)}}

    @property
    def size_reason(self) -> str:
        return "at which each quadrant has the 224 px of most backbones"

    @property
    def smallest_size(self) -> int:
        return 2 * max(backbone.smallest_size for backbone in self.backbones)

    def divisors(self, spatial_dims: int) -> tuple[int, ...]:
        return (2,) * spatial_dims
