"""Simulated T1 brains: one real template, deformed and re-imaged anew for each subject.

The anatomy is the ICBM 2009a symmetric MNI152 T1 average with its grey- and white-matter maps, as shipped inside
nilearn's wheel: no network is used. That template is skull-stripped, so the simulated heads have no skull or scalp.
CSF is what the brain mask holds beside both maps, without the mask's blurred rim: ventricles, cisterns, wide sulci.

The parameters of a subject are drawn first (`draw_parameters`), recorded, and then applied (`apply_parameters`):

1. a random diffeomorphism moves image and tissue maps alike, and widens or narrows the ventricles; it lives on a
   fixed lattice in world millimetres, so a subject has the same shape at every voxel spacing;
2. the head is scaled, turned and shifted, and the scan grid is tilted (an oblique affine);
3. tissue contrast, gamma, gain, a smooth bias field and Rician noise make the acquisition.

With the default `SubjectParameters` every step is the identity, exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.volume import Affine, world_of

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

TISSUES = ("CSF", "grey matter", "white matter")
"""Names of label values 1, 2 and 3; 0 is background."""

PEAK_INTENSITY = 1000.0
"""Brightest voxel of the template, in arbitrary units: twelve stored bits leave room for gain and bias."""

_COHERENCE_MM = 1.2
_LATTICE_MM = 6.0
_LATTICE_SHAPE = (39, 46, 37)
_SQUARINGS = 6
_RIM_MM = 2.0
"""Depth of the brain mask's outer rim, where what is neither grey nor white matter is no CSF but a blurred edge."""
_VELOCITY_STREAM, _NOISE_STREAM = 1, 2
_LATTICE_AFFINE = np.diag([_LATTICE_MM, _LATTICE_MM, _LATTICE_MM, 1.0])
_LATTICE_AFFINE[:3, 3] = (-114.0, -150.0, -90.0)
_VENTRICLES_MM = ((0.0, -12.0, 15.0), (34.0, 44.0, 20.0))
"""Centre and semi-axes of an ellipsoid that holds the lateral ventricles of the template, and little other CSF."""


@dataclass(frozen=True)
class Anatomy:
    """The template on one grid.

    Attributes:
        t1: (i, j, k) float32, 0 to `PEAK_INTENSITY`.
        label: (i, j, k) uint8: 0 background, else 1 + index in `TISSUES`; the largest share.
        affine: (4, 4) float64, voxel indices to RAS+ world mm.
        template: (4, x, y, z) float32: T1 and the shares (0 to 1) of the three tissues at the template's own 1 mm,
            smoothed to the voxel size of the grid. Subjects are sampled from these, so none is blurred twice.
        template_affine: (4, 4) float64, template indices to RAS+ world mm.
        ventricle_pull: (3, x, y, z) float64 vectors towards the ventricles, at most 1 long, on the lattice of
            `displacement_field`.
    """

    t1: Float32
    label: NDArray[np.uint8]
    affine: Affine
    template: Float32
    template_affine: Affine
    ventricle_pull: Float64


@dataclass(frozen=True)
class SubjectParameters:
    """All that tells one simulated subject from the template; the defaults change nothing.

    Attributes:
        seed: of the velocity field and the noise.
        deformation: (smoothness_mm, amplitude_mm) per scale: standard deviation of the Gaussian that smooths the
            velocity, and root mean square length of that scale's velocity.
        ventricle_mm: peak of an extra velocity out of the lateral ventricles; positive widens them.
        head_scale: size along the world axes relative to the template.
        head_rotation_deg: of the head about the world x, y, z axes, in that order.
        head_translation_mm: of the head along the world axes.
        scan_rotation_deg: of the voxel grid about the world axes; makes the affine oblique.
        tissue_contrast: factors on the intensity of CSF, grey and white matter.
        gamma: exponent on the intensity relative to `PEAK_INTENSITY`.
        gain: factor on all intensities, as of receiver and scanner.
        bias_coefficients: of x, y, z, xx, yy, zz, xy, xz, yz in the logarithm of the bias field, where the
            coordinates run from -1 to 1 over the grid.
        noise_sd: of both channels of the Rician noise, in units of intensity after gain.
    """

    seed: int = 0
    deformation: tuple[tuple[float, float], ...] = ()
    ventricle_mm: float = 0.0
    head_scale: tuple[float, ...] = (1.0, 1.0, 1.0)
    head_rotation_deg: tuple[float, ...] = (0.0, 0.0, 0.0)
    head_translation_mm: tuple[float, ...] = (0.0, 0.0, 0.0)
    scan_rotation_deg: tuple[float, ...] = (0.0, 0.0, 0.0)
    tissue_contrast: tuple[float, ...] = (1.0, 1.0, 1.0)
    gamma: float = 1.0
    gain: float = 1.0
    bias_coefficients: tuple[float, ...] = (0.0,) * 9
    noise_sd: float = 0.0

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Rebuild from `json.loads` of a recorded `dataclasses.asdict`.

        Raises:
            ValueError: a field is unknown.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(record) - known):
            raise ValueError(f"subject parameters have no field {unknown[0]!r}; known are {sorted(known)}.")
        return cls(**{name: _tuples(value) for name, value in record.items()})


