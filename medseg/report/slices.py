"""Which slices to show and how they lie on the page: radiological order, millimetre aspect, grey window.

Volumes are brought to canonical axes (R, A, S) without interpolation, so what is shown are the scan's own slices. The
patient's right is on the viewer's left; sagittal slices look from the patient's left, anterior on the left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.files import UserError, read_json
from medseg.images import read_image
from medseg.volume import Affine, resample, spacing_of, to_canonical

Array = NDArray[np.generic]
Float32 = NDArray[np.float32]

AIR_HU = -500.0
SOFT_TISSUE_HU = (-160.0, 240.0)
CONTEXT = 2.0
MIN_CROP_MM = 80.0


@dataclass(frozen=True)
class Plane:
    """One of three orthogonal views: the canonical axis it cuts, and what lies at the edges of the picture."""

    name: str
    axis: int
    columns: int
    rows: int
    left: str
    right: str
    top: str
    bottom: str


PLANES = (
    Plane("axial", 2, 0, 1, "R", "L", "A", "P"),
    Plane("coronal", 1, 0, 2, "R", "L", "S", "I"),
    Plane("sagittal", 0, 1, 2, "A", "P", "S", "I"),
)


@dataclass(frozen=True)
class Heat:
    """An activation map on the grid of the image.

    Attributes:
        array: float32, raw. raw_min, raw_max: as the method gave them. evidence: False when it found nothing.
        method, target: what made it, and for which class.
    """

    array: Float32
    raw_min: float
    raw_max: float
    evidence: bool
    method: str
    target: str


@dataclass(frozen=True)
class Scene:
    """All that is drawn of one case, on one grid: (i, j, k) with canonical axes, or (row, column).

    Attributes:
        image: first channel. affine: (4, 4), indices to RAS+ world mm. label, pred: integer maps.
        not_annotated: values of which the label does not tell, so that a prediction of them is not wrong.
    """

    image: Array
    affine: Affine
    label: Array | None = None
    pred: Array | None = None
    heat: Heat | None = None
    not_annotated: tuple[int, ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Distance of neighbouring voxels along the array's axes."""
        return spacing_of(self.affine)[: self.image.ndim]

    @property
    def extra(self) -> NDArray[np.bool_]:
        """Where the prediction has a structure and the label, which would tell of it, has none."""
        assert self.label is not None
        assert self.pred is not None
        extra: NDArray[np.bool_] = (self.label == 0) & (self.pred > 0)  # type: ignore[operator]
        return extra & ~np.isin(self.pred, self.not_annotated)


def load_scene(
    images: Sequence[Path], label: Path | None = None, pred: Path | None = None, explanation: Path | None = None
) -> Scene:
    """Read one case. `explanation` is a folder with `map.nii.gz` or `map.npy` and `explanation.json`.

    Raises:
        UserError: no image is given, a file cannot be read, or the grids differ.
    """
    if not images:
        raise UserError("the case names no image; predict from a cohort, so that the scan is at hand.")
    image = read_image(images[0])
    if image.array.ndim == 3:
        image = to_canonical(image)
    return Scene(
        image.array,
        image.affine,
        _read_grid(label, image.array.shape) if label else None,
        _read_grid(pred, image.array.shape) if pred else None,
        _read_heat(explanation, image.array.shape) if explanation else None,
    )


def load_map(explanation: Path, pred: Path | None, preview: Path | None) -> Scene:
    """An activation map whose scan is not at hand.

    Behind the map of a radiograph lies the preview where that shows the whole of it, else black.

    Raises:
        UserError: a file is missing or damaged, or the grids differ.
    """
    heat, affine = _read_map(explanation)
    ground: Array = np.zeros(heat.array.shape, np.uint8)
    if preview is not None and preview.is_file() and ground.ndim == 2:
        ground = _fitted(read_image(preview).array, ground)
    return Scene(ground, affine, None, _read_grid(pred, ground.shape) if pred else None, heat)


def is_withheld(explanation: Path) -> bool:
    """Whether a map was made but not written, because it failed its checks."""
    return bool(read_json(explanation / "explanation.json").get("withheld"))


def structure(scene: Scene) -> NDArray[np.bool_] | None:
    """Where the label or the prediction is, or None where both are empty or absent."""
    masks = [part > 0 for part in (scene.label, scene.pred) if part is not None]  # type: ignore[operator]
    union: NDArray[np.bool_] | None = np.logical_or.reduce(masks) if masks else None
    return union if union is not None and union.any() else None


