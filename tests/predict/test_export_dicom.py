"""Masks and volumes as DICOM: at the right place, with the right names, valid, and readable by others."""

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from dicom_reader import concepts, dciodvfy_errors, measured_ml, needs_dciodvfy, seg_points
from tiny_bundle import Threshold, box_volume, bundle, config, plan

from medseg.bundle import Bundle
from medseg.config import IngestConfig
from medseg.files import read_json
from medseg.ingest.dicom_derived import read_source_headers
from medseg.ingest.dicom_write import write_series
from medseg.ingest.sources import discover, read_source
from medseg.predict import Predictor, step
from medseg.predict.export_nifti import write_mask
from medseg.predict.export_seg import write_seg
from medseg.predict.export_sr import write_sr
from medseg.volume import Volume, resampled_grid, world_of

SPACING_MM = np.array([1.2, 1.6, 2.0])
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom"
SEGMENTS = {
    "front": {
        "type": {"value": 5366008, "meaning": "Hippocampus"},
        "modifier": {"value": 255549009, "meaning": "Anterior"},
    },
    "fluid": {
        "category": {"value": "91720002", "meaning": "Body Substance"},
        "type": {"value": "65216001", "meaning": "Cerebrospinal Fluid"},
        "modifier": {"value": "7771000", "meaning": "Left"},
    },
}
LABELS = {"front": 1, "fluid": 2, "plain": 3}


class Levels(torch.nn.Module):
    """Label 1 from 25 on, label 2 from 75 on, label 3 nowhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(x), x + 2.5, 2 * x, torch.full_like(x, -1.0)], 1)


def orientations() -> dict[str, np.ndarray]:
    """All 48 ways in which array axes can run along world axes, and eight oblique ones, half of them left-handed."""
    found = {}
    signs = itertools.product((1, -1), repeat=3)
    for number, (order, sign) in enumerate(itertools.product(itertools.permutations(range(3)), signs)):
        found[f"axes-{number:02d}"] = np.eye(3)[:, order] * np.asarray(sign)
    rng = np.random.default_rng(5)
    for number in range(8):
        rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        found[f"oblique-{number}"] = rotation * np.sign(np.linalg.det(rotation)) * (-1) ** number
    affines = {}
    for number, (name, directions) in enumerate(found.items()):
        affines[name] = np.eye(4)
        affines[name][:3, :3], affines[name][:3, 3] = directions * SPACING_MM, (11 + number, -22, 33)
    return affines


def two_organs(affine: np.ndarray, shape: tuple[int, int, int] = (12, 10, 7)) -> Volume:
    """Two boxes of different size away from the middle of every axis, in noise."""
    array = (np.indices(shape).sum(0) % 17).astype(np.int16)
    array[1:4, 2:8, 4:6] = 50
    array[7:11, 1:4, 1:4] = 100
    return Volume(array, affine)


def labels_of(volume: Volume) -> Volume:
    return Volume(((volume.array >= 50).astype(np.uint8) + (volume.array >= 100)).astype(np.uint8), volume.affine)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_model(tmp_path_factory.mktemp("bundle"), "binary")


def make_model(folder: Path, segmentation: str) -> Bundle:
    made = config(LABELS, export={"segmentation": segmentation, "segments": SEGMENTS})
    return bundle(folder / segmentation, made, plan(spacing_mm=(1.0, 1.0, 1.0)))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, model: Bundle) -> tuple[Path, list[Path]]:
    """The folder of a case predicted from a CT series by the step itself, and the series."""
    root = tmp_path_factory.mktemp("result")
    files = write_series(two_organs(np.diag([1.0, 1.0, 2.0, 1.0])), root / "s", patient_id="p", modality="MR")
    step.run(model, [root / "s"], root / "out", predictor=Predictor(model, net=Levels()))
    (folder,) = root.glob("out/case-*")
    return folder, files


@pytest.mark.parametrize("segmentation", ["binary", "labelmap"])
def test_organs_lie_at_the_same_place_in_nifti_and_seg(tmp_path: Path, segmentation: str) -> None:
    """From a series as found on disk, through two paths that share nothing but the mask's array."""
    chosen = orientations()
    if segmentation == "labelmap":
        chosen = dict(itertools.islice(chosen.items(), 0, None, 7))
    model = make_model(tmp_path, segmentation)
    for name, affine in chosen.items():
        written = two_organs(affine)
        write_series(written, tmp_path / name, patient_id=name)
        ((source,), _) = discover([tmp_path / name], IngestConfig())
        scan = read_source(source)
        mask = labels_of(scan.channels[0])
        sources = read_source_headers(scan.source_files)
        write_seg(tmp_path / "mask.dcm", mask, sources, model, seed_uid=name)
        found = seg_points(tmp_path / "mask.dcm")
        nifti = nib.load(write_mask(tmp_path, mask))
        values = np.asarray(nifti.dataobj)
        assert sorted(found) == [1, 2]
        for value in (1, 2):
            voxels = np.argwhere(values == value)
            centre = nib.affines.apply_affine(nifti.affine, voxels).mean(0)
            true = world_of(affine, np.argwhere(labels_of(written).array == value)).mean(0)
            indices = nib.affines.apply_affine(np.linalg.inv(nifti.affine), found[value] * (-1, -1, 1))
            assert np.abs(indices - indices.round()).max() < 1e-3, name
            assert sorted(map(tuple, indices.round().astype(int))) == sorted(map(tuple, voxels)), name
            assert np.linalg.norm(centre - true) < 1e-3, name


