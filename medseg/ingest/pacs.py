"""DICOMweb: find series in a PACS (QIDO-RS), copy them here (WADO-RS), and store results beside them (STOW-RS).

A search goes to studies first and then to the series of each, which every server understands. What is copied lies in a
folder that its owner alone can read, under names that identify no one, until the step that needs it is done.
"""

import hashlib
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from medseg.files import UserError
from medseg.ingest.dicom_headers import read_dataset
from medseg.ingest.download import Patience
from medseg.ingest.pacs_http import PATIENCE, SCHEMES, Connection, Interrupted, Server, parse_server
from medseg.ingest.pseudonyms import pseudonym
from medseg.ingest.scan import Refused
from medseg.progress import progress

_WHO = ("PatientID", "PatientName", "StudyInstanceUID", "StudyDate", "AccessionNumber")
STUDY_KEYS = (*_WHO, "StudyDescription", "ModalitiesInStudy")
SERIES_KEYS = ("Modality", "SeriesInstanceUID", "SeriesDescription", "BodyPartExamined")
NO_SCANS = ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "SR", "PR", "KO", "REG", "DOC", "FID")
_NAMING = ("PatientID", "PatientName", "StudyInstanceUID", "AccessionNumber", "SeriesInstanceUID")
_STUDY_UID, _SERIES_UID, _SOP_UID = "0020000D", "0020000E", "00080018"
_MODALITY, _INSTANCES = "00080060", "00201209"
_FAILED, _REASON = "00081198", "00081197"
_PAGE = 100
_UID = re.compile(r"[0-9.]{1,64}")


@dataclass(frozen=True)
class Query:
    """What is wanted: matching of studies, and of series within them."""

    study: dict[str, str] = field(repr=False)
    series: dict[str, str] = field(repr=False)


@dataclass(frozen=True)
class Series:
    """One series in the PACS. UIDs identify: they leave this machine's private folders as pseudonyms only."""

    study_uid: str = field(repr=False)
    uid: str = field(repr=False)
    modality: str
    instances: int


def is_address(source: str) -> bool:
    """Whether a source is the address of a PACS."""
    return source.partition("://")[0] in SCHEMES


def refuse_named(url: str, why: str) -> None:
    """Raises UserError when the query of an address names a patient or an examination, for the reason `why`."""
    server, query = parse_address(url)
    if named := [key for key in (*query.study, *query.series) if key in _NAMING]:
        raise UserError(f"{server.name}: {why}; it may not name {named[0]}, use other attributes.")


def parse_address(url: str) -> tuple[Server, Query]:
    """Server and query of `dicomweb://HOST[:PORT]/PATH?KEY=VALUE&…`.

    Raises:
        UserError: it is malformed, asks for everything, or names a key that is no attribute to search by.
    """
    server, parts = parse_server(url)
    pairs = dict(parse_qsl(parts.query, keep_blank_values=True))
    for key in pairs:
        if key not in (*STUDY_KEYS, *SERIES_KEYS):
            known = ", ".join((*STUDY_KEYS, *SERIES_KEYS))
            raise UserError(f"{server.name}: {key!r} is not among the attributes that are searched: {known}.")
    pairs = {key: value for key, value in pairs.items() if value}
    if not pairs:
        raise UserError(f"{server.name} without a query means all it holds; add ?PatientID=…, ?StudyDate=… or another.")
    study = {key: value for key, value in pairs.items() if key in STUDY_KEYS}
    if "Modality" in pairs:
        study.setdefault("ModalitiesInStudy", pairs["Modality"])
    return server, Query(study, {key: value for key, value in pairs.items() if key in SERIES_KEYS})


