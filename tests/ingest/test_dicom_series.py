"""DICOM series: what is written is what is read; what cannot be one volume is refused with its numbers."""

import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import dcm2niix
import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.cohort import Reject
from medseg.config import IngestConfig
from medseg.files import UserError
from medseg.ingest import quality
from medseg.ingest.dicom_write import derived_uid, write_series
from medseg.ingest.scan import Refused, Scan, Source
from medseg.ingest.sources import discover, read_source
from medseg.volume import Volume, to_canonical

KEY = b"k" * 32
ROOT = Path(__file__).resolve().parents[2]
SERIES = ROOT.parent / "shared" / "data" / "dicom" / "series"
needs_shared = [
    pytest.mark.shared_data,
    pytest.mark.skipif(not SERIES.is_dir(), reason="the real scans (../shared/data) are not here"),
]


def rotation(w: float, x: float, y: float, z: float) -> np.ndarray:
    w, x, y, z = np.array([w, x, y, z]) / np.linalg.norm([w, x, y, z])
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def oblique(shape: tuple[int, int, int] = (6, 5, 4), seed: int = 0) -> Volume:
    affine = np.eye(4)
    affine[:3, :3] = rotation(0.9, 0.2, -0.3, 0.1) * [0.8, 1.1, 2.5]
    affine[:3, 3] = (-30.0, 12.5, 7.25)
    values = np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.int16)
    return Volume(values, affine)


def find(folder: Path, **config: Any) -> tuple[list[Source], list[Reject]]:
    return discover([folder], IngestConfig(**config), key=KEY)


def read_one(folder: Path) -> Scan:
    (source,), rejects = find(folder)
    assert rejects == []
    return read_source(source)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    data = pydicom.dcmread(path)
    change(data)
    data.save_as(path)


