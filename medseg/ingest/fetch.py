"""Fetch a public data set: download, verify, unpack, and write the table that turns it into cases."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from medseg.files import UserError, read_json, read_rows, write_json, write_rows
from medseg.ingest.archives import safe_unpack
from medseg.ingest.download import ByteProgress, Download, check_file, checked_by, download, need_disk
from medseg.ingest.manifests import Layout, Manifest, RemoteFile, next_command
from medseg.progress import Progress
from medseg.result import Result


@dataclass(frozen=True)
class ByHand:
    """A file that a person has to fetch: the steps, and where it belongs."""

    name: str
    optional: bool
    put_at: Path
    steps: tuple[str, ...]


@dataclass(frozen=True)
class FetchResult:
    """What a fetch left in `folder`.

    Attributes:
        files: the files that are there; `checked_by` says what each was compared with.
        by_hand: the files that need a registration, with the steps.
        case_table: `cases.csv`, where the layout asks for one and there are images.
        cases: images found. status: `partial` when a file that is not optional has to be fetched by hand.
        next_command: the `medseg ingest` command for this folder.
    """

    name: str
    folder: Path
    files: tuple[Download, ...]
    by_hand: tuple[ByHand, ...]
    case_table: Path | None
    cases: int
    status: Literal["done", "partial"]
    next_command: str

    def as_result(self) -> Result:
        """The same as a step's result, for the command line."""
        paths = {"folder": self.folder} | ({"case_table": self.case_table} if self.case_table else {})
        figures: dict[str, object] = {
            "files": {file.path.name: file.checked_by for file in self.files},
            "size_bytes": sum(file.size_bytes for file in self.files),
            "cases": self.cases,
            "by_hand": [hand.steps for hand in self.by_hand],
            "next": self.next_command,
        }
        return Result("fetch", self.status, paths, figures)


def fetch(manifest: Manifest, out_dir: Path, progress: ByteProgress | None = None) -> FetchResult:
    """Bring a public data set into `out_dir`; what is there already is not fetched again.

    Archives are kept in `out_dir/archives/` (remove them when space is short) and unpacked beside it. A file that
    needs a registration is not fetched: once a person has put it into `archives/`, the same call checks and
    unpacks it. Several sets may share one folder; then their rows stand together in `cases.csv`.

    Args:
        manifest: what to fetch.
        out_dir: made if missing.
        progress: called with what is going on, bytes done and bytes in all; None shows a bar on stderr.

    Raises:
        UserError: no network, not the expected file, an unsafe archive, no disk space or no write permission,
            or another process fetches into the same folder.
    """
    folder = out_dir.absolute()
    with _alone_in(folder), _shown(progress) as advance:
        files, by_hand = [], []
        for file in manifest.files:
            target = folder / "archives" / file.name
            if file.registration is not None and not target.exists() and _recorded(folder, file) is None:
                by_hand.append(_by_hand(file, target))
            else:
                files.append(_fetch_file(file, folder, advance))
        rows = case_rows(manifest.layout, folder)
        table = write_case_table(manifest.layout, rows, folder) if manifest.layout.case_table and rows else None
    status: Literal["done", "partial"] = "done" if all(hand.optional for hand in by_hand) else "partial"
    if status == "done" and not rows:
        raise UserError(f"{folder} holds no {manifest.layout.images} of {manifest.name}; correct layout.images.")
    result = FetchResult(
        manifest.name, folder, tuple(files), tuple(by_hand), table, len(rows), status, next_command(manifest, folder)
    )
    write_json(folder / f"{manifest.name}.json", result)
    return result


def case_rows(layout: Layout, folder: Path) -> list[dict[str, str]]:
    """One row per image that fits the layout, in order: image, masks, the named groups of its name, site."""
    masks = {name: {p.name: p for p in folder.glob(m.replace("{case_id}", "*"))} for name, m in layout.masks.items()}
    rows = []
    for path in sorted(folder.glob(layout.images)):
        match = layout.match(path, folder)
        if match is None:
            continue
        row = {"image": path.relative_to(folder).as_posix()}
        for name, template in layout.masks.items():
            wanted = PurePosixPath(template).name.replace("{case_id}", match["case_id"])
            mask = masks[name].get(wanted)
            row[name] = mask.relative_to(folder).as_posix() if mask else ""
        rows.append(row | {"site": layout.site} | match.groupdict(default=""))
    return rows


def write_case_table(layout: Layout, rows: list[dict[str, str]], folder: Path) -> Path:
    """Write `cases.csv`; rows of other sites that stand there already are kept."""
    path = folder / "cases.csv"
    kept = [row for row in read_rows(path) if row.get("site") != layout.site] if path.exists() else []
    columns = list(dict.fromkeys(name for row in (*rows, *kept) for name in row))
    return write_rows(path, columns, ({name: row.get(name, "") for name in columns} for row in (*kept, *rows)))


def _fetch_file(file: RemoteFile, folder: Path, progress: ByteProgress) -> Download:
    """Download, verify and unpack one file, each only if not done before."""
    done = _recorded(folder, file)
    if done is not None:
        return done
    target = folder / "archives" / file.name
    if target.exists():
        sha256 = check_file(target, file.expected, progress, name=file.name)
        got = Download(target, "", target.stat().st_size, sha256, checked_by(file.expected))
    else:
        if file.size_bytes is not None and file.unpack_to is not None:
            need_disk(folder, 2 * file.size_bytes, f"{file.name}, packed and unpacked,")
        got = download(file.urls, target, file.expected, progress=progress)
    if file.unpack_to is not None:
        limits = {"max_bytes": file.max_unpacked_bytes, "max_files": file.max_unpacked_files}
        safe_unpack(target, folder / file.unpack_to, **limits)
    write_json(_record_path(folder, file), got)
    return got


def _recorded(folder: Path, file: RemoteFile) -> Download | None:
    """What an earlier fetch noted, if what it made is still there."""
    record, made = _record_path(folder, file), folder / (file.unpack_to or f"archives/{file.name}")
    if not record.is_file() or not made.exists():
        return None
    known: dict[str, Any] = read_json(record)
    return Download(**known | {"path": folder / "archives" / file.name})


def _record_path(folder: Path, file: RemoteFile) -> Path:
    return folder / "archives" / f"{file.name}.done.json"


def _by_hand(file: RemoteFile, target: Path) -> ByHand:
    assert file.registration is not None
    put = f"put the file at {target} and run the same command again"
    return ByHand(file.name, file.optional, target, (f"open {file.registration.url}", *file.registration.steps, put))


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system releases it also when the process is killed."""
    lock = folder / "archives" / ".lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another folder.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is fetching into {folder}; wait for it to end.") from error
        yield


@contextmanager
def _shown(progress: ByteProgress | None) -> Iterator[ByteProgress]:
    """The caller's progress, or one bar after another in megabytes."""
    if progress is not None:
        yield progress
        return
    bars: dict[str, tuple[Progress, list[int]]] = {}

    def advance(what: str, done: int, total: int | None) -> None:
        if what not in bars:
            close()
            bars[what] = (Progress(f"{what}, MB", (total or 0) // 10**6), [0])
        bar, shown = bars[what]
        bar.advance(done // 10**6 - shown[0])
        shown[0] = done // 10**6

    def close() -> None:
        for bar, _ in bars.values():
            bar.close()

    try:
        yield advance
    finally:
        close()
