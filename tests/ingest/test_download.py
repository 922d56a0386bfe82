"""Downloads from a real server that drops, forgets, changes and lies."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flaky_server import Site, running_site  # noqa: F401

from medseg.files import UserError
from medseg.ingest import download as module
from medseg.ingest.download import Download, Expected, Patience, download

BODY = os.urandom(1_000_000)
OTHER = os.urandom(1_000_000)
QUICK = Patience(attempts=3, wait_s=0.01, timeout_s=5)


def expect(body: bytes = BODY) -> Expected:
    return Expected(len(body), hashlib.md5(body).hexdigest(), hashlib.sha256(body).hexdigest())


def silent(what: str, done: int, total: int | None) -> None:
    pass


def get(site: Site, folder: Path, expected: Expected | None = None, *paths: str) -> Download:
    urls = [site.url + path for path in paths or ("/set.zip",)]
    target = folder / "set.zip"
    return download(urls, target, expected or Expected(), progress=silent, patience=QUICK)


def leave_part(site: Site, folder: Path, size: int = 300_000) -> None:
    """What a killed process leaves: the first bytes, and the note of which version they are."""
    (folder / "set.zip.part").write_bytes(BODY[:size])
    note = {"url": f"{site.url}/set.zip", "etag": site.etags.get("/set.zip", ""), "last_modified": site.modified}
    module.write_json(folder / "set.zip.part.json", note)


@pytest.fixture(autouse=True)
def served(site: Site) -> Site:
    site.files["/set.zip"], site.etags["/set.zip"] = BODY, '"v1"'
    return site


def test_a_file_arrives_whole_and_alone(site: Site, tmp_path: Path) -> None:
    result = get(site, tmp_path, expect())
    assert result.path.read_bytes() == BODY
    assert (result.size_bytes, result.sha256) == (len(BODY), expect().sha256)
    assert (result.checked_by, result.resumed_at_bytes) == ("sha256", 0)
    assert [p.name for p in tmp_path.iterdir()] == ["set.zip"]


def test_a_dropped_connection_is_taken_up_where_it_broke(site: Site, tmp_path: Path) -> None:
    site.cuts = [400_000, 300_000]
    result = get(site, tmp_path, expect())
    assert result.path.read_bytes() == BODY
    assert [span for _, span in site.asked] == ["", "bytes=400000-", "bytes=700000-"]
    assert result.resumed_at_bytes == 700_000


@pytest.mark.parametrize("validator", ["etag", "last-modified"])
def test_a_killed_download_goes_on(site: Site, tmp_path: Path, validator: str) -> None:
    if validator == "last-modified":
        site.etags, site.modified = {}, "Sat, 01 Jan 2022 00:00:00 GMT"
    leave_part(site, tmp_path)
    assert get(site, tmp_path).path.read_bytes() == BODY
    assert [span for _, span in site.asked] == ["bytes=300000-"]


def test_a_download_killed_after_its_last_byte_is_complete(site: Site, tmp_path: Path) -> None:
    leave_part(site, tmp_path, len(BODY))
    assert get(site, tmp_path).path.read_bytes() == BODY
    assert len(site.asked) == 1


@pytest.mark.parametrize("heeds", [True, False], ids=["server compares", "server does not"])
@pytest.mark.parametrize("validator", ["etag", "last-modified"])
def test_a_changed_file_starts_again(site: Site, tmp_path: Path, heeds: bool, validator: str) -> None:
    old, new = '"v1"', '"v2"'
    if validator == "last-modified":
        old, new = "Sat, 01 Jan 2022 00:00:00 GMT", "Sun, 02 Jan 2022 00:00:00 GMT"
        site.etags, site.modified = {}, old
    leave_part(site, tmp_path)
    site.files["/set.zip"], site.heeds_if_range = OTHER, heeds
    if validator == "etag":
        site.etags["/set.zip"] = new
    else:
        site.modified = new
    assert get(site, tmp_path).path.read_bytes() == OTHER
    assert site.conditions[0] == old


def test_a_file_that_shrank_starts_again(site: Site, tmp_path: Path) -> None:
    leave_part(site, tmp_path, 900_000)
    site.files["/set.zip"], site.heeds_if_range = OTHER[:1000], False
    assert get(site, tmp_path).path.read_bytes() == OTHER[:1000]


def test_a_server_that_cannot_send_parts_starts_again(site: Site, tmp_path: Path) -> None:
    leave_part(site, tmp_path)
    site.ranges = False
    result = get(site, tmp_path, expect())
    assert result.path.read_bytes() == BODY
    assert result.resumed_at_bytes == 0


def test_without_validator_or_hash_nothing_is_joined(site: Site, tmp_path: Path) -> None:
    site.etags = {}
    leave_part(site, tmp_path)
    site.files["/set.zip"] = OTHER
    assert get(site, tmp_path).path.read_bytes() == OTHER
    assert site.asked == [("/set.zip", "")]


def test_without_validator_the_hash_is_judge(site: Site, tmp_path: Path) -> None:
    site.etags = {}
    leave_part(site, tmp_path)
    assert get(site, tmp_path, expect()).path.read_bytes() == BODY
    assert site.asked == [("/set.zip", "bytes=300000-")]


def test_a_part_of_another_address_is_not_used(site: Site, tmp_path: Path) -> None:
    leave_part(site, tmp_path)
    site.files["/mirror.zip"], site.etags["/mirror.zip"] = OTHER, '"v1"'
    assert get(site, tmp_path, None, "/mirror.zip").path.read_bytes() == OTHER


@pytest.mark.parametrize(("field", "wrong"), [("md5", "0" * 32), ("sha256", "0" * 64), ("size_bytes", 17)])
def test_what_is_not_expected_is_kept_aside(site: Site, tmp_path: Path, field: str, wrong: str | int) -> None:
    site.says_length = False  # else a wrong size is seen before the first byte
    with pytest.raises(UserError, match=rf"{field} .* expects {wrong}.*set\.zip\.mismatch"):
        get(site, tmp_path, Expected(**{field: wrong}))
    assert [p.name for p in tmp_path.iterdir()] == ["set.zip.mismatch"]
    assert (tmp_path / "set.zip.mismatch").read_bytes() == BODY


def test_a_wrong_size_is_seen_before_the_first_byte(site: Site, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="offers 1000000 bytes where the manifest expects 17"):
        get(site, tmp_path, Expected(size_bytes=17))
    assert list(tmp_path.iterdir()) == []


def test_a_busy_server_is_asked_again(site: Site, tmp_path: Path) -> None:
    site.statuses = [503, 429]
    assert get(site, tmp_path, expect()).path.read_bytes() == BODY


def test_a_server_that_never_answers_well_is_given_up(site: Site, tmp_path: Path) -> None:
    site.statuses = [500] * 9
    with pytest.raises(UserError, match=r"HTTP 500, 3 times in a row.*put the file at"):
        get(site, tmp_path)
    assert len(site.asked) == QUICK.attempts


def test_a_line_that_always_breaks_at_the_same_byte_is_given_up(site: Site, tmp_path: Path) -> None:
    site.ranges, site.cuts = False, [1000] * 9
    with pytest.raises(UserError, match="closed after 1000 of 1000000 bytes, 3 times"):
        get(site, tmp_path)
    assert len(site.asked) == 1 + QUICK.attempts


def test_a_missing_file_is_not_asked_for_twice_and_the_mirror_serves(site: Site, tmp_path: Path) -> None:
    result = get(site, tmp_path, expect(), "/gone.zip", "/set.zip")
    assert result.path.read_bytes() == BODY
    assert result.url == site.url + "/set.zip"
    assert [path for path, _ in site.asked] == ["/gone.zip", "/set.zip"]


def test_a_redirect_is_followed_with_its_range(site: Site, tmp_path: Path) -> None:
    site.redirects["/latest.zip"] = site.url + "/set.zip"
    site.cuts = [400_000]
    assert get(site, tmp_path, expect(), "/latest.zip").path.read_bytes() == BODY
    assert site.asked[-1] == ("/set.zip", "bytes=400000-")


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/set.zip", "file:///etc/passwd"])
def test_only_http_is_fetched(site: Site, tmp_path: Path, target: str) -> None:
    site.redirects["/latest.zip"] = target
    with pytest.raises(UserError, match="cannot be downloaded"):
        get(site, tmp_path, None, "/latest.zip")
    with pytest.raises(UserError, match="only http and https"):
        download([target], tmp_path / "x", Expected(), progress=silent, patience=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_no_server_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"refused.*check the network"):
        download(["http://127.0.0.1:1/x"], tmp_path / "x", Expected(), progress=silent, patience=QUICK)


def test_a_full_disk_is_foreseen(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": module._DISK_MARGIN_BYTES + 1000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="free space or choose"):
        get(site, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_up_to_the_whole(site: Site, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int | None]]] = {}
    download(
        [site.url + "/set.zip"],
        tmp_path / "set.zip",
        expect(),
        progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)),
    )
    assert sorted(seen) == ["checking set.zip", "fetching set.zip"]
    for steps in seen.values():
        assert steps == sorted(steps)
        assert steps[-1] == (len(BODY), len(BODY))


def test_a_process_killed_midway_is_taken_up(site: Site, tmp_path: Path) -> None:
    """SIGKILL while bytes come: no handler runs, nothing can tidy up."""
    code = (
        "import sys, time; from pathlib import Path; from medseg.ingest.download import *\n"
        "slow = lambda what, done, total: time.sleep(0.2)\n"
        "download([sys.argv[1]], Path(sys.argv[2]), Expected(), progress=slow)\n"
    )
    part = tmp_path / "set.zip.part"
    process = subprocess.Popen([sys.executable, "-c", code, site.url + "/set.zip", str(tmp_path / "set.zip")])
    deadline = time.monotonic() + 100
    while (not part.exists() or part.stat().st_size == 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    came = part.stat().st_size
    assert 0 < came < len(BODY)
    assert not (tmp_path / "set.zip").exists()
    assert get(site, tmp_path, expect()).path.read_bytes() == BODY
    assert site.asked[-1] == ("/set.zip", f"bytes={came}-")
