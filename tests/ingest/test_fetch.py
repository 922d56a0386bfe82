"""A public set in miniature, fetched from a real server: whole, again, by hand, together, and under attack."""

import fcntl
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
from flaky_server import Site, running_site  # noqa: F401

from medseg.cohort import Case
from medseg.files import UserError, read_rows
from medseg.ingest.fetch import FetchResult, fetch
from medseg.ingest.manifests import Manifest, load_manifests

REAL = load_manifests()


def zip_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for name, data in files.items():
            out.writestr(name, data)
    return buffer.getvalue()


MONTGOMERY = zip_bytes(
    {
        "MontgomerySet/CXR_png/MCUCXR_0001_0.png": b"a",
        "MontgomerySet/CXR_png/MCUCXR_0104_1.png": b"b",
        "MontgomerySet/CXR_png/Thumbs.db": b"junk",
        "MontgomerySet/ManualMask/leftMask/MCUCXR_0001_0.png": b"l",
        "MontgomerySet/ManualMask/rightMask/MCUCXR_0001_0.png": b"r",
        "MontgomerySet/ManualMask/leftMask/MCUCXR_0104_1.png": b"l",
        "MontgomerySet/ClinicalReadings/MCUCXR_0001_0.txt": b"normal",
        "__MACOSX/MontgomerySet/CXR_png/._MCUCXR_0001_0.png": b"fork",
    }
)
SHENZHEN = zip_bytes({f"ChinaSet_AllFiles/CXR_png/CHNCXR_{i:04d}_{i % 2}.png": os.urandom(1000) for i in range(1, 6)})
MASKS = zip_bytes({"mask/mask/CHNCXR_0001_1_mask.png": b"m", "mask/mask/CHNCXR_0004_0_mask.png": b"m"})


def quiet(what: str, done: int, total: int | None) -> None:
    pass


def serve(site: Site, name: str, body: bytes, **changes: object) -> Manifest:
    """The real manifest of a set, its first file served here with the hash of `body`."""
    manifest = REAL[name]
    first = manifest.files[0]
    site.files[f"/{first.name}"], site.etags[f"/{first.name}"] = body, '"1"'
    served = first.model_copy(
        update={
            "urls": (f"{site.url}/{first.name}",),
            "size_bytes": len(body),
            "md5": hashlib.md5(body).hexdigest(),
            **changes,
        }
    )
    return manifest.model_copy(update={"files": (served, *manifest.files[1:])})


def test_a_set_arrives_as_a_table_of_cases(site: Site, tmp_path: Path) -> None:
    result = fetch(serve(site, "nlm_montgomery", MONTGOMERY), tmp_path / "set", quiet)
    assert (result.status, result.cases, result.by_hand) == ("done", 2, ())
    assert [file.checked_by for file in result.files] == ["md5"]
    assert result.case_table is not None
    rows = read_rows(result.case_table)
    assert rows == [
        {
            "image": "MontgomerySet/CXR_png/MCUCXR_0001_0.png",
            "left_lung_mask": "MontgomerySet/ManualMask/leftMask/MCUCXR_0001_0.png",
            "right_lung_mask": "MontgomerySet/ManualMask/rightMask/MCUCXR_0001_0.png",
            "site": "montgomery",
            "case_id": "MCUCXR_0001_0",
            "patient_id": "MCUCXR_0001",
            "tb": "0",
        },
        {
            "image": "MontgomerySet/CXR_png/MCUCXR_0104_1.png",
            "left_lung_mask": "MontgomerySet/ManualMask/leftMask/MCUCXR_0104_1.png",
            "right_lung_mask": "",
            "site": "montgomery",
            "case_id": "MCUCXR_0104_1",
            "patient_id": "MCUCXR_0104",
            "tb": "1",
        },
    ]
    assert all((tmp_path / "set" / row["image"]).is_file() for row in rows)
    assert {"case_id", "patient_id", "site"} <= set(rows[0]) & set(Case.__dataclass_fields__)
    written = json.loads((tmp_path / "set" / "nlm_montgomery.json").read_text())
    assert written["cases"] == 2
    assert str(tmp_path / "set") in result.next_command


def test_the_second_call_asks_the_server_nothing(site: Site, tmp_path: Path) -> None:
    manifest = serve(site, "nlm_montgomery", MONTGOMERY)
    first = fetch(manifest, tmp_path, quiet)
    asked = list(site.asked)
    assert fetch(manifest, tmp_path, quiet) == first
    assert site.asked == asked
    (tmp_path / "archives" / "NLM-MontgomeryCXRSet.zip").unlink()  # allowed, to save space
    assert fetch(manifest, tmp_path, quiet) == first
    assert site.asked == asked