def test_a_mask_off_the_slices_of_its_source_keeps_its_own_geometry(tmp_path: Path, model: Bundle) -> None:
    """As when a tilted series was resampled: another grid in the same frame of reference."""
    affine = orientations()["oblique-3"]
    files = write_series(two_organs(affine), tmp_path / "s", patient_id="p")
    shape, finer = resampled_grid((12, 10, 7), affine, (1.0, 1.0, 1.5))
    array = np.zeros(shape, np.uint8)
    array[2:5, 3:9, 2:4] = 2
    sources = read_source_headers(files)
    seg = write_seg(tmp_path / "m.dcm", Volume(array, finer), sources, model, seed_uid="x")
    expected = world_of(finer, np.argwhere(array == 2)).mean(0)
    assert np.linalg.norm(seg_points(tmp_path / "m.dcm")[2].mean(0) * (-1, -1, 1) - expected) < 1e-3
    assert seg.FrameOfReferenceUID == sources[0].FrameOfReferenceUID
    assert not any(frame.DerivationImageSequence for frame in seg.PerFrameFunctionalGroupsSequence)


def test_a_mask_of_an_enhanced_series_lies_on_the_frame_it_was_made_from(tmp_path: Path, model: Bundle) -> None:
    """Frames in the opposite order, and spacing and orientation repeated in each, as scanners do."""
    affine = orientations()["oblique-2"]
    files = write_series(two_organs(affine), tmp_path / "s", patient_id="p")
    enhanced = as_enhanced([pydicom.dcmread(file, stop_before_pixels=True) for file in reversed(files)])
    enhanced.save_as(tmp_path / "e.dcm", enforce_file_format=True)
    mask = labels_of(two_organs(affine))
    seg = write_seg(tmp_path / "m.dcm", mask, read_source_headers([tmp_path / "e.dcm"]), model, seed_uid="x")
    for value, points in seg_points(tmp_path / "m.dcm").items():
        expected = world_of(affine, np.argwhere(mask.array == value)).mean(0)
        assert np.linalg.norm(points.mean(0) * (-1, -1, 1) - expected) < 1e-3
    for frame in seg.PerFrameFunctionalGroupsSequence:
        number = int(frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber)
        source = enhanced.PerFrameFunctionalGroupsSequence[number - 1].PlanePositionSequence[0]
        assert same_position(frame.PlanePositionSequence[0], source)


def as_enhanced(slices: list[pydicom.Dataset]) -> pydicom.Dataset:
    """One Enhanced MR header for the slices, in their order."""
    made = pydicom.Dataset()
    made.update({element.tag: element for element in slices[0] if element.tag.group in (0x0008, 0x0010, 0x0020)})
    made.file_meta = slices[0].file_meta
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    made.Rows, made.Columns, made.NumberOfFrames = slices[0].Rows, slices[0].Columns, len(slices)
    made.SharedFunctionalGroupsSequence = [pydicom.Dataset()]
    made.PerFrameFunctionalGroupsSequence = []
    for one in slices:
        groups = {
            "PlanePositionSequence": ("ImagePositionPatient",),
            "PlaneOrientationSequence": ("ImageOrientationPatient",),
            "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
        }
        frame = pydicom.Dataset()
        for group, keywords in groups.items():
            item = pydicom.Dataset()
            for keyword in keywords:
                setattr(item, keyword, one.get(keyword))
            setattr(frame, group, [item])
        made.PerFrameFunctionalGroupsSequence.append(frame)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient"):
        delattr(made, keyword)
    return made


