"""What a compressed frame says about itself before it is decoded.

Decoders allocate, and some loop, by the size in the codestream's own header; one damaged byte there can take all the
memory of a machine. So that header must agree with the DICOM header first.
"""

from typing import Any

from medseg.ingest.scan import Refused

_JPEG_START, _J2K_START = b"\xff\xd8", b"\xff\x4f\xff\x51"
_NO_LENGTH = {0x01, *range(0xD0, 0xDA)}  # markers without a segment
_FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # SOF0…15 of JPEG and SOF55 of JPEG-LS


def check_frames(data: Any) -> None:
    """Compare the codestream of every frame with Rows, Columns and Samples per Pixel.

    Args:
        data: a pydicom data set with Pixel Data. Only the syntaxes of the JPEG family are checked.

    Raises:
        Refused: a frame has no readable header of its own, or says another size.
    """
    from pydicom.encaps import generate_frames

    syntax = data.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated or "JPEG" not in syntax.name:
        return
    expected = (int(data.Rows), int(data.Columns), int(data.SamplesPerPixel))
    for frame in generate_frames(data.PixelData, number_of_frames=int(data.get("NumberOfFrames") or 1)):
        found = _jpeg_2000_size(frame) if b"jP  " in frame[:12] or frame[:4] == _J2K_START else _jpeg_size(frame)
        if found is None:
            raise Refused("unreadable_pixels", "A compressed frame has no readable header; export the series again.")
        if found != expected:
            raise Refused(
                "unreadable_pixels",
                f"A compressed frame says {found[0]}×{found[1]} pixels of {found[2]} values, the DICOM header "
                f"{expected[0]}×{expected[1]} of {expected[2]}.",
            )


def _jpeg_size(frame: bytes) -> tuple[int, int, int] | None:
    """(rows, columns, components) of a JPEG or JPEG-LS codestream."""
    if frame[:2] != _JPEG_START:
        return None
    at = 2
    while at + 4 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # a filling byte
            at += 1
        elif marker in _NO_LENGTH:
            at += 2
        elif marker in _FRAME_MARKERS:
            segment = frame[at + 4 : at + 10]
            if len(segment) < 6:
                return None
            return int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big"), segment[5]
        else:
            at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None


def _jpeg_2000_size(frame: bytes) -> tuple[int, int, int] | None:
    """(rows, columns, components) of a JPEG 2000 codestream, bare or within a JP2 file."""
    start = frame.find(_J2K_START)
    segment = frame[start + 6 : start + 42]
    if start < 0 or len(segment) < 36:
        return None
    right, bottom, left, top = (int.from_bytes(segment[i : i + 4], "big") for i in (2, 6, 10, 14))
    return bottom - top, right - left, int.from_bytes(segment[34:36], "big")
