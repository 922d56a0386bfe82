"""Siemens mosaics: one picture that holds all slices of a volume side by side, as tiles.

The header places the picture, not its slices. Where they lie follows from the picture's corner, the number of tiles,
and the private CSA header, which names the slice normal and repeats the protocol with the position of each slice. The
tiles are unpacked only when these accounts agree; else the series is refused.
"""

import math
import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.ingest.dicom_frames import tile_count
from medseg.ingest.scan import Refused

_CREATOR, _IMAGE_HEADER, _SERIES_HEADER = "SIEMENS CSA HEADER", 0x10, 0x20
_BLOCKS = (0x10, 0x11, 0x12)
TAGS = [0x00290000 + block for block in _BLOCKS] + [
    0x00290000 + (block << 8) + offset for block in _BLOCKS for offset in (_IMAGE_HEADER, _SERIES_HEADER)
]
_NUMBER = 0x0019100A  # of images in the mosaic
_MAX_TAGS, _MAX_ITEMS = 1000, 10_000
_NORMAL_TOLERANCE = 1e-3  # of cosines
_ALONG_TOLERANCE_MM = 0.05
_POSITION = re.compile(r"sSliceArray\.asSlice\[(\d{1,4})\]\.sPosition\.d(Sag|Cor|Tra)\s*=\s*(-?[\d.]+(?:e[+-]?\d+)?)")
_SLICE = re.compile(r"sSliceArray\.asSlice\[(\d{1,4})\]\.")


@dataclass(frozen=True)
class Mosaic:
    """The tiles of one picture, row by row from its upper left corner: tile k is slice k.

    Attributes:
        count: of slices. per_row: of tiles. rows, columns: of one tile.
        positions: (count, 3) mm, LPS, of the centre of the first pixel of each slice.
    """

    count: int
    per_row: int
    rows: int
    columns: int
    positions: NDArray[np.float64]


