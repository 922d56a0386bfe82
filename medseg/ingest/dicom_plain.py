"""Uncompressed grey pixels of a single-frame file: where they lie, and what their numbers mean.

Most scans are such. Their header, read once when the files are found, tells all that reading them takes.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Finding
from medseg.ingest.deidentify import burned_in
from medseg.ingest.dicom_values import clear_spare_bits, padding_range, rescale

TAGS = (
    *("PixelRepresentation", "BitsStored", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "BurnedInAnnotation", "ConversionType"),
)


@dataclass(frozen=True)
class Plain:
    """The pixels of one file.

    Attributes:
        offset, shape, dtype: of the stored pixels (row, column), little endian.
        bits: of them count.
        slope, intercept: stored to modality values.
        padding: least and greatest stored value outside the image.
        burnt_in: findings about text in the pixels.
        file_bytes: size of the file when its header was read.
    """

    offset: int
    shape: tuple[int, int]
    dtype: str
    bits: int
    slope: float
    intercept: float
    padding: tuple[int, int] | None
    burnt_in: tuple[Finding, ...]
    file_bytes: int

    def read(self, path: Path) -> NDArray[Any] | None:
        """The stored pixels, (row, column), read-only; None where the file is not as it was."""
        size = self.shape[0] * self.shape[1] * np.dtype(self.dtype).itemsize
        try:
            with path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != self.file_bytes:
                    return None
                file.seek(self.offset)
                content = file.read(size)
        except OSError:
            return None
        if len(content) != size:
            return None
        stored = np.frombuffer(content, self.dtype).reshape(self.shape)
        return clear_spare_bits(stored, stored.dtype.itemsize * 8, self.bits)


def find_plain(data: Any, pixels: tuple[int, int], file_bytes: int) -> Plain | None:
    """Where the pixels of a file lie that holds nothing behind them; None where that is not all there is to say.

    Args:
        data: header of a single-frame file, with `TAGS`.
        pixels: offset and length of Pixel Data in bytes.
        file_bytes: size of the file.
    """
    offset, length = pixels
    try:
        shape, bits = (int(data.Rows), int(data.Columns)), int(data.BitsAllocated)
        size = shape[0] * shape[1] * bits // 8
        signed = data.PixelRepresentation
        regular = bits in (8, 16) and signed in (0, 1) and data.SamplesPerPixel == 1 and size > 0
        if not regular or length != size + size % 2 or offset + length != file_bytes:
            return None
        kind, scale, burnt_in = f"<{'ui'[signed]}{bits // 8}", rescale(data, None), tuple(burned_in(data))
        return Plain(offset, shape, kind, int(data.BitsStored), *scale, padding_range(data), burnt_in, file_bytes)
    except Exception:  # the reader of the pixels says what is wrong
        return None
