"""Walk the elements of a well-formed DICOM header: find the wanted ones and the pixels, and step over the rest.

pydicom parses every one of the hundreds of elements that scanners write, private ones and nested sequences too, and a
study has thousands of files. This walk is for regular files only: preamble, little endian, known value
representations, rising tags, sequences that end where they say. Everything else is left to pydicom, and so is the
meaning of the bytes: what is found here is what pydicom would have found.
"""

import struct
from collections.abc import Container
from functools import cache, lru_cache
from typing import Any, BinaryIO

SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # with a length of four bytes
FIRST_BYTES = 1 << 16
_MOST_BYTES = 1 << 20  # of a header
_EXPLICIT, _IMPLICIT, _TAG, _LENGTH = (struct.Struct(text).unpack_from for text in ("<HH2sH", "<HHL", "<HH", "<L"))
_UNDEFINED = 0xFFFFFFFF
_META_LENGTH, _SYNTAX, _CHARACTER_SET, _SOP_CLASS = 0x00020000, 0x00020010, 0x00080005, 0x00080016
_LAST_META, _LAST_HEADER, _LAST_INNER = 0x0002FFFF, 0x7FE00007, 0xFFFDFFFF
_PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)  # the header ends before them
_PIXEL_REPRESENTATION = 0x00280103
_SHORT_BYTES = 256
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_IMPLICIT_SYNTAX, _EXPLICIT_SYNTAX = b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1"
_COMPRESSED = (b"1.2.840.10008.1.2.4.", b"1.2.840.10008.1.2.5")  # JPEG and its kin, RLE; their headers are explicit
_Found = dict[int, tuple[bytes, int, int]]  # by tag: value representation if explicit, length, offset of the value


class _Irregular(Exception):
    """The header is not as regular as this walk needs."""


class Elements:
    """The wanted elements of one header, read like a pydicom data set: `get`, `in`, `[tag].value`, `.Keyword`.

    pydicom turns the bytes into values. Most of them are the same throughout a series, and are turned once.

    Attributes:
        pixels: offset and length in bytes of uncompressed Pixel Data; None where they are compressed, or floats.
    """

    def __init__(self, content: bytes, found: _Found, explicit: bool, pixels: tuple[int, int] | None) -> None:
        self.pixels = pixels
        self._raw = {tag: (vr, content[at : at + length]) for tag, (vr, length, at) in found.items()}
        encodings = _encodings(*self._raw[_CHARACTER_SET], explicit) if _CHARACTER_SET in self._raw else ()
        self._context = explicit, encodings, self._raw.get(_PIXEL_REPRESENTATION)

    def __contains__(self, place: str | int) -> bool:
        return _tag_of(place) in self._raw

    def __getitem__(self, place: str | int) -> Any:
        tag = _tag_of(place)
        vr, content = self._raw[tag]
        turn = _element if len(content) <= _SHORT_BYTES else _element.__wrapped__
        return turn(tag, vr, content, *self._context)

    def __getattr__(self, keyword: str) -> Any:
        if keyword not in self:
            raise AttributeError(f"the header has no {keyword}")
        return self[keyword].value

    def get(self, keyword: str, default: Any = None) -> Any:
        """The value of an element that has a keyword."""
        return self[keyword].value if keyword in self else default


def walk(file: BinaryIO, start: bytes, tags: Container[int]) -> Elements | None:
    """The wanted elements of the header of a file; None where pydicom must read the file.

    Args:
        start: the first `FIRST_BYTES` of the file.
        tags: of the wanted elements, with SOP Class UID and Specific Character Set.
    """
    try:
        try:
            return _walk(start, tags)
        except struct.error:  # the header goes on
            if len(start) < FIRST_BYTES:
                return None
            file.seek(0)
            return _walk(file.read(_MOST_BYTES), tags)
    except (struct.error, _Irregular):
        return None


def _walk(content: bytes, tags: Container[int]) -> Elements:
    meta, at = _elements(content, 132, True, _LAST_META, (_META_LENGTH, _SYNTAX))
    vr, length, offset = meta.get(_SYNTAX, (b"", 0, 0))
    if vr != b"UI" or meta.get(_META_LENGTH) != (b"UL", 4, 140):
        raise _Irregular
    syntax = content[offset : offset + length].rstrip(b"\0 ")
    explicit = syntax == _EXPLICIT_SYNTAX or syntax.startswith(_COMPRESSED)
    letters = content[at + 4 : at + 6]
    if not explicit and (syntax != _IMPLICIT_SYNTAX or (letters.isalpha() and letters.isupper())):
        raise _Irregular  # two letters there are a value representation, whatever the syntax says
    found, at = _elements(content, at, explicit, _LAST_HEADER, tags, last=_LAST_META)
    _, length, offset = found.get(_SOP_CLASS, (b"", 0, 0))
    if not content[offset : offset + length].strip(b"\0 "):
        raise _Irregular
    pixels = _pixels(content, at, explicit)
    return Elements(content, found, explicit, None if syntax.startswith(_COMPRESSED) else pixels)


