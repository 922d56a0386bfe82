"""What the frames of multi-frame files are, by their functional groups; what tells the volumes of a series apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# What may differ between the volumes of one series, from the plainest to the most roundabout. Each is read from the
# first of the named places that holds it; b-values and directions have had private homes at each vendor.
TRAITS: dict[str, tuple[str | int, ...]] = {
    "image type": ("FrameType", "ImageType"),
    "part of complex values": ("ComplexImageComponent",),
    "stack": ("StackID",),
    "echo": ("EchoNumbers", "EffectiveEchoTime"),
    "echo time": ("EchoTime",),
    "inversion time": ("InversionTimes", "InversionTime"),
    "b-value": ("DiffusionBValue", 0x0019100C, 0x00431039, 0x20011003, 0x00651009),
    "gradient direction": ("DiffusionGradientOrientation", 0x0019100E, 0x001910BB, 0x20051104),
    "time point": ("TemporalPositionIndex", "TemporalPositionIdentifier"),
    "phase": ("NominalCardiacTriggerDelayTime", "NominalPercentageOfCardiacPhase", "TriggerTime"),
    "reconstruction kernel": ("ConvolutionKernel",),
    "tube voltage": ("KVP",),
    "acquisition": ("FrameAcquisitionNumber", "AcquisitionNumber"),
    "acquisition time": ("AcquisitionDateTime", "AcquisitionTime"),
    "content time": ("ContentTime",),
}
TRAIT_TAGS = tuple(place for places in TRAITS.values() for place in places)
MOSAIC_TAGS = (0x0019100A, 0x00651050)  # number of images in a mosaic: Siemens, United Imaging
_GROUPS = {
    "FrameType": ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence"),
    "ComplexImageComponent": ("MRImageFrameTypeSequence",),
    "StackID": ("FrameContentSequence",),
    "TemporalPositionIndex": ("FrameContentSequence",),
    "FrameAcquisitionNumber": ("FrameContentSequence",),
    "EffectiveEchoTime": ("MREchoSequence",),
    "InversionTimes": ("MRModifierSequence",),
    "DiffusionBValue": ("MRDiffusionSequence",),
    "NominalCardiacTriggerDelayTime": ("CardiacSynchronizationSequence", "CardiacTriggerSequence"),
    "NominalPercentageOfCardiacPhase": ("CardiacSynchronizationSequence",),
    "ConvolutionKernel": ("CTReconstructionSequence",),
    "KVP": ("CTXRayDetailsSequence",),
}


@dataclass(frozen=True)
class Plane:
    """Where one frame lies (mm, LPS; empty where the file does not say) and what it shows."""

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    frame_type: tuple[str, ...]
    traits: tuple[str, ...]
    mosaic: bool


def planes(data: Any) -> list[Plane]:
    """The frames of a multi-frame data set in stored order. What a frame does not say itself, all share."""
    shared = list(data.get("SharedFunctionalGroupsSequence") or [])[:1]
    return [_plane([frame, *shared], data) for frame in data.PerFrameFunctionalGroupsSequence]


def frame_value(data: Any, frame: int, group: str, keyword: str) -> Any:
    """One value of the functional groups of a frame, its own before the shared one; None when neither is there."""
    shared = list(data.get("SharedFunctionalGroupsSequence") or [])[:1]
    return _value([data.PerFrameFunctionalGroupsSequence[frame], *shared], (group,), keyword)


def traits_of(data: Any) -> tuple[str, ...]:
    """The traits of a single-frame data set as text, empty where it does not say."""
    return tuple(next((str(data[place].value) for place in places if place in data), "") for places in TRAITS.values())


def is_mosaic(data: Any) -> bool:
    """Whether one picture holds many slices side by side, as Siemens and United Imaging write them."""
    return any(tile_count(data, tag) > 1 for tag in MOSAIC_TAGS)


def tile_count(data: Any, tag: int) -> int:
    """The number of slices in a picture by one of `MOSAIC_TAGS`; 0 when it does not say.

    A private element of implicit VR comes as bytes: two of them are a number, others its digits.
    """
    value = data[tag].value if tag in data else None
    if isinstance(value, bytes) and len(value) == 2 and not value.isdigit():
        return int.from_bytes(value, "little")
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    text = text.strip(" \0")
    return int(text) if text.isdecimal() and len(text) < 6 else 0


def numbers(value: Any) -> tuple[float, ...]:
    """A DICOM value of any multiplicity as floats."""
    values = () if value is None else value if hasattr(value, "__len__") else (value,)
    return tuple(float(number) for number in values)


def _plane(items: Sequence[Any], data: Any) -> Plane:
    frame_type = _value(items, _GROUPS["FrameType"], "FrameType")
    return Plane(
        position=numbers(_value(items, ("PlanePositionSequence",), "ImagePositionPatient")),
        orientation=numbers(_value(items, ("PlaneOrientationSequence",), "ImageOrientationPatient")),
        spacing=numbers(_value(items, ("PixelMeasuresSequence",), "PixelSpacing")),
        frame_type=() if frame_type is None or isinstance(frame_type, str) else tuple(str(part) for part in frame_type),
        traits=tuple(_trait(items, data, places) for places in TRAITS.values()),
        mosaic=frame_type is not None and "MOSAIC" in frame_type,
    )


def _trait(items: Sequence[Any], data: Any, places: tuple[str | int, ...]) -> str:
    for place in places:
        value = None
        if place == "DiffusionGradientOrientation":
            value = _gradient(items)
        elif isinstance(place, str) and place in _GROUPS:
            value = _value(items, _GROUPS[place], place)
        if value is None and place in data:
            value = data[place].value
        if value is not None:
            return str(value)
    return ""


def _gradient(items: Sequence[Any]) -> Any:
    for item in items:
        for diffusion in item.get("MRDiffusionSequence") or []:
            for direction in diffusion.get("DiffusionGradientDirectionSequence") or []:
                return direction.get("DiffusionGradientOrientation")
    return None


def _value(items: Sequence[Any], groups: tuple[str, ...], keyword: str) -> Any:
    for item in items:
        for group in groups:
            for member in item.get(group) or []:
                if keyword in member:
                    return member[keyword].value
    return None
