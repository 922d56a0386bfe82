"""Atomic writes, hashes, and where the package's own data lies.

A reader never sees half a file: everything is written beside its target, flushed to the disk and renamed.
"""

import csv
import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FULL_BYTES = 1 << 20
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
_DATABASE_ERROR = re.compile(
    r"database or disk is full|attempt to write a readonly database|unable to open database file|disk I/O error"
)


class UserError(ValueError):
    """Bad usage, configuration or input: one sentence with the field or file, the value and the remedy.

    The command line prints it without a traceback and exits with 2.
    """


class DiskError(UserError):
    """The disk refused: full, read-only, or a folder without permission. A batch stops; no case is to blame."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed onto `path`.

    The temporary name keeps all suffixes of the target, since writers choose their format by them.
    On an exception the temporary file is removed and the target stays as it was.

    Raises:
        DiskError: the folder cannot be written or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".part-", suffix=f"-{path.name}", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _disk_error(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync_folder(path.parent)
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise _disk_error(path, error) from error
        if shutil.disk_usage(path.parent).free < _FULL_BYTES:  # NumPy, torch and safetensors hide the system's error
            raise _disk_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
        if isinstance(error, OSError):
            raise _disk_error(path, error) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> Path:
    """Write `content` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text to `path` atomically."""
    return write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> Path:
    """Write `value` (dataclasses and paths allowed) as indented JSON, atomically. NaN becomes null."""
    return write_text(path, dump_json(value, indent=2) + "\n")


def dump_json(value: Any, indent: int | None = None) -> str:
    """JSON text of dataclasses, paths, NumPy scalars and arrays; non-finite numbers become null."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; check the path, or run the step that writes it.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); restore it or run its step again.") from error


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> Path:
    """Write a CSV table with exactly these columns, atomically; None becomes an empty cell."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(columns), extrasaction="raise", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if value is None else value for key, value in row.items()})
    return write_text(path, buffer.getvalue())


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV table as one dict of strings per row.

    Raises:
        UserError: it is missing, empty or not a UTF-8 table.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey="")
            rows = list(reader)
            names = reader.fieldnames
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; check the path, or run the step that writes it.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV table ({error}); save it as UTF-8 CSV.") from error
    if names is None:
        raise UserError(f"{path} is empty; a table needs a header line with column names.")
    return rows


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: Iterable[Path]) -> str:
    """One SHA-256 over the digests of several files, in sorted order of digest (names do not count)."""
    digests = sorted(sha256_file(path) for path in paths)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Turn dataclasses, paths, mappings, NumPy scalars and arrays into what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist") and not isinstance(value, (str, bytes)):  # NumPy, without importing it
        return plain(value.tolist())
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def resource_dir(name: str) -> Path:
    """The folder `configs` or `data_manifests`: in a source checkout, else inside the installed package."""
    package = Path(__file__).resolve().parent
    for candidate in (package.parent / name, package / "resources" / name):
        if candidate.is_dir():
            return candidate
    raise AssertionError(f"the installed package carries no {name}/")


def default_workspace() -> Path:
    """`MEDSEG_WORKSPACE`, or `workspace` in the current folder."""
    return Path(os.environ.get("MEDSEG_WORKSPACE") or "workspace").absolute()


def disk_trouble(error: BaseException | None) -> str:
    """A sentence for the user when a refusing disk stands behind an error, else an empty text.

    Libraries write too (MLflow its database, Prefect its own), and wrap what the system said.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            place = f"{error.filename} " if error.filename else "a file "
            return f"{place}cannot be written ({error.strerror}); free space, or choose a folder you may write to."
        if found := _DATABASE_ERROR.search(str(error)):
            return (
                f"mlflow.db in the workspace cannot be written ({found[0]}); free space, or choose another --workspace."
            )
        error = error.__cause__ or error.__context__
    return ""


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(path: Path, error: OSError) -> DiskError:
    reason = error.strerror or str(error)
    return DiskError(f"{path} cannot be written ({reason}); free space, or choose a folder you may write to.")