@dataclass(frozen=True)
class SimulatedSubject:
    """One simulated scan with its own truth.

    Attributes:
        t1: (i, j, k) float32, not negative, to be rounded to a 16-bit integer by whoever stores it.
        label: (i, j, k) uint8, values as in `Anatomy.label`.
        affine: (4, 4) float64, voxel indices to RAS+ world mm; oblique when the scan is.
        params: what it was made from.
    """

    t1: Float32
    label: NDArray[np.uint8]
    affine: Affine
    params: SubjectParameters


@lru_cache(maxsize=2)
def load_anatomy(spacing_mm: float | tuple[float, float, float] = 2.0, margin_mm: float = 16.0) -> Anatomy:
    """Read the template and put it on a grid around the brain.

    Args:
        spacing_mm: distance of voxel centres, one for all axes or one for each; 1 (the template's own) to 10.
        margin_mm: background kept around the brain, so that a deformed and turned head stays in the image.

    Returns:
        The anatomy; cached, its arrays are read-only.

    Raises:
        ValueError: the spacing is below 1 mm or above 10 mm.
    """
    spacing = np.broadcast_to(np.asarray(spacing_mm, dtype=np.float64), 3)
    if spacing.min() < 1.0 or spacing.max() > 10.0:
        raise ValueError(f"spacing_mm is {spacing_mm}; choose 1 to 10 mm (the template has 1 mm).")
    channels, source = _read_template()
    extent_mm = np.asarray(channels.shape[1:]) + 2 * margin_mm
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = source[:3, 3] - margin_mm
    # Variance of the voxel's box profile beyond that of the template's 1 mm voxels: structures thinner than a
    # voxel become partial volume instead of being skipped. The zeros around take up what is smoothed outwards.
    sigma = np.sqrt((spacing**2 - 1.0) / 12.0)
    pad = np.ceil(3 * sigma).astype(int) + 1
    padded = np.pad(channels, [(0, 0), *((n, n) for n in pad)])
    template = np.stack([ndimage.gaussian_filter(channel, sigma, truncate=3.0) for channel in padded])
    template_affine = source.copy()
    template_affine[:3, 3] -= pad
    shape = tuple(int(n) for n in np.ceil(extent_mm / spacing))
    t1, tissue = _sample(template, _to_index(template_affine, _transform(affine, np.indices(shape))))
    pull = _ventricle_pull(channels[1], source)
    for array in (t1, label := _label(tissue), affine, template, template_affine, pull):
        array.setflags(write=False)
    return Anatomy(t1, label, affine, template, template_affine, pull)


def draw_parameters(seed: int, index: int, *, amplitude_mm: float = 5.0) -> SubjectParameters:
    """Draw the parameters of subject `index` of a cohort; the same arguments give the same subject.

    Args:
        seed: of the cohort, not negative.
        index: of the subject in it, not negative.
        amplitude_mm: typical root mean square displacement; single subjects vary by a fifth around it.
    """
    rng = np.random.default_rng([seed, index])

    def several(low: float, high: float, count: int) -> tuple[float, ...]:
        return tuple(float(x) for x in rng.uniform(low, high, count))

    amplitude = amplitude_mm * float(rng.uniform(0.8, 1.2))
    size = float(rng.uniform(0.95, 1.04))
    head_rotation_deg = several(-6, 6, 3)
    return SubjectParameters(
        seed=int(rng.integers(2**31)),
        # Head size and lobes vary on the coarse scale; ventricles, gyri and sulci on the fine one.
        deformation=((24.0, 0.94 * amplitude), (11.0, 0.34 * amplitude)),
        ventricle_mm=float(rng.uniform(0.0, 6.0)),
        head_scale=tuple(float(size * s) for s in rng.uniform(0.98, 1.02, 3)),
        head_rotation_deg=head_rotation_deg,
        head_translation_mm=several(-4, 4, 3),
        # A technologist lines the slices up with the head, to within a few degrees.
        scan_rotation_deg=tuple(float(a + rng.normal(0, 1.5)) for a in head_rotation_deg),
        # The template averages many brains, which greys its fluid; a single T1 shows it at 30 to 55 % of grey matter.
        tissue_contrast=(*several(0.4, 0.8, 1), *several(0.95, 1.05, 1), *several(0.98, 1.08, 1)),
        gamma=float(rng.uniform(0.9, 1.15)),
        gain=float(np.exp(rng.uniform(-0.4, 0.4))),
        bias_coefficients=(*several(-0.08, 0.08, 3), *several(-0.06, 0.06, 3), *several(-0.04, 0.04, 3)),
        noise_sd=float(rng.uniform(6, 18)),
    )


