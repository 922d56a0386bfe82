"""Activation maps as DICOM Secondary Capture: the right picture in the right study, valid, and naming no one."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from dicom_reader import dciodvfy_errors, needs_dciodvfy
from torch import nn

from medseg.config import ExplainConfig, IngestConfig
from medseg.explain.export_sc import caption, draw_overlay, write_sc
from medseg.explain.step import run
from medseg.files import read_json, read_rows, write_json
from medseg.ingest.dicom_write import write_radiograph
from medseg.ingest.sources import discover, read_source
from medseg.plan import Plan

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom" / "radiographs"
ABOUT = {"method": "gradcam", "layer": "last", "target": "lesion", "raw_max": 2.0, "evidence": True}
RESULT = {
    "bundle": {"name": "chest", "sha256": "b" * 64, "run_id": "run-1"},
    "probs": {"normal": 0.125, "lesion": 0.875},
    "input_sha256": "a" * 64,
}


class Bright(nn.Module):
    """The lesion's logit is the mean of the bright part of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.act, self.head = nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Linear(1, 2)
        self.body.weight.data.fill_(1.0)
        self.body.bias.data.fill_(-1.0)
        self.head.weight.data = torch.tensor([[-1.0], [1.0]])

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.body(x_BCHW)).mean((2, 3)))


def radiograph(shape: tuple[int, int] = (96, 128)) -> np.ndarray:
    """A grey ramp with a bright patch at rows 16 to 31, columns 80 to 103."""
    image = np.indices(shape).sum(0).astype(np.uint16) + 50
    image[16:32, 80:104] = 900
    return image


def written(folder: Path, **changes: object) -> tuple[pydicom.Dataset, pydicom.Dataset]:
    """The capture and its source."""
    source = write_radiograph(radiograph(), (0.2, 0.2), folder / "r.dcm", patient_id="p17")
    activation = np.zeros((96, 128), np.float32)
    activation[16:32, 80:104] = 2.0
    write_sc(folder / "overlay.dcm", source, radiograph(), activation, ABOUT | changes, RESULT)
    return pydicom.dcmread(folder / "overlay.dcm"), pydicom.dcmread(source)


def test_the_capture_joins_the_study_of_its_radiograph_and_refers_to_it(tmp_path: Path) -> None:
    capture, source = written(tmp_path)
    assert capture.SOPClassUID.name == "Secondary Capture Image Storage"
    for keyword in ("StudyInstanceUID", "PatientID", "PatientName", "PatientOrientation", "BodyPartExamined"):
        assert capture.get(keyword) == source.get(keyword), keyword
    assert capture.SeriesInstanceUID != source.SeriesInstanceUID
    (item,) = capture.SourceImageSequence
    assert item.ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert (capture.Modality, list(capture.ImageType)[:2]) == ("OT", ["DERIVED", "SECONDARY"])
    assert (capture.ConversionType, capture.BurnedInAnnotation) == ("WSD", "NO")
    assert "gradcam" in capture.SeriesDescription
    again, _ = written(tmp_path)
    other, _ = written(tmp_path, target="normal")
    assert again.SOPInstanceUID == capture.SOPInstanceUID != other.SOPInstanceUID


def test_colour_lies_where_the_map_is_and_grey_where_it_is_not(tmp_path: Path) -> None:
    capture, _ = written(tmp_path)
    picture = np.frombuffer(capture.PixelData, np.uint8)[: capture.Rows * capture.Columns * 3]
    picture = picture.reshape(capture.Rows, capture.Columns, 3).astype(int)
    assert capture.Columns == 128
    assert capture.Rows > 96, "a strip of text below"
    coloured = np.ptp(picture[:96], axis=2) > 20
    expected = np.zeros((96, 128), bool)
    expected[16:32, 80:104] = True
    assert np.array_equal(coloured, expected)
    assert not np.ptp(picture[96:], axis=2).any()
    assert picture[96:].max() > 200
    grey = picture[:96, :, 0][~expected]
    assert np.corrcoef(grey, radiograph()[~expected])[0, 1] > 0.95, "the radiograph is seen"


def test_a_map_without_evidence_is_said_and_not_drawn() -> None:
    about = ABOUT | {"raw_max": 0.0, "evidence": False}
    assert "no evidence" in caption(about, RESULT)
    picture = draw_overlay(radiograph(), np.zeros((96, 128), np.float32), about, "text")
    assert not np.ptp(picture, axis=2).any()


