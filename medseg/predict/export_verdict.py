"""Write a classifier's verdict on a radiograph as DICOM Structured Report (TID 1500), for the PACS.

One measurement group about the whole image (TID 1501). The class to refer names the evaluation whose value is the call,
and is no Finding, since viewers list a finding as something that is there.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg.bundle import Bundle
from medseg.ingest.dicom_derived import MAX_TEXT, coded, writing
from medseg.predict.export_seg import tracking_uid
from medseg.predict.export_sr import algorithm_item, measurement_report

PRIVATE_SCHEME = "99MEDSEG"


def write_verdict_sr(
    path: Path,
    sources: Sequence[Any],
    verdict: Mapping[str, Any],
    bundle: Bundle,
    *,
    reasons: Sequence[str] = (),
    flags: Sequence[str] = (),
    seed_uid: str,
) -> Path:
    """Write call, probability, score, threshold, and sensitivity and specificity there with their intervals; atomic.

    Codes that neither DICOM nor SNOMED CT has are of the scheme `PRIVATE_SCHEME`, which the document declares:
    the values of the call, the codes of findings, and the class where `export.segments` of the config gives none.

    Args:
        sources: header of the radiograph, from `read_source_headers`.
        verdict: as `Verdict.as_result` gives it.
        reasons: codes of the findings for which the radiograph is not assessable.
        flags: codes of all other findings to look at.
        seed_uid: what the UIDs follow from; the same result has the same UIDs.

    Raises:
        ValueError, AttributeError, …: whatever highdicom finds wrong with the headers of the source.
    """
    import highdicom
    from highdicom.coding_schemes import CodingSchemeIdentificationItem

    positive = str(verdict["positive"])
    with writing(path) as temporary:
        group = highdicom.sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=highdicom.sr.TrackingIdentifier(
                uid=tracking_uid(seed_uid, positive), identifier=f"{bundle.name} {positive}"[:MAX_TEXT]
            ),
            algorithm_id=algorithm_item(bundle.identity(), calibration=str(verdict["calibration"])),
            measurements=list(_measurements(verdict)),
            qualitative_evaluations=list(_evaluations(verdict, bundle, reasons, flags)),
            source_images=[highdicom.sr.SourceImageForMeasurementGroup.from_source_image(one) for one in sources],
        )
        scheme = CodingSchemeIdentificationItem(
            designator=PRIVATE_SCHEME, name="Private codes of medseg", responsible_organization="medseg"
        )
        made = measurement_report([group], sources, bundle, "verdict", seed_uid=seed_uid, coding_schemes=[scheme])
        made.save_as(temporary)
    return path


def _measurements(verdict: Mapping[str, Any]) -> Iterator[Any]:
    """What is known as a number; a radiograph that is not assessable has neither probability nor score."""
    import highdicom
    from pydicom.sr.codedict import codes

    named = {
        codes.DCM.Probability: verdict["probability"],
        codes.SCT.Score: verdict["score"],
        codes.DCM.ThresholdValue: verdict["threshold"],
    }
    for name, value in named.items():
        if value is not None:
            yield highdicom.sr.Measurement(name=name, value=value, unit=codes.UCUM.NoUnits)
    for name, rate in (
        (codes.DCM.CaseSensitivity, verdict["sensitivity"]),
        (codes.DCM.CaseSpecificity, verdict["specificity"]),
    ):
        if rate is not None:
            interval = highdicom.sr.MeasurementProperties(
                upper_measurement_uncertainty=rate["ci_high"] - rate["value"],
                lower_measurement_uncertainty=rate["value"] - rate["ci_low"],
            )
            yield highdicom.sr.Measurement(name=name, value=rate["value"], unit=codes.UCUM.NoUnits, properties=interval)


def _evaluations(
    verdict: Mapping[str, Any], bundle: Bundle, reasons: Sequence[str], flags: Sequence[str]
) -> Iterator[Any]:
    import highdicom
    from pydicom.sr.codedict import codes

    given = bundle.config.export.segments.get(verdict["positive"])
    about = _private(verdict["positive"]) if given is None else coded(given.type)
    said = [(about, _private(verdict["call"]))]
    said += [(_private("reason not assessable"), _private(code)) for code in dict.fromkeys(reasons)]
    said += [(_private("flag"), _private(code)) for code in dict.fromkeys(flags)]
    said.append((_private("intended use"), codes.DCM.ForResearch))
    for name, value in said:
        yield highdicom.sr.QualitativeEvaluation(name, value)


def _private(term: str) -> Any:
    """A term of medseg's own: its code is the term with underscores, its meaning the term with spaces."""
    import highdicom

    return highdicom.sr.CodedConcept(term.replace(" ", "_"), PRIVATE_SCHEME, term.replace("_", " ")[:MAX_TEXT])
