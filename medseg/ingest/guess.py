"""The task when no config gives it: what the scans and their labels say, beneath whatever `--set` says.

Names come from `dataset.json` (Decathlon and nnU-Net), classes from the table, else the values in the label maps are
counted and named `label_1`, `label_2`, … A guess is marked as one in `cohort.json`, so that training may rename it.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from medseg.config import Config, IngestConfig, ReportConfig, TaskConfig, apply_override, validate_config
from medseg.files import UserError, read_json, read_rows
from medseg.ingest.label_maps import label_files, label_values
from medseg.ingest.labels import match
from medseg.ingest.scan import Refused, Source
from medseg.label_sets import EMPTY, read_set
from medseg.progress import tracked

TaskKind = Literal["segmentation", "classification"]
Item = TypeVar("Item")
Found = TypeVar("Found")
_WORKERS = 4
_SPARE_NAMES = 8  # how many names may stand for values that no label map holds, beyond one for each that is held


@dataclass(frozen=True)
class Draft:
    """A config whose task is still open.

    Attributes:
        given: the tree of fields that `--set` gives.
        ingest, report: the settings, complete.
    """

    given: Mapping[str, Any]
    ingest: IngestConfig
    report: ReportConfig

    @property
    def guesses_labels(self) -> bool:
        """Whether the label names follow from the data, not from `--set`."""
        return "labels" not in self.given.get("task", {})

    def settle(self, found: Sequence[Source], labels: Path | None) -> Config:
        """The whole config, its task as given and, where not given, as guessed.

        Raises:
            UserError: the labels cannot be used, or what is given does not fit together.
        """
        given = self.given.get("task", {})
        guessed = guess_task(
            found,
            labels,
            self.ingest,
            kind=given.get("kind"),
            named=not self.guesses_labels,
            multi_label=bool(given.get("multi_label")),
        )
        return _config(self.given, {**guessed.model_dump(mode="json"), **given})


def draft_config(overrides: Sequence[str]) -> Draft:
    """The draft that `a.b=c` overrides make of the defaults.

    Raises:
        UserError: an override is malformed, names an unknown field or has a wrong value.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        apply_override(tree, override)
    given = tree.get("task", {})
    if not isinstance(given, dict):
        raise UserError(f"--set task={given!r}: task is a group of fields; set task.labels, say.")
    first = 0 if given.get("kind") == "classification" else 1
    ingest = tree.get("ingest", {})
    named = ingest.get("channels") if isinstance(ingest, dict) else None
    channels = {"channels": tuple(named)} if named and isinstance(named, dict) else {}
    open_task = {"kind": "segmentation", **channels, **given, "labels": {"label": first}, "multi_label": False}
    rest = {name: value for name, value in tree.items() if name not in ("model", "loss")}  # they depend on the task
    start = _config(rest, open_task)
    return Draft(tree, start.ingest, start.report)


def guess_task(
    found: Sequence[Source],
    labels: Path | None,
    config: IngestConfig,
    *,
    kind: TaskKind | None = None,
    named: bool = False,
    multi_label: bool = False,
) -> TaskConfig:
    """The task that scans and labels are made for.

    A table with classes makes it a classification; anything else is a segmentation, with one label `label_1` when no
    label map says more. Dimensions and channels are those of most scans.

    Args:
        found: the scans.
        labels: folder or CSV; None takes what the layout of the scans brings.
        kind: the kind if it is known.
        named: the labels are known, so that no label map need be read; the names in the task mean nothing then.
        multi_label: a class cell of the table holds a set of labels.

    Raises:
        UserError: the labels cannot be used as a whole, or say nothing about the classes of a classification.
    """
    classes = _classes(labels, config, multi_label) if labels is not None and kind != "segmentation" else []
    kind = kind or ("classification" if classes else "segmentation")
    if named:
        names = {"label": int(kind == "segmentation")}
    elif kind == "segmentation":
        names = _label_names(found, labels, config)
    elif classes:
        names = {name: index for index, name in enumerate(classes)}
    else:
        raise UserError(
            "task.kind is classification, but no table names a class; give --labels CSV with column "
            f"ingest.table.target {config.table.target!r}, or set task.labels."
        )
    kinds = Counter(source.kind for source in found)
    flat = kinds["radiograph"] > kinds["volume"]
    count = _channels([source for source in found if (source.kind == "radiograph") == flat])
    channels = ("image",) if count == 1 else tuple(f"image_{number}" for number in range(count))
    channels = tuple(config.channels) or channels
    return TaskConfig(kind=kind, labels=names, channels=channels, spatial_dims=2 if flat else 3)


def check_declared(found: Sequence[Source], task: TaskConfig, config: IngestConfig) -> None:
    """Hold the task against what the data sets that the scans belong to declare themselves.

    Raises:
        UserError: a `dataset.json` gives a label of the task another value.
    """
    for folder in sorted({source.label_dir.parent for source in found if source.label_dir}):
        for name, value in _slugs(_declared(folder / "dataset.json")).items():
            value = config.label_values.get(value, value)
            if task.kind == "segmentation" and task.labels.get(name, value) != value:
                raise UserError(
                    f"task.labels gives {name!r} the value {task.labels[name]}, but {folder / 'dataset.json'} gives it "
                    f"{value}; correct task.labels."
                )