def test_the_caption_names_model_method_class_and_probability() -> None:
    text = caption(ABOUT, RESULT)
    for part in ("chest", "gradcam", "'lesion'", "0.88", "Research only"):
        assert part in text
    assert "probability" not in caption(ABOUT, RESULT | {"probs": {}})


@needs_dciodvfy
def test_the_capture_is_valid(tmp_path: Path) -> None:
    written(tmp_path)
    assert dciodvfy_errors(tmp_path / "r.dcm") == []
    assert dciodvfy_errors(tmp_path / "overlay.dcm") == []


@needs_dciodvfy
@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real radiographs are not kept beside this checkout")
def test_captures_of_real_radiographs_are_valid_even_where_these_are_not(tmp_path: Path) -> None:
    sources, _ = discover([SHARED], IngestConfig())
    assert len(sources) == 4
    for source in sources:
        scan = read_source(source)
        image = scan.channels[0].array[:256, :256]
        activation = np.linspace(0, 2, image.size, dtype=np.float32).reshape(image.shape)
        write_sc(tmp_path / "overlay.dcm", scan.source_files[0], image, activation, ABOUT, RESULT)
        assert dciodvfy_errors(tmp_path / "overlay.dcm") == [], scan.source_files[0].name


def explain(folder: Path, config: ExplainConfig) -> tuple[dict[str, str], dict[str, object]]:
    """Run the step on the DICOM radiograph of `folder`; the row of the table, and `explanation.json`."""
    plan = Plan(spatial_dims=2, patch_size=(96, 128), batch_size=4, size_px=(96, 128))
    labels = {"normal": 0, "lesion": 1}
    run(config, Bright(), plan, labels, [folder / "scans"], predictions=folder / "predictions")
    (row,) = read_rows(folder / "predictions" / "explanations.csv")
    return row, read_json(folder / "predictions" / row["case_id"] / "explanation" / "explanation.json")


def prepare(folder: Path) -> Path:
    """A DICOM radiograph and the result of its prediction; the folder of its explanation."""
    write_radiograph(radiograph(), (0.2, 0.2), folder / "scans" / "r.dcm", patient_id="p17")
    ((source,), _) = discover([folder / "scans"], IngestConfig())
    facts = {"status": "done", "input_sha256": read_source(source).source_sha256, "predicted": "lesion"}
    write_json(folder / "predictions" / source.case_id / "result.json", RESULT | facts)
    return folder / "predictions" / source.case_id / "explanation"


def test_the_step_writes_the_capture_beside_the_map_and_makes_a_missing_one_again(tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    row, about = explain(tmp_path, ExplainConfig())
    assert (row["status"], row["reason"], about["dicom"]) == ("done", "", "overlay.dcm")
    first = (folder / "overlay.dcm").stat().st_mtime_ns
    explain(tmp_path, ExplainConfig())
    assert (folder / "overlay.dcm").stat().st_mtime_ns == first
    (folder / "overlay.dcm").unlink()
    explain(tmp_path, ExplainConfig())
    instance = pydicom.dcmread(folder / "overlay.dcm").SOPInstanceUID
    explain(tmp_path, ExplainConfig(method="hirescam"))
    assert pydicom.dcmread(folder / "overlay.dcm").SOPInstanceUID != instance


def test_a_radiograph_that_no_capture_may_refer_to_keeps_its_map(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    file = write_radiograph(radiograph(), (0.2, 0.2), tmp_path / "scans" / "r.dcm", patient_id="p17")
    data = pydicom.dcmread(file)
    del data.StudyInstanceUID
    data.save_as(file)
    ((source,), _) = discover([tmp_path / "scans"], IngestConfig())
    facts = {"status": "done", "input_sha256": read_source(source).source_sha256, "predicted": "lesion"}
    write_json(tmp_path / "predictions" / source.case_id / "result.json", RESULT | facts)
    row, about = explain(tmp_path, ExplainConfig())
    assert row["status"] == "done"
    assert row["reason"] == "No DICOM SC was written (the source has no StudyInstanceUID)."
    assert "dicom" not in about
    folder = tmp_path / "predictions" / source.case_id / "explanation"
    assert (folder / "map.npy").is_file()
    assert not (folder / "overlay.dcm").exists()
