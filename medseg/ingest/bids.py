"""Folders in the layout of BIDS: which files are T1 images, whose they are, and when each examination was."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from medseg.ingest.plain_files import File

_PATTERNS = ("anat/*_T1w.nii*", "ses-*/anat/*_T1w.nii*")


def bids_files(folder: Path, root: Path) -> Iterator[File]:
    """The T1 images of every `sub-*` below a folder, each with its subject and its session.

    A session is known by the date in the column `acq_time` of `sub-*/sub-*_sessions.tsv`, else by its own name.

    Args:
        root: the folder that was given.
    """
    for subject in sorted(path for path in folder.glob("sub-*") if path.is_dir()):
        dates = _session_dates(subject / f"{subject.name}_sessions.tsv")
        for pattern in _PATTERNS:
            for path in sorted(subject.glob(pattern)):
                session = _session(path.relative_to(root))
                yield File(path, root, patient=subject.name, exam=dates.get(session) or session)


def _session(path: Path) -> str:
    """The name of the session that a file belongs to, without `ses-`; empty where there is none."""
    sessions = [part.removeprefix("ses-") for part in path.parts if part.startswith("ses-")]
    return sessions[-1] if sessions else ""


def _session_dates(table: Path) -> dict[str, str]:
    """Session to date; nothing of a table that is missing, damaged or dates only some of its sessions."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    found = {
        str(row.get("session_id") or "").removeprefix("ses-"): re.match(r"\d{4}-\d{2}-\d{2}", row.get("acq_time") or "")
        for row in rows
    }
    return {name: match[0] for name, match in found.items() if match} if all(found.values()) else {}
