"""Radiographs: read from PNG and JPEG, checked for their view, written into the cohort."""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Finding
from medseg.files import write_bytes
from medseg.images import write_png
from medseg.ingest.scan import Refused
from medseg.volume import Volume

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HARMLESS_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"gAMA", b"sRGB", b"cHRM", b"sBIT", b"pHYs", b"bKGD"}
_CHEST = {"CHEST", "THORAX", "LUNG", "LUNGS", "CXR"}
_OTHER_PARTS = {
    *("ABDOMEN", "ANKLE", "ARM", "BREAST", "CALCANEUS", "CLAVICLE", "COCCYX", "CSPINE", "ELBOW", "EXTREMITY", "FEMUR"),
    *("FINGER", "FOOT", "FOREARM", "HAND", "HEAD", "HIP", "HUMERUS", "JAW", "KNEE", "KUB", "LEG", "LSPINE", "MANDIBLE"),
    *("NECK", "ORBIT", "PATELLA", "PELVIS", "RADIUS", "SACRUM", "SCAPULA", "SHOULDER", "SINUS", "SKULL", "SPINE"),
    *("SSPINE", "THIGH", "TIBIA", "TOE", "TSPINE", "ULNA", "WRIST", "ZYGOMA"),
}
_FRONTAL = {"PA", "AP"}
_OTHER_VIEWS = {"LL", "RL", "LLD", "RLD", "LLO", "RLO", "LAO", "RAO", "LPO", "RPO", "LAT", "LATERAL", "CC", "MLO"}
# SNOMED CT and its older SRT codes of CID 4010: frontal, AP and PA; lateral and oblique.
_FRONTAL_CODES = {"399033003", "399348003", "272479007", "R-10206", "R-10214"}
_OTHER_CODES = {
    *("399067008", "399198007", "399173006", "399352003", "399260004", "399182000", "399135007", "399356000"),
    *("399006002", "399038007", "399184004", "399236003", "R-102CD", "R-10232", "R-10236", "R-10228"),
}
_CHEST_CODES = {"51185008", "816094009", "43799004", "T-D3000"}


def check_view(data: Any) -> Iterator[Finding]:
    """Whether a DICOM header says that this is a frontal chest radiograph; no word of the header is quoted unless
    it is one of the known terms.

    Yields:
        `not_frontal_chest` when view or body part is another one, `view_unknown` when the header does not say.
    """
    view, part = _view(data), _part(data)
    if view in _OTHER_VIEWS or part in _OTHER_PARTS:
        told = " and ".join(filter(None, (f"view {view}" * (view in _OTHER_VIEWS), part * (part in _OTHER_PARTS))))
        message = f"The header says {told}, not a frontal chest radiograph."
        yield Finding("not_frontal_chest", "warning", message)
    elif not (view and part):
        missing = " and ".join(name for name, known in (("view", view), ("body part", part)) if not known)
        yield Finding("view_unknown", "info", f"The header does not say the {missing} in a known term.")


def _view(data: Any) -> str:
    """A known view position, or empty."""
    position = str(data.get("ViewPosition") or "").strip().upper()
    if position in _FRONTAL | _OTHER_VIEWS:
        return position
    codes = _codes(data, "ViewCodeSequence")
    if codes & _FRONTAL_CODES:
        return "PA"
    if codes & _OTHER_CODES:
        return "LATERAL"
    directions = [str(part).strip().upper() for part in data.get("PatientOrientation") or ()]
    if len(directions) == 2 and all(directions):
        return {"L": "PA", "R": "PA", "A": "LATERAL", "P": "LATERAL"}.get(directions[0][0], "")
    return ""


def _part(data: Any) -> str:
    """`CHEST`, the name of another known part, or empty."""
    terms = set(re.findall(r"[A-Z]+", str(data.get("BodyPartExamined") or "").upper()))
    if terms & _CHEST or (not terms and _codes(data, "AnatomicRegionSequence") & _CHEST_CODES):
        return "CHEST"
    return min(terms & _OTHER_PARTS, default="")


def _codes(data: Any, keyword: str) -> set[str]:
    return {str(item.get("CodeValue") or "") for item in data.get(keyword) or ()}


def read_picture(path: Path) -> tuple[Volume, tuple[Finding, ...]]:
    """Read a PNG or JPEG as grey values.

    Returns:
        (row, column) uint8, or uint16 for 16-bit files, and findings. A picture has no scale: its affine is the
        identity and the finding `spacing_unknown` says so.

    Raises:
        Refused: damaged, empty, or too large to be decoded safely.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            colour = upright.mode not in ("1", "L", "LA", "I", "I;16", "I;16B") and _is_coloured(upright)
            array = _grey(upright)
    except Refused:
        raise
    except Exception as error:  # decoders raise anything on damaged files
        reason = " ".join(str(error).replace(str(path), "").split())[:160]
        raise Refused("unreadable_picture", f"The picture cannot be decoded ({reason}); copy it again.") from error
    findings = [Finding("spacing_unknown", "info", "A picture carries no pixel spacing.")]
    if colour:
        findings.append(Finding("colour", "warning", "A colour picture was reduced to its luminance."))
    return Volume(array, np.eye(4)), tuple(findings)


def write_radiograph_png(path: Path, array: NDArray[Any], source: Path | None) -> Path:
    """Write (row, column) uint8 or uint16 as PNG, atomically.

    When `source` is a PNG with the same pixels and nothing but pixels in it, its bytes are kept: that is fifteen
    times quicker than to compress anew. Text chunks could name a patient, so a file with any is written anew.
    """
    if source is not None and (content := _bare_png(source, array)) is not None:
        return write_bytes(path, content)
    return write_png(path, array)


def _grey(image: Any) -> NDArray[Any]:
    if image.mode in ("I", "I;16", "I;16B"):
        array = np.asarray(image)
        if array.min() < 0 or array.max() > 65535:
            raise Refused("bit_depth", f"Grey values reach {array.max()}; radiographs have at most 16 bits.")
        return array.astype(np.uint16)
    return np.asarray(image.convert("L"))


def _is_coloured(image: Any) -> bool:
    rgb = np.asarray(image.convert("RGB")).astype(np.int16)
    return bool(np.abs(rgb - rgb[..., :1]).max() > 8)


def _bare_png(path: Path, array: NDArray[Any]) -> bytes | None:
    """The file's bytes if it is a greyscale PNG of this size and depth without any text; else None."""
    content = path.read_bytes()
    if not content.startswith(_SIGNATURE) or len(content) < 33:
        return None
    width, height, depth, colour = struct.unpack(">IIBB", content[16:26])
    if (height, width) != array.shape or depth != array.dtype.itemsize * 8 or colour != 0:
        return None
    at = len(_SIGNATURE)
    while at + 12 <= len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        if kind not in _HARMLESS_CHUNKS:
            return None
        at += 12 + length
        if kind == b"IEND":
            return content if at == len(content) else None
    return None
