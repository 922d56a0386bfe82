"""The lung fields of radiographs: where they come from, what a classifier sees of an image, when they are not true."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medseg.config.fields import Share, Strict

LungMask = Literal["none", "tight", "dilated", "convex", "box"]
LungCode = Literal["lungs_area", "lungs_parts", "lungs_asymmetry", "lungs_askew", "lungs_at_border"]
"""What may be wrong with lung fields; see `medseg.data.lungs.check`."""


class LungsConfig(Strict):
    """The lung fields of a radiograph, and when they are implausible.

    A segmentation with this section says that its labels are lung fields: each of its masks is held against the limits.
    A classifier with it finds the lung fields of every radiograph by `model` (bundle folder, run id,
    `models:/NAME@ALIAS`), which is copied into its bundle; without a model they are the label maps of the cohort, and
    only cases of a cohort with such masks can be predicted. What it sees is the whole image (`mask: none`), or the
    image with all black outside the fields (`tight`), outside them grown by `dilate` of the longer side of the image
    (`dilated`), outside the convex hull of that (`convex`), or outside the rectangle round it (`box`).

    Limits: `area` is the share of the image between which both fields together lie; `min_ratio` the area of the
    smaller field over that of the larger; `max_askew` by how much the centre of one may lie below that of the other,
    over their distance sideways; `max_at_border` the share of the outline that may lie on the border of the image.
    """

    model: str = ""
    mask: LungMask = "none"
    dilate: Annotated[float, Field(ge=0, le=0.2)] = 0.03
    area: tuple[Share, Share] = (0.08, 0.6)
    min_ratio: Share = 0.3
    max_askew: Annotated[float, Field(ge=0)] = 0.3
    max_at_border: Share = 0.1

    @model_validator(mode="after")
    def _check_area(self) -> "LungsConfig":
        if self.area[0] >= self.area[1]:
            raise ValueError(f"area {self.area} must rise; give the least share first")
        return self