@given(
    quaternion=st.tuples(*[st.integers(-50, 50)] * 4).filter(any),
    spacing=st.tuples(*[st.integers(3, 60)] * 3),
    origin=st.tuples(*[st.floats(-400, 400)] * 3),
    left_handed=st.booleans(),
    dtype=st.sampled_from([np.uint8, np.int16, np.uint16]),
)
@settings(max_examples=40, deadline=None)
def test_any_oblique_volume_survives_write_and_read(
    quaternion: Any, spacing: Any, origin: Any, left_handed: bool, dtype: Any
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation(*quaternion) * (np.array(spacing) / 10)
    affine[:3, 3] = origin
    if left_handed:
        affine[:3, 2] *= -1
    values = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (4, 3, 5), endpoint=True).astype(dtype)
    with tempfile.TemporaryDirectory() as folder:
        files = write_series(Volume(values, affine), Path(folder) / "s", patient_id="p")
        scan = read_one(Path(folder))
        k_order = [scan.source_files.index(path) for path in files]
    read = scan.channels[0]
    # Slices are sorted along the normal of rows and columns, so a left-handed series comes back turned about.
    assert k_order == ([4, 3, 2, 1, 0] if left_handed else [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(read.array[:, :, k_order], values)
    first = affine @ [0, 0, k_order[0], 1]
    direction = affine[:3, 2] * (-1 if left_handed else 1)
    np.testing.assert_allclose(read.affine[:3], np.column_stack([affine[:3, :2], direction, first[:3]]), atol=1e-5)


def test_file_names_and_their_order_mean_nothing(tmp_path: Path) -> None:
    volume = oblique()
    files = write_series(volume, tmp_path / "s", patient_id="p")
    names = [f"{n:x}" for n in random.Random(2).sample(range(1000), len(files))]
    for path, name in zip(files, names, strict=True):
        path.rename(path.with_name(name))
    np.testing.assert_array_equal(read_one(tmp_path).channels[0].array, volume.array)


def test_source_files_are_the_slices_along_k(tmp_path: Path) -> None:
    write_series(oblique(), tmp_path / "s", patient_id="p")
    scan = read_one(tmp_path)
    for k, path in enumerate(scan.source_files):
        np.testing.assert_array_equal(pydicom.dcmread(path).pixel_array.T, scan.channels[0].array[:, :, k])


def test_fractions_are_quantised_by_at_most_half_a_step(tmp_path: Path) -> None:
    volume = Volume(np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32), oblique().affine)
    write_series(volume, tmp_path / "s", patient_id="p")
    step = float(np.ptp(volume.array)) / 65535
    read = read_one(tmp_path).channels[0].array
    assert read.dtype == np.float32
    assert np.abs(read - volume.array).max() <= step


@pytest.mark.parametrize(
    ("code", "keyword", "value"),
    [
        ("burned_in_text", "BurnedInAnnotation", "YES"),
        ("secondary_capture", "ConversionType", "WSD"),
        ("secondary_capture", "SOPClassUID", "1.2.840.10008.5.1.4.1.1.7.2"),
    ],
)
def test_text_that_one_slice_declares_is_told_of_the_volume_and_refused_when_asked(
    tmp_path: Path, code: str, keyword: str, value: str
) -> None:
    files = write_series(oblique((12, 12, 9)), tmp_path / "s", patient_id="p")
    assert not {"burned_in_text", "secondary_capture"} & {finding.code for finding in read_one(tmp_path).findings}
    for file in files[3:5]:
        edit(file, lambda data: setattr(data, keyword, value))
    scan = read_one(tmp_path)
    (finding,) = (finding for finding in scan.findings if finding.code == code)
    assert (finding.severity, finding.number) == ("warning", 2)
    assert "2 of 9 files" in finding.message
    assert finding in quality.check(scan, IngestConfig())
    with pytest.raises(Refused, match="It is in ingest") as refused:
        quality.check(scan, IngestConfig(refuse=(code,)))  # type: ignore[arg-type]
    assert refused.value.code == code


def test_rescaling_is_taken_slice_by_slice(tmp_path: Path) -> None:
    volume = Volume(np.ones((4, 4, 3), np.int16), np.eye(4))
    for k, path in enumerate(write_series(volume, tmp_path / "s", modality="CT", patient_id="p")):
        edit(path, lambda data, k=k: setattr(data, "RescaleSlope", k + 1))
    array = read_one(tmp_path).channels[0].array
    assert array.dtype == np.int16
    assert sorted(array[0, 0]) == [1, 2, 3]


def test_bits_above_bits_stored_are_no_part_of_the_value(tmp_path: Path) -> None:
    volume = Volume(np.full((4, 4, 3), 100, np.uint16), np.eye(4))

    def overlay(data: Any) -> None:
        data.BitsStored, data.HighBit, data.PixelRepresentation = 12, 11, 0
        data.PixelData = (np.frombuffer(data.PixelData, "<u2") | 0x8000).tobytes()

    for path in write_series(volume, tmp_path / "s", patient_id="p"):
        edit(path, overlay)
    assert np.unique(read_one(tmp_path).channels[0].array).tolist() == [100]


def test_pseudonyms_stand_in_for_the_patient(tmp_path: Path) -> None:
    write_series(oblique(), tmp_path / "Doe", patient_id="Doe^John", seed_uid="a")
    write_series(oblique(seed=1), tmp_path / "Doe2", patient_id="Doe^John", seed_uid="b")
    sources, _ = find(tmp_path)
    assert len({source.patient_id for source in sources}) == 1
    assert len({source.case_id for source in sources}) == 2
    assert all("Doe" not in text for s in sources for text in (repr(s), s.case_id, s.patient_id, s.name))
    other = discover([tmp_path], IngestConfig(), key=b"other" * 8)[0]
    assert {s.patient_id for s in other}.isdisjoint(s.patient_id for s in sources)


def test_identical_copies_count_once(tmp_path: Path) -> None:
    volume = oblique()
    for path in write_series(volume, tmp_path / "s", patient_id="p"):
        (tmp_path / f"copy-{path.name}").write_bytes(path.read_bytes())
    np.testing.assert_array_equal(read_one(tmp_path).channels[0].array, volume.array)


def shift(axis: int, millimetres: float) -> Callable[[list[Path]], None]:
    def change(files: list[Path]) -> None:
        for number, path in enumerate(files):
            data = pydicom.dcmread(path)
            position = [float(value) for value in data.ImagePositionPatient]
            position[axis] += millimetres * number
            data.ImagePositionPatient = position
            data.save_as(path)

    return change


def setting(keyword: str, value: Any, which: slice = slice(None)) -> Callable[[list[Path]], None]:
    return lambda files: [edit(path, lambda data: setattr(data, keyword, value)) for path in files[which]] and None


def move_last(files: list[Path]) -> None:
    edit(files[-1], lambda data: setattr(data, "ImagePositionPatient", [0, 0, 3.4]))


def double(files: list[Path]) -> None:
    for path in files:
        copy = path.with_name(f"echo-{path.name}")
        copy.write_bytes(path.read_bytes())
        edit(copy, lambda data: setattr(data, "SOPInstanceUID", derived_uid(data.SOPInstanceUID)))


def without(keyword: str) -> Callable[[list[Path]], None]:
    return lambda files: [edit(path, lambda data: delattr(data, keyword)) for path in files] and None


REFUSALS: list[tuple[str, Callable[[list[Path]], Any], str, str]] = [
    ("missing", lambda files: files[2].unlink(), "missing_slices", "2.000 mm apart, most 1.000 mm: 1 missing"),
    ("uneven", move_last, "uneven_spacing", "0.400 mm apart, most 1.000 mm"),
    ("few", lambda files: [path.unlink() for path in files[:3]], "few_slices", "2 of the 3 slices"),
    ("zigzag", setting("ImagePositionPatient", [0, 0.5, 2], slice(2, 3)), "shifted_slices", "0.500 mm off"),
    ("echoes", double, "several_volumes", "10 images lie at 5 positions"),
    ("twice", setting("ImagePositionPatient", [0, 0, 3], slice(4, 5)), "duplicate_positions", "5 images lie at 4"),
    ("turned", setting("ImageOrientationPatient", [1, 0, 0, 0, 0, 1], slice(0, 2)), "mixed_orientation", "2 different"),
    ("skewed", setting("ImageOrientationPatient", [1, 0, 0, 0.5, 0.5, 0]), "bad_orientation", "0.7071"),
    ("spacing", setting("PixelSpacing", [2, 2], slice(0, 1)), "mixed_spacing", "from 1 to 2 mm"),
    ("no position", without("ImagePositionPatient"), "no_geometry", "5 of 5 slices"),
    ("frames", setting("NumberOfFrames", 7), "multi_frame", "7 frames"),
    ("mosaic", setting("ImageType", ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), "mosaic", "mosaics"),
    ("patients", setting("PatientID", "other", slice(0, 1)), "several_patients", "2 patients"),
    ("report", without("BitsAllocated"), "no_scan", "no scan"),
]


@pytest.mark.parametrize(("change", "code", "words"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_what_is_no_single_volume_is_refused(
    tmp_path: Path, change: Callable[[list[Path]], Any], code: str, words: str
) -> None:
    volume = Volume(np.arange(80, dtype=np.int16).reshape(4, 4, 5), np.diag([-1.0, -1.0, 1.0, 1.0]))
    change(write_series(volume, tmp_path / "s", patient_id="Doe"))
    sources, (reject,) = find(tmp_path)
    assert sources == []
    assert reject.code == code
    assert words in reject.reason
    assert "Doe" not in reject.source + reject.reason


def test_a_localiser_is_called_so(tmp_path: Path) -> None:
    files = write_series(oblique(), tmp_path / "s", patient_id="p")
    setting("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])(files)
    setting("ImageOrientationPatient", [1, 0, 0, 0, 0, -1], slice(0, 1))(files)
    assert find(tmp_path)[1][0].code == "localiser"


def test_unwanted_modalities_are_listed(tmp_path: Path) -> None:
    write_series(oblique(), tmp_path / "s", patient_id="p")
    (reject,) = find(tmp_path, modality=("CT",))[1]
    assert (reject.code, "ingest.modality (CT)" in reject.reason) == ("modality", True)


def test_pixels_cut_short_are_refused_when_read(tmp_path: Path) -> None:
    files = write_series(oblique((32, 32, 4)), tmp_path / "s", patient_id="p")
    files[1].write_bytes(files[1].read_bytes()[:-500])
    (source,), _ = find(tmp_path)
    with pytest.raises(Refused, match="cut short") as refused:
        read_source(source)
    assert refused.value.code == "unreadable_pixels"


def test_one_damaged_header_leaves_other_series_alone(tmp_path: Path) -> None:
    write_series(oblique(), tmp_path / "good", patient_id="p")
    (tmp_path / "text.dcm").write_text("not DICOM at all")
    (tmp_path / "empty.dcm").write_bytes(b"")
    (tmp_path / "readme.txt").write_text("hello")
    sources, rejects = find(tmp_path)
    assert len(sources) == 1
    assert [(r.source, r.code) for r in rejects] == [("empty.dcm", "not_dicom"), ("text.dcm", "not_dicom")]


@pytest.mark.parametrize("seed", range(60))
def test_mutated_files_are_read_or_refused_and_nothing_else(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for path in write_series(oblique(), tmp_path / "s", patient_id="p"):
        content = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 4, 30])):
            content[rng.randrange(132, len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.randrange(len(content))] if rng.random() < 0.1 else content)
    sources, rejects = find(tmp_path)
    assert sources or rejects
    for source in sources:
        with suppress(Refused):
            assert read_source(source).channels[0].array.ndim in (2, 3)


def test_a_sheared_volume_is_not_written(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[0, 2] = 0.2
    with pytest.raises(ValueError, match="sheared"):
        write_series(Volume(np.zeros((3, 3, 3), np.int16), affine), tmp_path / "s", patient_id="p")
    assert list(tmp_path.iterdir()) == []


def test_a_series_is_never_written_among_other_files(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        write_series(oblique(), tmp_path, patient_id="p")


def dcm2niix_volumes(folder: Path, out: Path, *options: str) -> list[Volume]:
    """What the reference converter makes of a folder."""
    out.mkdir()
    dcm2niix.main(["-b", "n", "-z", "n", *options, "-f", "%j_%e", "-o", str(out), str(folder)], capture_output=True)
    images = [nib.load(path) for path in sorted(out.glob("*.nii"))]
    return [Volume(np.asarray(image.dataobj), image.affine) for image in images]


def assert_same_volume(ours: Volume, theirs: Volume) -> None:
    a, b = to_canonical(ours), to_canonical(theirs)
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-4)
    np.testing.assert_allclose(a.array.astype(float), b.array.astype(float), rtol=1e-4, atol=1e-3)


def distance(ours: Volume, theirs: Volume) -> float:
    return float(np.abs(to_canonical(ours).array.astype(float) - to_canonical(theirs).array).max())


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_dcm2niix_agrees_about_a_written_series(tmp_path: Path, modality: str) -> None:
    write_series(oblique((32, 24, 12)), tmp_path / "s", modality=modality, patient_id="p")
    (theirs,) = dcm2niix_volumes(tmp_path / "s", tmp_path / "out")
    assert_same_volume(read_one(tmp_path / "s").channels[0], theirs)


PLAIN = [
    *("mr_anatomical/001", "mr_anatomical/001_implicit", "mr_anatomical/002_non_isotropic", "hippocampus_crop"),
    *("mr_ge/001", "mr_ge/001_implicit", "compressed_j2k/001", "compressed_jpegls/001", "compressed_rle/001"),
]


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_shared) for name in PLAIN])
def test_dcm2niix_agrees_about_real_series(tmp_path: Path, name: str) -> None:
    (theirs,) = dcm2niix_volumes(SERIES / name, tmp_path / "out")
    assert_same_volume(read_one(SERIES / name).channels[0], theirs)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [pytest.param(SERIES.parent, marks=needs_shared)])
