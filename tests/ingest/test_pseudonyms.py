"""Pseudonyms are stable under one key and unrelated under another; the key is private and never replaced."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from medseg.files import UserError
from medseg.ingest import pseudonyms
from medseg.ingest.pseudonyms import load_key, pseudonym


@pytest.fixture(autouse=True)
def new_keys(monkeypatch: pytest.MonkeyPatch, true_new_key: Callable[[], str]) -> None:
    monkeypatch.setattr(pseudonyms, "_new_key", true_new_key)


def test_the_key_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "key"
    key = load_key(path)
    assert len(key) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_key(path) == key
    assert load_key(tmp_path / "another") != key
    assert [p.name for p in path.parent.iterdir()] == ["key"]


def test_many_starters_agree_on_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(load_key, [tmp_path / "key"] * 8))) == 1


@pytest.mark.parametrize("content", ["", "abcd", "not hexadecimal"])
def test_a_spoilt_key_is_never_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content)
    with pytest.raises(UserError, match="restore the file"):
        load_key(tmp_path / "key")
    assert (tmp_path / "key").read_text() == content


def test_pseudonyms_depend_on_key_kind_and_text() -> None:
    names = {pseudonym(k, kind, text) for k in (b"1", b"2") for kind in ("case", "patient") for text in ("a", "b")}
    assert len(names) == 8
    assert pseudonym(b"1", "case", "a") == pseudonym(b"1", "case", "a")
    assert pseudonym(b"1", "case", "") == ""
