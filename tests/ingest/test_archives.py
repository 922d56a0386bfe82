"""Archives: honest ones come out whole, malicious and damaged ones leave nothing behind."""

import bz2
import gzip
import io
import lzma
import os
import re
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.files import UserError
from medseg.ingest import archives
from medseg.ingest.archives import is_archive, safe_unpack

FILES = {
    "set/images/a.nii.gz": os.urandom(70_000),
    "set/labels/a.nii.gz": b"\0" * 5_000,
    "set/empty.txt": b"",
    "set/Ünïcode name.txt": b"x",
}
NOISE = os.urandom(950_000)  # more than one block of bzip2, less than the limit


def unpack(archive: Path, out: Path, max_bytes: int = 1_000_000, max_files: int = 50) -> Path:
    return safe_unpack(archive, out, max_bytes=max_bytes, max_files=max_files)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def zip_of(path: Path, *entries: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in entries:
            out.writestr(name, data)
    return path


def tar_entry(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, data


def tar_of(path: Path, *entries: tuple, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as out:
        for info, data in entries:
            out.addfile(info, io.BytesIO(data))
    return path


def symlink_in_zip(name: str, target: str) -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info, target.encode()


def assert_refused(archive: Path, match: str, **limits: int) -> None:
    """Refused with a sentence that names the archive, and the folder around it is as before."""
    before = sorted(p.relative_to(archive.parent) for p in archive.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        unpack(archive, archive.parent / "out", **limits)
    said = str(caught.value).replace(str(archive.parent), "")  # pytest's folder is named after the test
    assert archive.name in said
    assert re.search(match, said), said
    assert sorted(p.relative_to(archive.parent) for p in archive.parent.rglob("*")) == before


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_an_honest_archive_comes_out_whole(tmp_path: Path, suffix: str) -> None:
    archive = tmp_path / f"in.{suffix}"
    if suffix == "zip":
        zip_of(archive, *FILES.items())
    else:
        tar_of(archive, *(tar_entry(*item) for item in FILES.items()), mode="w:" + suffix.partition(".")[2])
    assert is_archive(archive)
    assert contents(unpack(archive, tmp_path / "out")) == FILES
    assert sorted(p.name for p in tmp_path.iterdir()) == [archive.name, "out"]


def test_a_top_folder_of_the_same_name_is_not_nested(tmp_path: Path) -> None:
    out = unpack(zip_of(tmp_path / "in.zip", *FILES.items()), tmp_path / "set")
    assert set(contents(out)) == {name.removeprefix("set/") for name in FILES}


def test_what_macos_adds_is_left_out(tmp_path: Path) -> None:
    junk = ("__MACOSX/set/._a.png", "set/._a.png", "set/.DS_Store")
    archive = zip_of(tmp_path / "in.zip", ("set/a.png", b"1"), *((name, b"2") for name in junk))
    assert contents(unpack(archive, tmp_path / "out")) == {"set/a.png": b"1"}


def test_a_link_inside_becomes_a_copy(tmp_path: Path) -> None:
    archive = tar_of(
        tmp_path / "in.tar",
        tar_entry("a/chain", kind=tarfile.SYMTYPE, link="link"),
        tar_entry("a/link", kind=tarfile.SYMTYPE, link="../b/file"),
        tar_entry("b/file", b"data"),
        tar_entry("hard", kind=tarfile.LNKTYPE, link="b/file"),
    )
    out = unpack(archive, tmp_path / "out")
    assert contents(out) == dict.fromkeys(("a/chain", "a/link", "b/file", "hard"), b"data")
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("../evil", "climbs out"),
        ("a/../../evil", "climbs out"),
        ("..\\evil", "climbs out"),
        ("/etc/evil", "absolute"),
        ("\\\\server\\evil", "absolute"),
        ("C:\\evil", "absolute"),
    ],
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, kind: str, name: str, match: str) -> None:
    if kind == "zip":
        archive = zip_of(tmp_path / "in.zip", ("good", b"1"), (name, b"2"))
    else:
        archive = tar_of(tmp_path / "in.tar", tar_entry("good", b"1"), tar_entry(name, b"2"))
    assert_refused(archive, match)


@pytest.mark.parametrize("target", ["/etc/passwd", "../../etc/passwd", "nowhere", "self"])
@pytest.mark.parametrize("kind", ["zip", "symlink", "hardlink"])
def test_a_link_that_leads_out_or_nowhere_is_refused(tmp_path: Path, kind: str, target: str) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("secret")
    if kind == "zip":
        archive = zip_of(tmp_path / "in.zip", symlink_in_zip("self", target))
    else:
        link_type = tarfile.SYMTYPE if kind == "symlink" else tarfile.LNKTYPE
        archive = tar_of(tmp_path / "in.tar", tar_entry("self", kind=link_type, link=target))
    assert_refused(archive, "link|absolute|climbs out")


def test_writing_through_a_link_is_refused(tmp_path: Path) -> None:
    """The classic: a link to a folder outside, then a file below the link."""
    archive = tar_of(
        tmp_path / "in.tar",
        tar_entry("door", kind=tarfile.SYMTYPE, link="."),
        tar_entry("door/evil", b"1"),
    )
    assert_refused(archive, "link|twice")


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_special_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    assert_refused(tar_of(tmp_path / "in.tar", tar_entry("dev", kind=kind)), "special|header|damaged")


def test_a_device_in_a_zip_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("dev")
    info.create_system, info.external_attr = 3, (stat.S_IFCHR | 0o666) << 16
    assert_refused(zip_of(tmp_path / "in.zip", (info, b"")), "special")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    assert_refused(zip_of(tmp_path / "in.zip", ("a", b"1"), ("a", b"2")), "twice")
    assert_refused(tar_of(tmp_path / "in.tar", tar_entry("a", b"1"), tar_entry("a/b", b"2")), "twice")


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "in.zip", ("a", b"1"))
    data = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    archive.write_bytes(data)
    assert_refused(archive, "encrypted")


def test_too_many_entries_are_refused(tmp_path: Path) -> None:
    assert_refused(zip_of(tmp_path / "in.zip", *((f"{i}", b"") for i in range(9))), "8 files", max_files=8)
    assert_refused(tar_of(tmp_path / "in.tar", *(tar_entry(f"{i}") for i in range(9))), "8 files", max_files=8)


@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_a_bomb_is_refused(tmp_path: Path, suffix: str) -> None:
    archive, zeros = tmp_path / f"in.{suffix}", bytes(3_000_000)
    if suffix == "zip":
        zip_of(archive, ("zeros", zeros))
    else:
        tar_of(archive, tar_entry("zeros", zeros), mode="w:" + suffix.partition(".")[2])
    assert archive.stat().st_size < 20_000
    assert_refused(archive, "1000000 bytes")


def test_a_zip_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "in.zip", ("zeros", bytes(3_000_000)))
    data = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", data, data.index(signature) + offset, 10)
    archive.write_bytes(data)
    assert_refused(archive, "1000000 bytes|damaged")


