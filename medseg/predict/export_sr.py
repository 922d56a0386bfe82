"""Write the volumes of a mask as DICOM Structured Report: an imaging measurement report (TID 1500), for the PACS."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg.bundle import Bundle
from medseg.ingest.dicom import RADIOGRAPH_MODALITIES
from medseg.ingest.dicom_derived import MAX_TEXT, SERIES_NUMBERS, algorithm, coded, maker, series_description, writing
from medseg.ingest.dicom_write import derived_uid
from medseg.predict.export_seg import segment_codes, tracking_uid

_SIDES = ("7771000", "24028007", "51440002", "66459002")  # SNOMED CT: left, right, both, one


def write_sr(
    path: Path,
    segmentation: Any,
    sources: Sequence[Any],
    volumes_ml: Mapping[str, float],
    bundle: Bundle,
    *,
    seed_uid: str,
) -> Path:
    """Write one measurement group per label, with its volume, that refers to its segment and the source; atomic.

    Args:
        segmentation: what `write_seg` returned.
        sources: headers of the series, from `read_source_headers`.
        volumes_ml: label name to volume, 0 for what was not found.
        seed_uid: as for `write_seg`.

    Raises:
        ValueError, AttributeError, …: whatever highdicom finds wrong with the headers of the source.
    """
    with writing(path) as temporary:
        groups = [
            _group(name, value_ml, segmentation, sources[0], bundle, seed_uid) for name, value_ml in volumes_ml.items()
        ]
        made = measurement_report(groups, sources, bundle, "volumes", seed_uid=seed_uid, evidence=[segmentation])
        made.save_as(temporary)
    return path


def measurement_report(
    groups: Sequence[Any],
    sources: Sequence[Any],
    bundle: Bundle,
    what: str,
    *,
    seed_uid: str,
    evidence: Sequence[Any] = (),
    coding_schemes: Sequence[Any] | None = None,
) -> Any:
    """The document around measurement groups: complete, not verified, in the study of its sources.

    Args:
        sources: headers from `read_source_headers`.
        what: a word for the series list of a viewer.
        evidence: other objects that the groups refer to.
        coding_schemes: what identifies the private ones among the schemes of the groups' codes.

    Returns:
        A pydicom data set.
    """
    import highdicom
    from pydicom.sr.codedict import codes

    identity = bundle.identity()
    report = highdicom.sr.MeasurementReport(
        observation_context=_observer(identity),
        procedure_reported=_procedure(str(sources[0].get("Modality", ""))),
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    return highdicom.sr.ComprehensiveSR(
        evidence=[*evidence, *sources],
        content=report,
        series_instance_uid=derived_uid(f"{seed_uid}/sr/series"),
        series_number=SERIES_NUMBERS["SR"],
        sop_instance_uid=derived_uid(f"{seed_uid}/sr/instance"),
        instance_number=1,
        is_complete=True,
        is_final=False,
        is_verified=False,
        series_description=series_description(identity, f" {what}"),
        coding_schemes=coding_schemes,
        **maker(identity),
    )


def _group(name: str, value_ml: float, segmentation: Any, source: Any, bundle: Bundle, seed_uid: str) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes

    given = segment_codes(bundle, name)
    volume = highdicom.sr.Measurement(
        name=codes.SCT.Volume,
        value=value_ml,
        unit=codes.UCUM.CubicCentimeter,  # what the standard's list of units of volume has for a millilitre
        method=codes.DCM.SumOfSegmentedVoxelMethodForVolume,
    )
    return highdicom.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=highdicom.sr.TrackingIdentifier(
            uid=tracking_uid(seed_uid, name), identifier=f"{bundle.name} {name}"[:MAX_TEXT]
        ),
        referenced_segment=highdicom.sr.ReferencedSegment(
            sop_class_uid=segmentation.SOPClassUID,
            sop_instance_uid=segmentation.SOPInstanceUID,
            segment_number=bundle.labels[name],
            source_series=highdicom.sr.SourceSeriesForSegmentation(source.SeriesInstanceUID),
        ),
        finding_category=coded(given.category),
        finding_type=coded(given.type),
        finding_sites=[_site(given.type, given.modifier)] if given.modifier is not None else None,
        algorithm_id=algorithm_item(bundle.identity()),
        measurements=[volume],
    )


def algorithm_item(identity: Mapping[str, str], **more: str) -> Any:
    """The model as the content of a measurement group; `more` are parameters beside its hash and its run."""
    import highdicom

    known = algorithm(identity)
    texts = [f"{name} = {value}" for name, value in {**known["parameters"], **more}.items()]
    return highdicom.sr.AlgorithmIdentification(name=known["name"], version=known["version"], parameters=texts)


def _site(structure: Any, modifier: Any) -> Any:
    """Where the structure is: left or right, or which part of it."""
    import highdicom

    role = "laterality" if modifier.scheme == "SCT" and modifier.value in _SIDES else "topographical_modifier"
    return highdicom.sr.FindingSite(anatomic_location=coded(structure), **{role: coded(modifier)})


def _observer(identity: Mapping[str, str]) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes

    device = highdicom.sr.DeviceObserverIdentifyingAttributes(
        uid=derived_uid(f"medseg/{identity['sha256']}"),
        name="medseg",
        manufacturer_name="medseg",
        model_name=identity["name"][:MAX_TEXT],
        serial_number=identity["sha256"][:16],
    )
    context = highdicom.sr.ObserverContext(codes.DCM.Device, device)
    return highdicom.sr.ObservationContext(observer_device_context=context)


def _procedure(modality: str) -> Any:
    """What was done, as far as the modality tells."""
    from pydicom.sr.codedict import codes

    known = {
        **dict.fromkeys(RADIOGRAPH_MODALITIES, codes.LN.XRUnspecifiedBodyRegion),
        "CT": codes.LN.CTUnspecifiedBodyRegion,
        "MR": codes.LN.MRIUnspecifiedBodyRegion,
        "PT": codes.LN.PETUnspecifiedBodyRegion,
    }
    return known.get(modality, codes.SCT.ImagingProcedure)
