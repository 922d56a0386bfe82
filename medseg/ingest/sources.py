"""Find the scans in what was handed over: folders of any depth, files, archives, published data-set layouts.

Layouts known by their folders: Medical Segmentation Decathlon and nnU-Net (`imagesTr`, `labelsTr`, `dataset.json`),
the same with plain `images` and `labels`, and BIDS (`sub-*/anat/*_T1w.nii.gz`). Everything else is walked, and DICOM
is recognised by content, not by name. Files that are no images at all (tables, read-me files) are passed over.
"""

import atexit
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

from medseg.cohort import Finding, Reject
from medseg.config import IngestConfig
from medseg.files import UserError, read_json, sha256_file, sha256_files
from medseg.ingest import (
    archives,
    dicom,
    dicom_directory,
    dicom_headers,
    dicom_pixels,
    dicom_radiograph,
    nifti,
    radiograph,
)
from medseg.ingest.bids import bids_files
from medseg.ingest.plain_files import NIFTI, PICTURE, File, name_of, plain_sources
from medseg.ingest.scan import Refused, Scan, Source
from medseg.volume import Volume

_LAYOUTS = (("imagesTr", "labelsTr"), ("images", "labels"))
_FOREIGN = (".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".hdr", ".img", ".tif", ".tiff", ".bmp", ".npy", ".npz")
_MAX_UNPACKED_BYTES = 200 << 30
_MAX_UNPACKED_FILES = 500_000
_SKIPPED = {"__MACOSX", "derivatives"}


def discover(
    sources: Sequence[Path],
    config: IngestConfig,
    *,
    key: bytes = b"",
    unpack_dir: Path | None = None,
    places: dict[str, Path] | None = None,
) -> tuple[list[Source], list[Reject]]:
    """Find the scans in folders, files and archives. Headers are read, pixels are not.

    Args:
        sources: what the user gave.
        config: which series are wanted.
        key: for pseudonyms (see `medseg.ingest.pseudonyms`). Without it the ids of DICOM cases are plain hashes of
            their UIDs, and their patient and site stay empty.
        unpack_dir: where archives are unpacked; the caller removes it. By default a temporary folder that is
            removed when the process ends.
        places: filled with the folder of each DICOM case or reject by its case id. This identifies patients.

    Returns:
        Sources in order of case_id; and what cannot become a case, with reasons.

    Raises:
        UserError: a path does not exist, is of a kind that is not read, or nothing in it is an image.
    """
    files: list[File] = []
    rejects: list[Reject] = []
    for source in sources:
        found = list(_walk(_existing(source), unpack_dir, rejects, layouts=not config.image_path))
        if not found and not rejects:
            raise UserError(f"{source} is empty; give a folder, file or archive with DICOM, NIfTI, PNG or JPEG.")
        files += found
    files = _without_twins(files)
    if config.image_path:
        files = _chosen(files, config.image_path)
    found_sources, refused, passed_over = _recognise(files, config, key, {} if places is None else places)
    rejects += refused
    if not found_sources and not rejects:
        names = ", ".join(str(source) for source in sources)
        raise UserError(
            f"{names}: none of the {passed_over} files is DICOM, NIfTI, PNG or JPEG; check the path, or convert them."
        )
    return sorted(found_sources, key=lambda s: s.case_id), rejects


def read_source(source: Source, sha256: str = "") -> Scan:
    """Read the pixels of a source.

    Args:
        sha256: what `hash_source` gave, where that is known already.

    Raises:
        Refused: they are damaged, or no grid of grey values; carries code and sentence.
    """
    with ThreadPoolExecutor(1) as beside:  # hashing and decoding leave the interpreter to each other
        hashing = None if sha256 else beside.submit(hash_source, source)
        try:
            channels, findings = _read_channels(source)
        except Refused:
            raise
        except Exception as error:  # values of damaged headers are parsed where they are used, and may be anything
            name = type(error).__name__
            raise Refused("unreadable", f"The file is damaged ({name}); copy or export it again.") from error
    return Scan(
        case_id=source.case_id,
        patient_id=source.patient_id,
        channels=channels,
        modality=source.modality,
        kind=source.kind,
        source_kind=source.source_kind,
        source_files=source.parts[0].files if source.parts else source.files,
        source_sha256=hashing.result() if hashing else sha256,
        findings=findings,
    )


def hash_source(source: Source) -> str:
    """SHA-256 of the bytes of the file, or of the digests of several. Raises Refused when one cannot be read."""
    try:
        return sha256_file(source.files[0]) if len(source.files) == 1 else sha256_files(source.files)
    except OSError as error:
        raise Refused("unreadable", f"A file cannot be read ({error.strerror or 'I/O error'}).") from error


def _without_twins(files: list[File]) -> list[File]:
    """Of the files that several links or sources lead to, the last."""
    folder = cache(Path.resolve)
    paths = (file.path for file in files)
    resolved = (path.resolve() if path.is_symlink() else folder(path.parent) / path.name for path in paths)
    return list(dict(zip(resolved, files, strict=True)).values())


def _existing(source: Path) -> Path:
    if re.match(r"[a-z]+:/", str(source)):
        raise UserError(f"{source} is an address; this version reads folders, files and archives only.")
    if not source.exists():
        raise UserError(f"{source} does not exist; check the path.")
    return source.absolute()


def _chosen(files: list[File], pattern: str) -> list[File]:
    """The files that `ingest.image_path` means, each with what its path tells."""
    chosen = []
    for file in files:
        if match := re.search(pattern, file.path.as_posix(), re.IGNORECASE):
            groups = match.groupdict(default="")
            patient, exam = groups.get("patient", ""), groups.get("exam", "")
            chosen.append(replace(file, patient=patient, exam=exam, groups=groups))
    if not chosen:
        raise UserError(f"ingest.image_path {pattern!r} fits none of {len(files)} files; correct it, or the source.")
    return chosen


def _walk(path: Path, unpack_dir: Path | None, rejects: list[Reject], *, layouts: bool) -> Iterator[File]:
    """All files that may be images below one given path, archives unpacked; a nested archive may be refused."""
    if archives.is_archive(path):
        yield from _walk_folder(_unpack(path, unpack_dir), unpack_dir, rejects, layouts)
    elif path.is_file() and path.name.upper() == "DICOMDIR":
        yield from (File(file, path.parent) for file in _listed(path, path.parent, rejects))
    elif path.is_file():
        yield File(path, path.parent)
    else:
        yield from _walk_folder(path, unpack_dir, rejects, layouts)


def _walk_folder(root: Path, unpack_dir: Path | None, rejects: list[Reject], layouts: bool) -> Iterator[File]:
    folders, seen = [root], set()
    while folders:
        folder = folders.pop()
        identity = (folder.stat().st_dev, folder.stat().st_ino)
        if identity in seen:  # a link that leads in a circle
            continue
        seen.add(identity)
        if layouts and (layout := _layout_files(folder, root)) is not None:
            yield from layout
            continue
        for entry in _entries(folder):
            if entry.is_dir():
                folders.append(entry)
            elif archives.is_archive(entry):
                yield from _walk_nested(entry, root, unpack_dir, rejects, layouts)
            elif entry.is_file():
                if entry.name.upper() == "DICOMDIR":
                    _listed(entry, root, rejects)  # the walk finds the files; this finds what is missing
                yield File(entry, root)


def _listed(path: Path, root: Path, rejects: list[Reject]) -> list[Path]:
    """The files that a DICOMDIR lists; a reject says how many of them are not there, or that it cannot be read."""
    name = path.relative_to(root).as_posix()
    try:
        found, missing = dicom_directory.listed_files(path)
    except Refused as error:
        rejects.append(error.reject(name))
        return []
    if missing:
        reason = (
            f"The DICOMDIR lists {len(found) + missing} files, of which {missing} are not there; copy the disc again."
        )
        rejects.append(Reject(name, "missing_files", reason))
    return found


def _walk_nested(
    archive: Path, root: Path, unpack_dir: Path | None, rejects: list[Reject], layouts: bool
) -> Iterator[File]:
    """Files of an archive found in a folder: when it is refused, the rest of the folder still counts."""
    try:
        inner = _unpack(archive, unpack_dir)
    except UserError as error:
        rejects.append(Reject(archive.relative_to(root).as_posix(), "archive_refused", str(error)))
        return
    yield from _walk_folder(inner, unpack_dir, rejects, layouts)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if _wanted(entry))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror or error}); check its permissions.") from error


