"""What is drawn inside one panel of a figure: grey image, outlines, differences, activation map, scale and letters.

Colours follow Okabe and Ito (2008) and stay apart for colour-blind readers, on grey and on black.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.report.slices import Array, Heat, Plane, Scene, cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCE, PREDICTION, CONFUSED = "#56B4E9", "#E69F00", "#CC79A7"
CLASS_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
HEAT_COLOURS = "inferno"

Kind = Literal["plain", "outlines", "difference", "heat"]

_SHADE = 0.62


@dataclass(frozen=True)
class View:
    """What one panel needs to know: the plane (None for a radiograph), the slice, and its size in mm or pixels."""

    plane: Plane | None
    index: int
    width: float
    height: float

    def of(self, array: Array) -> Array:
        """The panel's part of an array on the scene's grid."""
        return array if self.plane is None else cut(array, self.plane, self.index)


def draw_panel(axes: "Axes", scene: Scene, view: View, kind: Kind, window: tuple[float, float]) -> None:
    """The grey image within `window` (darkest, brightest) and, by `kind`, what lies on it."""
    extent = (0.0, view.width, view.height, 0.0)
    low, high = window
    shade = 1.0 if kind in ("plain", "outlines") else _SHADE
    grey = np.clip((view.of(scene.image).astype(np.float32) - low) / (high - low), 0, 1) * shade
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="antialiased", aspect="equal")
    axes.set_anchor("N")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor("black")
    for spine in axes.spines.values():
        spine.set_visible(False)
    if kind == "outlines":
        _draw_outlines(axes, scene, view)
    elif kind == "difference":
        axes.imshow(difference(scene, view), extent=extent, interpolation="nearest", aspect="equal")
    elif kind == "heat" and scene.heat is not None:
        _draw_heat(axes, scene.heat, view, extent)


def _draw_outlines(axes: "Axes", scene: Scene, view: View) -> None:
    if scene.label is None:
        assert scene.pred is not None
        for value in values_of(scene.pred):
            _outline(axes, view.of(scene.pred) == value, view, class_colour(value), 1.4)
        return
    for value in values_of(scene.label):
        _outline(axes, view.of(scene.label) == value, view, REFERENCE, 2.0)
    if scene.pred is not None:
        for value in values_of(scene.pred):
            _outline(axes, view.of(scene.pred) == value, view, PREDICTION, 0.9)


def class_colour(value: int) -> str:
    """Colour of a label value, from 1 on."""
    return CLASS_COLOURS[(value - 1) % len(CLASS_COLOURS)]


def values_of(array: Array) -> list[int]:
    """Label values that occur, without background."""
    return [int(value) for value in np.unique(array) if value > 0]


def _outline(axes: "Axes", mask: NDArray[np.bool_], view: View, colour: str, width_pt: float) -> None:
    """The border of a mask; a frame of background closes it at the edge of the picture."""
    if not mask.any():
        return
    framed = np.pad(mask.astype(np.float32), 1)
    rows, columns = mask.shape
    across, down = view.width / columns, view.height / rows
    x = (np.arange(columns + 2) - 0.5) * across
    y = (np.arange(rows + 2) - 0.5) * down
    axes.contour(x.clip(0, view.width), y.clip(0, view.height), framed, [0.5], colors=[colour], linewidths=[width_pt])


def difference(scene: Scene, view: View) -> NDArray[np.float32]:
    """RGBA (rows, columns, 4): missed in the reference's colour, extra in the prediction's, confused in a third."""
    assert scene.label is not None
    assert scene.pred is not None
    label, pred = view.of(scene.label), view.of(scene.pred)
    found: dict[str, NDArray[np.bool_]] = {
        REFERENCE: (label > 0) & (pred == 0),  # type: ignore[operator]
        PREDICTION: view.of(scene.extra).astype(bool),
        CONFUSED: (label > 0) & (pred > 0) & (label != pred),  # type: ignore[operator]
    }
    rgba = np.zeros((*label.shape, 4), np.float32)
    for colour, mask in found.items():
        rgba[mask] = [*rgb_of(colour), 0.95]
    return rgba


def _draw_heat(axes: "Axes", heat: Heat, view: View, extent: tuple[float, float, float, float]) -> None:
    if not heat.evidence:
        axes.text(
            0.5, 0.5, "no evidence:\nthe map is empty", transform=axes.transAxes, ha="center", va="center",
            color="white", fontsize=9,
        )  # fmt: skip
        return
    share = np.clip(view.of(heat.array).astype(np.float32) / heat.raw_max, 0, 1)
    axes.imshow(
        share, cmap=HEAT_COLOURS, vmin=0, vmax=1, alpha=0.85 * np.sqrt(share), extent=extent,
        interpolation="bilinear", aspect="equal",
    )  # fmt: skip


def draw_heat_scale(figure: "Figure", axes: "Axes", heat: Heat | None) -> None:
    """A colour scale from 0 to the raw maximum inside the panel; none where there is no evidence."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if heat is None or not heat.evidence:
        return
    inset = axes.inset_axes((0.54, 0.045, 0.42, 0.028))
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, heat.raw_max), HEAT_COLOURS), cax=inset, orientation="horizontal",
        ticks=[0, heat.raw_max],
    )  # fmt: skip
    bar.outline.set_edgecolor("white")
    inset.set_xticklabels(["0", f"raw max {heat.raw_max:.3g}"], color="white", fontsize=7)
    inset.xaxis.set_ticks_position("top")
    inset.tick_params(length=0, pad=2)
    inset.get_xticklabels()[0].set_horizontalalignment("left")
    inset.get_xticklabels()[1].set_horizontalalignment("right")


def draw_edge_letters(axes: "Axes", plane: Plane) -> None:
    """Letters of the directions at the four edges: R, L, A, P, S, I."""
    style: dict[str, Any] = {"transform": axes.transAxes, "color": "#dddddd", "fontsize": 7.5}
    axes.text(0.015, 0.5, plane.left, ha="left", va="center", **style)
    axes.text(0.985, 0.5, plane.right, ha="right", va="center", **style)
    axes.text(0.5, 0.985, plane.top, ha="center", va="top", **style)
    axes.text(0.5, 0.015, plane.bottom, ha="center", va="bottom", **style)


def draw_scale_bar(axes: "Axes", view: View) -> None:
    """A bar of a round length, at most a third of the width."""
    length = max((mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm <= view.width / 3), default=0)
    if not length:
        return
    y = view.height * 0.955
    right = view.width * 0.97
    axes.plot([right - length, right], [y, y], color="white", linewidth=1.6, solid_capstyle="butt")
    axes.text(right - length / 2, y - view.height * 0.012, f"{length} mm", color="white", ha="center", fontsize=7)


def rgb_of(colour: str) -> tuple[float, float, float]:
    """`#rrggbb` as shares from 0 to 1."""
    return int(colour[1:3], 16) / 255, int(colour[3:5], 16) / 255, int(colour[5:7], 16) / 255