def test_a_bomb_in_a_tar_header_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_HEADER_BYTES", 1 << 16)
    info = tarfile.TarInfo("a")
    info.pax_headers = {"comment": "x" * 300_000}
    with tarfile.open(tmp_path / "in.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as out:
        out.addfile(info)
    assert_refused(tmp_path / "in.tar.gz", "between its files")


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": archives._DISK_MARGIN_BYTES + 1000})
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: usage)
    assert_refused(zip_of(tmp_path / "in.zip", ("a", b"1" * 5000)), "room for 1000 bytes")


@pytest.mark.parametrize(
    "spoil",
    [lambda d: d[: len(d) // 2], lambda d: d[: len(d) // 2] + os.urandom(64) + d[len(d) // 2 + 64 :]],
    ids=["cut", "overwritten"],
)
@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_a_damaged_archive_is_named(tmp_path: Path, suffix: str, spoil: Callable[[bytes], bytes]) -> None:
    archive = tmp_path / f"in.{suffix}"
    if suffix == "zip":
        zip_of(archive, ("noise", NOISE))
    else:
        tar_of(archive, tar_entry("noise", NOISE), mode="w:" + suffix.partition(".")[2])
    archive.write_bytes(spoil(archive.read_bytes()))
    assert_refused(archive, "damaged")


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_tar_cut_anywhere_is_damaged(tmp_path: Path, blocks: int) -> None:
    """Also between two entries, where tarfile itself would see a shorter but sound archive."""
    archive = tar_of(tmp_path / "in.tar", tar_entry("a", b"1"), tar_entry("b", b"2"))
    archive.write_bytes(archive.read_bytes()[: blocks * 512])
    assert_refused(archive, "damaged")


def test_a_broken_header_in_the_middle_is_damage_not_the_end(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "in.tar", tar_entry("a", b"1"), tar_entry("b", b"2"))
    data = bytearray(archive.read_bytes())
    data[1024 + 150] ^= 0xFF  # the checksum of the second header
    archive.write_bytes(data)
    assert_refused(archive, "damaged")


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_what_is_no_archive_is_refused(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "scan.zip").write_bytes(pack(b"no archive at all" * 100))
    assert_refused(tmp_path / "scan.zip", "neither a zip nor a tar")


def test_an_empty_archive_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert_refused(zip_of(tmp_path / "in.zip"), "empty")
    with pytest.raises(UserError, match="no such file"):
        unpack(tmp_path / "absent.zip", tmp_path / "out")


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    archive = zip_of(tmp_path / "in.zip", ("a", b"1"))
    assert contents(unpack(archive, tmp_path / "out")) == {"a": b"1"}
    with pytest.raises(UserError, match="exists already"):
        unpack(archive, tmp_path / "out")
    assert contents(tmp_path / "out") == {"a": b"1"}


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".part-out").mkdir()
    (tmp_path / ".part-out" / "half").write_text("1")
    out = unpack(zip_of(tmp_path / "in.zip", ("a", b"1")), tmp_path / "out")
    assert contents(out) == {"a": b"1"}
    assert not (tmp_path / ".part-out").exists()


def test_a_compressed_scan_is_no_archive(tmp_path: Path) -> None:
    for name in ("scan.nii.gz", "scan.dcm", "notes.gz"):
        (tmp_path / name).write_bytes(b"1")
        assert not is_archive(tmp_path / name)


@given(st.text(st.sampled_from("./\\ab:"), min_size=1, max_size=9))
def test_no_name_reaches_out_of_the_root(name: str) -> None:
    """Whatever the spelling: refused, or below the root once the system has resolved it."""
    try:
        safe = archives._safe_name(name, "the entry")
    except archives._Refused:
        return
    assert os.path.normpath(f"/root/{safe}").startswith("/root")