def _layout_files(folder: Path, root: Path) -> list[File] | None:
    """The images of a data set whose layout says where they are; None when the folder has no such layout."""
    for images, labels in _LAYOUTS:
        if (folder / images).is_dir() and (folder / labels).is_dir():
            about = folder / "dataset.json"
            suffixed = about.is_file() and "channel_names" in (read_json(about) or {})
            paths = sorted(path for path in (folder / images).rglob("*") if path.is_file() and _wanted(path))
            return [File(path, root, folder / labels, suffixed) for path in paths]
    return [file for file in bids_files(folder, root) if _wanted(file.path)] or None


def _wanted(path: Path) -> bool:
    """Not hidden, not what macOS adds, not results that a data set carries along."""
    return not path.name.startswith(".") and path.name not in _SKIPPED


def _unpack(archive: Path, unpack_dir: Path | None) -> Path:
    if unpack_dir is None:
        unpack_dir = Path(tempfile.mkdtemp(prefix="medseg-"))
        atexit.register(shutil.rmtree, unpack_dir, ignore_errors=True)
    unpack_dir.mkdir(parents=True, exist_ok=True)
    out_dir = Path(tempfile.mkdtemp(dir=unpack_dir)) / archive.name.split(".")[0]
    return archives.safe_unpack(archive, out_dir, max_bytes=_MAX_UNPACKED_BYTES, max_files=_MAX_UNPACKED_FILES)