def _config(tree: Mapping[str, Any], task: Mapping[str, Any]) -> Config:
    """A whole config around a task. Ingest uses no network; one that fits the task makes the tree valid."""
    classifier = task.get("kind") == "classification"
    loss = "binary_cross_entropy" if task.get("multi_label") else "cross_entropy"
    usual = {
        "name": "ingest",
        "model": {"name": "densenet" if classifier else "unet"},
        "loss": {"name": loss if classifier else "dice_ce"},
    }
    return validate_config({**usual, **tree, "task": dict(task)}, "--set")


def _classes(labels: Path, config: IngestConfig, multi_label: bool) -> list[str]:
    """The classes in a table, numbers by size before words by alphabet; none when it has no such column."""
    if labels.suffix.lower() != ".csv" or not labels.is_file():
        return []
    rows = read_rows(labels)
    columns, table = list(rows[0]) if rows else [], config.table
    if rows and table.target not in columns and table.label and table.label not in columns:
        raise UserError(
            f"{labels} has neither column {table.target!r} nor {table.label!r} (it has {', '.join(columns)}); "
            "set ingest.table.target for classes, or ingest.table.label for label maps."
        )
    cells = {(row.get(table.target) or "").strip() for row in rows} - {""}
    if multi_label:
        cells = {name for cell in cells for name in read_set(cell)}
    return sorted(
        {config.target_names.get(cell, cell) for cell in cells} - ({EMPTY} if multi_label else set()),
        key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name),
    )


def _label_names(found: Sequence[Source], labels: Path | None, config: IngestConfig) -> dict[str, int]:
    """Names of the values 1, 2, … up to the largest that the data set declares or its label maps hold."""
    any_labels = TaskConfig(kind="segmentation", labels={"label": 1})
    pairs, _ = match(found, labels, config, any_labels)
    maps = [truth.label for _, truth in pairs if truth.label is not None]
    folders = {labels} if labels is not None else {source.label_dir for source in found if source.label_dir}
    declared = [_declared(folder.parent / "dataset.json") for folder in sorted(folders) if folder.is_dir()]
    names = _merged(declared)
    if config.label_files == "one_per_label":
        return _structures(maps)
    if config.label_threshold is not None:
        values = {1}
    elif declared and all(declared):
        values = set(names)
    else:
        values = set(names).union(*_each(partial(_values, config=config), maps, "Reading label values"))
    top = max(values, default=1)
    if top > 2 * len(values) + _SPARE_NAMES:
        raise UserError(
            f"the label maps hold {len(values)} values up to {top}, too few to be labels 1 to {top}; "
            "number them 1, 2, …, or set ingest.label_threshold for grey masks."
        )
    return _slugs({value: names.get(value, "") for value in range(1, top + 1)})


def _declared(path: Path) -> dict[int, str]:
    """Value to name as `dataset.json` has it, without background; empty when it does not name single values.

    Decathlon writes {"1": "Anterior"}, nnU-Net {"Anterior": 1}, or lists of values for regions that overlap.
    """
    about = read_json(path) if path.is_file() else {}
    labels = about.get("labels") if isinstance(about, dict) else None
    names: dict[int, str] = {}
    for key, item in labels.items() if isinstance(labels, dict) else ():
        if isinstance(item, int):
            names[item] = key
        elif key.isdecimal() and isinstance(item, str):
            names[int(key)] = item
        else:
            return {}
    return {value: name for value, name in names.items() if value > 0}


def _merged(declared: Iterable[Mapping[int, str]]) -> dict[int, str]:
    merged: dict[int, str] = {}
    for names in declared:
        for value, name in names.items():
            if (other := merged.setdefault(value, name)) != name:
                raise UserError(
                    f"one data set calls label {value} {other!r}, another {name!r}; "
                    "ingest them apart, or set task.labels."
                )
    return merged


def _slugs(names: Mapping[int, str]) -> dict[str, int]:
    """Names fit for columns and files, each once; `label_<value>` where there is none."""
    slugs: dict[str, int] = {}
    for value, name in names.items():
        slug = re.sub(r"\W+", "_", name.casefold()).strip("_") or f"label_{value}"
        slugs[f"{slug}_{value}" if slug in slugs else slug] = value
    return slugs


def _structures(folders: Sequence[Path]) -> dict[str, int]:
    """The structures that folders of masks hold, numbered in the order of their names."""
    names = sorted({name for folder in folders for name in label_files(folder)})
    return {name: value for value, name in enumerate(names, start=1)} or {"label_1": 1}


def _values(label: Path, config: IngestConfig) -> set[int]:
    """The values above 0 of one label map; none when it cannot be read, which is told when its case is made."""
    try:
        return label_values(label, config) - {0}
    except Refused:
        return set()


def _channels(sources: Sequence[Source]) -> int:
    """How many channels most scans have."""
    counts = Counter(_each(_channel_count, sources, "Reading headers"))
    return counts.most_common(1)[0][0] if counts else 1


def _channel_count(source: Source) -> int:
    if source.source_kind != "nifti" or len(source.files) > 1:
        return 1 if source.source_kind != "nifti" else len(source.files)
    import nibabel as nib

    try:
        image: Any = nib.load(source.files[0])
        shape = tuple(image.shape)
    except Exception:  # damaged files raise anything; the reason is told when the case is made
        return 1
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return int(shape[3]) if len(shape) == 4 else 1


def _each(function: Callable[[Item], Found], items: Sequence[Item], description: str) -> list[Found]:
    """`function` of every item, in a few threads."""
    with ThreadPoolExecutor(max_workers=_WORKERS) as pool:
        return list(tracked(pool.map(function, items), description, len(items)))
