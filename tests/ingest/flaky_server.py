"""A web server on the loopback interface that can be as unhelpful as real ones."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@dataclass
class Site:
    """What the server holds and how it behaves; tests change it while it runs.

    Attributes:
        files: path to body. etags: path to ETag. modified: the Last-Modified of every file.
        ranges: whether it can send a part of a file. heeds_if_range: whether it compares validators.
        cuts: for the next answers, after how many bytes of the body the connection is closed.
        statuses: status codes of the next answers, instead of the file.
        redirects: path to new address.
        asked: (path, Range header) of every request so far. conditions: its If-Range header.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    modified: str = ""
    ranges: bool = True
    heeds_if_range: bool = True
    says_length: bool = True
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    redirects: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    conditions: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        site, span = self.site, self.headers.get("Range", "")
        site.asked.append((self.path, span))
        site.conditions.append(self.headers.get("If-Range", ""))
        if site.statuses:
            self._answer(site.statuses.pop(0), {"Retry-After": "0", "Content-Length": "0"})
            return
        if self.path in site.redirects:
            self._answer(302, {"Location": site.redirects[self.path], "Content-Length": "0"})
            return
        if self.path not in site.files:
            self._answer(404, {"Content-Length": "0"})
            return
        body, etag = site.files[self.path], site.etags.get(self.path, "")
        headers = {"ETag": etag, "Last-Modified": site.modified}
        headers = {key: value for key, value in headers.items() if value}
        condition = self.headers.get("If-Range", "")
        fresh = not site.heeds_if_range or condition in ("", etag, site.modified)
        start = int(span.removeprefix("bytes=").rstrip("-")) if span and site.ranges and fresh else 0
        if start and start >= len(body):
            self._answer(416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"})
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if site.says_length:
            headers["Content-Length"] = str(len(body) - start)
        self._answer(206 if start else 200, headers)
        cut = site.cuts.pop(0) if site.cuts else len(body)
        self.wfile.write(body[start : start + cut])

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


@pytest.fixture(name="site")
def running_site() -> Iterator[Site]:
    """A running server with no files yet."""
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": site}))
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()
