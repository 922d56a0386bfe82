"""The verdict on a radiograph as DICOM SR: what result.json says, in declared codes, valid, and read back by others."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from dicom_reader import concepts, dciodvfy_errors, evaluations, needs_dciodvfy, numbers, undeclared_schemes
from synthetic import calibrated_bundle, chest
from torch import nn

from medseg.bundle import load_bundle
from medseg.config import IngestConfig
from medseg.files import read_json
from medseg.images import write_png
from medseg.ingest.dicom_derived import read_source_headers
from medseg.ingest.dicom_write import write_radiograph
from medseg.ingest.sources import discover
from medseg.predict import Predictor, step
from medseg.predict.export_verdict import write_verdict_sr

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom" / "radiographs"
TUBERCULOSIS, FOR_RESEARCH = "56717001", "113009"
PROBABILITY, SCORE, THRESHOLD, SENSITIVITY, SPECIFICITY = "122157", "246262008", "122411", "111088", "111090"


class Sure(nn.Module):
    """The same logits for every image."""

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[0.0, self.margin]]).expand(len(x_BCHW), -1)


def predicted(folder: Path, margin: float = 1.0, image: Any = None, *overrides: str) -> tuple[dict[str, Any], Path]:
    """`result.json` of a DICOM radiograph, and the folder of its case."""
    model = load_bundle(calibrated_bundle(folder / "bundle", *overrides))
    write_radiograph(chest() if image is None else image, (0.2, 0.2), folder / "scans" / "r.dcm", patient_id="p17")
    step.run(model, [folder / "scans"], folder / "out", predictor=Predictor(model, net=Sure(margin)))
    (case,) = folder.glob("out/case-*")
    return read_json(case / "result.json"), case


@pytest.mark.parametrize(("margin", "call"), [(1.0, "refer"), (-3.0, "do_not_refer")])
def test_the_report_says_what_the_result_says(tmp_path: Path, margin: float, call: str) -> None:
    result, case = predicted(tmp_path, margin)
    report, told = pydicom.dcmread(case / "report.dcm"), result["verdict"]
    assert result["outputs"][-1] == "report.dcm"
    found = numbers(report)
    assert found[PROBABILITY] == pytest.approx((told["probability"],))
    assert found[SCORE] == (told["score"],)
    assert found[THRESHOLD] == (told["threshold"],)
    for code, name in ((SENSITIVITY, "sensitivity"), (SPECIFICITY, "specificity")):
        rate = told[name]
        assert found[code] == pytest.approx((rate["value"], rate["ci_low"], rate["ci_high"]))
    flags = [("flag", flag["code"]) for flag in result["flags"]]
    assert evaluations(report) == [(TUBERCULOSIS, call), *flags, ("intended_use", FOR_RESEARCH)]
    assert not concepts(report, "121071"), "a viewer would list it as found, whatever the call"


def test_the_report_names_its_image_its_model_and_its_codes(tmp_path: Path) -> None:
    result, case = predicted(tmp_path)
    report, source = pydicom.dcmread(case / "report.dcm"), pydicom.dcmread(tmp_path / "scans" / "r.dcm")
    assert (report.Modality, report.StudyInstanceUID) == ("SR", source.StudyInstanceUID)
    assert (report.PatientID, report.VerificationFlag, report.PreliminaryFlag) == ("p17", "UNVERIFIED", "PRELIMINARY")
    assert "research only" in report.SeriesDescription
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    (evidence,) = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert [item.ReferencedSOPInstanceUID for item in evidence.ReferencedSOPSequence] == [source.SOPInstanceUID]
    texts = [element.value for element in report.iterall() if element.keyword == "TextValue"]
    for part in (f"bundle_sha256 = {result['bundle']['sha256']}", f"calibration = {result['verdict']['calibration']}"):
        assert part in texts
    assert undeclared_schemes(report) == set()
    (scheme,) = report.CodingSchemeIdentificationSequence
    assert scheme.CodingSchemeDesignator == "99MEDSEG"
    again = predicted(tmp_path / "again")[1]
    assert pydicom.dcmread(again / "report.dcm").SOPInstanceUID == report.SOPInstanceUID


def test_without_a_code_in_the_config_the_class_has_a_declared_one(tmp_path: Path) -> None:
    _, case = predicted(tmp_path, 1.0, None, "export.segments={}")
    report = pydicom.dcmread(case / "report.dcm")
    assert evaluations(report)[0] == ("tb", "refer")
    assert undeclared_schemes(report) == set()


def test_a_withheld_verdict_gives_its_reason_and_no_score(tmp_path: Path) -> None:
    coarse = (chest() // 1000 * 1000).astype(np.uint16)
    result, case = predicted(tmp_path, 1.0, coarse)
    assert (result["status"], result["verdict"]["call"]) == ("flagged", "not assessable")
    report = pydicom.dcmread(case / "report.dcm")
    assert not {PROBABILITY, SCORE} & set(numbers(report))
    said = evaluations(report)
    assert said[:2] == [(TUBERCULOSIS, "not_assessable"), ("reason_not_assessable", "few_levels")]
    assert ("flag", "few_levels") not in said


def test_a_rejected_radiograph_has_a_report_that_says_why(tmp_path: Path) -> None:
    result, case = predicted(tmp_path, 1.0, np.ascontiguousarray(np.rot90(chest())))
    assert (result["status"], result["outputs"]) == ("rejected", ["report.dcm"])
    said = evaluations(pydicom.dcmread(case / "report.dcm"))
    assert said[:2] == [(TUBERCULOSIS, "not_assessable"), ("reason_not_assessable", "not_frontal_chest")]
    model = load_bundle(tmp_path / "bundle")
    found = step.run(model, [tmp_path / "scans"], tmp_path / "out", predictor=Predictor(model, net=Sure(1.0)))
    assert found.figures["resumed"] == 1


def test_there_is_no_report_without_dicom_or_without_a_calibration(tmp_path: Path) -> None:
    model = load_bundle(calibrated_bundle(tmp_path / "bundle"))
    write_png(tmp_path / "pictures" / "a.png", chest())
    step.run(model, [tmp_path / "pictures"], tmp_path / "out", predictor=Predictor(model, net=Sure(1.0)))
    assert read_json(tmp_path / "out" / "a" / "result.json")["verdict"]["call"] == "refer"
    assert not list((tmp_path / "out").rglob("*.dcm"))


def test_a_source_that_no_report_may_refer_to_costs_the_report_alone(tmp_path: Path) -> None:
    _, case = predicted(tmp_path)
    data = pydicom.dcmread(tmp_path / "scans" / "r.dcm")
    del data.StudyInstanceUID
    data.save_as(tmp_path / "scans" / "r.dcm")
    model = load_bundle(tmp_path / "bundle")
    step.run(model, [tmp_path / "scans"], tmp_path / "out", predictor=Predictor(model, net=Sure(1.0)))
    result = read_json(case / "result.json")
    assert result["verdict"]["call"] == "refer"
    assert "No DICOM SR was written (the source has no StudyInstanceUID)." in [f["message"] for f in result["flags"]]
    assert not (case / "report.dcm").exists()


@needs_dciodvfy
@pytest.mark.parametrize("turned", [False, True])
def test_reports_of_verdicts_and_of_rejections_are_valid(tmp_path: Path, turned: bool) -> None:
    image = np.ascontiguousarray(np.rot90(chest(), int(turned)))
    _, case = predicted(tmp_path, 1.0, image)
    assert dciodvfy_errors(case / "report.dcm") == []


@needs_dciodvfy
@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real radiographs are not kept beside this checkout")
def test_reports_on_real_radiographs_are_valid_even_where_these_are_not(tmp_path: Path) -> None:
    model = load_bundle(calibrated_bundle(tmp_path / "bundle"))
    assert model.verdict is not None
    sources, _ = discover([SHARED], IngestConfig())
    assert len(sources) == 4
    for source in sources:
        headers = read_source_headers(source.files)
        verdict = model.verdict.as_result(1 / 3)
        write_verdict_sr(tmp_path / "report.dcm", headers, verdict, model, flags=["chest_doubtful"], seed_uid="x")
        assert dciodvfy_errors(tmp_path / "report.dcm") == [], source.files[0].name
        assert numbers(pydicom.dcmread(tmp_path / "report.dcm"))[PROBABILITY] == pytest.approx((1 / 3,))
