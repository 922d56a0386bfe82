"""An earlier segmentation beside the image: as codes on the network's grid, as channels, and made up for training.

A code is 0 where nothing is known, 1 for background, and 1 + the value of a label. So what lies outside the earlier
scan or outside a patch is unknown, not background.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from medseg.config import PriorConfig
from medseg.volume import Affine, Volume, resample

_LATTICE = 4  # knots per axis of a patch's warp


@dataclass(frozen=True)
class PriorParameters:
    """One item's draw.

    Attributes:
        shown: whether the network sees a prior at all.
        shift_voxels: displacement along each axis, warp_voxels: standard deviation of a smooth one, from `warp_seed`;
            only of priors that are made from the case's own label.
    """

    shown: bool
    shift_voxels: tuple[float, ...]
    warp_voxels: float
    warp_seed: int


def draw_prior(config: PriorConfig, rng: np.random.Generator) -> PriorParameters:
    """Draw one item's parameters for a volume."""
    return PriorParameters(
        shown=bool(rng.random() >= config.dropout),
        shift_voxels=tuple(rng.uniform(-config.shift_voxels, config.shift_voxels, 3).tolist()),
        warp_voxels=float(rng.uniform(0, config.warp_voxels)),
        warp_seed=int(rng.integers(2**31)),
    )


def encode(label: NDArray[np.generic]) -> NDArray[np.generic]:
    """Codes of a label map: its values plus 1, of a type that holds them."""
    wide = np.uint16 if label.size and int(label.max()) > 254 else np.uint8
    coded: NDArray[np.generic] = np.add(label, 1, dtype=wide, casting="unsafe")
    return coded


def without_background(codes: NDArray[np.generic]) -> NDArray[np.generic]:
    """Codes of a label that does not tell of every structure: where it shows none, anything may be."""
    return np.where(codes == 1, codes.dtype.type(0), codes)


def move_codes(mask: Volume, to_later: Affine, shape: tuple[int, ...], affine: Affine) -> NDArray[np.generic]:
    """Codes of an earlier mask on a later scan's network grid; 0 outside the earlier scan.

    Args:
        mask: (i, j, k) integer labels.
        to_later: (4, 4) from world mm of the earlier scan to world mm of the later one.
        shape, affine: of the grid.
    """
    return resample(encode(mask.array), to_later @ mask.affine, shape, affine, order=0)


def make_up(codes_DHW: NDArray[np.generic], params: PriorParameters) -> NDArray[np.float32]:
    """Codes (of a patch) displaced as drawn, nearest neighbour; what comes from outside is unknown."""
    size = codes_DHW.shape
    if not any(params.shift_voxels) and not params.warp_voxels:
        return codes_DHW.astype(np.float32)
    generator = torch.Generator().manual_seed(params.warp_seed)
    knots = torch.randn((1, 3, *[_LATTICE] * 3), generator=generator) * params.warp_voxels
    moved = functional.interpolate(knots, size, mode="trilinear", align_corners=True)
    moved = moved + torch.tensor(params.shift_voxels, dtype=torch.float32).view(1, 3, 1, 1, 1)
    per_voxel = 2 / torch.tensor(size, dtype=torch.float32).view(1, 3, 1, 1, 1)
    grid = functional.affine_grid(torch.eye(3, 4)[None], [1, 1, *size], align_corners=False)
    grid = grid + (moved * per_voxel).flip(1).permute(0, 2, 3, 4, 1)  # grid_sample names the last axis first
    source = torch.from_numpy(codes_DHW.astype(np.float32))[None, None]
    result = functional.grid_sample(source, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    made: NDArray[np.float32] = result[0, 0].numpy()
    return made


def as_channels(codes_B1DHW: Tensor, classes: int) -> Tensor:
    """(B, K, D, H, W) float32: 1 in the channel of the class that is known, background being channel 0."""
    values = torch.arange(1, classes + 1, device=codes_B1DHW.device).view(1, classes, 1, 1, 1)
    return (codes_B1DHW == values).float()
