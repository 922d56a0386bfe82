import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from orthanc import INSTALLED, PASSWORD, USER, Orthanc, running_orthanc

from medseg import road
from medseg.cohort import read_cohort
from medseg.files import UserError, sha256_file, write_json
from medseg.ingest import pacs
from medseg.ingest.dicom_write import write_series
from medseg.ingest.download import Patience
from medseg.ingest.pacs_http import Interrupted, Unreachable, parse_server, split_parts
from medseg.volume import Volume

KEY = b"k" * 32
QUICK = Patience(attempts=3, wait_s=0.01, timeout_s=20)
HASTY = Patience(attempts=3, wait_s=0.01, timeout_s=1.5)  # for a server that hangs on purpose
needs_orthanc = pytest.mark.skipif(not INSTALLED, reason="Orthanc with its DICOMweb plugin is not installed")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """Two patients, one MR series each."""
    folder = tmp_path_factory.mktemp("pacs")
    with running_orthanc(folder / "orthanc") as server:
        server.send_series(folder / "one", "ROE^JANE", "one")
        server.send_series(folder / "two", "DOE^JOHN", "two")
        yield server


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSEG_DICOMWEB_USER", USER)
    monkeypatch.setenv("MEDSEG_DICOMWEB_PASSWORD", PASSWORD)


class Answers:
    """A server that gives these answers one after another: (status, type, body)."""

    def __init__(self) -> None:
        self.queue: list[tuple[int, str, bytes]] = []
        self.asked: list[str] = []


@pytest.fixture
def answers() -> Iterator[tuple[str, Answers]]:
    site = Answers()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append(self.path)
            status, kind, body = site.queue.pop(0)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"dicomweb://127.0.0.1:{server.server_port}/web", site
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_parts_are_split_alike_however_the_body_is_cut(tmp_path: Path, size: int) -> None:
    parts = [b"first\r\n--almost", b"", b"\r\n\r\nthird\r\n"]
    body = b"preamble" + b"".join(b"\r\n--edge\r\nContent-Type: x\r\n\r\n" + part for part in parts)
    body += b"\r\n--edge--\r\n"
    chunks = [body[at : at + size] for at in range(0, len(body), size)]
    assert [path.read_bytes() for path in split_parts(chunks, b"edge", tmp_path)] == parts
    with pytest.raises(Interrupted):
        list(split_parts([body[:-6]], b"edge", tmp_path))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("dicomweb://me:secret@pacs/dicom-web?PatientID=1", "refused"),
        ("dicomweb://pacs/dicom-web", "all it holds"),
        ("dicomweb://pacs/dicom-web?PatentID=1", "PatentID"),
        ("dicomweb:///dicom-web?PatientID=1", "no DICOMweb address"),
    ],
)
def test_a_bad_address_is_refused_and_its_secrets_are_not_quoted(url: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        pacs.parse_address(url)
    assert "secret" not in str(caught.value)


def test_plain_http_is_for_this_machine_unless_asked_for() -> None:
    urls = ("dicomweb://localhost:1/a", "dicomweb://pacs/a", "dicomweb+http://pacs/a")
    assert [parse_server(url)[0].base for url in urls] == ["http://localhost:1/a", "https://pacs/a", "http://pacs/a"]


def test_a_busy_server_is_asked_again_and_a_dead_one_is_named_once(
    answers: tuple[str, Answers], tmp_path: Path
) -> None:
    url, site = answers
    site.queue = [(503, "text/plain", b""), (200, "application/dicom+json", b"[]")]
    with pytest.raises(UserError, match="no scan that matches"):
        pacs.fetch(f"{url}?PatientID=DOE", tmp_path, KEY, QUICK)
    assert len(site.asked) == 2
    site.queue = [(503, "text/plain", b"")] * 3
    with pytest.raises(Unreachable, match="HTTP 503, 3 times") as caught:
        pacs.fetch(f"{url}?PatientID=DOE", tmp_path, KEY, QUICK)
    assert "DOE" not in str(caught.value)
    with pytest.raises(Unreachable, match="check that the server runs"):
        pacs.fetch("dicomweb://127.0.0.1:9/web?PatientID=DOE", tmp_path, KEY, QUICK)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((401, "text/plain", b""), "MEDSEG_DICOMWEB_USER"),
        ((404, "text/plain", b""), "check the path"),
        ((200, "text/html", b"<html>"), "no DICOM JSON"),
        ((200, "application/json", b'[{"0020000D": {"Value": ["../../x"]}}]'), "no valid UID"),
    ],
)
def test_other_answers_are_one_sentence_at_once(
    answers: tuple[str, Answers], tmp_path: Path, answer: tuple[int, str, bytes], says: str
) -> None:
    url, site = answers
    site.queue = [answer]
    with pytest.raises(UserError, match=says):
        pacs.fetch(f"{url}?PatientID=1", tmp_path, KEY, QUICK)
    assert len(site.asked) == 1


