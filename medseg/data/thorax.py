"""The thorax of the simulated radiographs: density along the ray, from analytic shapes.

All shapes are functions of body coordinates (x, y), two float64 arrays of one shape: x runs from -1 (the patient's
right, left in the image) to 1, y from -1 (neck) to 1 (upper abdomen). Density has no unit; soft tissue at the spine
is about 1. Distances are positive inside, in body coordinates, and true near the border only.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Float64 = NDArray[np.float64]

LUNG_FIELD_AIR = 0.25
"""`lung_air` above this is lung field: not hidden by heart, mediastinum or diaphragm."""

_RIBS = 10
_VESSEL_STREAM, _TEXTURE_STREAM = 1, 2


@dataclass(frozen=True)
class Thorax:
    """The anatomy of one simulated patient. Lengths are in body coordinates.

    Attributes:
        seed: of vessels and soft-tissue texture.
        body_width, lung_width: half widths at the level of the diaphragm.
        apex: height of the lung apices above the widest part of the thorax.
        base_right, base_left: y of the diaphragm's domes.
        heart_size, heart_tilt_deg: factor on the heart's axes; angle of its long axis below the horizontal.
        rib_spacing, rib_slope: distance between ribs; how steeply they fall.
        breast: density of the breast shadows, 0 to 1.
    """

    seed: int
    body_width: float
    lung_width: float
    apex: float
    base_right: float
    base_left: float
    heart_size: float
    heart_tilt_deg: float
    rib_spacing: float
    rib_slope: float
    breast: float


def draw_thorax(rng: np.random.Generator) -> Thorax:
    """Draw one patient's anatomy."""
    lung_width, base_right = rng.uniform(0.7, 0.82), rng.uniform(0.36, 0.56)
    return Thorax(
        seed=int(rng.integers(2**31)),
        body_width=float(lung_width + rng.uniform(0.1, 0.2)),
        lung_width=float(lung_width),
        apex=float(rng.uniform(1.0, 1.14)),
        base_right=float(base_right),
        base_left=float(base_right + rng.uniform(0.02, 0.1)),
        heart_size=float(rng.uniform(0.85, 1.15)),
        heart_tilt_deg=float(rng.uniform(20, 40)),
        rib_spacing=float(rng.uniform(0.118, 0.135)),
        rib_slope=float(rng.uniform(0.26, 0.4)),
        breast=float(max(0.0, rng.uniform(-1, 1))),
    )


def lung_air(thorax: Thorax, x: Float64, y: Float64) -> Float64:
    """Share of the ray that runs through lung, 0 to 1; above `LUNG_FIELD_AIR` in the lung fields."""
    cage = _cage(thorax, x, y)
    depth = np.clip(cage / 0.4, 0, 1) ** 0.35
    walls = _step(cage) * _step(_diaphragm(thorax, x) - y) * _step(-_heart(thorax, x, y), 0.014)
    return depth * walls * _step(-_mediastinum(x, y), 0.014)


def soft_tissue(thorax: Thorax, x: Float64, y: Float64) -> Float64:
    """Density of the body without lungs and bones; -1 beside the body."""
    shoulder = 0.3 + 0.8 * _step(y + 0.8, 0.055)
    half = np.minimum(shoulder, thorax.body_width + 0.12 * _step(-0.35 - y, 0.1) + 0.04 * np.clip(y, 0, 1))
    thickness = np.sqrt(np.clip(1 - (x / (half + 0.02)) ** 2, 0, 1))
    density = 0.2 + 0.75 * thickness
    density += 0.3 * _step(_heart(thorax, x, y), 0.03) + 0.16 * _step(_mediastinum(x, y), 0.03)
    density += 0.3 * _step(y - _diaphragm(thorax, x), 0.02) * (1 - 0.15 * _step(x, 0.1))  # the liver is denser
    density -= 0.35 * _step(0.11 - np.hypot((x - 0.36) / 1.3, y - thorax.base_left - 0.13), 0.015)  # stomach
    trachea = _step(0.042 - np.abs(x + 0.01), 0.01) * _step(-0.27 - y, 0.02)
    bronchi = _step(0.028 - np.abs(y + 0.27 - 0.75 * np.abs(x)), 0.01) * _step(0.2 - np.abs(x), 0.02)
    density -= 0.16 * np.maximum(trachea, bronchi)
    for side in (-1, 1):
        density += 0.16 * _blob(x, y, (0.21 * side, -0.06 - 0.04 * side), (0.06, 0.11))  # hilum
        breast = 0.32 - np.hypot(x - 0.45 * side, (y - 0.3) * 1.15)
        density += 0.09 * thorax.breast * _step(breast, 0.012) * np.clip(0.5 + 1.2 * (y - 0.1), 0, 1)
    grain = np.random.default_rng([thorax.seed, _TEXTURE_STREAM]).standard_normal((48, 48))
    texture = _lookup(ndimage.gaussian_filter(grain, 2.0), (y + 1.2) / 2.4 * 47, (x + 1.2) / 2.4 * 47)
    return np.where(np.abs(x) < half, density + 0.25 * texture, -1.0)