def same_position(one: pydicom.Dataset, other: pydicom.Dataset) -> bool:
    first, second = (np.array(item.ImagePositionPatient, float) for item in (one, other))
    return bool(np.allclose(first, second, atol=1e-3))


def test_segments_carry_the_codes_of_the_config_and_say_who_made_them(result: tuple[Path, list[Path]]) -> None:
    seg = pydicom.dcmread(result[0] / "mask.dcm")
    said = [
        (
            segment.SegmentNumber,
            segment.SegmentLabel,
            segment.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning,
            segment.SegmentedPropertyTypeCodeSequence[0].CodeValue,
        )
        for segment in seg.SegmentSequence
    ]
    assert said == [
        (1, "front", "Anatomical Structure", "5366008"),
        (2, "fluid", "Body Substance", "65216001"),
        (3, "plain", "Anatomical Structure", "85756007"),
    ]
    front, _, plain = (segment.SegmentedPropertyTypeCodeSequence[0] for segment in seg.SegmentSequence)
    assert front.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Anterior"
    assert "SegmentedPropertyTypeModifierCodeSequence" not in plain
    for segment in seg.SegmentSequence:
        made_by = segment.SegmentationAlgorithmIdentificationSequence[0]
        assert (made_by.AlgorithmName, segment.SegmentAlgorithmType) == ("medseg tiny", "AUTOMATIC")
        assert len(segment.RecommendedDisplayCIELabValue) == 3
    assert len({tuple(segment.RecommendedDisplayCIELabValue) for segment in seg.SegmentSequence}) == 3
    assert (seg.SegmentationType, seg.Manufacturer, seg.ManufacturerModelName) == ("BINARY", "medseg", "tiny")


def test_each_frame_refers_to_the_slice_it_lies_on(result: tuple[Path, list[Path]]) -> None:
    seg = pydicom.dcmread(result[0] / "mask.dcm")
    slices = {data.SOPInstanceUID: data for data in map(pydicom.dcmread, result[1])}
    (series,) = seg.ReferencedSeriesSequence
    assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} == set(slices)
    for frame in seg.PerFrameFunctionalGroupsSequence:
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        assert same_position(frame.PlanePositionSequence[0], slices[source.ReferencedSOPInstanceUID])


def test_the_report_gives_the_volumes_of_the_segments(result: tuple[Path, list[Path]]) -> None:
    seg, report = (pydicom.dcmread(result[0] / name) for name in ("mask.dcm", "report.dcm"))
    volumes = read_json(result[0] / "result.json")["volumes_ml"]
    found = measured_ml(report)
    assert volumes["fluid"] > 0
    assert volumes["plain"] == 0
    for segment in seg.SegmentSequence:
        value_ml, number, instance = found[segment.TrackingUID]
        assert value_ml == pytest.approx(volumes[segment.SegmentLabel])
        assert (number, instance) == (segment.SegmentNumber, seg.SOPInstanceUID)
    assert report.StudyInstanceUID == seg.StudyInstanceUID
    assert (report.Modality, report.VerificationFlag) == ("SR", "UNVERIFIED")
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert report.ConceptNameCodeSequence[0].CodeMeaning == "Imaging Measurement Report"
    assert concepts(report, "121071") == ["Hippocampus", "Cerebrospinal Fluid", "Tissue"]
    assert concepts(report, "272741003") == ["Left"]
    assert concepts(report, "106233006") == ["Anterior"]
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert seg.SeriesInstanceUID in {series.SeriesInstanceUID for series in evidence}