def test_every_series_compares_with_dcm2niix_as_the_page_says(tmp_path: Path, folder: Path) -> None:
    page = ROOT / "docs" / "dicom_conformance.md"
    made = shutil.copyfile(page, tmp_path / "page.md")
    command = [sys.executable, "-m", "benchmarks.dicom_conformance", str(folder), "--out", str(made)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert made.read_text() == page.read_text()
    differing = [line for line in page.read_text().splitlines() if "| **no** |" in line]
    assert all(line.split("|")[-2].strip() for line in differing), "a difference needs its explanation"


@pytest.mark.parametrize(
    ("name", "volumes"),
    [pytest.param(*case, marks=needs_shared) for case in [("Philips", 2), ("Siemens", 4)]],
)
def test_dcm2niix_agrees_about_each_volume_of_enhanced_files(tmp_path: Path, name: str, volumes: int) -> None:
    folder = SERIES / "enhanced_multiframe" / name
    sources, rejects = find(folder)
    assert (len(sources), rejects) == (volumes, [])
    theirs = dcm2niix_volumes(folder, tmp_path / "out", "-p", "n")  # by the standard scale, not the private one
    parts = [
        Volume(v.array.reshape(*v.array.shape[:3], -1)[..., t], v.affine)
        for v in theirs
        for t in range(np.prod(v.array.shape[3:], dtype=int))
    ]
    assert len(parts) == volumes
    for source in sources:  # the two put them in orders of their own
        ours = read_source(source).channels[0]
        assert_same_volume(ours, min(parts, key=lambda part: distance(ours, part)))


@pytest.mark.parametrize("name", [pytest.param("gantry_tilt_ct", marks=needs_shared)])
def test_dcm2niix_agrees_about_gantry_tilt(tmp_path: Path, name: str) -> None:
    ours = to_canonical(read_one(SERIES / name).channels[0])
    others = [to_canonical(v) for v in dcm2niix_volumes(SERIES / name, tmp_path / "out")]
    (theirs,) = [v for v in others if v.array.shape[:3] == ours.array.shape]
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-4)
    off = np.abs(ours.array.astype(float) - theirs.array.reshape(ours.array.shape)) > 1
    rows = off.any(axis=0).sum(axis=0)  # of each slice
    assert rows.max() <= 2  # the first and the last, where the filling begins