def read_mosaic(data: Any, private: Any) -> Mosaic:
    """Where the slices of a mosaic lie.

    Args:
        data: header with position, orientation, spacing and size of the picture.
        private: header with `TAGS`.

    Raises:
        Refused: `mosaic` when the header lacks what places the slices, or contradicts itself; the sentence carries
            the numbers.
    """
    images, series = (_csa(private, offset) for offset in (_IMAGE_HEADER, _SERIES_HEADER))
    count = _count(data, images)
    per_row = math.ceil(math.sqrt(count))
    rows, columns = int(data.Rows), int(data.Columns)
    if rows % per_row or columns % per_row:
        raise _refused(f"{count} slices do not fit a picture of {rows}×{columns} pixels")
    tile = Mosaic(count, per_row, rows // per_row, columns // per_row, np.empty((0, 3)))
    normal = np.array([float(text) for text in images.get("SliceNormalVector", [])[:3]])
    centres = _protocol_positions(series, count)
    try:
        first, across, down = _first_tile(data, tile)
    except (AttributeError, TypeError, ValueError) as error:
        raise _refused("position, orientation or pixel spacing is missing") from error
    step = (centres[-1] - centres[0]) / (count - 1)
    _check(data, normal, step, across, down)
    middle = first + across * tile.columns / 2 + down * tile.rows / 2
    wrong = centres - (middle + np.outer(np.arange(count), step))
    along = float(np.abs(wrong @ normal).max())
    beside_px = float(np.abs(wrong @ np.linalg.pinv(np.stack([across, down]))).max())
    if along > _ALONG_TOLERANCE_MM or beside_px > 1:
        raise _refused(
            f"the protocol places its slices up to {along:.2f} mm along and {beside_px:.1f} pixels beside where the "
            "picture's corner does"
        )
    return Mosaic(count, per_row, tile.rows, tile.columns, first + np.outer(np.arange(count), step))


def tiles_of(data: Any, stored: NDArray[Any]) -> list[NDArray[Any]]:
    """The slices of a decoded picture (row, column), in order; `data` is a header that `read_mosaic` accepted.

    Raises:
        Refused: the picture is not of the size that the header says.
    """
    count = tile_count(data, _NUMBER)
    per_row = math.ceil(math.sqrt(count))
    if stored.shape != (data.Rows, data.Columns):
        raise Refused("unreadable_pixels", f"A mosaic decodes to shape {stored.shape}, which the header does not say.")
    rows, columns = stored.shape[0] // per_row, stored.shape[1] // per_row
    tiles = stored.reshape(per_row, rows, per_row, columns).swapaxes(1, 2).reshape(-1, rows, columns)
    return list(tiles[:count])


def is_siemens(data: Any) -> bool:
    """Whether the header counts tiles in Siemens' way."""
    return _NUMBER in data and "MOSAIC" in [str(part) for part in np.atleast_1d(data.get("ImageType") or [])]


def _count(data: Any, images: dict[str, list[str]]) -> int:
    """The number of slices, as two places of the header tell it."""
    public, private = tile_count(data, _NUMBER), (images.get("NumberOfImagesInMosaic") or ["0"])[0]
    if str(public) != private or not 2 <= public <= 4096:
        found = int(private) if private.isdecimal() else 0
        raise _refused(f"it holds {public} or {found} slices, by two fields of the header")
    return public


def _first_tile(data: Any, tile: Mosaic) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Centre of the first pixel of the first slice, and the steps (mm, LPS) to the next column and row.

    The corner that the header gives is that of a picture centred where each slice is, so a tile's own corner lies
    half the difference of their sizes further in.
    """
    down_mm, across_mm = (float(value) for value in data.PixelSpacing)
    row, column = np.reshape([float(value) for value in data.ImageOrientationPatient], (2, 3))
    across, down = row * (across_mm / np.linalg.norm(row)), column * (down_mm / np.linalg.norm(column))
    corner = np.array([float(value) for value in data.ImagePositionPatient])
    corner += across * (int(data.Columns) - tile.columns) / 2 + down * (int(data.Rows) - tile.rows) / 2
    return corner, across, down


def _check(
    data: Any, normal: NDArray[Any], step: NDArray[Any], across: NDArray[np.float64], down: NDArray[np.float64]
) -> None:
    """Normal, protocol and spacing must tell one direction and one distance."""
    cross = np.cross(across, down) / (np.linalg.norm(across) * np.linalg.norm(down))
    step_mm = float(np.linalg.norm(step))
    if normal.shape != (3,) or not np.isfinite([*normal, *step, *cross]).all() or step_mm == 0:
        raise _refused("its slice normal or slice positions are missing")
    if abs(abs(float(normal @ cross)) - 1) > _NORMAL_TOLERANCE:
        raise _refused(f"its slice normal is off the picture's by a cosine of {abs(float(normal @ cross)):.4f}")
    if abs(float(step @ normal) / step_mm - 1) > _NORMAL_TOLERANCE:
        raise _refused(f"its slices run along the normal by a cosine of {float(step @ normal) / step_mm:.4f}, not 1")
    stated = float(data.get("SpacingBetweenSlices") or step_mm)
    if abs(stated - step_mm) > _ALONG_TOLERANCE_MM:
        raise _refused(f"slices are {step_mm:.3f} mm apart by the protocol and {stated:.3f} mm by the header")


def _protocol_positions(series: dict[str, list[str]], count: int) -> NDArray[np.float64]:
    """(count, 3) mm, LPS: the centres of the slices by the protocol, which leaves out what is 0."""
    text = "".join(series.get("MrPhoenixProtocol") or series.get("MrProtocol") or [])
    positions = np.zeros((count, 3))
    seen = {int(number) for number in _SLICE.findall(text)}
    if seen != set(range(count)):
        raise _refused(f"its protocol places {len(seen)} slices, the picture holds {count}")
    for number, axis, value in _POSITION.findall(text):
        positions[int(number), ("Sag", "Cor", "Tra").index(axis)] = float(value)
    return positions


def _csa(private: Any, offset: int) -> dict[str, list[str]]:
    """The texts of a CSA header by name."""
    for block in _BLOCKS:
        creator, tag = 0x00290000 + block, 0x00290000 + (block << 8) + offset
        if creator in private and str(private[creator].value).strip() == _CREATOR and tag in private:
            content = private[tag].value
            try:
                return _parse_csa(content if isinstance(content, bytes) else b"")
            except (struct.error, UnicodeDecodeError) as error:
                raise _refused("its CSA header is damaged") from error
    raise _refused("it has no CSA header")


def _parse_csa(content: bytes) -> dict[str, list[str]]:
    """Version 2: `SV10`, four bytes, the number of tags and 77; then each tag with its items, padded to four bytes."""
    if content[:4] != b"SV10":
        raise _refused("its CSA header is not of version 2")
    (count,) = struct.unpack_from("<I", content, 8)
    found: dict[str, list[str]] = {}
    at = 16
    for _ in range(min(count, _MAX_TAGS)):
        name, _vm, _vr, _type, items, _mark = struct.unpack_from("<64si4siii", content, at)
        at += 84
        values = []
        for _ in range(min(max(items, 0), _MAX_ITEMS)):
            length = max(struct.unpack_from("<4i", content, at)[1], 0)
            values.append(content[at + 16 : at + 16 + length].partition(b"\0")[0].decode("latin-1").strip())
            at += 16 + (length + 3) // 4 * 4
        found[name.partition(b"\0")[0].decode("latin-1")] = [value for value in values if value]
    return found


def _refused(why: str) -> Refused:
    return Refused("mosaic", f"It is a mosaic of slices that cannot be placed: {why}; export single slices.")
