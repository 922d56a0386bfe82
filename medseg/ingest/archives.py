"""Unpack zip and tar archives that nobody vouches for.

Names, types and sizes in an archive are claims of whoever made it. Every entry is checked before a byte of it
is written, bytes are counted while they stream, and no link is ever created: a link to a file of the same
archive becomes a copy of that file. All goes to a folder beside the target, renamed when complete, so that a
refusal or a killed process leaves no half-unpacked data set behind.
"""

import bz2
import gzip
import io
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, Protocol, Self

from medseg.files import UserError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_CHUNK_BYTES = 1 << 20
_HEADER_BYTES = 4 << 20  # more than any honest run of tar headers between two entries
_LINK_BYTES = 4096
_DISK_MARGIN_BYTES = 64 << 20
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError)


class _Refused(Exception):
    """Why an archive is not unpacked, without its name."""


class _Damaged(Exception):
    """The compressed stream does not hold together."""


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def is_archive(path: Path) -> bool:
    """Whether `path` is a file whose name ends like an archive's (`scan.nii.gz` is none)."""
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def safe_unpack(archive: Path, out_dir: Path, *, max_bytes: int, max_files: int) -> Path:
    """Unpack a zip or tar (plain, gz, bz2, xz) archive into the new folder `out_dir`.

    An archive whose only top entry is a folder with the name of `out_dir` is not nested in it once more.
    What macOS adds (`__MACOSX/`, `._*`, `.DS_Store`) is left out. Permissions and owners are ignored.

    Args:
        archive: the file; its kind is read from its first bytes, not from its name.
        out_dir: must not exist, or be empty.
        max_bytes: largest sum of the unpacked files, in bytes; the free space of the disk limits it further.
        max_files: largest number of entries, folders included.

    Returns:
        `out_dir`.

    Raises:
        UserError: not an archive, damaged, encrypted, an unsafe entry (absolute path, `..`, link that leaves
            the archive, device, name given twice), more bytes or entries than allowed, no disk space, or
            `out_dir` is not empty. Nothing is left behind.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir} exists already; remove it, or unpack {archive.name} into another folder.")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_dir.with_name(f".part-{out_dir.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
    free = shutil.disk_usage(out_dir.parent).free - _DISK_MARGIN_BYTES
    try:
        temporary.mkdir()
        tree = _Tree(temporary, max_bytes=max_bytes, max_files=max_files, free_bytes=max(free, 0))
        _unpack(archive, tree)
        inner = temporary / out_dir.name
        whole = inner if inner.is_dir() and len(list(temporary.iterdir())) == 1 else temporary
        # The archive itself is still there, so files are not synced one by one: a power cut costs a repeat.
        whole.replace(out_dir)
    except _Refused as error:
        raise UserError(f"{archive} is refused: {error}; nothing of it was unpacked.") from error
    except (_Damaged, *_BROKEN) as error:
        raise UserError(f"{archive} is damaged ({_words(error)}); fetch or copy it again.") from error
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"{archive} cannot be unpacked into {out_dir} ({why}); choose another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out_dir


def _unpack(archive: Path, tree: "_Tree") -> None:
    if not archive.is_file():
        raise _Refused("there is no such file")
    # Not `is_zipfile`, which also accepts any file that merely ends like a zip.
    with archive.open("rb") as file:
        magic = file.read(6)
    if magic.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        _unpack_zip(archive, tree)
    else:
        _unpack_tar(archive, magic, tree)
    if tree.entries == 0:
        raise _Refused("it is empty")
    tree.copy_links()


def _unpack_zip(archive: Path, tree: "_Tree") -> None:
    with zipfile.ZipFile(archive) as source:
        entries = source.infolist()
        tree.announce(sum(entry.file_size for entry in entries), len(entries))
        for entry in entries:
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if entry.flag_bits & 1:
                raise _Refused(f"{entry.filename!r} is encrypted; unpack it yourself with its password")
            if entry.is_dir():
                tree.add_folder(entry.filename)
                continue
            if kind not in (0, stat.S_IFREG, stat.S_IFLNK):
                raise _Refused(f"{entry.filename!r} is a device or another special file")
            try:
                with source.open(entry) as stream:
                    if kind == stat.S_IFLNK:
                        target = stream.read(_LINK_BYTES).decode(errors="replace")
                        tree.add_link(entry.filename, _beside(entry.filename, target))
                    else:
                        tree.add_file(entry.filename, stream)
            except NotImplementedError as error:
                raise _Refused(f"{entry.filename!r} is packed in a way not known here ({error})") from error


def _unpack_tar(archive: Path, magic: bytes, tree: "_Tree") -> None:
    with _decompressed(archive, magic) as raw, _open_tar(metered := _Metered(raw)) as source:
        while (member := source.next()) is not None:
            _add_member(source, member, metered, tree)
            metered.allow(_HEADER_BYTES)
        while metered.read(_CHUNK_BYTES):
            pass  # to the very end: only there do gzip, bz2 and xz compare their checksums


def _open_tar(metered: "_Metered") -> tarfile.TarFile:
    metered.allow(_HEADER_BYTES)
    try:
        return tarfile.open(fileobj=metered, mode="r|", tarinfo=_Header)
    except tarfile.ReadError as error:
        raise _Refused("it is neither a zip nor a tar archive, or its beginning is damaged") from error


def _add_member(source: tarfile.TarFile, member: tarfile.TarInfo, metered: "_Metered", tree: "_Tree") -> None:
    if member.isdir():
        tree.add_folder(member.name)
    elif member.issym():
        tree.add_link(member.name, _beside(member.name, member.linkname))
    elif member.islnk():
        tree.add_link(member.name, member.linkname)
    elif member.isreg() and not member.issparse():
        tree.announce(member.size, 0)
        metered.allow(member.size + _HEADER_BYTES)
        stream = source.extractfile(member)
        assert stream is not None
        with stream:
            written = tree.add_file(member.name, stream)
        if written != member.size:
            raise tarfile.ReadError(f"{member.name!r} ends after {written} of {member.size} bytes")
    else:
        raise _Refused(f"{member.name!r} is a device, a sparse file or another special file")


class _Tree:
    """The folder being filled, with what may still go into it."""

    def __init__(self, root: Path, *, max_bytes: int, max_files: int, free_bytes: int) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self.max_files = max_files
        self.free_bytes = free_bytes
        self.bytes = 0
        self.entries = 0
        self.links: list[tuple[str, str]] = []

    def announce(self, size_bytes: int, entries: int) -> None:
        """Refuse what the archive itself says to be too much, before writing it."""
        self._check(self.bytes + size_bytes, self.entries + entries)

    def add_folder(self, name: str) -> None:
        path = self._place(name)
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)

    def add_file(self, name: str, stream: _Readable) -> int:
        """Write one file, counting; returns its bytes."""
        path = self._place(name)
        if path is not None:
            return self._write(path, name, stream)
        size = 0
        while chunk := stream.read(_CHUNK_BYTES):
            size += len(chunk)
            self._check(self.bytes + size, self.entries)
        return size

    def add_link(self, name: str, target: str) -> None:
        """Remember a link; `copy_links` replaces it once its target has come."""
        if self._place(name) is not None:
            self.links.append((name, target))

    def copy_links(self) -> None:
        """Put a copy of its target in the place of each link, also of links to links."""
        waiting = self.links
        while waiting:
            later = []
            for name, target in waiting:
                source = self.root / _safe_name(target, f"the target of the link {name!r}")
                if source.is_file():
                    with source.open("rb") as stream:
                        self._write(self.root / _safe_name(name, "the link"), name, stream)
                else:
                    later.append((name, target))
            if len(later) == len(waiting):
                name, target = later[0]
                raise _Refused(f"the link {name!r} leads to {target!r}, which is no file of the archive")
            waiting = later

    def _place(self, name: str) -> Path | None:
        """Where an entry goes; None for what macOS adds."""
        self.entries += 1
        self._check(self.bytes, self.entries)
        safe = _safe_name(name, "the entry")
        junk = "__MACOSX" in safe.parts or safe.name == ".DS_Store" or safe.name.startswith("._")
        return None if junk else self.root / safe

    def _write(self, path: Path, name: str, stream: _Readable) -> int:
        size = 0
        with _create(path, name) as out:
            while chunk := stream.read(_CHUNK_BYTES):
                size += len(chunk)
                self.bytes += len(chunk)
                self._check(self.bytes, self.entries)
                out.write(chunk)
        return size

    def _check(self, size_bytes: int, entries: int) -> None:
        if entries > self.max_files:
            raise _Refused(f"it holds more than the {self.max_files} files and folders allowed")
        if size_bytes > self.max_bytes:
            raise _Refused(f"it unpacks to more than the {self.max_bytes} bytes allowed")
        if size_bytes > self.free_bytes:
            raise _Refused(f"the disk has room for {self.free_bytes} bytes only; free space or choose another disk")


class _Header(tarfile.TarInfo):
    """A tar header that may not be broken or missing: tarfile takes that for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the end mark
            return super().frombuf(buf, encoding, errors)
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no end mark, {error}") from error


