"""Changes at the edge of a radiograph that no reader would let change the verdict. Pure functions of arrays.

Images are (row, column) of any real dtype, which is kept. The darkest value of the image counts as black, and the
99th percentile as the white of burned-in text.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[Any]

SHARE = 0.05
"""Of the shorter side: how much is padded or cropped on each side."""

CORNER_SHARE = 0.14
"""Of each side: how much of a corner is covered, or taken by text."""


def pad(image: Image, share: float = SHARE) -> Image:
    """Black padding on all sides, as from a scanner's bed or another aspect ratio."""
    width = max(1, round(share * min(image.shape)))
    return np.pad(image, width, constant_values=image.min())


def pad_sides(image: Image, share: float = 2 * SHARE) -> Image:
    """Black padding at the left and right only."""
    width = max(1, round(share * image.shape[1]))
    return np.pad(image, ((0, 0), (width, width)), constant_values=image.min())


def crop(image: Image, share: float = SHARE) -> Image:
    """The image without its rim."""
    width = max(1, round(share * min(image.shape)))
    return image[width:-width, width:-width] if min(image.shape) > 2 * width + 1 else image


def black_corners(image: Image, share: float = CORNER_SHARE) -> Image:
    """All four corners covered, where markers and text lie."""
    rows, columns = (max(1, round(share * n)) for n in image.shape)
    changed = image.copy()
    for row in (slice(rows), slice(-rows, None)):
        for column in (slice(columns), slice(-columns, None)):
            changed[row, column] = image.min()
    return changed


def write(image: Image, text: str, *, right: bool, bottom: bool = False, share: float = CORNER_SHARE) -> Image:
    """Text burned into a corner, as high as half of the corner and not wider than a third of the image."""
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFont

    rows, columns = image.shape
    font = ImageFont.load_default(size=max(8, round(share * rows / 2)))
    left, top, far, low = font.getbbox(text)
    stamp = Pillow.new("L", (int(far - left) + 2, int(low - top) + 2), 0)
    ImageDraw.Draw(stamp).text((1 - left, 1 - top), text, fill=255, font=font)
    if stamp.width > columns / 3:
        stamp = stamp.resize((max(1, columns // 3), max(1, round(stamp.height * columns / 3 / stamp.width))))
    ink = np.asarray(stamp, dtype=np.float64)[:rows, :columns] / 255
    gap_down, gap_right = (min(round(0.02 * n), n - m) for n, m in zip(image.shape, ink.shape, strict=True))
    down = rows - ink.shape[0] - gap_down if bottom else gap_down
    across = columns - ink.shape[1] - gap_right if right else gap_right
    place = (slice(down, down + ink.shape[0]), slice(across, across + ink.shape[1]))
    changed = image.astype(np.float64)
    changed[place] += ink * (float(np.percentile(image, 99)) - changed[place])
    whole = image.dtype.kind in "iub"
    return (np.round(changed) if whole else changed).astype(image.dtype)


CHANGES: dict[str, Callable[[Image], Image]] = {
    "padded 5 % on all sides": pad,
    "padded 10 % left and right": pad_sides,
    "cropped 5 % on all sides": crop,
    "corners blacked out": black_corners,
    "“L” written top right": partial(write, text="L", right=True),
    "“R” written top left": partial(write, text="R", right=False),
    "“PORTABLE 12:30” written bottom left": partial(write, text="PORTABLE 12:30", right=False, bottom=True),
}
"""What is done to the images, by the name shown on the page."""
