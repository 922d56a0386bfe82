"""The geometry law: an object keeps its world position from scan to mask, whatever the scan's affine."""

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from tiny_bundle import Threshold, box_volume, bundle, config, plan

from medseg.bundle import Bundle
from medseg.files import read_json
from medseg.images import write_nifti
from medseg.ingest.dicom_write import write_series
from medseg.ingest.scan import Scan
from medseg.plan import Appearance
from medseg.predict import Predictor, step
from medseg.volume import Volume

SPACING_MM = np.array([1.2, 1.6, 2.0])
TOLERANCE_MM = 0.35  # the object's edges are found to a fraction of a voxel


def axis_affines() -> dict[str, np.ndarray]:
    """All 48 ways in which array axes can run along world axes."""
    found = {}
    for number, (order, signs) in enumerate(
        itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))
    ):
        affine = np.eye(4)
        affine[:3, :3] = np.eye(3)[:, order] * np.asarray(signs) * SPACING_MM
        affine[:3, 3] = (11, -22, 33)
        found[f"axes-{number:02d}"] = affine
    return found


def oblique_affines(count: int, *, left_handed: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    found = {}
    for number in range(count):
        rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        rotation *= np.sign(np.linalg.det(rotation)) * (-1 if left_handed else 1)
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = rotation * SPACING_MM, rng.normal(0, 50, 3)
        found[f"oblique-{number}-{'left' if left_handed else 'right'}"] = affine
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Resamples every scan: the network's grid is 1.5 mm."""
    return bundle(tmp_path_factory.mktemp("bundle") / "b", grid=plan(spacing_mm=(1.5, 1.5, 1.5)))


def test_masks_of_all_orientations_lie_where_the_object_lies(tmp_path: Path, model: Bundle) -> None:
    affines = axis_affines() | oblique_affines(4, left_handed=True) | oblique_affines(4, left_handed=False)
    centres = {}
    for name, affine in affines.items():
        volume, centres[name] = box_volume(affine)
        write_nifti(tmp_path / "scans" / f"{name}.nii.gz", volume)
    result = step.run(model, [tmp_path / "scans"], tmp_path / "out", predictor=Predictor(model, net=Threshold()))
    assert result.figures["cases"] == len(affines)
    for name in affines:
        scan = nib.load(tmp_path / "scans" / f"{name}.nii.gz")
        mask = nib.load(tmp_path / "out" / name / "mask.nii.gz")
        assert np.array_equal(mask.affine, scan.affine)
        assert mask.shape == scan.shape
        voxels = np.argwhere(np.asarray(mask.dataobj) == 1)
        centre = nib.affines.apply_affine(mask.affine, voxels).mean(0)
        assert np.linalg.norm(centre - centres[name]) < TOLERANCE_MM, name
        truth = np.asarray(scan.dataobj) > 50
        assert 2 * truth[tuple(voxels.T)].sum() / (truth.sum() + len(voxels)) > 0.9, name
        volume_ml = read_json(tmp_path / "out" / name / "result.json")["volumes_ml"]["thing"]
        assert volume_ml == pytest.approx(len(voxels) * SPACING_MM.prod() / 1000, rel=1e-5)


def seg_centre(path: Path) -> np.ndarray:
    """World centre (RAS, mm) of the only segment, from the frames of a DICOM SEG and the standard's equation alone."""
    seg = pydicom.dcmread(path)
    shared = seg.SharedFunctionalGroupsSequence[0]
    measures = shared.PixelMeasuresSequence[0]
    down_mm, across_mm = (float(s) for s in measures.PixelSpacing)
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    assert [segment.SegmentNumber for segment in seg.SegmentSequence] == [1]
    bits = np.unpackbits(np.frombuffer(seg.PixelData, dtype=np.uint8), bitorder="little")
    points = []
    for number, frame in enumerate(seg.PerFrameFunctionalGroupsSequence):
        size = seg.Rows * seg.Columns
        plane = bits[number * size : (number + 1) * size].reshape(seg.Rows, seg.Columns)
        position = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        for row, column in np.argwhere(plane):
            points.append(position + column * across_mm * cosines[:3] + row * down_mm * cosines[3:])
    return np.mean(points, axis=0) * (-1, -1, 1)


def test_dicom_series_give_nifti_and_seg_at_the_same_place(tmp_path: Path, model: Bundle) -> None:
    some = dict(itertools.islice(axis_affines().items(), 0, 48, 7))
    affines = some | oblique_affines(2, left_handed=True) | oblique_affines(2, left_handed=False)
    centres = {}
    for name, affine in affines.items():
        volume, centre = box_volume(affine)
        files = write_series(volume, tmp_path / "scans" / name, patient_id=name)
        centres[pydicom.dcmread(files[0]).StudyInstanceUID] = centre
    result = step.run(model, [tmp_path / "scans"], tmp_path / "out", predictor=Predictor(model, net=Threshold()))
    assert result.status == "done"
    found = sorted((tmp_path / "out").glob("*/mask.dcm"))
    assert len(found) == len(affines)
    for path in found:
        seg = pydicom.dcmread(path, stop_before_pixels=True)
        expected = centres[seg.StudyInstanceUID]
        mask = nib.load(path.with_name("mask.nii.gz"))
        voxels = np.argwhere(np.asarray(mask.dataobj) == 1)
        centre = nib.affines.apply_affine(mask.affine, voxels).mean(0)
        assert np.linalg.norm(centre - expected) < TOLERANCE_MM
        assert np.linalg.norm(seg_centre(path) - centre) < 1e-3
        assert [segment.SegmentLabel for segment in seg.SegmentSequence] == ["thing"]


def test_seg_refers_to_its_source_and_keeps_its_uids(tmp_path: Path, model: Bundle) -> None:
    volume, _ = box_volume(np.diag([1.0, 1.0, 2.0, 1.0]))
    files = write_series(volume, tmp_path / "series", patient_id="p")
    uids = []
    for out in (tmp_path / "a", tmp_path / "b"):
        step.run(model, [tmp_path / "series"], out, predictor=Predictor(model, net=Threshold()))
        (path,) = out.glob("*/mask.dcm")
        uids.append(pydicom.dcmread(path).SOPInstanceUID)
    seg, source = pydicom.dcmread(path), [pydicom.dcmread(file) for file in files]
    assert uids[0] == uids[1]
    assert (seg.Modality, seg.PatientID, seg.StudyInstanceUID) == ("SEG", "p", source[0].StudyInstanceUID)
    assert seg.FrameOfReferenceUID == source[0].FrameOfReferenceUID
    referenced = {item.ReferencedSOPInstanceUID for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referenced <= {dataset.SOPInstanceUID for dataset in source}


def test_seg_is_made_of_headers_as_they_are_found(tmp_path: Path, model: Bundle) -> None:
    volume, _ = box_volume(np.diag([1.0, 1.0, 2.0, 1.0]))
    for file in write_series(volume, tmp_path / "series", patient_id="p"):
        dataset = pydicom.dcmread(file)
        for keyword in ("PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber", "FrameOfReferenceUID"):
            delattr(dataset, keyword)
        del dataset.SliceThickness
        dataset.SpecificCharacterSet, dataset.PatientName = "ISO 2022 IR 100", "Müller^Zoë"
        dataset.save_as(file)
    step.run(model, [tmp_path / "series"], tmp_path / "out", predictor=Predictor(model, net=Threshold()))
    (path,) = (tmp_path / "out").glob("*/mask.dcm")
    seg = pydicom.dcmread(path)
    assert str(seg.PatientName) == "Müller^Zoë"
    assert seg.FrameOfReferenceUID


def test_labels_keep_their_values_with_several_classes(tmp_path: Path) -> None:
    class Steps(torch.nn.Module):
        """Label 1 from 25 on, label 2 from 75 on."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.zeros_like(x), x + 2.5, 2 * x], 1)

    model = bundle(tmp_path / "b", config({"rim": 1, "core": 2}), plan(spacing_mm=(1.0, 1.0, 1.0)))
    volume, _ = box_volume(np.eye(4))
    volume.array[14:20, 2:8, 2:8] = 50
    write_series(volume, tmp_path / "series", patient_id="p")
    step.run(model, [tmp_path / "series"], tmp_path / "out", predictor=Predictor(model, net=Steps()))
    (folder,) = (tmp_path / "out").glob("case-*")
    volumes = read_json(folder / "result.json")["volumes_ml"]
    assert volumes["rim"] == pytest.approx((volume.array == 50).sum() / 1000)
    assert volumes["core"] == pytest.approx((volume.array == 100).sum() / 1000)
    seg = pydicom.dcmread(folder / "mask.dcm")
    assert [(s.SegmentNumber, s.SegmentLabel) for s in seg.SegmentSequence] == [(1, "rim"), (2, "core")]


def test_the_mask_of_a_padded_radiograph_lies_on_its_own_grid(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:96, :80]
    content = 10 + 10 * np.sin(rows / 7) * np.cos(columns / 5) + 80 * (np.hypot(rows - 40, columns - 30) < 20)
    image = np.zeros((116, 122), dtype=np.uint8)
    image[12:108, 30:110] = content
    grid = plan(spatial_dims=2, patch_size=(48, 48), size_px=(48, 48), appearance=Appearance(crop_padding=True))
    predictor = Predictor(bundle(tmp_path / "b", config(dims=2), grid), net=Threshold())
    scan = Scan("one", "p", (Volume(image, np.eye(4)),), "DX", "radiograph", "png", (), "")
    mask = predictor.predict(scan, predictor.prepare(scan)).mask
    assert mask is not None
    truth = image > 50
    assert mask.array.shape == image.shape
    assert 2 * (mask.array.astype(bool) & truth).sum() / (mask.array.sum() + truth.sum()) > 0.97
