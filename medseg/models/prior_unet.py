"""A 2D U-Net over the slices of a volume that also sees the slices beside each and an earlier segmentation.

In the manner of "Enforcing temporal consistency in Deep Learning segmentation of brain MR images" (arXiv:1906.07160):
a sagittal slice is segmented with its neighbours, and with the segmentation of the patient's earlier examination, as
further channels. Here the convolutions are written in 3D with a reach of one slice, so that layers keep the axes of the
volume (explanations and features read them); the instance norm is over the slices of a window, and of a slice with
little tissue it does not make noise.

Shape legend: B batch, C image channels, K classes, D H W the spatial axes in array order.
"""

from monai.networks import nets
from torch import Tensor, nn
from torch.nn import functional

from medseg.config import PriorUNetConfig


class PriorUNet(nn.Module):
    """x -> logits_BKDHW, where x has C channels, or C + K with the channels of `medseg.data.prior.as_channels`.

    Without a prior its channels are 0, which says that nothing is known anywhere.
    """

    def __init__(self, config: PriorUNetConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.image_channels, self.prior_channels = in_channels, out_channels
        flat = [_along(config.axis, 1, 3)] * len(config.channels)
        halving = [_along(config.axis, 1, 2)] * (len(config.channels) - 1)
        reach = _along(config.axis, 2 * config.neighbours + 1, 3)
        self.stem = nn.Conv3d(in_channels + out_channels, config.channels[0], reach, padding="same")
        self.unet: nn.Module = nets.DynUNet(
            spatial_dims=3,
            in_channels=config.channels[0],
            out_channels=out_channels,
            kernel_size=flat,
            strides=[(1, 1, 1), *halving],
            upsample_kernel_size=halving,
            filters=list(config.channels),
            norm_name=("instance", {"affine": True}),
            deep_supervision=False,
        )

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Raises ValueError where x has neither C nor C + K channels."""
        given = x_BCDHW.shape[1]
        if given == self.image_channels:
            x_BCDHW = functional.pad(x_BCDHW, (0, 0, 0, 0, 0, 0, 0, self.prior_channels))
        elif given != self.image_channels + self.prior_channels:
            raise ValueError(
                f"the image has {given} channels; {self.image_channels} are wanted, or "
                f"{self.image_channels + self.prior_channels} with an earlier segmentation"
            )
        logits: Tensor = self.unet(self.stem(x_BCDHW))
        return logits


def build_prior_unet(config: PriorUNetConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """The network of a config; `spatial_dims` is 3."""
    return PriorUNet(config, in_channels, out_channels)


def _along(axis: int, there: int, elsewhere: int) -> tuple[int, int, int]:
    """One number per spatial axis."""
    first, second, third = (there if n == axis else elsewhere for n in range(3))
    return first, second, third