class Pacs(Connection):
    """A PACS: find, fetch, store."""

    def find(self, query: Query) -> Iterator[list[Series]]:
        """The wanted series of each study that matches, study by study; what holds no scan is left out."""
        for study in self._search("studies", query.study, _STUDY_UID):
            uid = _uid(study, _STUDY_UID)
            found = self._search(f"studies/{uid}/series", query.series, _SERIES_UID)
            series = [
                Series(uid, _uid(item, _SERIES_UID), str(_value(item, _MODALITY)), int(_value(item, _INSTANCES) or 0))
                for item in found
            ]
            wanted = query.series.get("Modality", "*")  # some servers heed no matching within a study
            yield [
                one
                for one in sorted(series, key=lambda one: one.uid)
                if one.modality not in NO_SCANS and (one.modality == wanted or "*" in wanted or "?" in wanted)
            ]

    def fetch(self, series: Sequence[Series], folder: Path, key: bytes) -> Path:
        """Copy series into `folder/<study>/<series>/<instance>.dcm`; called again, it brings what is missing.

        Args:
            folder: made if missing, readable by its owner alone.
            key: for the pseudonyms in those names.

        Returns:
            `folder`.

        Raises:
            UserError: the server or the disk refuses.
        """
        _make_private(folder)
        with progress("Fetching", len(series)) as shown:
            for one in series:
                place = folder / pseudonym(key, "study", one.study_uid) / pseudonym(key, "series", one.uid)
                _make_private(place)
                self._fetch_series(one, place, key)
                shown.advance(text=place.name)
        return folder

    def store(self, file: Path) -> bool:
        """Store one DICOM object in the study it names, unless it is there; returns whether it had to be sent.

        It counts as stored when a search finds it, so a broken line or a restart never stores it twice.

        Raises:
            UserError: the study is not on the server, or the server refuses the object.
        """
        header = read_dataset(file, stop_before_pixels=True)
        study, sop = str(header.StudyInstanceUID), str(header.SOPInstanceUID)
        if not self._search("studies", {"StudyInstanceUID": study}, _STUDY_UID):
            raise UserError(f"{self.server.name} lacks the study of {file}; results go beside their scans only.")
        for attempt in range(1, self.patience.attempts + 1):
            if self._search(f"studies/{study}/instances", {"SOPInstanceUID": sop}, _SOP_UID):
                return attempt > 1
            try:
                self._refusals(self.post_file("studies", file), file)
            except Interrupted as error:  # it may have arrived all the same
                self.wait(attempt, error)
        if self._search(f"studies/{study}/instances", {"SOPInstanceUID": sop}, _SOP_UID):
            return True
        raise UserError(f"{self.server.name} accepted {file} and does not find it; its log may say why.")

    def _search(self, path: str, match: dict[str, str], uid_tag: str) -> list[dict[str, Any]]:
        """All pages of a search, each object once."""
        found: dict[str, dict[str, Any]] = {}
        extra = {"includefield": _INSTANCES} if uid_tag == _SERIES_UID else {}
        while True:
            page = {"limit": str(_PAGE), "offset": str(len(found))}
            more = self.get_json(path, {**match, **extra, **page})
            new = {_uid(item, uid_tag): item for item in more}
            if len(more) < _PAGE or new.keys() <= found.keys():  # some servers heed no offset
                return list({**found, **new}.values())
            found |= new

    def _fetch_series(self, series: Series, place: Path, key: bytes) -> None:
        path = f"studies/{series.study_uid}/series/{series.uid}"
        uids = [_uid(item, _SOP_UID) for item in self._search(f"{path}/instances", {}, _SOP_UID)]
        targets = {uid: place / f"{pseudonym(key, 'instance', uid)}.dcm" for uid in uids}
        attempt, one_by_one = 0, len(uids) == 1
        while missing := [uid for uid in uids if not targets[uid].is_file()]:
            try:
                if one_by_one or len(missing) < len(uids):
                    self._receive(f"{path}/instances/{missing[0]}", place, targets, only=missing[0])
                else:
                    self._receive(path, place, targets)
                attempt = 0
            except Interrupted as error:
                left = sum(not target.is_file() for target in targets.values())
                attempt = 1 if left < len(missing) else attempt + 1
                self.wait(attempt, error)
            one_by_one = True

    def _receive(self, path: str, place: Path, targets: dict[str, Path], only: str = "") -> None:
        """Move what comes to its place; an unreadable file keeps the name it was asked for by."""
        for part in place.glob(".part-*"):  # of a killed process
            part.unlink(missing_ok=True)
        for part in self.get_parts(path, place):
            try:
                uid = str(read_dataset(part, stop_before_pixels=True).SOPInstanceUID)
            except (Refused, AttributeError):
                uid = only
            if uid in targets and only in ("", uid):
                part.replace(targets[uid])
            else:
                part.unlink()
        if only and not targets[only].is_file():
            raise Interrupted("the instance asked for did not come")

    def _refusals(self, answer: dict[str, Any], file: Path) -> None:
        failed = answer.get(_FAILED, {}).get("Value") or []
        if failed:
            reason = int(_value(failed[0], _REASON) or 0)
            raise UserError(f"{self.server.name} refuses to store {file} (failure reason {reason:04X} hex).")


def fetch(url: str, spool: Path, key: bytes, patience: Patience = PATIENCE) -> Path:
    """Copy every series that the address asks for into a folder of its own below `spool`.

    Returns:
        The folder, the same for the same address; the caller removes it when its scans are used.

    Raises:
        UserError: nothing matches, or see `Pacs`.
    """
    server, query = parse_address(url)
    with Pacs(server, patience) as pacs:
        series = [one for study in pacs.find(query) for one in study]
        if not series:
            raise UserError(f"{server.name} holds no scan that matches the query; check its values.")
        return pacs.fetch(series, spool / pseudonym(key, "query", url), key)


def results_of(out: Path) -> list[Path]:
    """The DICOM objects that predict wrote for the finished cases in `out`: masks, reports, maps.

    A radiograph that was rejected has one too where a classifier says why it gives no verdict; a failed case has none.
    """
    return [path for result in sorted(out.glob("*/result.json")) for path in sorted(result.parent.rglob("*.dcm"))]


def series_of(file: Path) -> tuple[str, str]:
    """(Study Instance UID, Series Instance UID) of a DICOM file."""
    header = read_dataset(file, stop_before_pixels=True)
    return str(header.StudyInstanceUID), str(header.SeriesInstanceUID)


def content_of(series: Collection[Series]) -> str:
    """SHA-256 over which series there are and how many instances each has; DICOM instances never change."""
    lines = sorted(f"{one.uid} {one.instances}" for one in series)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def remove_spool(folder: Path) -> None:
    """Remove copied scans; what is gone already is no error."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{folder} cannot be made ({reason}); choose a workspace you may write to.") from error


def _value(item: dict[str, Any], tag: str) -> Any:
    """The first value of an attribute in DICOM JSON; None when absent."""
    values = item.get(tag, {}).get("Value") or [None]
    return values[0]


def _uid(item: dict[str, Any], tag: str) -> str:
    """A UID, checked, since it becomes part of an address."""
    uid = str(_value(item, tag) or "")
    if not _UID.fullmatch(uid):
        raise UserError(f"the server's answer holds no valid UID at {tag}; ask its administrator.")
    return uid
