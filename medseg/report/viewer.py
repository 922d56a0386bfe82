"""An interactive slice viewer of one case as a single HTML file, by nilearn; it loads nothing from anywhere."""

import re
import warnings
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from medseg.report.panels import CONFUSED, PREDICTION, REFERENCE, class_colour
from medseg.report.slices import Array, Scene, focus, grey_window
from medseg.volume import resample, resampled_grid

AGREE = "#009E73"
AGREE_ALPHA, CLASS_ALPHA = "50", "90"
"""Hexadecimal opacity of agreement, so that errors stand out, and of classes, so that the scan is seen."""
MAX_VOXELS = 900_000
GREY_LEVELS = 64
WIDTH_PX = 820
_CONTROLS_PX = 52

_BLANK_GIF = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
_STYLE = "<style>body{margin:0;background:#000;color:#ddd;font:13px system-ui,sans-serif}p{margin:6px 8px}</style>"


def slice_viewer(scene: Scene) -> tuple[str, int, int]:
    """A viewer of a volume with its label and prediction.

    With a reference the overlay says where both agree, what was missed, what is extra and what got the wrong class;
    without one it shows the prediction by class. The grid is made isotropic and at most `MAX_VOXELS` large.

    Returns:
        The HTML document, and its width and height in CSS pixels.
    """
    import nibabel as nib
    from matplotlib.colors import ListedColormap
    from nilearn.plotting import view_img

    image, overlay, affine = _isotropic(scene)
    colours = _colours(scene)
    centre = affine[:3, :3] @ (np.asarray(focus(scene)) * scene.spacing_mm / np.diag(affine)[:3]) + affine[:3, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nilearn warns of empty overlays and of integer images
        view = view_img(
            nib.Nifti1Image(overlay.astype(np.float32), affine),
            nib.Nifti1Image(image, affine),
            cut_coords=tuple(float(c) for c in centre),
            cmap=ListedColormap(colours),
            vmin=0.5,
            vmax=len(colours) + 0.5,
            threshold=0.5,
            symmetric_cmap=False,
            colorbar=False,
            annotate=_is_aligned(scene),
            dim=0,
            black_bg=True,
            resampling_interpolation="nearest",
            width_view=WIDTH_PX,
            radiological=True,
        )
    across, up = image.shape[1] + 2 * image.shape[0], max(image.shape[1:])
    room = 1.1 if _is_aligned(scene) else 1.0  # for the line of coordinates
    return _standalone(view.html), WIDTH_PX, round(WIDTH_PX * room * up / across) + _CONTROLS_PX


def legend(scene: Scene, label_names: Mapping[str, int]) -> tuple[tuple[str, str], ...]:
    """(colour, meaning) of the overlay."""
    if scene.label is not None and scene.pred is not None:
        meanings = [(AGREE, "both agree"), (REFERENCE, "missed"), (PREDICTION, "extra"), (CONFUSED, "wrong class")]
        return tuple(meanings if len(label_names) > 1 else meanings[:3])
    names = {value: name for name, value in label_names.items()}
    part = scene.label if scene.pred is None else scene.pred
    values = [] if part is None else [int(v) for v in np.unique(part) if v > 0]
    return tuple((class_colour(value), names.get(value, f"label {value}")) for value in values)


def _colours(scene: Scene) -> list[str]:
    if scene.label is not None and scene.pred is not None:
        return [f"{AGREE}{AGREE_ALPHA}", REFERENCE, PREDICTION, CONFUSED]
    part = scene.label if scene.pred is None else scene.pred
    highest = int(part.max()) if part is not None else 1
    return [f"{class_colour(value)}{CLASS_ALPHA}" for value in range(1, max(highest, 1) + 1)]


def _overlay(scene: Scene) -> Array:
    """Classes of the overlay, from 1 on, on the grid of the scene."""
    label, pred = scene.label, scene.pred
    if label is None or pred is None:
        part = pred if label is None else label
        return np.zeros(scene.image.shape, np.uint8) if part is None else part
    truth, found = label.astype(np.int64), pred.astype(np.int64)
    both = (truth > 0) & (found > 0)
    kinds = [both & (truth == found), (truth > 0) & (found == 0), scene.extra, both]
    return np.select(kinds, np.arange(1, 5, dtype=np.uint8), np.uint8(0))


def _isotropic(scene: Scene) -> tuple[NDArray[np.float32], Array, NDArray[np.float64]]:
    """Grey image in a few levels from 0.01 to 1, overlay, and their common axis-aligned affine."""
    shape, spacing = scene.image.shape, scene.spacing_mm
    field_mm3 = float(np.prod(np.asarray(shape) * spacing))
    side = max(min(spacing), (field_mm3 / MAX_VOXELS) ** (1 / 3))
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = scene.affine[:3, 3]
    new_shape, new_affine = resampled_grid(shape, affine, (side,) * 3)
    new_affine[:3, :3] = np.diag([side] * 3)  # nilearn resamples unless the voxels are exact cubes
    low, high = grey_window(scene)
    grey = np.clip((scene.image.astype(np.float32) - low) / (high - low), 0, 1)
    image = resample(grey, affine, new_shape, new_affine, order=1)
    levels = np.round(image.astype(np.float32) * (GREY_LEVELS - 1)) / (GREY_LEVELS - 1)
    visible = np.clip(levels, 0.01, 1).astype(np.float32)  # nilearn hides zeros
    return visible, resample(_overlay(scene), affine, new_shape, new_affine, order=0), new_affine


def _is_aligned(scene: Scene) -> bool:
    """Whether positions along the axes are world positions, and may be shown as such."""
    matrix = scene.affine[:3, :3] / np.asarray(scene.spacing_mm)
    return bool(np.allclose(matrix, np.eye(3), atol=1e-3))


def _standalone(document: str) -> str:
    """The viewer without its icon on the network, with fixed ids, and without the picture that never loads."""
    document = re.sub(r"<link[^>]*rel=\"icon\"[^>]*>", "", document)
    document = document.replace('src="data:image/png;base64,"', f'src="{_BLANK_GIF}"')
    if found := re.search(r"div_viewer-([0-9a-f]{32})", document):
        document = document.replace(found.group(1), "slices")
    return document.replace("</head>", f"{_STYLE}</head>", 1)
