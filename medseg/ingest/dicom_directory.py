"""Read a DICOMDIR, the table of contents of a DICOM disc: which files it lists, and which of them are missing."""

from pathlib import Path

from medseg.ingest.dicom_headers import read_dataset
from medseg.ingest.scan import Refused


def listed_files(path: Path) -> tuple[list[Path], int]:
    """The files that a DICOMDIR lists and that are there, each once, and how many are not.

    Names are compared without regard to case: discs hold capitals, and systems show them as they like. A name that
    leads out of the folder of the DICOMDIR counts as missing.

    Raises:
        Refused: the file is damaged or no DICOMDIR.
    """
    data = read_dataset(path, stop_before_pixels=True)
    try:
        if "DirectoryRecordSequence" not in data:
            raise Refused("unreadable_dicom", "The DICOMDIR holds no directory; give the folder of the files.")
        ids = [record.get("ReferencedFileID") for record in data.DirectoryRecordSequence]
        names = {(part,) if isinstance(part, str) else tuple(map(str, part)) for part in ids if part}
    except Refused:
        raise
    except Exception as error:  # values are parsed when they are asked for, and may be anything
        raise Refused("unreadable_dicom", f"The DICOMDIR is damaged ({type(error).__name__}).") from error
    folders: dict[Path, dict[str, Path]] = {}
    found = {file for name in sorted(names) if (file := _find(path.parent, name, folders)) is not None}
    return sorted(found), len(names) - len(found)


def _find(folder: Path, parts: tuple[str, ...], folders: dict[Path, dict[str, Path]]) -> Path | None:
    path = folder
    for part in parts:
        if path not in folders:
            folders[path] = _children(path)
        inner = folders[path].get(part.strip().lower())
        if inner is None:
            return None
        path = inner
    return path if path.is_file() else None


def _children(folder: Path) -> dict[str, Path]:
    try:
        return {entry.name.lower(): entry for entry in sorted(folder.iterdir(), reverse=True)}
    except OSError:
        return {}
