"""What a classifier sees of a radiograph: the whole image, or its lungs alone; at training as at prediction."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.bundle import Bundle, load_bundle
from medseg.cohort import Finding
from medseg.config import LungsConfig
from medseg.data.lungs import Mask, box, check, convex, dilate, inside_only, lung_fields
from medseg.files import UserError
from medseg.images import read_image
from medseg.ingest.scan import Refused
from medseg.volume import Volume

FILE = "lungs.png"
"""The lung fields of a predicted case, in its folder, on the grid of the radiograph: 1 inside, 0 outside."""

Segment = Callable[[Volume], NDArray[np.generic]]
"""Label map of a radiograph, (row, column) on its own grid; above 0 is lung."""


@dataclass(frozen=True)
class LungFields:
    """The lung fields of one radiograph on its own grid, and what makes them implausible."""

    mask: Mask
    findings: tuple[Finding, ...] = ()

    def volume(self, image: Volume) -> Volume:
        """The mask, 0 or 1, as a label map of its image."""
        return Volume(self.mask.astype(np.uint8), image.affine)


@dataclass(frozen=True)
class LungView:
    """How a classifier sees radiographs.

    Attributes:
        config: what it sees, and when lung fields are implausible.
        model: the lung model; None where the cohort keeps a mask for each of its radiographs.
        segment: how `model` finds lung fields.
    """

    config: LungsConfig
    model: Bundle | None = None
    segment: Segment | None = None

    @property
    def masks(self) -> bool:
        """Whether anything of an image is hidden."""
        return self.config.mask != "none"

    @property
    def key(self) -> str:
        """Names what the visible part of an image follows from, beside the image and its cohort; empty for all of it.

        The limits do not count: an implausible mask is flagged, and used as it is.
        """
        if not self.masks:
            return ""
        deciding = [self.model.sha256 if self.model else "", self.config.mask, self.config.dilate]
        return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:16]

    def find(self, image: Volume, kept: Path | None = None) -> LungFields | None:
        """The lung fields of a radiograph; None where there is neither a model nor a mask.

        Args:
            kept: file of the mask that the cohort keeps; a model's own mask goes before it.

        Raises:
            UserError: the file cannot be read, or is no mask of this image.
        """
        if self.segment is not None:
            found = self.segment(image)
        elif kept is not None:
            found = read_mask(kept, image)
        else:
            return None
        mask = np.asarray(found).astype(np.bool_)
        return LungFields(lung_fields(mask), tuple(check(mask, self.config)))

    def show(
        self, channels: Sequence[Volume], kept: Path | None = None, *, like: Volume | None = None
    ) -> tuple[Volume, ...]:
        """The channels of a radiograph as the network is to see them.

        Args:
            like: the radiograph whose lung fields count, where `channels` are a changed copy of it.

        Raises:
            Refused: as `visible` does.
        """
        return visible(channels, self.find(like or channels[0], kept), self.config) if self.masks else tuple(channels)


def visible(channels: Sequence[Volume], fields: LungFields | None, config: LungsConfig) -> tuple[Volume, ...]:
    """The channels of a radiograph with all black that `config.mask` hides, on the same grid.

    Raises:
        Refused: something is to be hidden, and the lung fields are not known.
    """
    if config.mask == "none":
        return tuple(channels)
    if fields is None:
        raise Refused("no_lung_mask", "The model sees the lungs alone, and there is no lung mask; name lungs.model.")
    mask = fields.mask
    if config.mask != "tight":
        mask = dilate(mask, config.dilate * max(mask.shape))
    if config.mask in ("convex", "box"):
        mask = convex(mask) if config.mask == "convex" else box(mask)
    return tuple(replace(channel, array=inside_only(channel.array, mask)) for channel in channels)


def load_lung_model(name: str, workspace: Path, field: str) -> Bundle:
    """The bundle of a segmentation model of radiographs. Raises UserError naming `field` when it is none."""
    bundle = load_bundle(name, workspace)
    if bundle.config.task.kind != "segmentation" or bundle.config.task.spatial_dims != 2:
        raise UserError(f"{field} {name!r} is no segmentation model of radiographs; name one that finds lungs.")
    return bundle


def read_mask(path: Path, image: Volume) -> NDArray[np.generic]:
    """A mask file on the grid of its image. Raises UserError when it cannot be read or has another shape."""
    mask = read_image(path).array
    if mask.shape != image.array.shape:
        raise UserError(f"{path} has shape {mask.shape}, its image {image.array.shape}; give a mask on its grid.")
    return mask