def _elements(
    content: bytes, at: int, explicit: bool, limit: int, tags: Container[int], *, stop: int = -1, last: int = -1
) -> tuple[_Found, int]:
    """The wanted ones of the elements from `at` to `stop`, or before the first tag above `limit`; and that place."""
    found: _Found = {}
    while at != stop:
        vr = b""
        if explicit:
            group, element, vr, length = _EXPLICIT(content, at)
        else:
            group, element, length = _IMPLICIT(content, at)
        tag = group << 16 | element
        if tag > limit:
            break
        value = at + 8
        if vr in LONG_VRS:
            (length,) = _LENGTH(content, value)
            value += 4
        elif explicit and vr not in SHORT_VRS:
            raise _Irregular
        if tag <= last:
            raise _Irregular
        last = tag
        if length == _UNDEFINED:
            if tag in tags or not _is_sequence(tag, vr):
                raise _Irregular
            at = _after_items(content, value, explicit)
            continue
        if tag in tags:
            found[tag] = vr, length, value
        at = value + length
    return found, at


def _after_items(content: bytes, at: int, explicit: bool) -> int:
    """Where a sequence without a length ends, whose first item is at `at`."""
    while (tag := _tag(content, at)) != _SEQUENCE_END:
        (length,) = _LENGTH(content, at + 4)
        stop = -1 if length == _UNDEFINED else at + 8 + length
        found, at = _elements(content, at + 8, explicit, _LAST_INNER, (_CHARACTER_SET,), stop=stop)
        if tag != _ITEM or found or (at != stop and (stop >= 0 or _tag(content, at) != _ITEM_END)):
            raise _Irregular
        at += 8 * (stop < 0)
    return at + 8


def _is_sequence(tag: int, vr: bytes) -> bool:
    from pydicom.datadict import dictionary_VR

    try:
        return vr == b"SQ" or (not vr and dictionary_VR(tag) == "SQ")
    except KeyError:
        return False


def _pixels(content: bytes, at: int, explicit: bool) -> tuple[int, int] | None:
    """Offset and length of the Pixel Data that begin at `at`; None for floats, and where no length is given."""
    if (tag := _tag(content, at)) not in _PIXEL_TAGS:
        raise _Irregular
    value = at + 12 if explicit else at + 8
    (length,) = _LENGTH(content, value - 4)
    if tag != _PIXEL_TAGS[-1] or length == _UNDEFINED or (explicit and content[at + 4 : at + 6] not in (b"OB", b"OW")):
        return None
    return value, length


def _tag(content: bytes, at: int) -> int:
    group, element = _TAG(content, at)
    return int(group << 16 | element)


@lru_cache(maxsize=1 << 12)
def _element(
    tag: int, vr: bytes, content: bytes, explicit: bool, encodings: tuple[str, ...], sign: tuple[bytes, bytes] | None
) -> Any:
    """One element as pydicom reads it; `sign` is Pixel Representation, on which the type of others hangs."""
    from pydicom.charset import default_encoding
    from pydicom.dataelem import RawDataElement, empty_value_for_VR
    from pydicom.dataset import Dataset
    from pydicom.tag import BaseTag

    data = Dataset()
    data.set_original_encoding(not explicit, True, list(encodings) or default_encoding)
    beside = {_PIXEL_REPRESENTATION: sign} if sign else {}
    for each, (letters, value) in (beside | {tag: (vr, content)}).items():
        name = letters.decode() or None
        held: Any = value or empty_value_for_VR(name, raw=True)
        data[BaseTag(each)] = RawDataElement(BaseTag(each), name, len(value), held, 0, not explicit, True)
    return data[BaseTag(tag)]


@lru_cache(maxsize=64)
def _encodings(vr: bytes, content: bytes, explicit: bool) -> tuple[str, ...]:
    """Python's names of the character sets that the value of Specific Character Set names."""
    from pydicom.charset import convert_encodings

    return tuple(convert_encodings(_element(_CHARACTER_SET, vr, content, explicit, (), None).value))


@cache
def _tag_of(place: str | int) -> int:
    from pydicom.tag import Tag

    return int(Tag(place))
