"""Augmentation of whole batches: spatial transforms in one resampling, then intensities.

Parameters are drawn per item (`draw_augment`), then applied (`augment`); an item whose parameters are neutral comes
back unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medseg.config import AugmentConfig
from medseg.data.style import AS_IS, Style, draw_style, restyle


@dataclass(frozen=True)
class AugmentParameters:
    """One item's draw.

    Attributes:
        rotation_rad: about each axis (3D: 3 angles, 2D: 1). scale: magnification per axis. translation: share of the
            patch per axis. flips: axes to reverse.
        style: what scanners and software change; see `medseg.data.style`.
        contrast: factor about the mean. brightness: offset in standard deviations. gamma: exponent on the item's
            intensity range. noise_sd: of added Gaussian noise, from `noise_seed`.
    """

    rotation_rad: tuple[float, ...]
    scale: tuple[float, ...]
    translation: tuple[float, ...]
    flips: tuple[int, ...] = ()
    contrast: float = 1.0
    brightness: float = 0.0
    gamma: float = 1.0
    noise_sd: float = 0.0
    noise_seed: int = 0
    style: Style = AS_IS

    @property
    def moves(self) -> bool:
        """Whether resampling is needed at all."""
        return any(self.rotation_rad) or any(self.translation) or any(s != 1 for s in self.scale)


def neutral(ndim: int) -> AugmentParameters:
    """Parameters that change nothing."""
    return AugmentParameters((0.0,) * (3 if ndim == 3 else 1), (1.0,) * ndim, (0.0,) * ndim)


def draw_augment(
    config: AugmentConfig, ndim: int, rng: np.random.Generator, *, batch_size: int = 1
) -> AugmentParameters:
    """Draw one item's parameters; with probability 1 - `config.probability` they are neutral but for flips.

    Args:
        batch_size: items of the batch that styles are mixed within.
    """
    flips = tuple(axis for axis in config.flip_axes if axis < ndim and rng.random() < 0.5)
    if rng.random() >= config.probability:
        still = neutral(ndim)
        return AugmentParameters(still.rotation_rad, still.scale, still.translation, flips)
    limits = np.broadcast_to(np.deg2rad(config.rotate_deg), 3 if ndim == 3 else 1)
    log_gamma = abs(np.log(1 - config.gamma))
    return AugmentParameters(
        rotation_rad=tuple(rng.uniform(-limits, limits).tolist()),
        scale=tuple((1 + rng.uniform(-config.scale, config.scale, ndim)).tolist()),
        translation=tuple(rng.uniform(-config.translate, config.translate, ndim).tolist()),
        flips=flips,
        contrast=1 + float(rng.uniform(-config.contrast, config.contrast)),
        brightness=float(rng.uniform(-config.brightness, config.brightness)),
        gamma=float(np.exp(rng.uniform(-log_gamma, log_gamma))),
        noise_sd=float(rng.uniform(0, config.noise_sd)),
        noise_seed=int(rng.integers(2**31)),
        style=draw_style(config.style, rng, batch_size),
    )


def augment(
    image_BCDHW: Tensor, label_B1DHW: Tensor | None, parameters: Sequence[AugmentParameters]
) -> tuple[Tensor, Tensor | None]:
    """Apply one draw per item: style; image with linear, label with nearest interpolation; then intensities."""
    image_BCDHW = restyle(image_BCDHW, [p.style for p in parameters])
    if any(p.moves for p in parameters):
        grid = _grid(image_BCDHW.shape[2:], parameters, image_BCDHW.device)
        moved = _sample(image_BCDHW, grid, "bilinear")
        still = torch.tensor([not p.moves for p in parameters], device=image_BCDHW.device)
        keep = still.view(-1, *[1] * (image_BCDHW.ndim - 1))
        image_BCDHW = torch.where(keep, image_BCDHW, moved)
        if label_B1DHW is not None:
            label_B1DHW = torch.where(keep, label_B1DHW, _sample(label_B1DHW, grid, "nearest"))
    images, labels = [], []
    for item, params in enumerate(parameters):
        axes = [axis + 1 for axis in params.flips]
        image = _intensities(image_BCDHW[item], params)
        images.append(image.flip(axes) if axes else image)
        if label_B1DHW is not None:
            labels.append(label_B1DHW[item].flip(axes) if axes else label_B1DHW[item])
    return torch.stack(images), torch.stack(labels) if labels else None


def _sample(x: Tensor, grid: Tensor, mode: str) -> Tensor:
    # The label's border counts as background, and so does the image's: the padding of a patch is 0 as well.
    return functional.grid_sample(x, grid, mode=mode, padding_mode="zeros", align_corners=False)


def _grid(shape: Sequence[int], parameters: Sequence[AugmentParameters], device: torch.device) -> Tensor:
    """Sampling grid for `grid_sample`; rotations are in voxel space, so an anisotropic patch is not sheared."""
    ndim = len(shape)
    half = np.asarray(shape, dtype=np.float64) / 2
    thetas = []
    for p in parameters:
        matrix = _rotation(p.rotation_rad, ndim) @ np.diag(1 / np.asarray(p.scale))
        matrix = np.diag(1 / half) @ matrix @ np.diag(half)  # voxels -> the [-1, 1] cube of grid_sample
        theta = np.concatenate([matrix, 2 * np.asarray(p.translation)[:, None]], axis=1)
        order = list(range(ndim))[::-1]  # grid_sample names the last array axis first
        thetas.append(theta[order][:, [*order, ndim]])
    theta_tensor = torch.tensor(np.stack(thetas), dtype=torch.float32, device=device)
    return functional.affine_grid(theta_tensor, [len(parameters), 1, *shape], align_corners=False)


def _rotation(angles_rad: Sequence[float], ndim: int) -> np.ndarray:
    if ndim == 2:
        c, s = np.cos(angles_rad[0]), np.sin(angles_rad[0])
        return np.array([[c, -s], [s, c]])
    matrix = np.eye(3)
    for axis, angle in enumerate(angles_rad):
        i, j = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def _intensities(image_CDHW: Tensor, params: AugmentParameters) -> Tensor:
    if params.gamma != 1:
        low, high = image_CDHW.amin(), image_CDHW.amax()
        span = (high - low).clamp(min=1e-6)
        image_CDHW = ((image_CDHW - low) / span) ** params.gamma * span + low
    if params.contrast != 1 or params.brightness:
        image_CDHW = image_CDHW * params.contrast + params.brightness
    if params.noise_sd:
        generator = torch.Generator().manual_seed(params.noise_seed)
        noise = torch.randn(image_CDHW.shape, generator=generator).to(image_CDHW.device)
        image_CDHW = image_CDHW + params.noise_sd * noise
    return image_CDHW
