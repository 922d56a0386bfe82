"""What is known about each scan: its label map, its class, its patient, site and split; and whether that fits.

Labels come from a folder (a file named like the scan, its folder or its patient), from a table, or from the layout
of a published data set. Once labels are given, a scan without one is rejected, and so is a label without a scan.
Reasons quote no cell and no file name, which may identify a patient.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medseg.cohort import SPLITS, Reject
from medseg.config import IngestConfig, TaskConfig
from medseg.files import UserError, read_rows
from medseg.ingest.label_maps import LABEL_SUFFIXES
from medseg.ingest.scan import Source, stem_of
from medseg.label_sets import read_set, write_set

_ENDINGS = ("", "_seg", "_label", "_labels", "_mask", "_dseg")
_NOT_GIVEN = "no_label"


@dataclass(frozen=True)
class Truth:
    """What the labels say about one case; empty where they say nothing. The label may be a folder of masks.

    `annotated`: the structures of which the label tells, as `label_sets` writes them.
    """

    label: Path | None = field(default=None, repr=False)
    target: str = ""
    patient: str = field(default="", repr=False)
    site: str = ""
    split: str = ""
    exam: str = field(default="", repr=False)
    annotated: str = ""


Matched = tuple[list[tuple[Source, Truth]], list[Reject]]


def match(sources: Sequence[Source], labels: Path | None, config: IngestConfig, task: TaskConfig) -> Matched:
    """Give each source its truth.

    Args:
        sources: what was found.
        labels: a folder or a CSV; None takes what the layout of the sources brings, if anything.

    Returns:
        The sources that may go on, each with its truth, and the rejects on both sides.

    Raises:
        UserError: the labels do not exist, are empty, or the table lacks a column or contradicts itself.
    """
    if config.label_path and (labels is None or labels.is_dir()):
        return _match_paths(sources, labels, config)
    if config.label_files == "one_per_label" and (labels is None or labels.is_dir()):
        raise UserError("ingest.label_files 'one_per_label' needs ingest.label_path: where each case's folder lies.")
    if labels is None:
        return _match_layouts(sources)
    if labels.is_dir():
        return _match_folder(sources, labels)
    if not labels.is_file():
        raise UserError(f"labels {labels} do not exist; give a folder of label files, or a CSV.")
    if labels.suffix.lower() != ".csv":
        raise UserError(f"labels {labels} are neither a folder nor a .csv table.")
    return _match_table(sources, labels.absolute(), config, task)


def _match_paths(sources: Sequence[Source], folder: Path | None, config: IngestConfig) -> Matched:
    """Labels at the places that `ingest.label_path` says; in a folder of labels, what no image means is a reject."""
    places = {s.case_id: _absolute((folder or s.files[0].parent) / s.label_path) for s in sources}
    uses = Counter(places.values())
    pairs, rejects = [], []
    for source in sources:
        place = places[source.case_id]
        if not _is_label(place, config):
            reason = "Nothing lies where ingest.label_path says; add its label, or correct the setting."
            rejects.append(Reject(source.name, _NOT_GIVEN, reason))
        elif uses[place] > 1:
            rejects.append(_ambiguous(source, uses[place]))
        else:
            pairs.append((source, Truth(label=place)))
    if folder is not None and config.label_files == "map":
        rejects += _without_image(_label_files(folder), folder, set(map(str, places.values())))
    return pairs, rejects


def _is_label(path: Path, config: IngestConfig) -> bool:
    return path.is_dir() if config.label_files == "one_per_label" else path.is_file()


def _match_layouts(sources: Sequence[Source]) -> Matched:
    by_folder: dict[Path | None, list[Source]] = defaultdict(list)
    for source in sources:
        by_folder[source.label_dir].append(source)
    alone = by_folder.pop(None, [])
    lacking = [source for source in alone if source.label is None and any(other.label for other in alone)]
    pairs = [(source, Truth(label=source.label)) for source in alone if source not in lacking]
    rejects = [
        Reject(source.name, _NOT_GIVEN, "No file beside it matches ingest.label_name; add its label map.")
        for source in lacking
    ]
    for folder, members in by_folder.items():
        assert folder is not None
        found, refused = _match_folder(members, folder)
        pairs += found
        rejects += refused
    return pairs, rejects


def _match_folder(sources: Sequence[Source], folder: Path) -> Matched:
    files = _label_files(folder)
    by_stem: dict[str, Path] = {}
    for file in files:
        if (other := by_stem.setdefault(stem_of(file), file)) != file:
            raise UserError(f"labels {file} and {other} have one name; keep one label per case.")
    chosen = {s.case_id: _label_for(s, by_stem) for s in sources}
    uses = Counter(path for path in chosen.values() if path is not None)
    pairs, rejects = [], []
    for source in sources:
        path = chosen[source.case_id]
        if path is None:
            reason = "No label file is named like this image; add its label, or leave the image out."
            rejects.append(Reject(source.name, _NOT_GIVEN, reason))
        elif uses[path] > 1:
            rejects.append(_ambiguous(source, uses[path]))
        else:
            pairs.append((source, Truth(label=path)))
    return pairs, [*rejects, *_without_image(files, folder, set(map(str, uses)))]


def _label_files(folder: Path) -> list[Path]:
    files = sorted(
        path
        for path in folder.absolute().rglob("*")
        if path.name.lower().endswith(LABEL_SUFFIXES) and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise UserError(f"labels {folder} hold no .nii, .nii.gz or .png file; check the path.")
    return files


def _ambiguous(source: Source, images: int) -> Reject:
    reason = f"{images} images fit one label file; name each label like its own image."
    return Reject(source.name, "ambiguous_label", reason)


def _without_image(files: Sequence[Path], folder: Path, used: set[str]) -> Iterator[Reject]:
    for file in files:
        if str(file) not in used and str(_absolute(file)) not in used:
            reason = "No image is named like this label; add the image, or remove the label."
            name = f"{folder.name}/{file.relative_to(folder.absolute()).as_posix()}"
            yield Reject(name, "label_without_image", reason)


def _label_for(source: Source, by_stem: Mapping[str, Path]) -> Path | None:
    for name in (source.case_id, *source.match_names):
        for ending in _ENDINGS:
            path = by_stem.get(name + ending)
            if path is not None and path not in source.files:
                return path
    return None


def _match_table(sources: Sequence[Source], table: Path, config: IngestConfig, task: TaskConfig) -> Matched:
    rows = read_rows(table)
    if not rows:
        raise UserError(f"{table} has no rows; a labels table needs one per image.")
    columns = _columns(table, rows, config, task)
    not_images = {path for row in rows for path in _other_files(row, table.parent, columns["image"])}
    finder = _Finder(sources)
    pairs: list[tuple[Source, Truth]] = []
    rejects: list[Reject] = []
    used: dict[str, int] = {}
    for number, row in enumerate(rows, start=2):
        cell = row[columns["image"]].strip()
        source = finder.find(cell, table.parent)
        if source is None:
            reason = f"Line {number} of the labels table names this image, and it was not found once."
            rejects.append(Reject(cell or f"line {number}", "image_not_found", reason))
            continue
        if source.case_id in used:
            raise UserError(f"{table}: lines {used[source.case_id]} and {number} name one image, {cell!r}; keep one.")
        used[source.case_id] = number
        truth = _truth(row, columns, table, number, config, task)
        reject = _lacking(source, truth, columns, task, config, number)
        if reject is None:
            pairs.append((source, truth))
        else:
            rejects.append(reject)
    for source in sources:
        if source.case_id not in used and not not_images.issuperset(map(_absolute, source.files)):
            reason = "No line of the labels table names this image; add one, or leave the image out."
            rejects.append(Reject(source.name, _NOT_GIVEN, reason))
    return pairs, rejects


def _columns(table: Path, rows: Sequence[Mapping[str, str]], config: IngestConfig, task: TaskConfig) -> dict[str, str]:
    """Field of `ingest.table` to column name, of those that are there. A column asked for by name must be."""
    present = rows[0].keys()
    wanted = config.table.model_dump()
    needed = {"image", "target" if task.kind == "classification" else "label"} | config.table.model_fields_set
    for name in needed:
        column = wanted[name]
        if column and column not in present:
            have = ", ".join(present)
            raise UserError(f"{table} has no column {column!r} (it has {have}); set ingest.table.{name}.")
        if not column and name in ("image", "target"):
            raise UserError(f"ingest.table.{name} is empty; name the column of {table} that holds it.")
    return {name: column for name, column in wanted.items() if column and column in present}


def _truth(
    row: Mapping[str, str],
    columns: Mapping[str, str],
    table: Path,
    number: int,
    config: IngestConfig,
    task: TaskConfig,
) -> Truth:
    cells = {name: (row[column] or "").strip() for name, column in columns.items()}
    split = cells.get("split", "")
    if split not in ("", *SPLITS):
        raise UserError(f"{table}, line {number}: split {split!r} is none of {', '.join(SPLITS)}.")
    label = cells.get("label", "")
    return Truth(
        label=table.parent / label if label else None,
        target=_target(cells.get("target", ""), config, task),
        patient=cells.get("patient", ""),
        site=cells.get("site", ""),
        split=split,
        exam=cells.get("exam", ""),
        annotated=write_set(read_set(cells["annotated"]), task.labels) if cells.get("annotated") else "",
    )


def _target(cell: str, config: IngestConfig, task: TaskConfig) -> str:
    """The class of a cell, or its set of labels in the order of their values; names are mapped one by one."""
    if not task.multi_label or not cell:
        return config.target_names.get(cell, cell)
    return write_set((config.target_names.get(name, name) for name in read_set(cell)), task.labels)


def _lacking(
    source: Source, truth: Truth, columns: Mapping[str, str], task: TaskConfig, config: IngestConfig, number: int
) -> Reject | None:
    if truth.label is not None and not _is_label(truth.label, config):
        reason = "Its label file does not exist; correct ingest.table.label or the table."
        return Reject(source.name, "label_not_found", reason)
    if task.kind == "segmentation":
        if truth.label is None and "label" in columns:
            return Reject(source.name, _NOT_GIVEN, "Its label cell is empty; add the label's path.")
        return None
    if not truth.target:
        return Reject(source.name, "no_target", f"Its cell in column {columns['target']!r} is empty.")
    if not set(read_set(truth.target) if task.multi_label else (truth.target,)) <= task.labels.keys():
        names = ", ".join(task.labels)
        reason = (
            f"{'A label of its' if task.multi_label else 'Its class'}, in line {number} of the labels table, is not in "
            f"task.labels ({names}); add it, or map it by ingest.target_names."
        )
        return Reject(source.name, "unknown_target", reason)
    return None


def _other_files(row: Mapping[str, str], folder: Path, image_column: str) -> Iterator[Path]:
    """Files that a row names outside its image column: masks and the like, which are no images of their own."""
    for column, cell in row.items():
        if column != image_column and cell and cell.lower().endswith(LABEL_SUFFIXES):
            yield _absolute(folder / cell)


def _absolute(path: Path) -> Path:
    """Without `..`, and without following links, so that equal spellings of one place compare equal."""
    return Path(os.path.abspath(path))


class _Finder:
    """Looks up the one source that a cell means: by path, by file or folder name, by stem, by patient."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._by_path: dict[Path, set[str]] = defaultdict(set)
        self._by_name: dict[str, set[str]] = defaultdict(set)
        self._sources = {source.case_id: source for source in sources}
        for source in sources:
            for path in source.files:
                self._by_path[_absolute(path)].add(source.case_id)
                self._by_path[_absolute(path.parent)].add(source.case_id)
            for name in (*(path.name for path in source.files), source.case_id, *source.match_names):
                self._by_name[name].add(source.case_id)

    def find(self, cell: str, folder: Path) -> Source | None:
        """None when the cell fits no source, or several."""
        if not cell:
            return None
        path = Path(cell)
        for found in (
            self._by_path.get(_absolute(folder / path)),
            self._by_name.get(path.name),
            self._by_name.get(stem_of(path)),
        ):
            if found and len(found) == 1:
                return self._sources[next(iter(found))]
        return None
