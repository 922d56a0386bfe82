"""Read a label map and hold it against its image and the task: one grid, whole numbers, known values."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Finding
from medseg.config import IngestConfig, TaskConfig
from medseg.ingest.nifti import grid_offset_mm, grid_tolerance_mm, read_channels
from medseg.ingest.radiograph import read_picture
from medseg.ingest.scan import Refused, stem_of
from medseg.label_sets import read_set, write_set
from medseg.volume import Volume, from_canonical, to_canonical

LABEL_SUFFIXES = (".nii.gz", ".nii", ".png")
_SHOWN_VALUES = 5


def read_label(path: Path, image: Volume, task: TaskConfig, config: IngestConfig) -> tuple[Volume, tuple[Finding, ...]]:
    """Read the label of a case onto the image's grid; axes may be stored in another order, nothing is interpolated.

    Args:
        path: NIfTI or PNG, or a folder of binary masks where `config.label_files` says so.
        image: first channel of the case.
        task: its label values count for segmentation; a classifier's label map is evidence and may hold any.
        config: `label_threshold`, `label_values`, `label_files` and `label_grid` count.

    Returns:
        uint8 or uint16 label map with the image's affine, and findings.

    Raises:
        Refused: unreadable, on another grid (with the offset in mm), fractions, values that the task does not name.
    """
    findings = []
    try:
        if config.label_files == "one_per_label":
            array, overlap = _combined(path, image, task, config)
            if overlap:
                message = "Voxels belong to several structures; each has the one with the highest value."
                findings.append(Finding("label_overlap", "warning", message, overlap, 0))
        else:
            array = _values(_on_grid(_read(path), image, config), config)
    except Refused as error:
        raise Refused(error.code, f"Its label: {error.reason}") from error
    values = np.unique(array)
    _check_values(values, task)
    if values.max() == 0:
        findings.append(Finding("empty_label", "warning", "The label map is empty: no voxel is labelled.", 0, 1))
    dtype = np.uint8 if values.max() <= 255 else np.uint16
    return Volume(np.ascontiguousarray(array, dtype=dtype), image.affine), tuple(findings)


def annotated(path: Path, label: Volume, listed: str, task: TaskConfig, config: IngestConfig) -> str:
    """The structures of which a label tells, as `Case.annotated` has them.

    Args:
        path, label: where it was read from, and what was read.
        listed: the structures as somebody listed them, which counts before `config.label_missing`; empty when nobody
            did.

    Raises:
        Refused: the list names no structure of the task, or lacks one that the label holds; or there is none.
    """
    if task.kind != "segmentation" or (not listed and config.label_missing == "absent"):
        return ""
    values = set(np.unique(label.array).tolist())
    held = {name for name, value in task.labels.items() if value in values}
    if listed:
        names = set(read_set(listed))
        if wrong := sorted(names - task.labels.keys()):
            known = ", ".join(task.labels)
            reason = f"Its list of annotated structures names {wrong[0]!r}, which is not in task.labels ({known})."
            raise Refused("unknown_label", reason)
        if wrong := sorted(held - names):
            reason = f"Its label holds {wrong[0]!r}, which its list of annotated structures lacks; correct one of them."
            raise Refused("label_not_listed", reason)
    else:
        one_file_each = config.label_files == "one_per_label"
        names = held | (label_files(path).keys() & task.labels.keys() if one_file_each else set())
    if not names:
        raise Refused("nothing_annotated", "None of its structures is contoured; contour some, or leave it out.")
    return "" if len(names) == len(task.labels) else write_set(names, task.labels)


def label_values(path: Path, config: IngestConfig) -> set[int]:
    """The values of a label map, 0 to 65535, as `config.label_values` has them. Raises Refused as `read_label` does."""
    found = np.unique(_whole_numbers(_read(path).array))
    return {int(value) for value in _renumbered(found, config.label_values)}


def label_files(path: Path) -> dict[str, Path]:
    """The mask of each structure by its name, in a folder that holds one file per structure."""
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    return {stem_of(file): file for file in files if file.name.lower().endswith(LABEL_SUFFIXES)}


def label_inputs(path: Path, task: TaskConfig, config: IngestConfig) -> list[Path]:
    """The files that a label is made of."""
    if config.label_files == "map":
        return [path]
    return [file for name, file in label_files(path).items() if name in task.labels]


def _combined(path: Path, image: Volume, task: TaskConfig, config: IngestConfig) -> tuple[NDArray[Any], int]:
    """One label map of the masks of all structures; and how many voxels more than one of them claims."""
    files = label_files(path)
    missing = [name for name in task.labels if name not in files]
    if missing and config.label_missing == "absent":
        raise Refused(
            "label_incomplete",
            f"It has no mask of {', '.join(missing[:_SHOWN_VALUES])} ({len(missing)} of {len(task.labels)} missing); "
            "add an empty mask where a structure is absent, leave it out of task.labels, or set ingest.label_missing.",
        )
    top = max(task.labels.values())
    array = np.zeros(image.array.shape, dtype=np.uint8 if top <= 255 else np.uint16)
    twice = np.zeros(image.array.shape, dtype=np.bool_)
    for name, value in sorted(task.labels.items(), key=lambda item: item[1]):
        if name in missing:
            continue
        mask = _values(_on_grid(_read(files[name]), image, config), config) > 0
        twice |= mask & (array > 0)
        array[mask] = value
    return array, int(twice.sum())


def _values(label: Volume, config: IngestConfig) -> NDArray[Any]:
    """Whole numbers of a label map, after the threshold or the renumbering that the config asks for."""
    grey = np.asarray(label.array, dtype=label.array.dtype)  # any numeric type from here on
    if config.label_threshold is not None:
        return np.uint8(1) * (grey > config.label_threshold)
    return _renumbered(_whole_numbers(grey), config.label_values)


def _renumbered(array: NDArray[Any], values: Mapping[int, int]) -> NDArray[Any]:
    if not values:
        return array
    renumbered = array.astype(np.uint16)
    for old, new in values.items():  # compared with what was read, so that values can change places
        renumbered[array == old] = new
    return renumbered


def _read(path: Path) -> Volume:
    if path.suffix.lower() == ".png":
        return read_picture(path)[0]
    channels, _ = read_channels((path,))
    if len(channels) > 1:
        raise Refused("label_channels", f"It has {len(channels)} channels; one integer map is needed.")
    return channels[0]


def _on_grid(label: Volume, image: Volume, config: IngestConfig) -> Volume:
    if image.array.ndim != label.array.ndim:
        raise Refused("label_grid", f"It has {label.array.ndim} axes, the image {image.array.ndim}.")
    if image.array.ndim == 2:
        if image.array.shape != label.array.shape:
            raise Refused("label_grid", f"It has shape {label.array.shape}, the image {image.array.shape}.")
        return label
    if config.label_grid == "image":
        if image.array.shape != label.array.shape:
            raise Refused("label_grid", f"It has shape {label.array.shape}, the image {image.array.shape}.")
        return replace(label, affine=image.affine)
    limit = grid_tolerance_mm(image)
    offset = grid_offset_mm(image, label)
    if offset is None or offset > limit:
        label = _reoriented(label, image)
        offset = grid_offset_mm(image, label) or 0.0
    if offset > limit:
        raise Refused("label_grid", f"Its grid lies {offset:.3g} mm from the image's ({limit:.3g} mm allowed).")
    return label


def _reoriented(label: Volume, image: Volume) -> Volume:
    """The label with its axes permuted and flipped as the image's are stored."""
    canonical = to_canonical(label)
    frame = to_canonical(Volume(np.empty(image.array.shape, dtype=np.bool_), image.affine))
    if grid_offset_mm(canonical, frame) is None:
        raise Refused("label_grid", f"It has shape {label.array.shape}, the image {image.array.shape}.")
    array = from_canonical(canonical.array, image.affine)
    # The image's own affine, moved by as much as the two canonical grids differ.
    return Volume(array, canonical.affine @ np.linalg.inv(frame.affine) @ image.affine)


