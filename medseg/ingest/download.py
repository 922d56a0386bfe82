"""One file over http(s): streamed, resumed, retried, verified, and only then under its own name.

What has come lies in `NAME.part`, and `NAME.part.json` says from which address and version of the file it is.
A killed download goes on where it stopped, if the server still holds that version and can send a part of a file;
otherwise it starts again. No byte is ever joined to another version of the file.
"""

import hashlib
import http.client
import logging
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from medseg import __version__
from medseg.files import UserError, read_json, write_json

log = logging.getLogger(__name__)

ByteProgress = Callable[[str, int, int | None], None]
"""Called with what is going on, bytes done, and bytes in all (None when not known)."""

_CHUNK_BYTES = 1 << 18
_DISK_MARGIN_BYTES = 64 << 20
_LONGEST_WAIT_S = 60.0
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Expected:
    """What the publisher says about the file; None where nothing is published."""

    size_bytes: int | None = None
    md5: str | None = None
    sha256: str | None = None

    @property
    def has_hash(self) -> bool:
        return self.md5 is not None or self.sha256 is not None


@dataclass(frozen=True)
class Patience:
    """How long to bear a bad line: `attempts` in a row without a new byte, waiting `wait_s`, then twice that, …"""

    attempts: int = 4
    wait_s: float = 1.0
    timeout_s: float = 30.0


@dataclass(frozen=True)
class Download:
    """A complete file. `checked_by` names what it was compared with: sha256, md5, size or nothing."""

    path: Path
    url: str
    size_bytes: int
    sha256: str
    checked_by: str
    resumed_at_bytes: int = 0


class _Unavailable(Exception):
    """This address will not give the file, however often it is asked."""


