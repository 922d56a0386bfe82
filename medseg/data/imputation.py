"""Noisy linear imputation of removed pixels (ROAD; Rong et al. 2022, section 4.2), in 2D and 3D.

A network has never seen a hole: black in its place says more than that something is missing.

Each removed pixel becomes the weighted mean of its neighbours, a removed neighbour by its own new value: one sparse
symmetric positive definite system per image and channel. It is solved by conjugate gradients with the matrix as a
convolution, all images at once, started from a pyramid of means.
"""

from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from medseg.data.grids import enlarged, pooled

_CONV = {2: functional.conv2d, 3: functional.conv3d}
_SIDE = 256  # what is filled in is smooth; a finer grid costs time and shows nothing more


def fill_in(image: NDArray[Any], hidden: NDArray[np.bool_], *, seed: int = 0) -> NDArray[Any]:
    """A picture whose hidden pixels are imputed from the others, on a grid of at most 256 pixels a side.

    Args:
        image: (row, column), any number type; the result has the same, within the image's range. hidden: of its shape.

    Returns:
        The pixels that are not hidden as they are; where all are, an image of its darkest value.
    """
    if not hidden.any():
        return image
    whole = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None, None]
    known = torch.from_numpy(~hidden)[None, None].float()
    scale = min(1.0, _SIDE / max(image.shape))
    grid = tuple(max(1, round(n * scale)) for n in image.shape)
    share = pooled(known, grid)
    if not bool((share > 0).any()):
        return np.full_like(image, image.min())
    coarse = pooled(whole * known, grid) / share.clamp(min=1e-6)
    values = enlarged(impute(coarse, share[:, 0] == 0, seed=seed), image.shape)[0, 0].numpy()
    values = np.clip(values, image.min(), image.max())
    if np.issubdtype(image.dtype, np.integer):
        values = np.rint(values)
    return np.where(hidden, values.astype(image.dtype), image)


def impute(
    x_NCDHW: Tensor,
    missing_NDHW: Tensor,
    *,
    noise: float = 0.01,
    seed: int = 0,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
) -> Tensor:
    """Replace the missing pixels of each image.

    Args:
        missing_NDHW: bool; at least one pixel of each image must be left.
        noise: standard deviation of what is added to imputed pixels, as a share of the range of the channel.
        tolerance: where the residual's norm relative to that of the right side is small enough.

    Raises:
        ValueError: nothing is left of an image.
    """
    if bool(missing_NDHW.flatten(1).all(1).any()):
        raise ValueError("missing_NDHW leaves no pixel of an image; nothing can be imputed from nothing.")
    channels, space = x_NCDHW.shape[1], x_NCDHW.shape[2:]
    x = x_NCDHW.reshape(-1, 1, *space)
    missing = missing_NDHW.repeat_interleave(channels, 0)[:, None].to(x.dtype)
    filled = _solve(x, missing, tolerance, max_iterations)
    generator = torch.Generator().manual_seed(seed)
    grain = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    axes = tuple(range(1, x.ndim))
    reach = x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True)
    return torch.where(missing > 0, filled + noise * reach * grain, x).reshape(x_NCDHW.shape)


def neighbour_weights(dims: int) -> Tensor:
    """(1, 1, 3, 3[, 3]) weights of the neighbours, summing to 1, 0 in the middle.

    Inverse to the Manhattan distance, which gives the paper's 1/6 and 1/12 in 2D; for 3D the paper gives none.
    """
    weights = torch.zeros([3] * dims, dtype=torch.float64)
    for place in product(range(3), repeat=dims):
        distance = sum(abs(n - 1) for n in place)
        weights[place] = 1 / distance if distance else 0.0
    return (weights / weights.sum())[None, None]


def _solve(x: Tensor, missing: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """Conjugate gradients for s u - W u = W known at the missing pixels; s is the weight of a pixel's neighbours."""
    dims = x.ndim - 2
    weights = neighbour_weights(dims).to(x)
    convolve = _CONV[dims]

    def around(values: Tensor) -> Tensor:
        return convolve(values, weights, padding=1)

    weight_inside = around(torch.ones_like(x[:1]))
    right = missing * around(x * (1 - missing))

    def system(values: Tensor) -> Tensor:
        return missing * (weight_inside * values - around(values))

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).view(-1, *[1] * (x.ndim - 1))

    found = missing * _guess(x, 1 - missing)
    residual = right - system(found)
    direction, size = residual, dot(residual, residual)
    enough = tolerance**2 * dot(right, right)
    for _ in range(max_iterations):
        if bool((size <= enough).all()):
            break
        pushed = system(direction)
        step = size / dot(direction, pushed).clamp(min=torch.finfo(x.dtype).tiny)
        found, residual = found + step * direction, residual - step * pushed
        size, before = dot(residual, residual), size
        direction = residual + size / before.clamp(min=torch.finfo(x.dtype).tiny) * direction
    return found


def _guess(x: Tensor, known: Tensor) -> Tensor:
    """The known pixels, and for the others means of ever larger surroundings."""
    space = tuple(x.shape[2:])
    if bool((known > 0).all()):
        return x
    if max(space) == 1:
        return x * known
    half = tuple((n + 1) // 2 for n in space)
    share = pooled(known, half)
    mean = pooled(x * known, half) / share.clamp(min=1e-6)
    coarse = _guess(mean, (share > 0).to(x.dtype))
    return torch.where(known > 0, x, enlarged(coarse, space))
