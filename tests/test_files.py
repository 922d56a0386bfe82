"""Atomic writes keep the old file on failure, and user errors name the file and the remedy."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from medseg.files import UserError, dump_json, read_json, read_rows, replacing, resource_dir, write_rows, write_text


def test_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = write_text(tmp_path / "table.csv", "old")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_never_shows_half_a_file(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from medseg.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as t:\n    t.write_text('half'); os.kill(os.getpid(), 9)"
    )
    path = write_text(tmp_path / "state.json", "whole")
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -9
    assert path.read_text() == "whole"


def test_temporary_name_keeps_the_suffixes(tmp_path: Path) -> None:
    with replacing(tmp_path / "mask.nii.gz") as temporary:
        assert temporary.name.endswith("mask.nii.gz")
        temporary.write_bytes(b"x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / "x", "")


def test_a_file_in_the_way_of_a_folder_is_one_sentence(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "")
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / "file" / "below", "")


def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text(tmp_path / "a", "old")
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")

    def write() -> None:
        with replacing(path):
            full.write_text("x" * 10)

    with pytest.raises(UserError, match="No space left"):
        write()
    assert path.read_text() == "old"


def test_json_of_numpy_paths_and_dataclasses() -> None:
    @dataclass(frozen=True)
    class Thing:
        where: Path
        values: object

    text = dump_json(Thing(Path("a/b"), {"x": np.float32(0.5), "n": float("nan"), "v": np.arange(2)}))
    assert json.loads(text) == {"where": "a/b", "values": {"x": 0.5, "n": None, "v": [0, 1]}}


def test_rows_round_trip_with_commas_quotes_and_newlines(tmp_path: Path) -> None:
    rows = [{"a": 'x, "y"\nz', "b": ""}, {"a": "ü", "b": "1"}]
    assert read_rows(write_rows(tmp_path / "t.csv", ["a", "b"], rows)) == rows


@pytest.mark.parametrize("content", ["", "{"])
def test_damaged_json_names_the_file(tmp_path: Path, content: str) -> None:
    path = write_text(tmp_path / "x.json", content)
    with pytest.raises(UserError, match=r"x\.json"):
        read_json(path)


def test_resources_are_found() -> None:
    assert (resource_dir("configs") / "hippocampus.yaml").is_file()
