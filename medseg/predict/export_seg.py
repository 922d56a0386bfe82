"""Write a mask as DICOM Segmentation that refers to the series it was made from, for the PACS."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg.bundle import Bundle
from medseg.config import SegmentConfig
from medseg.ingest.dicom_derived import (
    MAX_TEXT,
    RESEARCH_ONLY,
    SERIES_NUMBERS,
    algorithm,
    coded,
    maker,
    series_description,
    writing,
)
from medseg.ingest.dicom_write import derived_uid
from medseg.predict.preview import label_colour
from medseg.volume import Volume, world_of

_OFF_GRID = 0.1  # of the smallest spacing: farther off, a mask does not lie on the slices of its source
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


def write_seg(path: Path, mask: Volume, sources: Sequence[Any], bundle: Bundle, *, seed_uid: str) -> Any:
    """Write one segment per label of the bundle, in the frame of reference of the source series; atomic.

    Segment number = label value. A label that occurs nowhere keeps its segment, without frames. Patient and study are
    those of the source, so this file identifies the patient as the source does. Codes and the encoding come from
    `export` of the bundle's config.

    Args:
        mask: labels on the grid of the series, or on another grid in its frame of reference.
        sources: headers from `read_source_headers`; where the grid is that of single-frame slices, `sources[k]` is
            the slice with rows and columns `mask.array[:, :, k].T`.
        seed_uid: what the UIDs follow from; the same result has the same UIDs.

    Returns:
        What was written, a pydicom data set.

    Raises:
        ValueError, AttributeError, …: whatever highdicom finds wrong with the headers of the source.
    """
    import highdicom

    identity = bundle.identity()
    with writing(path) as temporary:
        first, *more = sources
        several_enhanced = bool(more) and "NumberOfFrames" in first
        pixels, on_slices = _planes(mask, sources)
        segmentation = highdicom.seg.Segmentation(
            source_images=[first] if several_enhanced else _with_spacing(sources, mask) if on_slices else sources,
            further_source_images=more if several_enhanced else None,
            pixel_array=pixels,
            segmentation_type=bundle.config.export.segmentation.upper(),
            segment_descriptions=list(describe_segments(bundle, seed_uid)),
            series_instance_uid=derived_uid(f"{seed_uid}/series"),
            series_number=SERIES_NUMBERS["SEG"],
            sop_instance_uid=derived_uid(f"{seed_uid}/instance"),
            instance_number=1,
            content_label="SEGMENTATION",
            content_description=RESEARCH_ONLY,
            series_description=series_description(identity),
            **maker(identity),
        )
        segmentation.save_as(temporary)
    return segmentation


def tracking_uid(seed_uid: str, name: str) -> str:
    """Identifies one structure of one result, in the segmentation and in the measurements of it."""
    return derived_uid(f"{seed_uid}/segment/{name}")


def segment_codes(bundle: Bundle, name: str) -> SegmentConfig:
    """The codes of a label. None is made up: without any, all that is said is that it is tissue."""
    return bundle.config.export.segments.get(name, SegmentConfig())


def describe_segments(bundle: Bundle, seed_uid: str) -> Iterator[Any]:
    """A segment description per label, in the order of the values."""
    import highdicom
    from pydicom.sr.codedict import codes

    identity = bundle.identity()
    made_by = highdicom.AlgorithmIdentificationSequence(
        family=codes.DCM.ArtificialIntelligence, source="medseg", **algorithm(identity)
    )
    for name, value in sorted(bundle.labels.items(), key=lambda item: item[1]):
        given = segment_codes(bundle, name)
        description = highdicom.seg.SegmentDescription(
            segment_number=value,
            segment_label=name[:MAX_TEXT],
            segmented_property_category=coded(given.category),
            segmented_property_type=coded(given.type),
            algorithm_type="AUTOMATIC",
            algorithm_identification=made_by,
            tracking_uid=tracking_uid(seed_uid, name),
            tracking_id=f"{bundle.name} {name}"[:MAX_TEXT],
            # Without a colour, some viewers hang while they load the file.
            display_color=highdicom.color.CIELabColor.from_rgb(*label_colour(value)),
        )
        if given.modifier is not None:
            modifier = highdicom.sr.CodedConcept.from_code(coded(given.modifier))
            description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
        yield description


def _planes(mask: Volume, sources: Sequence[Any]) -> tuple[Any, bool]:
    """What highdicom encodes, and whether it lies on the slices of the source.

    On the slices, (slice, row, column) labels that take each slice's own position; else a volume with the geometry
    of the mask.
    """
    import highdicom

    array = np.ascontiguousarray(mask.array.transpose(2, 1, 0))
    if _lies_on_slices(mask, sources):
        return array, True
    to_lps = np.diag([*_LPS_TO_RAS, 1.0])
    frame = sources[0].FrameOfReferenceUID
    affine = (to_lps @ mask.affine)[:, [2, 1, 0, 3]]
    return highdicom.Volume(array, affine, coordinate_system="PATIENT", frame_of_reference_uid=frame), False


def _lies_on_slices(mask: Volume, sources: Sequence[Any]) -> bool:
    """Whether the corners of each plane of the mask are the corners of the source's slice of the same number."""
    columns, rows, slices = mask.array.shape
    if len(sources) != slices or any("NumberOfFrames" in source for source in sources):
        return False
    for k in (0, slices - 1):
        source = sources[k]
        if (source.Columns, source.Rows) != (columns, rows):
            return False
        across, down = np.reshape(np.asarray(source.ImageOrientationPatient, float), (2, 3))
        down_mm, across_mm = (float(spacing) for spacing in source.PixelSpacing)
        first = np.asarray(source.ImagePositionPatient, float)
        index = np.array([[i, j, k] for i in (0, columns - 1) for j in (0, rows - 1)])
        theirs = first + index[:, :1] * across * across_mm + index[:, 1:2] * down * down_mm
        apart = np.abs(world_of(mask.affine, index) - theirs * _LPS_TO_RAS).max()
        if apart > _OFF_GRID * min(mask.spacing_mm):
            return False
    return True


def _with_spacing(sources: Sequence[Any], mask: Volume) -> Sequence[Any]:
    """The masks have no gaps between them; how thick was imaged is for the source to say, if it does."""
    for source in sources:
        source.SliceThickness = source.SpacingBetweenSlices = f"{mask.spacing_mm[2]:.10g}"
    return sources
