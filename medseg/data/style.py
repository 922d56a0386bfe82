"""Style augmentation: what scanners and their software change, and disease does not. Drawn first, then applied.

Of a batch, images come out as (B, C, *space); an item whose style is `AS_IS` comes back unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medseg.config import StyleConfig

_DETAIL_SIGMA = 1.0  # voxels: what is finer counts as detail


@dataclass(frozen=True)
class Style:
    """One item's draw.

    Attributes:
        mix_share: share of the Fourier amplitude that is taken from item number `mix_with` of the batch.
        convolved_share: share of the image filtered by a random kernel of `kernel_size` voxels, from `kernel_seed`.
        kept_resolution: voxels along an axis to which the image is reduced and then brought back, as a share.
        detail_gain: factor on what is finer than about a voxel; below 1 blurs, above 1 sharpens.
    """

    mix_share: float = 0.0
    mix_with: int = 0
    convolved_share: float = 0.0
    kernel_size: int = 1
    kernel_seed: int = 0
    kept_resolution: float = 1.0
    detail_gain: float = 1.0


AS_IS = Style()


def draw_style(config: StyleConfig, rng: np.random.Generator, batch_size: int) -> Style:
    """Draw one item's style; a kind whose range is 0 draws nothing, so that it changes no other draw."""
    drawn: dict[str, float | int] = {}
    if config.amplitude_mix:
        drawn |= {"mix_share": float(rng.uniform(0, config.amplitude_mix)), "mix_with": int(rng.integers(batch_size))}
    if config.random_convolution:
        drawn |= {"convolved_share": float(rng.uniform(0, config.random_convolution))}
        drawn |= {"kernel_size": int(rng.choice((3, 5, 7))), "kernel_seed": int(rng.integers(2**31))}
    if config.resolution:
        drawn["kept_resolution"] = float(rng.uniform(1 - config.resolution, 1))
    if config.sharpness:
        log_gain = abs(np.log(1 - config.sharpness))
        drawn["detail_gain"] = float(np.exp(rng.uniform(-log_gain, log_gain)))
    return Style(**drawn)  # type: ignore[arg-type]


def restyle(image_BCDHW: Tensor, styles: Sequence[Style]) -> Tensor:
    """Apply one style per item; all items are mixed as they were before any was changed."""
    if all(style == AS_IS for style in styles):
        return image_BCDHW
    images = []
    for image, style in zip(image_BCDHW, styles, strict=True):
        if style.mix_share:
            image = _mix_amplitude(image, image_BCDHW[style.mix_with], style.mix_share)
        if style.convolved_share:
            image = _convolve(image, style)
        if style.kept_resolution < 1:
            image = _reduce(image, style.kept_resolution)
        if style.detail_gain != 1:
            image = image + (style.detail_gain - 1) * (image - _smooth(image))
        images.append(image)
    return torch.stack(images)


def _mix_amplitude(image_CDHW: Tensor, other_CDHW: Tensor, share: float) -> Tensor:
    """The image's phase with a mixture of both amplitudes (Xu et al. 2021, arXiv:2105.11120, equation 3)."""
    axes = tuple(range(1, image_CDHW.ndim))
    own, other = (torch.fft.rfftn(x, dim=axes) for x in (image_CDHW, other_CDHW))
    amplitude = (1 - share) * own.abs() + share * other.abs()
    mixed: Tensor = torch.fft.irfftn(torch.polar(amplitude, own.angle()), s=image_CDHW.shape[1:], dim=axes)
    return mixed


def _convolve(image_CDHW: Tensor, style: Style) -> Tensor:
    """Mixed with its convolution by a random kernel (Xu et al. 2021, arXiv:2007.13003); each channel by itself.

    The convolved channel gets mean and deviation of the channel, and its sign, so that bone stays brighter than air.
    """
    ndim = image_CDHW.ndim - 1
    generator = torch.Generator().manual_seed(style.kernel_seed)
    kernel = torch.randn((1, 1, *[style.kernel_size] * ndim), generator=generator).to(image_CDHW.device)
    padded = functional.pad(image_CDHW[:, None], [style.kernel_size // 2] * (2 * ndim), mode="replicate")
    convolve = functional.conv2d if ndim == 2 else functional.conv3d
    found = convolve(padded, kernel)[:, 0].flatten(1)
    own = image_CDHW.flatten(1)
    mean, spread = own.mean(1, keepdim=True), own.std(1, keepdim=True)
    centred = found - found.mean(1, keepdim=True)
    sign = torch.where((centred * (own - mean)).sum(1, keepdim=True) < 0, -1.0, 1.0)
    found = sign * centred / centred.std(1, keepdim=True).clamp(min=1e-6) * spread + mean
    return torch.lerp(image_CDHW, found.view_as(image_CDHW), style.convolved_share)


def _reduce(image_CDHW: Tensor, kept: float) -> Tensor:
    shape = image_CDHW.shape[1:]
    fewer = [max(1, round(kept * n)) for n in shape]
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    small = functional.interpolate(image_CDHW[None], fewer, mode=mode, align_corners=False, antialias=len(shape) == 2)
    return functional.interpolate(small, shape, mode=mode, align_corners=False)[0]


def _smooth(image_CDHW: Tensor) -> Tensor:
    """Each channel under a Gaussian, axis by axis."""
    ndim = image_CDHW.ndim - 1
    reach = torch.arange(-3, 4, device=image_CDHW.device, dtype=image_CDHW.dtype)
    weights = torch.exp(-(reach**2) / (2 * _DETAIL_SIGMA**2))
    weights = weights / weights.sum()
    convolve = functional.conv2d if ndim == 2 else functional.conv3d
    smooth = functional.pad(image_CDHW[:, None], [3] * (2 * ndim), mode="replicate")
    for axis in range(ndim):
        smooth = convolve(smooth, weights.view([-1 if a == axis else 1 for a in (-2, -1, *range(ndim))]))
    return smooth[:, 0]
