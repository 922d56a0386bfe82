"""From a scan to the network's grid and back: orientation, spacing, intensities.

The forward and the backward way use the same two affines, so a label map returns to exactly the scan's own grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.data.appearance import content_box, crop_to, standardise
from medseg.plan import Plan
from medseg.volume import Affine, Volume, from_canonical, resample, resampled_grid, to_canonical


@dataclass(frozen=True)
class Prepared:
    """A scan on the network's grid.

    Attributes:
        image: (channel, *space) float32, canonical axes, plan spacing or size, normalised.
        label: (*space) uint8 or uint16 on the same grid, or None.
        affine: of the network's grid. native_affine, native_shape: of the scan as stored.
        content: rows and columns of a radiograph that the network's grid covers; empty where it covers all.
    """

    image: NDArray[np.float32]
    label: NDArray[np.generic] | None
    affine: Affine
    native_affine: Affine
    native_shape: tuple[int, ...]
    content: tuple[slice, ...] = ()

    @property
    def covered_shape(self) -> tuple[int, ...]:
        """Of the part of the scan that the network's grid covers, edge to edge."""
        return tuple(part.stop - part.start for part in self.content) or self.native_shape

    def onto_scan(self, covered: NDArray[np.generic]) -> NDArray[np.generic]:
        """An array of `covered_shape` on the scan's own grid, 0 where the network saw nothing."""
        if not self.content:
            return covered
        whole = np.zeros(self.native_shape, dtype=covered.dtype)
        whole[self.content] = covered
        return whole


def prepare(channels: Sequence[Volume], plan: Plan, label: Volume | None = None) -> Prepared:
    """Bring the channels of one case, which share a grid, to the network's grid.

    Args:
        channels: one volume per channel, (i, j, k) or (row, column).
        label: integer label map on the grid of the channels.
    """
    native = channels[0]
    content = content_box(native.array) if plan.appearance.crop_padding else ()
    parts = [crop_to(_canonical(channel), content) for channel in channels]
    shape, affine = network_grid(parts[0], plan)
    image = np.stack([standardise(_resample_image(part, shape, affine), plan.appearance) for part in parts])
    for channel in image:
        normalise_inplace(channel, plan)
    label_array = None
    if label is not None:
        part = _canonical(label)
        label_array = resample(part.array, part.affine, shape, affine, order=0)
    return Prepared(image, label_array, affine, native.affine, native.array.shape, content)


def restore_label(label: NDArray[np.generic], prepared: Prepared) -> NDArray[np.generic]:
    """Bring a label map from the network's grid back to the scan's own grid, shape `prepared.native_shape`."""
    native = Volume(np.empty(prepared.native_shape, dtype=np.uint8), prepared.native_affine)
    canonical = _canonical(native)
    array = resample(label, prepared.affine, canonical.array.shape, canonical.affine, order=0)
    return array if array.ndim == 2 else from_canonical(array, prepared.native_affine)


def network_grid(canonical: Volume, plan: Plan) -> tuple[tuple[int, ...], Affine]:
    """Shape and affine of the network's grid for a scan with canonical axes."""
    if plan.size_px:
        spacing = tuple(
            s * n / size for s, n, size in zip(canonical.spacing_mm, canonical.array.shape, plan.size_px, strict=True)
        )
        return resampled_grid(canonical.array.shape, canonical.affine, spacing)
    if not plan.spacing_mm:
        return canonical.array.shape, canonical.affine
    return resampled_grid(canonical.array.shape, canonical.affine, plan.spacing_mm)


def normalise_inplace(channel: NDArray[np.float32], plan: Plan) -> None:
    """Apply the plan's intensity scheme to one channel, in place. A constant channel becomes 0."""
    if plan.normalise == "ct":
        np.clip(channel, plan.intensity_low, plan.intensity_high, out=channel)
        channel -= plan.intensity_mean
        channel /= max(plan.intensity_sd, 1e-6)
        return
    if plan.normalise == "zscore_nonzero":
        inside = channel != 0
        values = channel[inside].astype(np.float64)
        if values.size and (spread := float(values.std())) > 0:
            channel[inside] = (values - values.mean()) / spread
        return
    channel -= channel.mean(dtype=np.float64)
    deviation = float(channel.std(dtype=np.float64))
    if deviation > 0:
        channel /= deviation


def normalised_limit(limit: float | None, plan: Plan) -> float | None:
    """A limit of intensities in the unit of prepared images; HU of a plan that normalises by HU, else it is one."""
    if limit is None or plan.normalise != "ct":
        return limit
    return (limit - plan.intensity_mean) / max(plan.intensity_sd, 1e-6)


def _canonical(volume: Volume) -> Volume:
    return to_canonical(volume) if volume.array.ndim == 3 else volume


def _resample_image(volume: Volume, shape: tuple[int, ...], affine: Affine) -> NDArray[np.float32]:
    array = volume.array.astype(np.float32)
    shrink = [n / m for n, m in zip(array.shape, shape, strict=True)]
    if any(factor > 1.5 for factor in shrink):  # anti-alias before taking fewer samples
        from scipy import ndimage

        sigma = [0.5 * factor if factor > 1.5 else 0.0 for factor in shrink]
        array = ndimage.gaussian_filter(array, sigma, mode="nearest")
    return np.ascontiguousarray(resample(array, volume.affine, shape, affine, order=1), dtype=np.float32)
