"""HTTP to a DICOMweb server: the address, who is asking, patience, and multipart bodies that never lie in memory whole.

Credentials come from the environment or from netrc, never from an address: addresses are logged and stored.
Messages name the server and no query, since queries name patients.
"""

import ipaddress
import logging
import netrc
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any, Self, TypeVar
from urllib.parse import SplitResult, quote, urlencode, urlsplit

import httpx

from medseg import __version__
from medseg.files import UserError
from medseg.ingest.download import Patience

USER, PASSWORD, TOKEN = "MEDSEG_DICOMWEB_USER", "MEDSEG_DICOMWEB_PASSWORD", "MEDSEG_DICOMWEB_TOKEN"
SCHEMES = {"dicomweb": "", "dicomweb+http": "http", "dicomweb+https": "https"}
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
PATIENCE = Patience()
_LONGEST_WAIT_S = 60.0
_CHUNK_BYTES = 1 << 18
_MAX_HEADER_BYTES = 1 << 16
_MAX_PART_BYTES = 8 << 30
_DICOM_JSON = "application/dicom+json"
_DICOM_PARTS = 'multipart/related; type="application/dicom"; transfer-syntax=*'  # as stored, not decoded
T = TypeVar("T")


class Unreachable(UserError):
    """The server as a whole cannot be used now: it does not answer, or refuses access."""


class Interrupted(Exception):
    """A request broke off; the same request may succeed later."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Server:
    """A DICOMweb service. `name` is what messages call it, `base` its http(s) address."""

    name: str
    base: str
    host: str
    loopback: bool


def parse_server(url: str) -> tuple[Server, SplitResult]:
    """The server of an address `dicomweb://HOST[:PORT]/PATH[?QUERY]`, and the address in its parts.

    `dicomweb://` is https, and http on this machine itself; `dicomweb+http://` is http anywhere.

    Raises:
        UserError: it is no such address, or carries a password.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise UserError(
            f"an address with a user or password in it is refused, since addresses are logged; set {USER} and "
            f"{PASSWORD}, or add {parts.hostname} to netrc."
        )
    try:
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if parts.scheme not in SCHEMES or not host:
        raise UserError(f"{parts.scheme}://{parts.netloc} is no DICOMweb address; write dicomweb://HOST:PORT/PATH?….")
    loopback = _is_loopback(host)
    scheme = SCHEMES[parts.scheme] or ("http" if loopback else "https")
    place = f"{f'[{host}]' if ':' in host else host}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}"
    return Server(f"{parts.scheme}://{place}", f"{scheme}://{place}", host, loopback), parts


class Connection:
    """Requests to one server: those that may be repeated are, with growing waits."""

    def __init__(self, server: Server, patience: Patience = PATIENCE) -> None:
        self.server, self.patience = server, patience
        logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it logs addresses with their queries
        self._http = httpx.Client(
            timeout=patience.timeout_s,
            headers={"User-Agent": f"medseg/{__version__}", **_authorization(server.host)[1]},
            auth=_authorization(server.host)[0],
            trust_env=not server.loopback,  # no proxy stands between this machine and itself
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get_json(self, path: str, params: Mapping[str, str]) -> list[dict[str, Any]]:
        """Search (QIDO-RS): the objects found.

        Raises:
            UserError: the server refuses, or answers something else.
        """
        found = self.patiently(lambda: self._get_json(path, params))
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise UserError(f"{self.server.name} answers no DICOM JSON list; check the path of its DICOMweb service.")
        return found

    def get_parts(self, path: str, folder: Path) -> Iterator[Path]:
        """Retrieve (WADO-RS): each DICOM file of the answer as a temporary file `.part-…` in `folder`.

        Raises:
            Interrupted: it broke off; the files yielded before are whole.
            UserError: the server refuses, or the disk does.
        """
        with _transport(), self._http.stream("GET", self._url(path), headers={"Accept": _DICOM_PARTS}) as response:
            self._check(response)
            kind = Message()
            kind["Content-Type"] = response.headers.get("Content-Type", "")
            chunks = response.iter_bytes(_CHUNK_BYTES)
            if kind.get_content_type() == "multipart/related" and (boundary := kind.get_param("boundary")):
                yield from split_parts(chunks, str(boundary).encode(), folder)
            elif kind.get_content_type() == "application/dicom":
                yield _save(folder, lambda write: [write(chunk) for chunk in chunks])
            else:
                raise UserError(f"{self.server.name} answers {kind.get_content_type()} where DICOM was asked for.")

    def post_file(self, path: str, file: Path) -> dict[str, Any]:
        """Store one DICOM file (STOW-RS), once; the server's answer.

        Raises:
            Interrupted: it may or may not have arrived.
        """
        boundary = os.urandom(16).hex()
        head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        tail = f"\r\n--{boundary}--\r\n".encode()
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Content-Length": str(len(head) + file.stat().st_size + len(tail)),
            "Accept": _DICOM_JSON,
        }
        with _transport():
            response = self._http.post(self._url(path), content=_body(head, file, tail), headers=headers)
        if response.status_code != 409:  # says which instance failed and why, as 200 and 202 do
            self._check(response)
        with suppress(ValueError):
            answer = response.json()
            return answer if isinstance(answer, dict) else {}
        return {}

    def patiently(self, call: Callable[[], T]) -> T:
        """Call until it is not interrupted; raises Unreachable when patience ends."""
        for attempt in range(1, self.patience.attempts + 1):
            try:
                return call()
            except Interrupted as error:
                self.wait(attempt, error)
        raise AssertionError("the last attempt returns or raises")

    def wait(self, attempt: int, error: Interrupted) -> None:
        """Sleep after the `attempt`-th failure in a row, or raise Unreachable when it was the last."""
        if attempt >= self.patience.attempts:
            raise Unreachable(
                f"{self.server.name} cannot be used ({error}, {attempt} times in a row); check that the server runs "
                "and the address is right, then run the same command again: it goes on where it stopped."
            ) from error
        wait_s = self.patience.wait_s * 2 ** (attempt - 1) if error.wait_s is None else error.wait_s
        time.sleep(min(wait_s, _LONGEST_WAIT_S))

    def _get_json(self, path: str, params: Mapping[str, str]) -> Any:
        with _transport():
            query = urlencode(params, quote_via=quote, safe="*?^,:")  # some servers decode no such character
            response = self._http.get(f"{self._url(path)}?{query}", headers={"Accept": _DICOM_JSON})
        self._check(response)
        if response.status_code == 204 or not response.content:
            return []
        try:
            return response.json()
        except ValueError:
            return None

    def _url(self, path: str) -> str:
        return f"{self.server.base}/{path}"

    def _check(self, response: httpx.Response) -> None:
        code, name = response.status_code, self.server.name
        if response.is_success:
            return
        if code in (401, 403):
            raise Unreachable(
                f"{name} refuses access (HTTP {code}); set {USER} and {PASSWORD}, or {TOKEN}, or add "
                f"{self.server.host} to netrc, for an account that may search, retrieve and store."
            )
        if code in _TRY_AGAIN:
            after = response.headers.get("Retry-After", "")
            raise Interrupted(f"HTTP {code}", float(after) if after.isdigit() else None)
        if code == 404:
            raise UserError(f"{name} knows no such resource (HTTP 404); check the path of its DICOMweb service.")
        if response.is_redirect:
            raise UserError(f"{name} leads to another address (HTTP {code}); give that address itself.")
        raise UserError(f"{name} refuses the request (HTTP {code}); its log says why.")