def focus(scene: Scene) -> tuple[int, ...]:
    """The voxel through which the slices go.

    Along each axis the median slice of the structure, so that every slice meets it; without a structure the maximum
    of the activation map; without either the centre of the image.
    """
    union = structure(scene)
    if union is not None:
        return tuple(_median_slice(union, axis) for axis in range(union.ndim))
    if scene.heat is not None and scene.heat.array.max() > 0:
        return tuple(int(n) for n in np.unravel_index(int(scene.heat.array.argmax()), scene.heat.array.shape))
    return tuple(n // 2 for n in scene.image.shape)


def crop_to_structure(scene: Scene) -> Scene:
    """Keep the part of a volume around the structure, where that is small in the field of view.

    Along each axis `CONTEXT` times the length of the structure and at least `MIN_CROP_MM` remain.
    """
    union = structure(scene)
    if union is None or union.ndim != 3:
        return scene
    box = []
    for axis, spacing in enumerate(scene.spacing_mm):
        inside = _filled(union, axis)
        wanted = max(CONTEXT * len(range(inside[0], inside[-1] + 1)), MIN_CROP_MM / spacing)
        start = round((inside[0] + inside[-1] + 1 - wanted) / 2)
        start = max(0, min(start, union.shape[axis] - round(wanted)))
        box.append(slice(start, start + round(wanted)))
    part = tuple(box)
    heat = replace(scene.heat, array=scene.heat.array[part]) if scene.heat is not None else None
    label = scene.label[part] if scene.label is not None else None
    pred = scene.pred[part] if scene.pred is not None else None
    affine = scene.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [side.start for side in part]
    return replace(scene, image=scene.image[part], affine=affine, label=label, pred=pred, heat=heat)


def cut(array: Array, plane: Plane, index: int) -> Array:
    """The slice of a canonical volume as (rows, columns) of the picture, first row on top."""
    picture: Array = np.moveaxis(array, plane.axis, 0)[index]  # both remaining axes in rising order
    return picture[::-1, ::-1].T


def size_mm(shape: tuple[int, ...], spacing_mm: tuple[float, ...], plane: Plane) -> tuple[float, float]:
    """Width and height of the picture of a plane."""
    return shape[plane.columns] * spacing_mm[plane.columns], shape[plane.rows] * spacing_mm[plane.rows]


def grey_window(scene: Scene) -> tuple[float, float]:
    """Darkest and brightest value shown.

    The 0.5 and 99.8 % points of the non-zero values; the soft tissue window where a volume's values look like HU.
    """
    image = scene.image
    if image.ndim == 3 and float(image.min()) < AIR_HU:
        return SOFT_TISSUE_HU
    step = max(1, round((image.size / 400_000) ** (1 / image.ndim)))
    values = image[(slice(None, None, step),) * image.ndim].astype(np.float32).ravel()
    values = values[np.isfinite(values) & (values != 0)]
    if not values.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, (0.5, 99.8)))
    return (low, high) if high > low else (low, low + 1.0)


def _median_slice(union: NDArray[np.bool_], axis: int) -> int:
    others = tuple(n for n in range(union.ndim) if n != axis)
    filled = union.sum(axis=others).cumsum()
    return int(np.searchsorted(filled, (filled[-1] + 1) // 2))


def _filled(union: NDArray[np.bool_], axis: int) -> NDArray[np.int64]:
    """Indices along an axis at which the structure occurs."""
    others = tuple(n for n in range(union.ndim) if n != axis)
    return np.flatnonzero(union.any(axis=others))


def _read_grid(path: Path, shape: tuple[int, ...]) -> Array:
    volume = read_image(path)
    array = to_canonical(volume).array if volume.array.ndim == 3 else volume.array
    if array.shape != shape:
        raise UserError(f"{path.name} has shape {array.shape}, but its image has {shape}; predict the case again.")
    return array


def _fitted(picture: Array, ground: Array) -> Array:
    """The picture on the grid of `ground` if its proportions are the same within 2 %, else `ground`."""
    (rows, columns), (height, width) = ground.shape, picture.shape
    if abs(rows * width / (columns * height) - 1) > 0.02:
        return ground
    shape, affine = ground.shape, np.diag([height / rows, width / columns, 1.0, 1.0])
    return resample(picture, np.eye(4), shape, affine, order=1)


def _read_heat(folder: Path, shape: tuple[int, ...]) -> Heat | None:
    if not (folder / "explanation.json").is_file() or is_withheld(folder):
        return None
    heat, _ = _read_map(folder)
    if heat.array.shape != shape:
        raise UserError(
            f"the activation map has shape {heat.array.shape}, but its image has {shape}; explain the case again."
        )
    return heat


def _read_map(folder: Path) -> tuple[Heat, Affine]:
    about = read_json(folder / "explanation.json")
    if (folder / "map.npy").is_file():
        try:
            array, affine = np.load(folder / "map.npy", allow_pickle=False), np.eye(4)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / 'map.npy'} cannot be read ({error}); explain the case again.") from error
    else:
        volume = to_canonical(read_image(folder / "map.nii.gz"))
        array, affine = volume.array, volume.affine
    array = np.nan_to_num(array.astype(np.float32), posinf=0, neginf=0)
    high, low = about.get("raw_max"), about.get("raw_min")
    raw_max = float(array.max()) if high is None else float(high)
    raw_min = float(array.min()) if low is None else float(low)
    evidence = bool(about.get("evidence", True)) and raw_max > 0
    return Heat(array, raw_min, raw_max, evidence, str(about.get("method", "")), str(about.get("target", ""))), affine
