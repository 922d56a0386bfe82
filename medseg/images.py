"""Read and write the images of a cohort: NIfTI volumes and PNG radiographs, nothing else.

Scanner formats are turned into these by `medseg.ingest`; every later step reads images through here only.
"""

import io
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medseg.files import UserError, replacing
from medseg.volume import Volume


def read_image(path: Path) -> Volume:
    """Read `.nii`, `.nii.gz` (i, j, k; scaling applied, float32 unless stored as integer) or `.png` (row, column).

    Raises:
        UserError: missing, unreadable, or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; check the path, or ingest the cohort again.")
    try:
        return _read_png(path) if path.suffix == ".png" else _read_nifti(path)
    except UserError:
        raise
    except Exception as error:  # readers raise anything on damaged files; the cause is kept
        raise UserError(f"{path} cannot be read as an image ({error}); replace the file or leave it out.") from error


def write_nifti(path: Path, volume: Volume, *, intent: str = "") -> Path:
    """Write (i, j, k) as NIfTI-1 with sform = qform = affine (code 1, scanner), millimetres; atomic.

    The qform of a sheared grid is the closest rigid one; the sform is always exact to float32.
    """
    import nibabel as nib

    image = nib.Nifti1Image(np.asarray(volume.array), volume.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(volume.affine, code=1)
    image.set_qform(volume.affine, code=1, strip_shears=True)
    if intent:
        image.header["descrip"] = intent[:79].encode()
    with replacing(path) as temporary:
        if temporary.suffix == ".gz":
            with temporary.open("wb") as file, _Packed(file, image.get_data_dtype().itemsize) as packed:
                image.to_stream(packed)
        else:
            nib.save(image, temporary)
    return path


class _Packed(io.RawIOBase):
    """Writes a gzip stream without name or time, so that the same image gives the same bytes.

    Integers of one or two bytes are noise in their low bits: looking for more than runs of one byte would take twice
    the time and save nothing. Wider values often have a background of many bytes that repeat.
    """

    def __init__(self, file: BinaryIO, itemsize: int) -> None:
        strategy = zlib.Z_RLE if itemsize <= 2 else zlib.Z_DEFAULT_STRATEGY
        self._file = file
        self._packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS + 16, zlib.DEF_MEM_LEVEL, strategy)
        self._written = 0

    def writable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        assert (offset, whence) == (self._written, 0), "a packed stream is written from start to end"
        return offset

    def tell(self) -> int:
        return self._written

    def write(self, content: Any, /) -> int:
        size = memoryview(content).nbytes
        self._file.write(self._packer.compress(content))
        self._written += size
        return size

    def close(self) -> None:
        if not self.closed:
            self._file.write(self._packer.flush())
        super().close()


def write_png(path: Path, array: NDArray[Any]) -> Path:
    """Write a (row, column) uint8 or uint16 array as a greyscale PNG; atomic."""
    from PIL import Image

    if array.dtype not in (np.uint8, np.uint16) or array.ndim != 2:
        raise AssertionError(f"a PNG takes (row, column) uint8 or uint16, not {array.shape} {array.dtype}")
    with replacing(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")
    return path


def _read_nifti(path: Path) -> Volume:
    import nibabel as nib

    image: Any = nib.load(path)
    data = image.dataobj
    scaled = (data.slope, data.inter) not in ((1.0, 0.0), (None, None))
    array = np.asarray(data.get_unscaled()) if not scaled else np.asarray(data, dtype=np.float32)
    if array.dtype.byteorder not in ("=", "|"):
        array = array.astype(array.dtype.newbyteorder("="))
    return Volume(array, np.asarray(image.affine, dtype=np.float64))


def _read_png(path: Path) -> Volume:
    from PIL import Image

    with Image.open(path) as image:
        grey = image.mode in ("L", "I;16", "I", "1")
        array = np.asarray(image if grey else image.convert("L"))
    if array.dtype == np.int32:
        array = array.astype(np.uint16)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    return Volume(array, np.eye(4))