class _Metered(io.BufferedIOBase):
    """A stream that hands out no more bytes than were allowed for the entry at hand.

    tarfile reads extended headers whole; without this a compressed bomb in a header would fill the memory.
    """

    def __init__(self, raw: _Readable) -> None:
        self.raw_stream = raw
        self.left = 0

    def allow(self, size: int) -> None:
        self.left = size

    def read(self, size: int | None = -1, /) -> bytes:
        try:
            chunk = self.raw_stream.read(-1 if size is None else size)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise _Damaged(str(error)) from error
        self.left -= len(chunk)
        if self.left < 0:
            raise _Refused("it holds more between its files than any honest archive does")
        return chunk


def _safe_name(name: str, what: str) -> PurePosixPath:
    """The relative path an entry may have. Archives made on Windows separate folders by backslashes."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or (path.parts and path.parts[0].endswith(":")):
        raise _Refused(f"{what} {name!r} is an absolute path")
    if ".." in path.parts:
        raise _Refused(f"{what} {name!r} climbs out of the archive by '..'")
    if "\0" in name:
        raise _Refused(f"{what} {name!r} has a zero byte in its name")
    return path


def _beside(name: str, target: str) -> str:
    """A symbolic link's target counted from the archive's root; `..` within the archive is resolved."""
    if PurePosixPath(target).is_absolute():
        return target
    parts: list[str] = []
    for part in (*PurePosixPath(name).parent.parts, *PurePosixPath(target).parts):
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def _create(path: Path, name: str) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise _Refused(f"{name!r} comes twice, or is both a file and a folder") from error


def _decompressed(archive: Path, magic: bytes) -> "gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile | BinaryIO":
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(archive)
    if magic.startswith(b"BZh"):
        return bz2.open(archive)
    if magic.startswith(b"\xfd7zXZ\0"):
        return lzma.open(archive)
    return archive.open("rb")


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
