"""Names that identify no one: keyed hashes, so that only the holder of the key can tell whose they are.

An unkeyed hash of a patient ID is undone by hashing all possible IDs. The key therefore lies outside the cohort: with
it the same patient gets the same pseudonym in every cohort, without it a pseudonym leads nowhere.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from medseg.files import UserError, read_rows, write_rows

_KEY_BYTES = 32
_DIGITS = 16
_PSEUDONYM = re.compile(r"(?:case|file)-(?:[0-9a-f]{12,16}|without-uid)\b")


def load_key(path: Path) -> bytes:
    """Read the key file, or create it (32 random bytes as hexadecimal digits, readable by its owner alone).

    Raises:
        UserError: it cannot be read or created, or holds something else.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _create(path)
        text = path.read_text(encoding="ascii").strip()
        key = bytes.fromhex(text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"the key file {path} cannot be used ({reason}); choose a folder you may write to.") from error
    except ValueError as error:
        raise UserError(
            f"{path} holds no key (hexadecimal digits were expected); restore the file, or move it away to begin "
            "anew with other pseudonyms."
        ) from error
    if len(key) < _KEY_BYTES:
        raise UserError(f"{path} holds a key of {len(key)} bytes, {_KEY_BYTES} are needed; restore the file.")
    return key


def pseudonym(key: bytes, kind: str, text: str) -> str:
    """`<kind>-` and 16 hexadecimal digits of HMAC-SHA256(key, kind and text): stable, and not to be undone.

    Args:
        key: from `load_key`.
        kind: what is named: `case`, `patient`, `site`. The same text gives unrelated pseudonyms for two kinds.
        text: the true name; empty text gives an empty pseudonym.
    """
    if not text:
        return ""
    digest = hmac.new(key, f"{kind}\0{text}".encode(errors="surrogateescape"), hashlib.sha256)
    return f"{kind}-{digest.hexdigest()[:_DIGITS]}"


def is_pseudonym(name: str) -> bool:
    """Whether a case's or a reject's name begins with a pseudonym, and so tells no one's name."""
    return _PSEUDONYM.match(name) is not None


def _new_key() -> str:
    return secrets.token_hex(_KEY_BYTES)


def _create(path: Path) -> None:
    """Create the file whole or not at all; of two processes at once one wins and both then read its key."""
    if path.exists():
        return
    temporary = path.with_name(f".part-{secrets.token_hex(8)}-{path.name}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(_new_key() + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, fails when the name is taken
        except FileExistsError:
            return
    finally:
        temporary.unlink(missing_ok=True)


def record_places(path: Path, places: Mapping[str, Path]) -> None:
    """Add the place behind each pseudonym to a table that only its owner may read; it identifies patients.

    Args:
        path: CSV with columns case_id, folder.
        places: pseudonym of a case or of a rejected input, to where it lies.
    """
    known = {row.get("case_id", ""): row.get("folder", "") for row in read_rows(path)} if path.is_file() else {}
    known.update((case_id, str(folder)) for case_id, folder in places.items())
    rows = [{"case_id": case_id, "folder": folder} for case_id, folder in sorted(known.items())]
    write_rows(path, ["case_id", "folder"], rows)
    path.chmod(0o600)