def _recognise(
    files: list[File], config: IngestConfig, key: bytes, places: dict[str, Path]
) -> tuple[list[Source], list[Reject], int]:
    """Sort files by kind; also returns how many were passed over because they are no images."""
    rejects: list[Reject] = []
    plain: list[File] = []
    candidates: list[File] = []
    for file in files:
        name = file.path.name.lower()
        if name.endswith((*NIFTI, *PICTURE)):
            plain.append(file)
        elif name.endswith(_FOREIGN):
            reason = f"{file.path.suffix} images are not read; convert the file to NIfTI, or to PNG."
            rejects.append(Reject(name_of(file), "unsupported_format", reason))
        else:
            candidates.append(file)
    headers, damaged, others = dicom_headers.read_headers([(file.path, file.root) for file in candidates])
    rejects += [
        error.reject(str(path.relative_to(root) if path.is_relative_to(root) else path.name))
        for path, root, error in damaged
    ]
    roots = {file.path: file for file in candidates}
    passed_over = 0
    for path in others:
        if path.suffix.lower() in (".dcm", ".dicom", ".ima"):
            reason = "The file is named like DICOM and is none; remove it or export it again."
            rejects.append(Reject(name_of(roots[path]), "not_dicom", reason))
        else:
            passed_over += 1
    sources, refused, folders = dicom.group(headers, config, key)
    places.update(folders)
    by_path = {file.path: file for file in candidates}
    sources = [_placed(source, by_path[source.files[0]], config) for source in sources]
    for made in plain_sources(plain, config):
        if isinstance(made, Reject):
            rejects.append(made)
        else:
            sources.append(made)
    return sources, [*rejects, *refused], passed_over


def _placed(source: Source, file: File, config: IngestConfig) -> Source:
    """A DICOM source with what the place of its first file tells."""
    return replace(source, label_dir=file.label_dir, label_path=file.label_path(config), exam=file.exam)


def _read_channels(source: Source) -> tuple[tuple[Volume, ...], tuple[Finding, ...]]:
    if source.parts:
        read = [_read_channels(part) for part in source.parts]
        channels = [channel for found, _ in read for channel in found]
        nifti.check_one_grid(channels)
        return tuple(channels), tuple(finding for _, found in read for finding in found)
    if source.source_kind == "nifti":
        return nifti.as_meant(*nifti.read_channels(source.files), source.offset_hu, source.orientation)
    if source.source_kind == "png":
        image, findings = radiograph.read_picture(source.files[0])
    elif source.kind == "radiograph":
        image, findings = dicom_radiograph.read_radiograph(source)
    else:
        image, findings = dicom_pixels.read_series(source)
    return (image,), findings