def bones(thorax: Thorax, x: Float64, y: Float64) -> Float64:
    """Density of spine, ribs, clavicles, shoulder blades and arms."""
    disc = 0.5 + 0.5 * np.cos(2 * np.pi * y / 0.115)
    bones = _step(0.075 - np.abs(x)) * (0.12 - 0.05 * disc) + 0.1 * _blob(x, 0 * y, (0, 0), (0.02, 1)) * disc
    wall = _cage(thorax, x, y)
    lateral = np.abs(x) / thorax.lung_width
    for rib in range(_RIBS):
        start = 0.32 - thorax.apex + thorax.rib_spacing * rib
        reach = _step(wall + 0.03, 0.015) * _step(np.abs(x) - 0.07)
        back = start - 0.1 * lateral + thorax.rib_slope * lateral**2
        bones += 0.15 * reach * _bone_profile(y - back, 2 * thorax.rib_slope * lateral - 0.1, 0.03)
        front = start + thorax.rib_slope - 0.1 + 0.55 * (1 - lateral)
        reach = reach * _step(lateral - 0.5, 0.03)
        bones += 0.09 * reach * _bone_profile(y - front, -0.55, 0.032)
    for side in (-1, 1):
        out = x * side
        clavicle = y + thorax.apex - 0.47 + 0.2 * out - 0.05 * np.sin(2 * np.pi * out / 0.75)
        reach = _step(out - 0.06) * _step(0.8 - out, 0.02)
        bones += 0.2 * reach * _bone_profile(clavicle, 0.2, 0.032)
        blade = 0.24 - np.hypot(out - 1.02, (y + 0.33) * 0.55)
        bones += 0.09 * _step(blade) + 0.07 * np.exp(-((blade / 0.018) ** 2))
        bones += 0.22 * _step(0.12 - np.hypot(out - 1.0, y + 0.66))  # head of the humerus
    return bones


def vessels(thorax: Thorax, x: Float64, y: Float64) -> Float64:
    """Lung markings: streaks that run outwards from each hilum and fade. To be multiplied by `lung_air`."""
    rng = np.random.default_rng([thorax.seed, _VESSEL_STREAM])
    streaks = ndimage.gaussian_filter(rng.standard_normal((2, 240, 40)), (0, 1.3, 3.0), mode="wrap")
    streaks = np.clip(streaks / streaks.std(), 0, 3)
    density = np.zeros_like(x)
    for side, texture in zip((-1, 1), streaks, strict=True):
        right, down = x - 0.18 * side, y + 0.06
        radius = np.hypot(right, down)
        angle = (np.arctan2(down, right) + 0.5 * radius) / (2 * np.pi) % 1.0 * 240
        marks = _lookup(texture, angle, radius / 1.4 * 39) * np.exp(-radius / 0.4)
        marks *= 1 - np.exp(-((radius / 0.2) ** 2))
        density += np.where(x * side > 0, 0.16 * marks, 0.0)
    return density


def _step(distance: Float64, softness: float = 0.012) -> Float64:
    """0 to 1 where a signed distance turns positive."""
    return np.asarray(1 / (1 + np.exp(-np.clip(distance / softness, -40, 40))))


def _blob(x: Float64, y: Float64, centre: tuple[float, float], radii: tuple[float, float]) -> Float64:
    """Gaussian with standard deviations `radii`, 1 at its centre."""
    return np.asarray(np.exp(-(((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2) / 2))


def _cage(thorax: Thorax, x: Float64, y: Float64) -> Float64:
    """Inner wall of the thorax: positive inside, about the distance to the wall near it."""
    above = np.maximum(0.35 - y, 0) / thorax.apex
    below = np.maximum(y - 0.35, 0)
    radius = ((np.abs(x) / (thorax.lung_width - 0.05 * below)) ** 2.4 + above**2.4) ** (1 / 2.4)
    return np.asarray((1 - radius) * thorax.lung_width)


def _diaphragm(thorax: Thorax, x: Float64) -> Float64:
    """y of the diaphragm: two domes that fall to the costophrenic angles."""
    base = thorax.base_right + (thorax.base_left - thorax.base_right) * _step(x, 0.08)
    offset = (np.abs(x) - 0.36) / (thorax.lung_width - 0.36)
    return np.asarray(base + 0.2 * np.where(offset > 0, offset**2, 0.12 * offset**2))


def _heart(thorax: Thorax, x: Float64, y: Float64) -> Float64:
    """Heart: positive inside, about the distance to its border."""
    tilt, size = np.deg2rad(thorax.heart_tilt_deg), thorax.heart_size
    right, down = x - 0.1 * size, y - (thorax.base_left - 0.24 * size)
    along, across = np.cos(tilt) * right + np.sin(tilt) * down, np.cos(tilt) * down - np.sin(tilt) * right
    return np.asarray((1 - np.hypot(along / 0.36, across / 0.25) / size) * 0.28 * size)


def _mediastinum(x: Float64, y: Float64) -> Float64:
    """Great vessels, spine and aortic knob: positive inside, about the distance to the border."""
    half = 0.13 + 0.05 * np.clip(-0.45 - y, 0, 1) + 0.04 * np.exp(-(((y - 0.1) / 0.25) ** 2))
    knob = 0.1 - np.hypot(x - 0.11, y + 0.28)
    return np.maximum(half - np.abs(x), knob)


def _bone_profile(offset: Float64, slope: Float64 | float, half: float) -> Float64:
    """A tubular bone across its axis: brighter at the cortex; `offset` is vertical to an axis of this slope."""
    squared = np.minimum((offset / half) ** 2 / (1 + np.square(slope)), 3.0)
    return np.asarray(np.exp(-squared * squared * squared) * (0.55 + 0.45 * np.minimum(squared, 1)))


def _lookup(texture: Float64, row: Float64, column: Float64) -> Float64:
    """Linear interpolation in a texture that repeats."""
    return np.asarray(ndimage.map_coordinates(texture, [row, column], order=1, mode="grid-wrap"))