def split_parts(chunks: Iterable[bytes], boundary: bytes, folder: Path) -> Iterator[Path]:
    """Write the parts of a multipart body to temporary files in `folder`, as they come.

    Raises:
        Interrupted: the body ends before its closing boundary, or is no multipart body.
    """
    coming, buffer = iter(chunks), bytearray(b"\r\n")  # so that the first delimiter is like all others
    delimiter = b"\r\n--" + boundary

    def more() -> None:
        try:
            buffer.extend(next(coming))
        except StopIteration:
            raise Interrupted("the answer broke off") from None

    def copy_until(mark: bytes, write: Callable[[bytes], object]) -> None:
        while (at := buffer.find(mark)) < 0:
            if (ready := len(buffer) - len(mark) + 1) > 0:
                write(bytes(buffer[:ready]))
                del buffer[:ready]
            more()
        write(bytes(buffer[:at]))
        del buffer[: at + len(mark)]

    copy_until(delimiter, _at_most(_MAX_HEADER_BYTES))
    while True:
        while len(buffer) < 2:
            more()
        if buffer.startswith(b"--"):
            for _ in coming:  # to the end, so that the connection can be used again
                pass
            return
        copy_until(b"\r\n\r\n", _at_most(_MAX_HEADER_BYTES))
        yield _save(folder, lambda write: copy_until(delimiter, write))


def _save(folder: Path, fill: Callable[[Callable[[bytes], object]], object]) -> Path:
    """A temporary file, synced, with what `fill` writes; removed again when `fill` fails."""
    try:
        handle, name = tempfile.mkstemp(prefix=".part-", dir=folder)  # readable by its owner alone
        path = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                fill(_at_most(_MAX_PART_BYTES, file))
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{folder} cannot be written ({reason}); free space, or choose another workspace.") from error
    return path


def _at_most(limit: int, file: IO[bytes] | None = None) -> Callable[[bytes], object]:
    """A function that writes to `file`, or nowhere, and refuses more than `limit` bytes."""
    done = 0

    def write(content: bytes) -> None:
        nonlocal done
        done += len(content)
        if done > limit:
            raise UserError(f"the server sends more than {limit} bytes where less is sensible; ask its administrator.")
        if file is not None:
            file.write(content)

    return write


def _body(head: bytes, file: Path, tail: bytes) -> Iterator[bytes]:
    yield head
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            yield chunk
    yield tail


class _transport:
    """What httpx raises when a line is bad, as Interrupted."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, httpx.TimeoutException):
            raise Interrupted("no answer in time") from error
        if isinstance(error, httpx.TransportError):
            raise Interrupted(str(error).split("(")[0].strip() or type(error).__name__) from error


def _authorization(host: str) -> tuple[httpx.Auth | None, dict[str, str]]:
    """How to say who is asking: a token, a user and password, an entry of netrc, or not at all."""
    if token := os.environ.get(TOKEN):
        return None, {"Authorization": f"Bearer {token}"}
    if user := os.environ.get(USER):
        return httpx.BasicAuth(user, os.environ.get(PASSWORD, "")), {}
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    if not file.is_file():
        return None, {}
    try:
        entry = netrc.netrc(str(file)).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        raise UserError(f"{file} cannot be read as netrc; correct it, or set {USER} and {PASSWORD}.") from None
    return (httpx.BasicAuth(entry[0], entry[2] or ""), {}) if entry else (None, {})


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
