"""Pictures of one case: outlines of reference and prediction, where they differ, and the activation map."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.files import UserError, replacing
from medseg.report.page import Picture, data_uri
from medseg.report.panels import (
    CONFUSED,
    LUNGS,
    PREDICTION,
    REFERENCE,
    Kind,
    View,
    class_colour,
    draw_edge_letters,
    draw_heat_scale,
    draw_panel,
    draw_scale_bar,
    rgb_of,
    values_of,
)
from medseg.report.slices import PLANES, Scene, crop_to_structure, focus, grey_window, load_scene, size_mm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110

_WIDTH_IN, _MAX_HEIGHT_IN = 9.6, 4.6
_ROW_NAMES: dict[Kind, str] = {
    "plain": "",
    "outlines": "outlines",
    "difference": "where they differ",
    "heat": "activation map",
}


def draw_overlay(
    images: Sequence[Path],
    label: Path | None,
    pred: Path | None,
    path: Path,
    *,
    explanation: Path | None = None,
    label_names: Mapping[str, int] | None = None,
    title: str = "",
) -> Path:
    """Draw one case as a PNG: three orthogonal slices through the structure, or the radiograph.

    Args:
        images: one path per channel; the first is drawn.
        label, pred: integer maps on the grid of the image, or None.
        path: the PNG to write, atomically.
        explanation: folder with the activation map and `explanation.json`.
        label_names: names of the values, for the legend where there is no reference.
        title: one line above the picture.

    Returns:
        `path`.

    Raises:
        UserError: an image is missing or damaged, or the grids differ.
    """
    scene = load_scene(images, label, pred, explanation)
    with replacing(path) as temporary:
        temporary.write_bytes(draw_scene(scene, label_names or {}, title))
    return path


def draw_scene(scene: Scene, label_names: Mapping[str, int], title: str = "") -> bytes:
    """The PNG of a scene."""
    import matplotlib as mpl

    kinds = _kinds(scene)
    with mpl.rc_context({"font.family": ["DejaVu Sans"], "font.size": 8, "axes.titlesize": 8.5}):
        figure = _volume_figure(scene, kinds) if scene.image.ndim == 3 else _radiograph_figure(scene, kinds)
        _legend(figure, scene, label_names)
        if title:
            figure.text(0.005, 1.0, title, ha="left", va="top", fontsize=9, color="#1c1c1a")
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def draw_thumbnail(scene: Scene, height_px: int = 132) -> NDArray[np.uint8]:
    """A small (rows, columns, 3) picture: three slices through the structure, or the radiograph, with the label."""
    centre, (low, high) = focus(scene), grey_window(scene)
    views = [View(None, 0, float(scene.image.shape[1]), float(scene.image.shape[0]))]
    if scene.image.ndim == 3:
        sizes = [size_mm(scene.image.shape, scene.spacing_mm, plane) for plane in PLANES]
        views = [View(plane, centre[plane.axis], *size) for plane, size in zip(PLANES, sizes, strict=True)]
    tallest = max(view.height for view in views)
    parts = []
    for view in views:
        grey = np.clip((view.of(scene.image).astype(np.float32) - low) / (high - low), 0, 1)
        rgb = np.repeat((grey * 255)[..., None], 3, axis=2)
        if scene.label is not None:
            label = view.of(scene.label)
            for value in values_of(label):
                rgb[label == value] = 0.7 * rgb[label == value] + 0.3 * 255 * np.asarray(rgb_of(class_colour(value)))
        parts.append(_scaled(rgb.astype(np.uint8), view, height_px / tallest, height_px))
    return np.concatenate(parts, axis=1)


def _scaled(rgb: NDArray[np.uint8], view: View, px_per_mm: float, height_px: int) -> NDArray[np.uint8]:
    from PIL import Image

    size = max(1, round(view.width * px_per_mm)), max(1, min(height_px, round(view.height * px_per_mm)))
    picture = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BILINEAR))
    return np.pad(picture, ((0, height_px - size[1]), (1, 1), (0, 0)))


def embedded(path: Path, alt: str) -> Picture:
    """A picture file, recompressed small enough to stand inside a page.

    Raises:
        UserError: it is missing or not a picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            buffer = BytesIO()
            image.convert("RGB").save(buffer, format="WEBP", quality=82, method=4)
            return Picture(data_uri(buffer.getvalue(), "image/webp"), alt, image.width)
    except OSError as error:
        raise UserError(f"{path.name} cannot be read as a picture ({error}); run the report again.") from error