@pytest.mark.parametrize(
    ("name", "code"),
    [
        pytest.param(name, code, marks=needs_shared)
        for name, code in [
            ("missing_slices", "few_slices"),
            ("mixed_orientation", "mixed_orientation"),
            ("uneven_spacing", "missing_slices"),
            ("mr_ge/001_single_slice", "few_slices"),
        ]
    ],
)
def test_awkward_real_series_are_refused_by_name(name: str, code: str) -> None:
    sources, rejects = find(SERIES / name)
    assert [s.source_kind for s in sources if s.source_kind == "dicom"] == []
    assert {reject.code for reject in rejects} == {code}


@pytest.mark.parametrize(
    ("value", "limit", "share", "severity"),
    [
        (-2000, None, 0.25, "info"),
        (63536, None, 0.25, "info"),
        (-2000, -1999, 0.5, "info"),
        (900, None, 0.2, "warning"),
    ],
)
def test_padding_is_told_with_its_share_and_value(
    tmp_path: Path, value: int, limit: int | None, share: float, severity: str
) -> None:
    array = np.full((10, 20, 4), 40, np.int16)
    array[:, :5], array[:, 5:10], array[:, 16:] = -2000, -1999, 900
    for path in write_series(Volume(array, np.eye(4)), tmp_path / "s", patient_id="p"):
        data = pydicom.dcmread(path)
        data.add_new("PixelPaddingValue", "US" if value > 32767 else "SS", value)
        if limit is not None:
            data.add_new("PixelPaddingRangeLimit", "SS", limit)
        data.save_as(path)
    scan = read_one(tmp_path)
    np.testing.assert_array_equal(scan.channels[0].array, array)
    (finding,) = scan.findings
    assert (finding.code, finding.number, finding.severity) == ("padding", share, severity)
