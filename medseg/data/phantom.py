"""Simulated frontal chest radiographs: a thorax phantom, with a lesion at a known place in half of them.

No patient and no scanner is behind these images. Attenuation is summed along the ray over the shapes of
`medseg.data.thorax` and shown as a radiograph shows it: bright is dense (MONOCHROME2). Two fictive sites differ in
exposure, noise, lead marker and collimation, never in how often a lesion is present.

Parameters are drawn first (`draw_radiograph_parameters`), recorded, and then rendered (`render_radiograph`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.data.thorax import LUNG_FIELD_AIR, Thorax, bones, draw_thorax, lung_air, soft_tissue, vessels

Float64 = NDArray[np.float64]
Site = Literal["north", "south"]

SITES: tuple[Site, ...] = get_args(Site)
FIELD_MM = 380.0
"""Width and height of the detector; body coordinates run from -1 to 1 over it before zoom and rotation."""
MAX_VALUE = 4095
"""Largest value of the 12 stored bits."""

_EXPOSURE: dict[Site, tuple[float, float, float]] = {"north": (0.76, 0.3, 0.016), "south": (0.69, 0.26, 0.022)}
"""Habitual level, width and noise_sd of each site."""
_LETTERS = {
    "L": np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]),
    "R": np.array([[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 0, 1], [1, 0, 1]]),
}


@dataclass(frozen=True)
class Lesion:
    """A soft opacity inside a lung field.

    Attributes:
        x, y: centre, in body coordinates.
        radius_mm: geometric mean of its half axes.
        aspect, angle_deg: ratio of the axes, and direction of the longer one.
        density: at its centre; the heart adds about 0.3.
    """

    x: float
    y: float
    radius_mm: float
    aspect: float
    angle_deg: float
    density: float


@dataclass(frozen=True)
class RadiographParameters:
    """All that tells one simulated radiograph from another.

    Attributes:
        site: sets marker and collimation; exposure and noise are drawn around its habits.
        has_lesion: whether `lesion` is rendered.
        thorax: the patient.
        lesion: drawn whether it is rendered or not.
        rotation_deg, zoom, shift: of the body on the detector; the shift in body coordinates.
        level, width: density shown as mid-grey, and the range around it: exposure and contrast.
        noise_sd: of the detector, in density.
        noise_seed: of the detector's noise.
    """

    site: Site
    has_lesion: bool
    thorax: Thorax
    lesion: Lesion
    rotation_deg: float
    zoom: float
    shift: tuple[float, float]
    level: float
    width: float
    noise_sd: float
    noise_seed: int

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Rebuild from `json.loads` of a recorded `dataclasses.asdict`.

        Raises:
            ValueError: a field is missing or unknown.
        """
        values = dict(record)
        try:
            values["thorax"], values["lesion"] = Thorax(**values["thorax"]), Lesion(**values["lesion"])
            values["shift"] = tuple(values["shift"])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"these are not radiograph parameters ({error}); draw them again.") from error


@dataclass(frozen=True)
class SimulatedRadiograph:
    """One simulated radiograph with its own truth.

    Attributes:
        image: (row, column) uint16, 0 to `MAX_VALUE`, bright is dense.
        lung_mask: (row, column) uint8, 1 in the lung fields that heart and diaphragm leave free.
        lesion_mask: (row, column) uint8, 1 in the lesion; all 0 without one.
        pixel_spacing_mm: distance between rows and between columns.
        params: what it was made from.
    """

    image: NDArray[np.uint16]
    lung_mask: NDArray[np.uint8]
    lesion_mask: NDArray[np.uint8]
    pixel_spacing_mm: tuple[float, float]
    params: RadiographParameters


def draw_radiograph_parameters(seed: int, index: int, has_lesion: bool, site: Site = "north") -> RadiographParameters:
    """Draw the parameters of radiograph `index` of a cohort; the same arguments give the same radiograph.

    The lesion is drawn whether it will be rendered or not, so that `has_lesion` changes nothing else.

    Args:
        seed: of the cohort, not negative.
        index: of the radiograph in it, not negative.
        has_lesion: render the lesion.
        site: one of `SITES`.

    Raises:
        ValueError: the site is unknown.
    """
    if site not in SITES:
        raise ValueError(f"site is {site!r}; choose one of {', '.join(SITES)}.")
    rng = np.random.default_rng([seed, index])
    thorax = draw_thorax(rng)
    level, width, noise_sd = (habit * float(rng.uniform(0.93, 1.07)) for habit in _EXPOSURE[site])
    return RadiographParameters(
        site=site,
        has_lesion=has_lesion,
        thorax=thorax,
        lesion=_draw_lesion(thorax, rng),
        rotation_deg=float(rng.uniform(-4, 4)),
        zoom=float(rng.uniform(0.93, 1.05)),
        shift=(float(rng.uniform(-0.05, 0.05)), float(rng.uniform(-0.05, 0.05))),
        level=level,
        width=width,
        noise_sd=noise_sd,
        noise_seed=int(rng.integers(2**31)),
    )


