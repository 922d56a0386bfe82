"""Read a label map and hold it against its image and the task: one grid, whole numbers, known values."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Finding
from medseg.config import TaskConfig
from medseg.ingest.nifti import grid_offset_mm, grid_tolerance_mm, read_channels
from medseg.ingest.radiograph import read_picture
from medseg.ingest.scan import Refused
from medseg.volume import Volume, from_canonical, to_canonical

_SHOWN_VALUES = 5


def read_label(
    path: Path, image: Volume, task: TaskConfig, threshold: int | None
) -> tuple[Volume, tuple[Finding, ...]]:
    """Read the label of a case onto the image's grid; axes may be stored in another order, nothing is interpolated.

    Args:
        path: NIfTI or PNG.
        image: first channel of the case.
        task: its label values count for segmentation; a classifier's label map is evidence and may hold any.
        threshold: values above it become 1, all others 0; None takes the values as they are.

    Returns:
        uint8 or uint16 label map with the image's affine, and findings.

    Raises:
        Refused: unreadable, on another grid (with the offset in mm), fractions, values that the task does not name.
    """
    try:
        label = _on_grid(_read(path), image)
        grey = np.asarray(label.array, dtype=label.array.dtype)  # any numeric type from here on
        array: NDArray[Any] = _whole_numbers(grey) if threshold is None else np.uint8(1) * (grey > threshold)
    except Refused as error:
        raise Refused(error.code, f"Its label: {error.reason}") from error
    values = np.unique(array)
    _check_values(values, task)
    findings = []
    if values.max() == 0:
        findings.append(Finding("empty_label", "warning", "The label map is empty: no voxel is labelled.", 0, 1))
    dtype = np.uint8 if values.max() <= 255 else np.uint16
    return Volume(np.ascontiguousarray(array, dtype=dtype), image.affine), tuple(findings)


def label_values(path: Path) -> set[int]:
    """The values that a label map holds, 0 to 65535. Raises Refused as `read_label` does."""
    return {int(value) for value in np.unique(_whole_numbers(_read(path).array))}


def _read(path: Path) -> Volume:
    if path.suffix.lower() == ".png":
        return read_picture(path)[0]
    channels, _ = read_channels((path,))
    if len(channels) > 1:
        raise Refused("label_channels", f"It has {len(channels)} channels; one integer map is needed.")
    return channels[0]


def _on_grid(label: Volume, image: Volume) -> Volume:
    if image.array.ndim != label.array.ndim:
        raise Refused("label_grid", f"It has {label.array.ndim} axes, the image {image.array.ndim}.")
    if image.array.ndim == 2:
        if image.array.shape != label.array.shape:
            raise Refused("label_grid", f"It has shape {label.array.shape}, the image {image.array.shape}.")
        return label
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