def apply_parameters(anatomy: Anatomy, params: SubjectParameters) -> SimulatedSubject:
    """Make the subject that `params` describe, on the shape and spacing of `anatomy`; deterministic.

    The tissue shares are moved with linear interpolation and the label is their largest, so labels and image
    stay as consistent as they are in the template.
    """
    centre = world_of(anatomy.affine, (np.asarray(anatomy.t1.shape) - 1) / 2)
    affine = _about(centre, _rotation(params.scan_rotation_deg)) @ anatomy.affine
    pose = _about(centre, _rotation(params.head_rotation_deg) @ np.diag(params.head_scale))
    pose[:3, 3] += params.head_translation_mm
    rest_mm = _transform(np.asarray(np.linalg.inv(pose) @ affine), np.indices(anatomy.t1.shape))
    if params.deformation or params.ventricle_mm:
        u, lattice = displacement_field(anatomy, params)
        rest_mm += _interpolate(u, _to_index(lattice, rest_mm))
    t1, tissue = _sample(anatomy.template, _to_index(anatomy.template_affine, rest_mm))
    return SimulatedSubject(_acquire(t1, tissue, params), _label(tissue), affine, params)


def displacement_field(anatomy: Anatomy, params: SubjectParameters) -> tuple[Float64, Affine]:
    """The subject's diffeomorphism, subject to template: a point y of the subject shows the template at y + u(y).

    A smooth stationary velocity field is integrated over unit time by scaling and squaring (Arsigny et al., "A
    Log-Euclidean framework for statistics on diffeomorphisms", MICCAI 2006): u = v / 2^n, then n times
    u(y) <- u(y) + u(y + u(y)).

    Returns:
        (3, x, y, z) float64 u in mm on a lattice that holds the whole head, and the lattice's affine.
    """
    velocity = params.ventricle_mm * anatomy.ventricle_pull
    rng = np.random.default_rng([params.seed, _VELOCITY_STREAM])
    for smoothness_mm, amplitude_mm in params.deformation:
        sigma = (0.0, *(smoothness_mm / _LATTICE_MM,) * 3)
        field = ndimage.gaussian_filter(rng.standard_normal(velocity.shape), sigma, mode="nearest")
        velocity += field * (amplitude_mm / np.sqrt((field**2).sum(axis=0).mean()))
    u = velocity / 2**_SQUARINGS
    identity = np.indices(_LATTICE_SHAPE, dtype=np.float64)
    for _ in range(_SQUARINGS):
        u = u + _interpolate(u, identity + u / _LATTICE_MM)
    return u, _LATTICE_AFFINE


def _read_template() -> tuple[Float32, Affine]:
    """(4, x, y, z) at 1 mm around the brain: T1 from 0 to `PEAK_INTENSITY`, shares of CSF, grey, white matter."""
    from nilearn import datasets  # slow to import, and needed by simulations alone

    image = datasets.load_mni152_template(resolution=1)
    maps = (image, datasets.load_mni152_gm_template(resolution=1), datasets.load_mni152_wm_template(resolution=1))
    mask = np.asarray(datasets.load_mni152_brain_mask(resolution=1).dataobj).astype(np.uint8)
    box = ndimage.find_objects(mask)[0]
    brain = mask[box]
    t1, grey, white = (np.asarray(m.dataobj, dtype=np.float32)[box] * brain for m in maps)
    # CSF is what lies in the brain, deeper than its rim, and is neither.
    core = ndimage.distance_transform_edt(np.pad(brain, 1))[1:-1, 1:-1, 1:-1] > _RIM_MM
    csf = np.clip(brain - grey - white, 0, 1) * core
    grey, white, csf = (ndimage.gaussian_filter(share, _COHERENCE_MM) for share in (grey, white, csf))
    affine = np.array(image.affine, dtype=np.float64)
    affine[:3, 3] = world_of(affine, np.array([side.start for side in box]))
    return np.stack([t1 * PEAK_INTENSITY, csf, grey, white]).astype(np.float32), affine