class Faulty:
    """A PACS with one series, whose next retrievals go wrong in the ways named: `cut`, `cut-part`, `hang`, `busy`."""

    def __init__(self, folder: Path) -> None:
        volume = Volume(np.random.default_rng(0).integers(0, 900, (400, 400, 5)).astype(np.int16), np.eye(4))
        self.files = write_series(volume, folder, patient_id="p")
        self.faults: list[str] = []
        self.asked: list[str] = []
        self.released = threading.Event()
        headers = [pydicom.dcmread(file) for file in self.files]
        self.uids = [str(header.SOPInstanceUID) for header in headers]
        self.study, self.series = str(headers[0].StudyInstanceUID), str(headers[0].SeriesInstanceUID)

    def search(self, path: str) -> list[dict[str, Any]]:
        if path.endswith("/instances"):
            return [{"00080018": {"vr": "UI", "Value": [uid]}} for uid in self.uids]
        found: dict[str, Any] = {"0020000D": {"vr": "UI", "Value": [self.study]}}
        if path.endswith("/series"):
            found |= {"0020000E": {"Value": [self.series]}, "00080060": {"Value": ["MR"]}, "00201209": {"Value": [5]}}
        return [found]

    def body(self, path: str) -> bytes:
        uid = path.rpartition("/")[2]
        wanted = [file for file, own in zip(self.files, self.uids, strict=True) if uid in (own, self.series)]
        parts = [b"\r\n--edge\r\nContent-Type: application/dicom\r\n\r\n" + file.read_bytes() for file in wanted]
        return b"".join(parts) + b"\r\n--edge--\r\n"


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[tuple[str, Faulty]]:
    pacs_ = Faulty(tmp_path / "held")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0].removeprefix("/web")
            retrieval = "/instances/" in path or path.endswith(pacs_.series)
            fault = pacs_.faults.pop(0) if retrieval and pacs_.faults else ""
            pacs_.asked += [path] if retrieval else []
            body = pacs_.body(path) if retrieval else json.dumps(pacs_.search(path)).encode()
            self.send_response(503 if fault == "busy" else 200)
            kind = (
                'multipart/related; type="application/dicom"; boundary=edge' if retrieval else "application/dicom+json"
            )
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            sent = {"cut": len(body) * 5 // 9, "cut-part": 40, "hang": len(body) // 2, "busy": 0}.get(fault, len(body))
            self.wfile.write(body[:sent])
            self.wfile.flush()
            if fault == "hang":
                pacs_.released.wait(10)
            self.close_connection = bool(fault)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"dicomweb://127.0.0.1:{server.server_port}/web?Modality=MR", pacs_
    pacs_.released.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("faults", [["cut"], ["cut-part"], ["hang"], ["busy", "cut"], ["cut", "busy"], ["cut", "hang"]])
def test_a_transfer_that_breaks_or_stalls_goes_on_and_brings_each_file_once(
    faulty: tuple[str, Faulty], tmp_path: Path, faults: list[str]
) -> None:
    url, server = faulty
    server.faults = list(faults)
    folder = pacs.fetch(url, tmp_path / "spool", KEY, HASTY if "hang" in faults else QUICK)
    assert server.faults == []
    fetched = sorted(path.read_bytes() for path in folder.rglob("*.dcm"))
    assert fetched == sorted(path.read_bytes() for path in server.files)
    assert not list(folder.rglob(".part-*"))
    again = [path for path in server.asked if "/instances/" in path]
    assert len(server.asked) <= 2 * len(faults) + 5
    if faults == ["cut"]:  # what came before the break is not fetched again
        assert 0 < len(again) < 5


def test_a_line_that_never_holds_ends_in_a_sentence_and_keeps_what_came(
    faulty: tuple[str, Faulty], tmp_path: Path
) -> None:
    url, server = faulty
    server.faults = ["cut", "hang", "hang"]
    with pytest.raises(Unreachable, match="no answer in time, 3 times in a row"):
        pacs.fetch(url, tmp_path / "spool", KEY, HASTY)
    came = len(list((tmp_path / "spool").rglob("*.dcm")))
    assert 0 < came < 5
    server.asked.clear()
    pacs.fetch(url, tmp_path / "spool", KEY, QUICK)
    assert len(server.asked) == 5 - came


@needs_orthanc
def test_credentials_come_from_netrc_too(archive: Orthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDSEG_DICOMWEB_USER", raising=False)
    netrc = tmp_path / "netrc"
    netrc.write_text("")
    monkeypatch.setenv("NETRC", str(netrc))
    with pytest.raises(Unreachable, match="HTTP 401"):
        pacs.fetch(f"{archive.url}?PatientID=DOE^JOHN", tmp_path / "spool", KEY)
    netrc.write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    assert pacs.fetch(f"{archive.url}?PatientID=DOE^JOHN", tmp_path / "spool", KEY).is_dir()


@needs_orthanc
@pytest.mark.usefixtures("known")
def test_what_is_fetched_is_what_was_sent_and_a_second_fetch_brings_only_what_is_missing(
    archive: Orthanc, tmp_path: Path
) -> None:
    url = f"{archive.url}?PatientID=DOE%5EJOHN&Modality=MR"
    folder = pacs.fetch(url, tmp_path, KEY)
    files = sorted(folder.rglob("*.dcm"))
    pixels = {path: path.read_bytes()[-960:] for path in files}
    assert len(files) == 8
    assert (folder.stat().st_mode & 0o777, files[0].stat().st_mode & 0o777) == (0o700, 0o600)
    assert "DOE" not in str(files[0])
    kept = {path: path.stat().st_mtime_ns for path in files[2:]}
    for path in files[:2]:
        path.unlink()
    (files[0].parent / ".part-left").write_bytes(b"half")
    pacs.fetch(url, tmp_path, KEY)
    assert {path: path.read_bytes()[-960:] for path in sorted(folder.rglob("*.dcm"))} == pixels
    assert {path: path.stat().st_mtime_ns for path in files[2:]} == kept
    assert not list(folder.rglob(".part-*"))


@needs_orthanc
@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_ingest_takes_an_address_and_leaves_no_scan_behind(archive: Orthanc, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    url = f"{archive.url}?ModalitiesInStudy=MR"
    result = road.ingest([url], tmp_path / "cohort", None, None, [], workspace)
    assert (result.status, len(read_cohort(tmp_path / "cohort").cases)) == ("done", 2)
    assert not list((workspace / "spool").rglob("*.dcm"))


@needs_orthanc
@pytest.mark.usefixtures("known")
def test_a_result_is_stored_once_beside_its_scan_and_nowhere_else(archive: Orthanc, tmp_path: Path) -> None:
    from medseg.ingest.dicom_headers import read_dataset

    scan = sorted(pacs.fetch(f"{archive.url}?PatientID=ROE^JANE", tmp_path, KEY).rglob("*.dcm"))[0]
    data = read_dataset(scan)
    data.SeriesInstanceUID, data.SOPInstanceUID = "2.25.7", "2.25.8"
    data.file_meta.MediaStorageSOPInstanceUID = "2.25.8"
    out = tmp_path / "out"
    write_json(out / "case" / "result.json", {"status": "done"})
    data.save_as(out / "case" / "mask.dcm")
    digest = sha256_file(out / "case" / "mask.dcm")
    assert road.store(out, archive.url).figures == {"stored": 1, "present": 0}
    assert road.store(out, archive.url).figures == {"stored": 0, "present": 1}
    assert digest == sha256_file(out / "case" / "mask.dcm")
    data.StudyInstanceUID, data.SOPInstanceUID = "2.25.9", "2.25.10"
    data.save_as(out / "case" / "mask.dcm")
    with pytest.raises(UserError, match="lacks the study"):
        road.store(out, archive.url)


@pytest.mark.parametrize("key", ["PatientID", "PatientName", "StudyInstanceUID", "AccessionNumber"])
def test_an_address_that_names_a_patient_is_refused_where_it_would_be_kept(key: str) -> None:
    with pytest.raises(UserError, match=f"it may not name {key}") as caught:
        pacs.refuse_named(f"dicomweb://pacs/dicom-web?{key}=DOE&Modality=MR", "it is shown")
    assert "DOE" not in str(caught.value)
    pacs.refuse_named("dicomweb://pacs/dicom-web?Modality=MR&StudyDate=20240101-", "it is shown")
