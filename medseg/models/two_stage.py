"""Two stages: features of several networks, and what an autoencoder keeps of them.

Kayan et al. 2023 (arXiv:2304.10677) take pretrained networks as they are, give each the four quarters of a radiograph,
train an autoencoder with three hidden layers on the joined features, and a perceptron or a support vector machine on
its code. Different here: the whole image is a fifth view, autoencoder and classifier learn together, and the backbones
may learn too.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.config import BackboneConfig, TwoStageConfig
from medseg.losses import WithLosses
from medseg.models.classifiers import (
    build_densenet,
    build_inception_v3,
    build_mobilenet_v2,
    build_resnet,
    build_squeezenet,
    build_vgg,
)

BACKBONES: dict[str, tuple[Callable[[Any, int, int, int], nn.Module], str]] = {
    "densenet": (build_densenet, "class_layers.out"),
    "resnet": (build_resnet, "fc"),
    "vgg": (build_vgg, "classifier.6"),
    "inception_v3": (build_inception_v3, "fc"),
    "squeezenet": (build_squeezenet, "classifier.1"),
    "mobilenet_v2": (build_mobilenet_v2, "classifier.1"),
}
"""How each is built, and the dotted name of its head."""

VIEWS = 5


def build_two_stage(config: TwoStageConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """Backbones without their heads, autoencoder and classifier."""
    found = [_headless(backbone, spatial_dims, in_channels) for backbone in config.backbones]
    return TwoStage([net for net, _ in found], VIEWS * sum(width for _, width in found), config, out_channels)


class TwoStage(nn.Module):
    """x_BCHW -> logits_BK; in training `WithLosses`, with the loss `reconstruction`.

    Height and width are even. In evaluation the whole image goes through each backbone by itself, after the quadrants:
    what explains a layer by its last run then sees one map per image, over the whole of it.

    Args:
        backbones: x_BCHW -> features_BF. width: of the features of all backbones and views.
    """

    def __init__(self, backbones: list[nn.Module], width: int, config: TwoStageConfig, out_channels: int) -> None:
        super().__init__()
        self.frozen, self.reconstruction_weight = config.frozen, config.reconstruction_weight
        self.backbones = nn.ModuleList(backbones).requires_grad_(not config.frozen)
        self.encoder = _perceptron((width, config.hidden, config.code), rectified=True)
        self.decoder = _perceptron((config.code, config.hidden, width))
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = _perceptron((config.code, *config.classifier, out_channels))

    def train(self, mode: bool = True) -> Self:
        """Frozen backbones stay in evaluation mode, so that their running statistics stay as well."""
        super().train(mode)
        if self.frozen:
            self.backbones.eval()
        return self

    def forward(self, x_BCHW: Tensor) -> Tensor | WithLosses:
        """The decoder's target is held fixed: features must not become easy to rebuild by saying less."""
        quadrants, whole = _quadrants(x_BCHW), functional.avg_pool2d(x_BCHW, 2)
        features_BF = torch.cat([self._see(backbone, quadrants, whole) for backbone in self.backbones], 1)
        code_BF = self.encoder(features_BF)
        if not self.training:
            logits: Tensor = self.classifier(code_BF)
            return logits
        rebuilt_BF = self.decoder(code_BF)
        loss = functional.mse_loss(rebuilt_BF.float(), features_BF.detach().float())
        return WithLosses(self.classifier(self.dropout(code_BF)), {"reconstruction": self.reconstruction_weight * loss})

    def _see(self, backbone: nn.Module, quadrants: Tensor, whole: Tensor) -> Tensor:
        """Features (B, views * F) of one backbone, each view's with mean 0 and deviation 1, so that all count alike.

        Batch norm that learns must meet all views in one batch, since its running statistics serve them all.
        """
        if self.training:
            seen = backbone(torch.cat([quadrants, whole]))
        else:
            seen = torch.cat([backbone(quadrants), backbone(whole)])
        seen = functional.layer_norm(seen, seen.shape[1:])
        return torch.cat(seen.chunk(VIEWS), 1)


def _headless(config: BackboneConfig, spatial_dims: int, in_channels: int) -> tuple[nn.Module, int]:
    """A backbone that puts out what its head would have read, and how many numbers that is."""
    build, name = BACKBONES[config.name]
    net = build(config, spatial_dims, in_channels, 1)
    head = net.get_submodule(name)
    assert isinstance(head, nn.Linear | nn.Conv2d)
    net.set_submodule(name, nn.Identity())
    return net, head.in_features if isinstance(head, nn.Linear) else head.in_channels


def _perceptron(widths: tuple[int, ...], *, rectified: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them, and behind the last one if `rectified`."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*(layers if rectified else layers[:-1]))


def _quadrants(x_BCHW: Tensor) -> Tensor:
    """(4B, C, H/2, W/2): upper left of every image, then upper right, lower left, lower right."""
    halves = x_BCHW.chunk(2, 2)
    return torch.cat([quadrant for half in halves for quadrant in half.chunk(2, 3)])