def _kinds(scene: Scene) -> list[Kind]:
    kinds: list[Kind] = []
    if any(part is not None for part in (scene.label, scene.pred, scene.lungs)):
        kinds.append("outlines")
    if scene.label is not None and scene.pred is not None:
        kinds.append("difference")
    if scene.heat is not None:
        kinds.append("heat")
    if "outlines" not in kinds:
        kinds.insert(0, "plain")
    return kinds


def _volume_figure(scene: Scene, kinds: Sequence[Kind]) -> "Figure":
    from matplotlib.figure import Figure

    scene = crop_to_structure(scene)
    centre = focus(scene)
    sizes = [size_mm(scene.image.shape, scene.spacing_mm, plane) for plane in PLANES]
    views = [View(plane, centre[plane.axis], *size) for plane, size in zip(PLANES, sizes, strict=True)]
    inch_per_mm = min(_WIDTH_IN / sum(view.width for view in views), 3.4 / max(view.height for view in views))
    row_in = max(view.height for view in views) * inch_per_mm + 0.32
    figure = Figure(figsize=(_WIDTH_IN, row_in * len(kinds) + 0.55))
    top = 1 - 0.5 / figure.get_figheight()
    grid = figure.add_gridspec(
        len(kinds), 3, width_ratios=[view.width for view in views],
        left=0.005, right=0.995, top=top, bottom=0.005, wspace=0.03, hspace=0.08,
    )  # fmt: skip
    window = grey_window(scene)
    for row, kind in enumerate(kinds):
        for column, view in enumerate(views):
            axes = figure.add_subplot(grid[row, column])
            draw_panel(axes, scene, view, kind, window)
            assert view.plane is not None
            name = view.plane.name if row == 0 else ""
            note = _ROW_NAMES[kind] if column == 0 else ""
            axes.set_title(" · ".join(filter(None, (name, note))), loc="left", pad=3, color="#444")
            draw_edge_letters(axes, view.plane)
        if column == 2 and row == 0:
            draw_scale_bar(axes, views[-1])
        if kind == "heat":
            draw_heat_scale(figure, axes, scene.heat)
    return figure


def _radiograph_figure(scene: Scene, kinds: Sequence[Kind]) -> "Figure":
    from matplotlib.figure import Figure

    kinds = kinds if kinds[0] == "plain" else ["plain", *kinds]
    rows, columns = scene.image.shape
    view = View(None, 0, float(columns), float(rows))
    panel_in = min(_WIDTH_IN / max(len(kinds), 2), _MAX_HEIGHT_IN * columns / rows)
    figure = Figure(figsize=(max(panel_in * len(kinds), 4.2), panel_in * rows / columns + 0.45))
    top = 1 - 0.42 / figure.get_figheight()
    grid = figure.add_gridspec(1, len(kinds), left=0.005, right=0.995, top=top, bottom=0.005, wspace=0.02)
    window = grey_window(scene)
    for column, kind in enumerate(kinds):
        axes = figure.add_subplot(grid[0, column])
        draw_panel(axes, scene, view, kind, window)
        axes.set_title(_ROW_NAMES[kind] or "radiograph", loc="left", pad=3, color="#444")
        if kind == "heat":
            draw_heat_scale(figure, axes, scene.heat)
    return figure


def _legend(figure: "Figure", scene: Scene, label_names: Mapping[str, int]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if scene.lungs is not None:
        handles.append(Line2D([], [], color=LUNGS, linewidth=1.4, label="lung fields found"))
    if scene.label is not None:
        handles.append(Line2D([], [], color=REFERENCE, linewidth=2.4, label="reference"))
        if scene.pred is not None:
            handles.append(Line2D([], [], color=PREDICTION, linewidth=1.4, label="prediction"))
            handles.append(Patch(color=REFERENCE, label="missed"))
            handles.append(Patch(color=PREDICTION, label="extra"))
            if len(values_of(scene.label)) > 1:
                handles.append(Patch(color=CONFUSED, label="wrong class"))
    elif scene.pred is not None:
        names = {value: name for name, value in label_names.items()}
        for value in values_of(scene.pred)[:12]:
            text = names.get(value, f"label {value}")
            handles.append(Line2D([], [], color=class_colour(value), linewidth=2, label=text))
    if handles:
        figure.legend(
            handles=handles, loc="upper right", bbox_to_anchor=(1.0, 1.005), ncols=len(handles), frameon=False,
            handlelength=1.3, columnspacing=1.2, borderpad=0.1, fontsize=8,
        )  # fmt: skip
