"""A small picture per case: three slices (or the radiograph) with outlines, enough to see that nothing went wrong."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.files import replacing
from medseg.volume import Volume, to_canonical

PANEL_PX = 256
_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167))
_PERCENTILES = (0.5, 99.5)


def write_preview(path: Path, image: Volume, mask: Volume | None) -> Path:
    """Write a PNG, atomically: axial, coronal and sagittal slice side by side, the patient's right on the left.

    The slices go through the middle of what was segmented, or of the scan. Colours distinguish labels for readers
    with any colour vision (Okabe and Ito) and repeat after six.
    """
    from PIL import Image

    panels = _slices(image, mask) if image.array.ndim == 3 else [_flat(image, mask)]
    low, high = _window(image.array)
    drawn = [_draw(grey, labels, size, low, high) for grey, labels, size in panels]
    sheet = Image.new("RGB", (sum(p.width for p in drawn), max(p.height for p in drawn)))
    left = 0
    for panel in drawn:
        sheet.paste(panel, (left, (sheet.height - panel.height) // 2))
        left += panel.width
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG", compress_level=3)
    return path


def label_colour(value: int) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of a label value from 1 on; the DICOM segmentation proposes the same."""
    return _COLOURS[(value - 1) % len(_COLOURS)]


Panel = tuple[NDArray[Any], NDArray[Any] | None, tuple[float, float]]


def _slices(image: Volume, mask: Volume | None) -> list[Panel]:
    volume = to_canonical(image)
    labels = to_canonical(mask).array if mask is not None else None
    centre = [n // 2 for n in volume.array.shape]
    if labels is not None and (found := np.argwhere(labels)).size:
        centre = [int(n) for n in np.median(found, axis=0)]
    panels: list[Panel] = []
    for axis in (2, 1, 0):
        across, up = (a for a in range(3) if a != axis)
        size = tuple(volume.array.shape[a] * volume.spacing_mm[a] for a in (up, across))
        grey = _upright(np.moveaxis(volume.array, axis, 0)[centre[axis]])
        cut = None if labels is None else _upright(np.moveaxis(labels, axis, 0)[centre[axis]])
        panels.append((grey, cut, (size[0], size[1])))
    return panels


def _upright(plane: NDArray[Any]) -> NDArray[Any]:
    """Canonical (across, up) to (row, column): up is up, and right (or anterior) is on the left."""
    return plane[::-1, ::-1].T


def _flat(image: Volume, mask: Volume | None) -> Panel:
    rows, columns = (n * s for n, s in zip(image.array.shape, image.spacing_mm, strict=True))
    return image.array, None if mask is None else mask.array, (rows, columns)


def _window(array: NDArray[Any]) -> tuple[float, float]:
    step = tuple(slice(None, None, max(1, n // 64)) for n in array.shape)
    low, high = np.percentile(array[step].astype(np.float32), _PERCENTILES)
    return float(low), float(max(high, low + 1e-6))


def _draw(grey: NDArray[Any], labels: NDArray[Any] | None, size: tuple[float, float], low: float, high: float) -> Any:
    from PIL import Image

    scale = PANEL_PX / max(size)
    width, height = max(1, round(size[1] * scale)), max(1, round(size[0] * scale))
    scaled = np.clip((grey.astype(np.float32) - low) / (high - low), 0, 1) * 255
    picture = Image.fromarray(scaled.astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    rgb = np.asarray(picture.convert("RGB")).copy()
    if labels is not None and labels.any():
        # Labels of no more than 16 bits keep their value as a 32-bit picture.
        enlarged = Image.fromarray(labels.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
        values = np.asarray(enlarged)
        for value in np.unique(values[values > 0]):
            inside = values == value
            rgb[inside & ~ndimage.binary_erosion(inside)] = label_colour(int(value))
    return Image.fromarray(rgb)