def _whole_numbers(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise Refused("label_not_finite", "It holds values that are no numbers.")
        rounded = np.rint(array)
        if (difference := np.abs(array - rounded)).max() > 1e-3:
            worst = array.reshape(-1)[int(difference.argmax())]
            raise Refused(
                "label_not_integer",
                f"It holds {worst:g}; labels are whole numbers (a grey mask needs ingest.label_threshold).",
            )
        array = rounded.astype(np.int64)
    if array.min() < 0 or array.max() > 65535:
        extreme = array.min() if array.min() < 0 else array.max()
        raise Refused("label_value", f"It holds {extreme}; label values lie between 0 and 65535.")
    return array


def _check_values(values: NDArray[Any], task: TaskConfig) -> None:
    if task.kind != "segmentation":
        return
    unknown = [int(value) for value in values if value not in (0, *task.labels.values())]
    if unknown:
        shown = ", ".join(str(value) for value in unknown[:_SHOWN_VALUES])
        more = f" and {len(unknown) - _SHOWN_VALUES} more" if len(unknown) > _SHOWN_VALUES else ""
        known = ", ".join(f"{label} {value}" for label, value in task.labels.items())
        raise Refused(
            "label_value",
            f"Its label holds {shown}{more}, which task.labels does not name ({known}); add or correct it.",
        )