class _Interrupted(Exception):
    """The transfer broke off or must start again; the next attempt may succeed."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def download(
    urls: Sequence[str],
    target: Path,
    expected: Expected,
    *,
    progress: ByteProgress,
    patience: Patience = Patience(),
) -> Download:
    """Fetch `target` from the first of `urls` that gives it.

    Args:
        urls: http or https addresses of the same file, in order of preference.
        target: where the verified file goes; must not exist.
        expected: size and hashes to compare with.
        progress: told of every chunk.
        patience: retries and timeouts.

    Raises:
        UserError: no address gives the file, no disk space, or it is not the file expected; then it is kept
            as `NAME.mismatch` and the sentence says so.
    """
    part = target.with_name(target.name + ".part")
    aside = target.with_name(target.name + ".mismatch")
    reasons = []
    for url in urls:
        try:
            resumed_at = _transfer(url, part, expected, progress, patience)
            break
        except _Unavailable as error:
            reasons.append(f"{url}: {error}")
    else:
        raise UserError(
            f"{target.name} cannot be downloaded ({'; '.join(reasons)}); check the network and the address in the "
            f"manifest, or put the file at {target} by hand."
        )
    sha256 = check_file(part, expected, progress, name=target.name, aside=aside)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(target)
    _note_path(part).unlink(missing_ok=True)
    return Download(target, url, target.stat().st_size, sha256, checked_by(expected), resumed_at)


def check_file(path: Path, expected: Expected, progress: ByteProgress, *, name: str, aside: Path | None = None) -> str:
    """Compare a file with what is expected of it and return its SHA-256.

    Raises:
        UserError: another size or hash. The file is moved to `aside` if given, never deleted.
    """
    size, done = path.stat().st_size, 0
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            md5.update(chunk)
            sha256.update(chunk)
            done += len(chunk)
            progress(f"checking {name}", done, size)
    found = {"size_bytes": size, "md5": md5.hexdigest(), "sha256": sha256.hexdigest()}
    for field, value in found.items():
        wanted = getattr(expected, field)
        if wanted is not None and wanted != value:
            kept = path
            if aside is not None:
                kept = path.replace(aside)
                _note_path(path).unlink(missing_ok=True)
            raise UserError(
                f"{name} has {field} {value} where the manifest expects {wanted}; it is kept as {kept}: remove it and "
                "fetch again, and if it comes so again the publisher has replaced it, so look before you use it."
            )
    return sha256.hexdigest()


def checked_by(expected: Expected) -> str:
    """The strongest thing that `check_file` compares: sha256, md5, size or nothing."""
    named = {"sha256": expected.sha256, "md5": expected.md5, "size": expected.size_bytes}
    return next((name for name, value in named.items() if value is not None), "nothing")


def need_disk(folder: Path, size_bytes: int, what: str) -> None:
    """Raise UserError unless the disk of `folder` has room for `size_bytes` and a margin."""
    free = shutil.disk_usage(folder).free
    if free < size_bytes + _DISK_MARGIN_BYTES:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free and {what} needs {size_bytes / 1e9:.2f} GB; "
            "free space or choose a folder on another disk."
        )


def _transfer(url: str, part: Path, expected: Expected, progress: ByteProgress, patience: Patience) -> int:
    """Bring `part` to its full size; returns the byte from which the last attempt went on."""
    most, idle = _size(part), 0
    while True:
        try:
            return _attempt(url, part, expected, progress, patience.timeout_s)
        except _Interrupted as error:
            now = _size(part)
            idle = 0 if now > most else idle + 1
            most = max(most, now)
            if idle >= patience.attempts:
                raise _Unavailable(f"{error}, {idle} times in a row") from error
            wait_s = patience.wait_s * 2 ** max(idle - 1, 0) if error.wait_s is None else error.wait_s
            log.warning("%s: %s; trying again in %.1f s", part.stem, error, wait_s)
            time.sleep(min(wait_s, _LONGEST_WAIT_S))


def _attempt(url: str, part: Path, expected: Expected, progress: ByteProgress, timeout_s: float) -> int:
    if urlsplit(url).scheme not in ("http", "https"):
        raise _Unavailable("only http and https addresses are fetched")
    start, note = _resume_point(url, part, expected)
    headers = {"User-Agent": f"medseg/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if validator := _validator(note):
            headers["If-Range"] = validator
    try:
        with _OPENER.open(urllib.request.Request(url, headers=headers), timeout=timeout_s) as response:
            return _receive(response, url, part, start, note, expected, progress)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            if _total(error.headers) == start:
                return start
            part.unlink()
            raise _Interrupted("the file on the server has another length now") from error
        if error.code in _TRY_AGAIN:
            after = error.headers.get("Retry-After", "")
            raise _Interrupted(f"HTTP {error.code}", float(after) if after.isdigit() else None) from error
        raise _Unavailable(f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise _Unavailable(f"its certificate is not trusted ({reason.verify_message})") from error
        raise _Interrupted(str(reason) or type(error).__name__) from error


def _receive(
    response: Any,
    url: str,
    part: Path,
    start: int,
    note: Mapping[str, str],
    expected: Expected,
    progress: ByteProgress,
) -> int:
    """Write the body of `response` behind the first `start` bytes of `part`, or from 0 if it is the whole file."""
    headers = response.headers
    if response.status == 206:
        first = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))
        # A server may answer with a part although the version in If-Range is gone.
        changed = any(
            headers.get(name, note.get(key, "")) != note.get(key, "")
            for name, key in (("ETag", "etag"), ("Last-Modified", "last_modified"))
        )
        if first is None or int(first[1]) != start or changed:
            part.unlink()
            raise _Interrupted("the file on the server has changed since the download began", 0.0)
    else:
        start = 0
    total = _total(headers)
    if total is not None and expected.size_bytes not in (None, total):
        raise _Unavailable(f"it offers {total} bytes where the manifest expects {expected.size_bytes}")
    need_disk(part.parent, (total or expected.size_bytes or 0) - start, part.stem)
    done = start
    with _writing(part), part.open("ab" if start else "wb") as out:
        if not start:  # after the old bytes are gone, before new ones come
            etag, modified = headers.get("ETag", ""), headers.get("Last-Modified", "")
            write_json(_note_path(part), {"url": url, "etag": etag, "last_modified": modified})
        while chunk := _read(response):
            out.write(chunk)
            done += len(chunk)
            progress(f"fetching {part.stem}", done, total)
    if total is not None and done < total:
        raise _Interrupted(f"the connection closed after {done} of {total} bytes")
    return start


def _read(response: Any) -> bytes:
    try:
        chunk: bytes = response.read(_CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(f"the connection broke ({str(error) or type(error).__name__})") from error
    return chunk


@contextmanager
def _writing(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(
            f"{part} cannot be written ({why}); free space or choose another folder, what has come is kept."
        ) from error


def _resume_point(url: str, part: Path, expected: Expected) -> tuple[int, Mapping[str, str]]:
    """How many bytes of `part` may be kept, and the note that says of which version they are."""
    if not _size(part) or not _note_path(part).is_file():
        return 0, {}
    note: dict[str, str] = read_json(_note_path(part))
    # Without a validator only the hash at the end could tell two versions apart.
    known = note["url"] == url and (_validator(note) or expected.has_hash)
    return (_size(part), note) if known else (0, {})


def _validator(note: Mapping[str, str]) -> str:
    etag = note.get("etag", "")
    return etag if etag and not etag.startswith("W/") else note.get("last_modified", "")


def _total(headers: Message) -> int | None:
    """Length of the whole file: after the slash of Content-Range, else Content-Length."""
    text = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
    return int(text) if text.isdigit() else None


def _note_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class _SafeRedirect(urllib.request.HTTPRedirectHandler):
    """Follow a redirect to http(s) only, and never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in ("https", req.type):
            raise _Unavailable(f"it leads to {newurl}, which is not secured")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_SafeRedirect)