def _label(tissue: Float32) -> NDArray[np.uint8]:
    """(i, j, k) uint8 from the shares (3, i, j, k): the largest one, background being what they leave."""
    background = 1 - tissue.sum(axis=0, keepdims=True)
    return np.asarray(np.concatenate([background, tissue]).argmax(axis=0), dtype=np.uint8)


def _ventricle_pull(csf: Float32, affine: Affine) -> Float64:
    """(3, x, y, z) on the lattice: gradient of the smoothed ventricles of the 1 mm template (diagonal affine)."""
    axes_mm = [affine[a, a] * np.arange(n) + affine[a, 3] for a, n in enumerate(csf.shape)]
    scaled = [(axis - centre) / half for axis, centre, half in zip(axes_mm, *_VENTRICLES_MM, strict=True)]
    x, y, z = np.meshgrid(*scaled, indexing="ij", sparse=True)
    inside = x**2 + y**2 + z**2 < 1
    smooth = ndimage.gaussian_filter(csf * inside, 6.0)
    index = _to_index(affine, _transform(_LATTICE_AFFINE, np.indices(_LATTICE_SHAPE)))
    pull = np.stack(np.gradient(ndimage.map_coordinates(smooth, index, output=np.float64, order=1)))
    return np.asarray(pull / np.sqrt((pull**2).sum(axis=0)).max(), dtype=np.float64)


def _rotation(angles_deg: Sequence[float]) -> Float64:
    """(3, 3): about x, then y, then z."""
    rotation = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(angles_deg)):
        turn, (a, b) = np.eye(3), ((1, 2), (2, 0), (0, 1))[axis]
        turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        rotation = turn @ rotation
    return rotation


def _about(centre_mm: Float64, linear: Float64) -> Affine:
    """(4, 4): the linear map that leaves `centre_mm` in place."""
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = centre_mm - linear @ centre_mm
    return matrix


def _transform(matrix: Affine, points: NDArray[Any]) -> Float64:
    """Apply (4, 4) to (3, i, j, k)."""
    moved = np.tensordot(matrix[:3, :3], points, axes=1) + matrix[:3, 3].reshape(3, 1, 1, 1)
    return np.asarray(moved, dtype=np.float64)


def _to_index(affine: Affine, point_mm: Float64) -> Float64:
    """World mm (3, i, j, k) to voxel indices, to a millionth of a voxel: equal places give equal values."""
    return _transform(np.asarray(np.linalg.inv(affine), dtype=np.float64), point_mm).round(6)


def _sample(template: Float32, index: Float64) -> tuple[Float32, Float32]:
    """T1 (i, j, k) and tissue shares (3, i, j, k) at template indices (3, i, j, k); linear, zero outside."""
    channels = np.empty((len(template), *index.shape[1:]), dtype=np.float32)
    for channel, values in zip(template, channels, strict=True):
        ndimage.map_coordinates(channel, index, output=values, order=1, mode="constant")
    return channels[0], channels[1:]


def _interpolate(field: Float64, index: Float64) -> Float64:
    """Each component of (3, x, y, z) at (3, ...) lattice indices: linear, the edge value beyond the edge."""
    return np.stack([ndimage.map_coordinates(f, index, order=1, mode="nearest") for f in field])


def _acquire(t1: Float32, tissue: Float32, params: SubjectParameters) -> Float32:
    """Image the moved anatomy: contrast, gamma, bias field, gain and Rician noise, in this order."""
    contrast = np.asarray(params.tissue_contrast, dtype=np.float32) - 1
    image = t1 * (1 + np.tensordot(contrast, tissue, axes=1))
    image = image * (np.maximum(image, 1) / PEAK_INTENSITY) ** (params.gamma - 1)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in t1.shape), indexing="ij", sparse=True)
    terms = (x, y, z, x * x, y * y, z * z, x * y, x * z, y * z)
    bias = np.exp(sum(c * term for c, term in zip(params.bias_coefficients, terms, strict=True)))
    image = image * bias * params.gain
    if params.noise_sd > 0:
        rng = np.random.default_rng([params.seed, _NOISE_STREAM])
        real, imaginary = params.noise_sd * rng.standard_normal((2, *t1.shape))
        image = np.hypot(image + real, imaginary)
    return np.asarray(image, dtype=np.float32)


def _tuples(value: Any) -> Any:
    """JSON lists, nested, as tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