def test_a_run_killed_before_unpacking_goes_on_from_the_archive(site: Site, tmp_path: Path) -> None:
    manifest = serve(site, "nlm_montgomery", MONTGOMERY)
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "NLM-MontgomeryCXRSet.zip").write_bytes(MONTGOMERY)
    (tmp_path / ".part-MontgomerySet").mkdir()
    assert fetch(manifest, tmp_path, quiet).cases == 2
    assert site.asked == []


def test_a_connection_that_breaks_costs_nothing(site: Site, tmp_path: Path) -> None:
    site.cuts = [2000]
    assert fetch(serve(site, "nlm_shenzhen", SHENZHEN), tmp_path, quiet).cases == 5
    assert site.asked[-1][1] == "bytes=2000-"


def test_a_registration_is_explained_and_its_file_taken_when_it_comes(site: Site, tmp_path: Path) -> None:
    manifest = serve(site, "nlm_shenzhen", SHENZHEN)
    result = fetch(manifest, tmp_path, quiet)
    (hand,) = result.by_hand
    assert hand.optional
    assert result.status == "done", "the masks are optional"
    assert "kaggle.com" in hand.steps[0]
    assert str(hand.put_at) in hand.steps[-1]
    assert {row["lung_mask"] for row in read_rows(tmp_path / "cases.csv")} == {""}

    hand.put_at.write_bytes(MASKS)
    result = fetch(manifest, tmp_path, quiet)
    assert result.by_hand == ()
    masks = {row["case_id"]: row["lung_mask"] for row in read_rows(tmp_path / "cases.csv") if row["lung_mask"]}
    assert set(masks) == {"CHNCXR_0001_1", "CHNCXR_0004_0"}
    assert all((tmp_path / path).is_file() for path in masks.values())


def test_a_set_behind_a_registration_is_partial_with_its_steps(site: Site, tmp_path: Path) -> None:
    manifest = REAL["nlm_shenzhen"]
    needed = manifest.files[1].model_copy(update={"optional": False})
    result = fetch(manifest.model_copy(update={"files": (needed,)}), tmp_path, quiet)
    assert (result.status, result.cases, result.case_table) == ("partial", 0, None)
    assert result.as_result().exit_code == 3
    assert len(result.by_hand[0].steps) == 2 + len(needed.registration.steps)


def test_two_sites_share_a_folder_and_a_table(site: Site, tmp_path: Path) -> None:
    montgomery, shenzhen = serve(site, "nlm_montgomery", MONTGOMERY), serve(site, "nlm_shenzhen", SHENZHEN)
    for manifest in (montgomery, shenzhen, montgomery):  # the third call must not double its rows
        fetch(manifest, tmp_path, quiet)
    rows = read_rows(tmp_path / "cases.csv")
    assert sorted(row["site"] for row in rows) == ["montgomery"] * 2 + ["shenzhen"] * 5
    assert len({row["case_id"] for row in rows}) == 7


def test_the_wrong_file_is_not_unpacked(site: Site, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"md5 .* expects 0000.*mismatch"):
        fetch(serve(site, "nlm_montgomery", MONTGOMERY, md5="0" * 32), tmp_path, quiet)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".lock", "NLM-MontgomeryCXRSet.zip.mismatch"]


def test_a_hostile_archive_leaves_only_itself(site: Site, tmp_path: Path) -> None:
    body = zip_bytes({"MontgomerySet/CXR_png/MCUCXR_0001_0.png": b"a", "../../evil": b"b"})
    with pytest.raises(UserError, match="climbs out"):
        fetch(serve(site, "nlm_montgomery", body), tmp_path / "set", quiet)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".lock", "NLM-MontgomeryCXRSet.zip"]


def test_a_layout_that_finds_nothing_is_named(site: Site, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layout\.images"):
        fetch(serve(site, "nlm_montgomery", zip_bytes({"MontgomerySet/readme.txt": b"x"})), tmp_path, quiet)


def test_two_fetches_into_one_folder_do_not_meet(site: Site, tmp_path: Path) -> None:
    manifest = serve(site, "nlm_montgomery", MONTGOMERY)
    (tmp_path / "archives").mkdir()
    with (tmp_path / "archives" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            fetch(manifest, tmp_path, quiet)
    assert fetch(manifest, tmp_path, quiet).cases == 2


def test_a_folder_that_cannot_be_made_is_named(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        fetch(serve(site, "nlm_montgomery", MONTGOMERY), tmp_path / "file" / "set", quiet)


def test_without_a_callback_nothing_is_said_on_stdout(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = fetch(serve(site, "nlm_montgomery", MONTGOMERY), tmp_path)
    assert isinstance(result, FetchResult)
    assert capsys.readouterr().out == ""
