"""Series that hold several volumes, enhanced multi-frame files, gantry tilt, DICOMDIR, compressed and hostile files."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from medseg.cohort import Reject
from medseg.config import IngestConfig
from medseg.files import UserError
from medseg.ingest import dicom_headers
from medseg.ingest.dicom_geometry import tilt_of, upright
from medseg.ingest.dicom_write import derived_uid, write_series
from medseg.ingest.scan import Source
from medseg.ingest.sources import discover, read_source
from medseg.volume import Volume, world_of

KEY = b"k" * 32


def find(*paths: Path, **config: Any) -> tuple[list[Source], list[Reject]]:
    return discover(paths, IngestConfig(**config), key=KEY)


def ramp(first: int = 0) -> Volume:
    values = np.arange(first, first + 8 * 6 * 5, dtype=np.int16).reshape(8, 6, 5)
    return Volume(values, np.diag([-0.8, -1.1, 2.5, 1.0]))


def series_of(folder: Path, volumes: list[Volume], change: Callable[[Any, int, int], None]) -> None:
    """One series made of several volumes; `change(data, volume number, k)` says what tells them apart."""
    for number, volume in enumerate(volumes):
        files = write_series(volume, folder / str(number), patient_id="p", seed_uid=f"v{number}")
        for k, path in enumerate(files):
            data = pydicom.dcmread(path)
            data.SeriesInstanceUID = derived_uid("together")
            data.InstanceNumber = len(volumes) * k + number + 1
            change(data, number, k)
            data.save_as(path)


TELLING = {
    "echo": lambda data, number, k: setattr(data, "EchoNumbers", number + 1),
    "image type": lambda data, number, k: setattr(data, "ImageType", ["ORIGINAL", "PRIMARY", "MP"[number]]),
    "b-value": lambda data, number, k: setattr(data, "DiffusionBValue", 1000.0 * number),
    "time point": lambda data, number, k: setattr(data, "TemporalPositionIdentifier", number + 1),
    "acquisition": lambda data, number, k: setattr(data, "AcquisitionNumber", number + 1),
    "order": lambda data, number, k: setattr(data, "TriggerTime", 10.0 * data.InstanceNumber),
}


@pytest.mark.parametrize("trait", TELLING)
def test_a_series_is_split_by_what_differs_at_one_place(tmp_path: Path, trait: str) -> None:
    volumes = [ramp(0), ramp(1000)]
    series_of(tmp_path, volumes, TELLING[trait])
    sources, rejects = find(tmp_path)
    assert rejects == []
    assert len({source.case_id for source in sources}) == 2
    assert all(f"split by {trait}" in source.name for source in sources)
    for source, volume in zip(sources, volumes, strict=True):
        read = read_source(source).channels[0]
        np.testing.assert_array_equal(read.array, volume.array)
        np.testing.assert_allclose(read.affine, volume.affine, atol=1e-6)


def test_only_the_first_volume_when_asked_and_the_rest_listed(tmp_path: Path) -> None:
    series_of(tmp_path, [ramp(), ramp(500), ramp(900)], TELLING["time point"])
    sources, rejects = find(tmp_path, volumes="first")
    assert len(sources) == 1
    assert [reject.code for reject in rejects] == ["not_first", "not_first"]


def test_one_broken_time_point_leaves_the_others(tmp_path: Path) -> None:
    series_of(tmp_path, [ramp(), ramp(500)], TELLING["time point"])
    (tmp_path / "1" / "0003.dcm").unlink()
    sources, (reject,) = find(tmp_path)
    assert (len(sources), reject.code) == (1, "missing_slices")


def test_orientations_that_are_volumes_are_kept_apart(tmp_path: Path) -> None:
    turned = Volume(ramp(300).array, np.array([[0, 0, 2.5, 9], [-0.8, 0, 0, 8], [0, -1.1, 0, 7], [0, 0, 0, 1.0]]))
    series_of(tmp_path, [ramp(), turned], lambda data, number, k: None)
    sources, rejects = find(tmp_path)
    assert (len(sources), rejects) == (2, [])


@pytest.mark.parametrize(
    ("config", "code"),
    [({"description": "^t2"}, "description"), ({"plane": ("coronal",)}, "plane"), ({"min_slices": 9}, "few_slices")],
)
def test_the_rule_picks_and_says_why_not(tmp_path: Path, config: dict[str, Any], code: str) -> None:
    write_series(ramp(), tmp_path / "s", patient_id="p", series_description="T1 mprage")
    assert [reject.code for reject in find(tmp_path, **config)[1]] == [code]
    assert len(find(tmp_path, description="t1.*RAGE", plane=("axial",), min_slices=5)[0]) == 1


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no regular expression"):
        IngestConfig(description="(")


def enhanced(folder: Path, volumes: list[Volume], slopes: tuple[float, ...] = (1.0, 1.0)) -> Path:
    """One enhanced MR file of all frames, frames in disorder, geometry in the functional groups alone."""
    first = write_series(volumes[0], folder / "single", patient_id="p", seed_uid="e")
    frames, groups = [], []
    for number, volume in enumerate(volumes):
        for k, path in enumerate(first):
            data = pydicom.dcmread(path)
            item, content, place, value = Dataset(), Dataset(), Dataset(), Dataset()
            content.StackID, content.TemporalPositionIndex = "1", number + 1
            place.ImagePositionPatient = data.ImagePositionPatient
            value.RescaleSlope, value.RescaleIntercept, value.RescaleType = slopes[number], 0, "US"
            item.FrameContentSequence, item.PlanePositionSequence = Sequence([content]), Sequence([place])
            item.PixelValueTransformationSequence = Sequence([value])
            groups.append(item)
            frames.append(volume.array[:, :, k].T)
    order = np.random.default_rng(0).permutation(len(frames))
    data = pydicom.dcmread(first[0])
    shared, plane, measures = Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient, measures.PixelSpacing = data.ImageOrientationPatient, data.PixelSpacing
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([plane]), Sequence([measures])
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        data.pop(keyword, None)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    data.NumberOfFrames = len(frames)
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    data.PerFrameFunctionalGroupsSequence = Sequence([groups[i] for i in order])
    data.PixelData = np.stack([frames[i] for i in order]).astype("<i2").tobytes()
    path = folder / "enhanced.dcm"
    data.save_as(path)
    for single in first:
        single.unlink()
    return path


def test_frames_lie_where_their_functional_groups_say(tmp_path: Path) -> None:
    volumes = [ramp(), ramp(1000)]
    enhanced(tmp_path, volumes, slopes=(1.0, 0.5))
    sources, rejects = find(tmp_path)
    assert rejects == []
    for source, volume, slope in zip(sources, volumes, (1, 0.5), strict=True):
        scan = read_source(source)
        np.testing.assert_allclose(scan.channels[0].array, volume.array * slope)
        np.testing.assert_allclose(scan.channels[0].affine, volume.affine, atol=1e-6)
        assert len(scan.source_files) == 1


def test_frames_without_a_place_are_refused(tmp_path: Path) -> None:
    path = enhanced(tmp_path, [ramp()])
    data = pydicom.dcmread(path)
    del data.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence
    data.save_as(path)
    assert find(tmp_path)[1][0].code == "no_geometry"
    del data.PerFrameFunctionalGroupsSequence[2]
    data.save_as(path)
    assert find(tmp_path)[1][0].code == "frame_count"
    del data.PerFrameFunctionalGroupsSequence
    data.save_as(path)
    assert find(tmp_path)[1][0].code == "multi_frame"


def tilted(folder: Path) -> list[Path]:
    files = write_series(ramp(), folder, patient_id="p", modality="CT")
    for k, path in enumerate(files):
        data = pydicom.dcmread(path)
        data.ImagePositionPatient = [0, 1.375 * k, 2.5 * k]
        data.save_as(path)
    return files


def test_gantry_tilt_is_removed_or_refused(tmp_path: Path) -> None:
    tilted(tmp_path / "s")
    (source,), rejects = find(tmp_path)
    assert rejects == []
    scan = read_source(source)
    read = scan.channels[0]
    assert [finding.code for finding in scan.findings] == ["gantry_tilt"]
    assert tilt_of(read.affine, 5) == 0
    assert read.array.shape == (8, 6 + 5, 5)
    assert find(tmp_path, tilt="refuse")[1][0].code == "gantry_tilt"


def test_an_upright_grid_shows_each_plane_where_it_was() -> None:
    grid = np.indices((12, 10, 6)).reshape(3, -1).T
    affine = np.array([[0.8, 0.1, 0.3, 5], [-0.1, 0.9, -0.7, 6], [0, 0, 2.5, 7], [0, 0, 0, 1]])
    slope = np.array([3.0, -2.0, 5.0])
    values = (world_of(affine, grid) @ slope).reshape(12, 10, 6).astype(np.float32)
    out = upright(Volume(values, affine), fill=np.nan)
    index = np.indices(out.array.shape).reshape(3, -1).T
    inside = np.isfinite(out.array).ravel()
    # A field that is linear in space is linear in every plane, so that shifting within planes is exact.
    np.testing.assert_allclose(out.array.ravel()[inside], (world_of(out.affine, index) @ slope)[inside], atol=1e-3)
    assert inside.sum() > 0.7 * values.size


def test_a_dicomdir_names_the_files_and_those_that_are_missing(tmp_path: Path) -> None:
    from pydicom.fileset import FileSet

    media = FileSet()
    for path in write_series(ramp(), tmp_path / "s", patient_id="p"):
        data = pydicom.dcmread(path)
        data.StudyID, data.SeriesNumber, data.StudyDate, data.StudyTime = "1", 1, "20200101", "120000"
        media.add(data)
    media.write(tmp_path / "disc")
    (tmp_path / "disc" / "stray.dcm").write_text("not listed")
    (source,), rejects = find(tmp_path / "disc" / "DICOMDIR")
    assert (rejects, len(source.files)) == ([], 5)
    source.files[4].unlink()
    _, rejects = find(tmp_path / "disc" / "DICOMDIR")
    assert [(r.source, r.code) for r in rejects] == [("DICOMDIR", "missing_files")]
    assert "5 files, of which 1" in rejects[0].reason
    assert {r.code for r in find(tmp_path / "disc")[1]} == {"missing_files", "not_dicom"}


def test_a_dicomdir_leads_nowhere_else(tmp_path: Path) -> None:
    record, data = Dataset(), Dataset()
    write_series(ramp(), tmp_path / "outside", patient_id="p")
    record.ReferencedFileID = ["..", "outside", "0001.dcm"]
    data.DirectoryRecordSequence = Sequence([record])
    (tmp_path / "disc").mkdir()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    data.file_meta.MediaStorageSOPInstanceUID = "1.2"
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    pydicom.dcmwrite(tmp_path / "disc" / "DICOMDIR", data, enforce_file_format=True)
    sources, (reject,) = find(tmp_path / "disc" / "DICOMDIR")
    assert (sources, reject.code) == ([], "missing_files")


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless, DeflatedExplicitVRLittleEndian])
def test_every_lossless_syntax_gives_the_same_voxels(tmp_path: Path, syntax: Any) -> None:
    rng = np.random.default_rng(0)
    volume = Volume(rng.integers(-900, 2000, (64, 64, 3)).astype(np.int16), ramp().affine)
    for path in write_series(volume, tmp_path / "s", patient_id="p", modality="CT"):
        data = pydicom.dcmread(path)
        if syntax == DeflatedExplicitVRLittleEndian:
            data.file_meta.TransferSyntaxUID = syntax
        else:
            data.compress(syntax, generate_instance_uid=False)
        data.save_as(path)
    (source,), _ = find(tmp_path)
    np.testing.assert_array_equal(read_source(source).channels[0].array, volume.array)


# A 16×16 ramp, 7 grey values from pixel to pixel modulo 1000, coded by OpenJPH: nothing installed here writes HTJ2K.
HTJ2K_RAMP = bytes.fromhex(
    "ff4fff5100294000000000100000001000000000000000000000001000000010000000000000000000010f0101ff50000800"
    "020000000aff52000c00020001000504044001ff5c00132088909090909090909090909090888888ff64001700014f70656e"
    "4a50482056657220302e32362e332eff90000a0000000000cd0001ff93c000262dfd0507740000c00012c0001340001280fe"
    "0087740000fc02877400fd00477400c00013400015300004c096f70021540018eb9114ee0106b4002ef300225400c0001530"
    "0005ad000054001e97e5fea41c2255007c9eaf1bc33e63d837867d25d8f71041767044c7580078fca0108c43d600c0002d18"
    "0005d2c0002a4024834173063130fce7c015038447427900f8f3cf3fff7ce79f7f7e3b6fafd7ebf57abdf8004203dfb1080f"
    "658906bbc84037d6205301e6cdf9c01046405700ffd9"
)


def test_high_throughput_jpeg_2000_is_read(tmp_path: Path) -> None:
    for path in write_series(Volume(np.zeros((16, 16, 3), np.uint16), np.eye(4)), tmp_path / "s", patient_id="p"):
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = HTJ2KLossless
        data.PixelRepresentation = 0
        data.PixelData = encapsulate([HTJ2K_RAMP])
        data["PixelData"].is_undefined_length = True
        data.save_as(path)
    (source,), _ = find(tmp_path)
    ramp_jik = np.arange(256).reshape(16, 16) * 7 % 1000
    array = read_source(source).channels[0].array
    np.testing.assert_array_equal(array, np.repeat(ramp_jik.T[..., None], 3, axis=2))


def test_big_endian_is_read(tmp_path: Path) -> None:
    for path in write_series(ramp(), tmp_path / "s", patient_id="p"):
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        data["PixelData"].value = np.frombuffer(data.PixelData, "<i2").astype(">i2").tobytes()
        pydicom.dcmwrite(path, data, implicit_vr=False, little_endian=False, force_encoding=True)
    (source,), _ = find(tmp_path)
    np.testing.assert_array_equal(read_source(source).channels[0].array, ramp().array)


def test_unknown_syntaxes_are_refused_by_name(tmp_path: Path) -> None:
    for path in write_series(ramp(), tmp_path / "s", patient_id="p"):
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2
        data.PixelData = encapsulate([bytes(64)])
        data["PixelData"].is_undefined_length = True
        data.save_as(path)
    (source,), _ = find(tmp_path)
    with pytest.raises(UserError, match="transfer syntax MPEG2"):
        read_source(source)


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless])
def test_a_codestream_of_another_size_never_reaches_the_decoder(tmp_path: Path, syntax: Any) -> None:
    volume = Volume(np.zeros((64, 64, 3), np.int16), np.eye(4))
    for path in write_series(volume, tmp_path / "s", patient_id="p"):
        data = pydicom.dcmread(path)
        data.compress(syntax, generate_instance_uid=False)
        data.PixelData = data.PixelData.replace(b"\0\x40", b"\xff\x40")  # 64 columns become 65344
        data.save_as(path)
    (source,), _ = find(tmp_path)
    with pytest.raises(UserError, match="65344"):
        read_source(source)


def test_a_deflated_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_headers, "_MAX_DEFLATED_BYTES", 4 << 20)
    (path, *_) = write_series(ramp(), tmp_path / "s", patient_id="p")
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.save_as(path)
    head = path.read_bytes()[: 144 + pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength]
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join([packer.compress(bytes(1 << 20)) for _ in range(5)] + [packer.flush()])
    path.write_bytes(head + bomb)
    assert "too_large" in {reject.code for reject in find(path)[1]}


def test_junk_without_end_is_refused_and_the_rest_arrives(tmp_path: Path) -> None:
    files = write_series(ramp(), tmp_path / "good", patient_id="p")
    with (tmp_path / "junk.dcm").open("wb") as file:
        file.write(bytes(128) + b"DICM")
        file.truncate(2 << 30)  # sparse: no disk is used
    with (tmp_path / "long.dcm").open("wb") as file:
        file.write(files[0].read_bytes())
        file.truncate(2 << 30)
    sources, rejects = find(tmp_path)
    assert len(sources) == 1
    assert {reject.source for reject in rejects} == {"junk.dcm", "long.dcm"}


def test_each_bad_input_has_its_own_line_and_the_others_arrive(tmp_path: Path) -> None:
    write_series(ramp(), tmp_path / "good", patient_id="p")
    first, *_ = write_series(ramp(), tmp_path / "two", patient_id="a", seed_uid="x")
    data = pydicom.dcmread(first)
    data.PatientID = "b"
    data.save_as(first)
    content = first.read_bytes()
    (tmp_path / "truncated.dcm").write_bytes(content[:200])
    (tmp_path / "empty.dcm").write_bytes(b"")
    (tmp_path / "text.dcm").write_text("hello")
    sources, rejects = find(tmp_path)
    assert len(sources) == 1
    codes = {reject.source.split(" ")[0]: reject.code for reject in rejects}
    assert codes["empty.dcm"] == codes["text.dcm"] == "not_dicom"
    assert len(rejects) == 4
    assert "several_patients" in codes.values()


@pytest.mark.parametrize("tag", [0x0019100A, 0x00651050])
def test_a_mosaic_is_known_by_its_private_count_too(tmp_path: Path, tag: int) -> None:
    for path in write_series(ramp(), tmp_path / "s", patient_id="p"):
        data = pydicom.dcmread(path)
        data.add_new((tag & 0xFFFF0000) | 0x10, "LO", "MAKER")
        data.add_new(tag, "US", 36)
        data.save_as(path)
    assert [reject.code for reject in find(tmp_path)[1]] == ["mosaic"]