def draw_radiographs(seed: int, count: int) -> list[RadiographParameters]:
    """Draw a balanced cohort: in any four in a row, each site has one radiograph with and one without lesion."""
    return [draw_radiograph_parameters(seed, i, has_lesion=i % 2 == 1, site=SITES[i // 2 % 2]) for i in range(count)]


def render_radiograph(params: RadiographParameters, size_px: int = 256) -> SimulatedRadiograph:
    """Render the radiograph that `params` describe; deterministic for a given size.

    Args:
        params: from `draw_radiograph_parameters`.
        size_px: rows and columns, at least 32. The anatomy is the same at every size.

    Raises:
        ValueError: the size is below 32.
    """
    if size_px < 32:
        raise ValueError(f"size_px is {size_px}; a radiograph needs at least 32 rows and columns.")
    x, y = _body_grid(params, size_px)
    air = lung_air(params.thorax, x, y)
    lung = air > LUNG_FIELD_AIR
    density = soft_tissue(params.thorax, x, y) - 0.62 * air + bones(params.thorax, x, y)
    density += vessels(params.thorax, x, y) * air
    profile = _lesion_profile(params.lesion, x, y) * lung
    if params.has_lesion:
        density += params.lesion.density * profile
    density = ndimage.gaussian_filter(density, 0.0022 * size_px, truncate=3.0)  # focal spot and detector
    noise = np.random.default_rng(params.noise_seed).standard_normal(density.shape)
    image = 1 / (1 + np.exp(-(density + params.noise_sd * noise - params.level) / params.width))
    image = _site_marks(params, image)
    spacing = FIELD_MM / size_px
    return SimulatedRadiograph(
        np.round(image * MAX_VALUE).astype(np.uint16),
        lung.astype(np.uint8),
        ((profile > 0) & params.has_lesion).astype(np.uint8),
        (spacing, spacing),
        params,
    )


def _draw_lesion(thorax: Thorax, rng: np.random.Generator) -> Lesion:
    """Draw a lesion that lies inside a lung field as a whole."""
    radius_mm, aspect = float(rng.uniform(13, 24)), float(rng.uniform(1.0, 1.4))
    axis = np.linspace(-1, 1, 160)
    x, y = np.meshgrid(axis, axis)
    depth = ndimage.distance_transform_edt(lung_air(thorax, x, y) > LUNG_FIELD_AIR) * (axis[1] - axis[0])
    longest = 1.15 * radius_mm * np.sqrt(aspect) / (FIELD_MM / 2)
    candidates = np.argwhere(depth > min(longest, 0.9 * depth.max()))
    row, column = candidates[rng.integers(len(candidates))]
    return Lesion(
        x=float(axis[column]),
        y=float(axis[row]),
        radius_mm=radius_mm,
        aspect=aspect,
        angle_deg=float(rng.uniform(0, 180)),
        density=float(rng.uniform(0.25, 0.42)),
    )


def _body_grid(params: RadiographParameters, size_px: int) -> tuple[Float64, Float64]:
    """Body coordinates x and y (row, column) of the pixel centres."""
    axis = (np.arange(size_px) + 0.5) / size_px * 2 - 1
    column, row = np.meshgrid(axis, axis)
    angle = np.deg2rad(params.rotation_deg)
    right, down = (column - params.shift[0]) / params.zoom, (row - params.shift[1]) / params.zoom
    return np.cos(angle) * right + np.sin(angle) * down, np.cos(angle) * down - np.sin(angle) * right


def _lesion_profile(lesion: Lesion, x: Float64, y: Float64) -> Float64:
    """1 at the centre of the lesion, falling smoothly to 0 at its slightly lobed border."""
    radius = lesion.radius_mm / (FIELD_MM / 2)
    angle = np.deg2rad(lesion.angle_deg)
    right, down = x - lesion.x, y - lesion.y
    along = (np.cos(angle) * right + np.sin(angle) * down) / np.sqrt(lesion.aspect)
    across = (np.cos(angle) * down - np.sin(angle) * right) * np.sqrt(lesion.aspect)
    lobes = 1 + 0.1 * np.cos(3 * np.arctan2(across, along) + angle)
    return np.asarray(np.clip(1 - (np.hypot(along, across) / (radius * lobes)) ** 2, 0, 1) ** 0.8)


def _site_marks(params: RadiographParameters, image: Float64) -> Float64:
    """Lead marker, and at `south` a collimated border, burnt into an image from 0 to 1."""
    image = image.copy()
    size = len(image)
    pixel = max(1, size // 64)
    letter, column = {"north": ("R", 0.07), "south": ("L", 0.86)}[params.site]
    if params.site == "south":
        edge = round(0.03 * size)
        frame = np.ones_like(image, dtype=bool)
        frame[edge : size - edge, edge : size - edge] = False
        image[frame] = 0.01
    strokes = np.kron(_LETTERS[letter], np.ones((pixel, pixel)))
    top, left = round(0.07 * size), round(column * size)
    window = image[top : top + strokes.shape[0], left : left + strokes.shape[1]]
    window[strokes > 0] = 0.97
    return image