@needs_dciodvfy
@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("found", [True, False])
def test_segmentation_and_report_are_valid(tmp_path: Path, model: Bundle, modality: str, found: bool) -> None:
    volume = two_organs(orientations()["oblique-1"])
    files = write_series(volume, tmp_path / "s", patient_id="p", modality=modality)
    assert dciodvfy_errors(files[0]) == []
    mask = labels_of(volume) if found else Volume(np.zeros(volume.array.shape, np.uint8), volume.affine)
    sources = read_source_headers(files)
    seg = write_seg(tmp_path / "mask.dcm", mask, sources, model, seed_uid="x")
    write_sr(tmp_path / "report.dcm", seg, sources, dict.fromkeys(LABELS, 1 / 3), model, seed_uid="x")
    assert dciodvfy_errors(tmp_path / "mask.dcm") == []
    assert dciodvfy_errors(tmp_path / "report.dcm") == []


@needs_dciodvfy
@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real scans are not kept beside this checkout")
@pytest.mark.parametrize("name", ["hippocampus_crop", "mr_ge/001", "mr_anatomical/001_implicit", "compressed_j2k"])
def test_objects_made_of_real_series_are_valid_even_where_these_are_not(
    tmp_path: Path, model: Bundle, name: str
) -> None:
    sources, _ = discover([SHARED / "series" / name], IngestConfig())
    scan = read_source(next(source for source in sources if source.source_kind == "dicom"))
    image = scan.channels[0]
    mask = Volume((image.array > np.percentile(image.array, 95)).astype(np.uint8), image.affine)
    headers = read_source_headers(scan.source_files)
    seg = write_seg(tmp_path / "mask.dcm", mask, headers, model, seed_uid="x")
    write_sr(tmp_path / "report.dcm", seg, headers, dict.fromkeys(LABELS, 2.5), model, seed_uid="x")
    assert [error for kind in ("mask", "report") for error in dciodvfy_errors(tmp_path / f"{kind}.dcm")] == []
    centre = world_of(mask.affine, np.argwhere(mask.array)).mean(0)
    assert np.linalg.norm(seg_points(tmp_path / "mask.dcm")[1].mean(0) * (-1, -1, 1) - centre) < 0.01


def test_what_the_source_says_wrongly_of_the_patient_is_not_repeated(tmp_path: Path) -> None:
    files = write_series(two_organs(np.eye(4)), tmp_path / "s", patient_id="p")
    data = pydicom.dcmread(files[0])
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    data.PatientAge, data.StudyDate, data.PatientWeight, data.PatientID = "62", "1995.07.20", "70.5", "17"
    data.save_as(files[0])
    (header,) = read_source_headers(files[:1])
    assert "PatientAge" not in header
    assert (header.StudyDate, header.PatientID, float(header.PatientWeight)) == ("", "17", 70.5)


def test_a_source_that_no_object_may_refer_to_costs_the_objects_alone(tmp_path: Path, model: Bundle) -> None:
    volume, _ = box_volume(np.eye(4))
    for file in write_series(volume, tmp_path / "s", patient_id="p"):
        data = pydicom.dcmread(file)
        del data.StudyInstanceUID
        data.save_as(file)
    step.run(model, [tmp_path / "s"], tmp_path / "out", predictor=Predictor(model, net=Levels()))
    (folder,) = tmp_path.glob("out/case-*")
    told = read_json(folder / "result.json")
    assert told["outputs"] == ["preview.png", "mask.nii.gz"]
    told_why = {flag["code"]: flag["message"] for flag in told["flags"]}
    assert told_why["no_dicom_seg"] == "No DICOM SEG was written (the source has no StudyInstanceUID)."
    assert not list(folder.glob("*.dcm"))


def test_outputs_are_listed_and_missing_ones_are_made_again(tmp_path: Path) -> None:
    model = bundle(tmp_path / "b", grid=plan(spacing_mm=(1.0, 1.0, 1.0)))
    write_series(box_volume(np.eye(4))[0], tmp_path / "s", patient_id="p")
    predictor = Predictor(model, net=Threshold())
    for resumed in (0, 1, 0):
        found = step.run(model, [tmp_path / "s"], tmp_path / "out", predictor=predictor)
        assert found.figures["resumed"] == resumed
        (folder,) = tmp_path.glob("out/case-*")
        assert read_json(folder / "result.json")["outputs"][-2:] == ["mask.dcm", "report.dcm"]
        if resumed:
            (folder / "report.dcm").unlink()
    assert (folder / "report.dcm").is_file()
