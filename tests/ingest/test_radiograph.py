"""Radiographs come out bright where dense, in full depth, and without words hidden in the file."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image, PngImagePlugin

from medseg.config import IngestConfig
from medseg.images import read_image
from medseg.ingest import quality
from medseg.ingest.dicom_write import write_radiograph
from medseg.ingest.radiograph import read_picture, write_radiograph_png
from medseg.ingest.scan import Refused, Scan
from medseg.ingest.sources import discover, read_source

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "dicom" / "radiographs"
RAMP = np.arange(80 * 96, dtype=np.uint16).reshape(80, 96)


def read(path: Path) -> Scan:
    (source,), rejects = discover([path], IngestConfig(), key=b"k" * 32)
    assert rejects == []
    return read_source(source)


def edited(path: Path, **values: Any) -> Path:
    data = pydicom.dcmread(path)
    for keyword, value in values.items():
        setattr(data, keyword, value)
    data.save_as(path)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_dx_round_trip(tmp_path: Path, dtype: Any) -> None:
    array = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (70, 91)).astype(dtype)
    scan = read(write_radiograph(array, (0.2, 0.15), tmp_path / "x.dcm", patient_id="p"))
    np.testing.assert_array_equal(scan.channels[0].array, array)
    assert scan.channels[0].array.dtype == dtype
    assert scan.channels[0].spacing_mm == pytest.approx((0.2, 0.15))
    assert (scan.kind, scan.modality, scan.source_kind) == ("radiograph", "DX", "dicom")
    assert {finding.code for finding in scan.findings} == {"detector_spacing", "display_window"}


def test_monochrome1_and_negative_slope_are_each_inverted_and_together_not(tmp_path: Path) -> None:
    path = write_radiograph(RAMP, (0.2, 0.2), tmp_path / "x.dcm", patient_id="p")
    np.testing.assert_array_equal(
        read(edited(path, PhotometricInterpretation="MONOCHROME1")).channels[0].array, 65535 - RAMP
    )
    np.testing.assert_array_equal(read(edited(path, RescaleSlope=-1)).channels[0].array, RAMP)
    np.testing.assert_array_equal(
        read(edited(path, PhotometricInterpretation="MONOCHROME2")).channels[0].array, 65535 - RAMP
    )


def test_signed_pixels_start_at_zero(tmp_path: Path) -> None:
    path = write_radiograph(RAMP, (0.2, 0.2), tmp_path / "x.dcm", patient_id="p")
    edited(path, PixelRepresentation=1, PixelData=(RAMP.astype(np.int32) - 32768).astype("<i2").tobytes())
    np.testing.assert_array_equal(read(path).channels[0].array, RAMP)


def test_padding_becomes_the_darkest_level_also_when_inverted(tmp_path: Path) -> None:
    path = write_radiograph(np.maximum(RAMP, 5), (0.2, 0.2), tmp_path / "x.dcm", patient_id="p")
    data = pydicom.dcmread(edited(path, PhotometricInterpretation="MONOCHROME1"))
    data.add_new("PixelPaddingValue", "US", 5)
    data.save_as(path)
    array = read(path).channels[0].array
    assert (array.reshape(-1)[:6] == 0).all()
    assert (array.reshape(-1)[6:] > 0).all()


def test_burnt_in_text_is_flagged(tmp_path: Path) -> None:
    path = write_radiograph(RAMP, (0.2, 0.2), tmp_path / "x.dcm", patient_id="p")
    assert "burned_in_text" in {f.code for f in read(edited(path, BurnedInAnnotation="YES")).findings}


@pytest.mark.shared_data
@pytest.mark.skipif(not REAL.is_dir(), reason="the real scans (../shared/data) are not here")
def test_real_radiographs_are_bright_where_dense() -> None:
    sources, rejects = discover([REAL], IngestConfig(), key=b"k" * 32)
    assert (len(sources), rejects) == (4, [])
    for scan in map(read_source, sources):
        array = scan.channels[0].array.astype(float)
        rows, columns = array.shape
        middle = np.median(array[rows // 3 : 2 * rows // 3, 2 * columns // 5 : 3 * columns // 5])
        assert array.min() >= 0
        assert middle > np.percentile(array, 25)  # the spine is denser than lungs and air


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "LA"])
def test_pictures_of_any_mode_are_read_as_grey(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray((RAMP % 256).astype(np.uint8))
    grey.convert(mode).save(tmp_path / "a.png")
    image, findings = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(image.array, RAMP % 256)
    assert [finding.code for finding in findings] == ["spacing_unknown"]


def test_colour_is_flagged(tmp_path: Path) -> None:
    Image.new("RGB", (70, 70), (200, 10, 10)).save(tmp_path / "a.jpg")
    assert "colour" in {finding.code for finding in read_picture(tmp_path / "a.jpg")[1]}


def test_sixteen_bits_are_kept(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png")[0].array, RAMP)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nrubbish", b"GIF?"])
def test_damaged_pictures_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(Refused, match="cannot be decoded"):
        read_picture(tmp_path / "a.png")


def test_bare_files_are_kept_byte_for_byte_and_texts_are_not_kept_at_all(tmp_path: Path) -> None:
    array = (RAMP % 256).astype(np.uint8)
    bare, named = tmp_path / "bare.png", tmp_path / "named.png"
    Image.fromarray(array).save(bare, compress_level=1)
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "John Doe")
    Image.fromarray(array).save(named, pnginfo=info)
    (tmp_path / "trailing.png").write_bytes(bare.read_bytes() + b"John Doe")
    for source in (bare, named, tmp_path / "trailing.png"):
        copy = write_radiograph_png(tmp_path / "out.png", array, source)
        np.testing.assert_array_equal(read_image(copy).array, array)
        assert b"Doe" not in copy.read_bytes()
        assert (copy.read_bytes() == source.read_bytes()) == (source == bare)


@pytest.mark.parametrize(
    ("values", "codes"),
    [
        ({}, set()),
        ({"ViewPosition": "LL"}, {"not_frontal_chest"}),
        ({"BodyPartExamined": "HAND"}, {"not_frontal_chest"}),
        ({"BodyPartExamined": "Chest PA", "ViewPosition": "AP"}, set()),
        ({"ViewPosition": "", "ViewCodeSequence": [], "PatientOrientation": ["P", "F"]}, {"not_frontal_chest"}),
        ({"ViewPosition": "", "ViewCodeSequence": [], "PatientOrientation": ["L", "F"]}, set()),
        ({"BodyPartExamined": "Doe"}, {"view_unknown"}),
        ({"PresentationIntentType": "FOR PROCESSING"}, {"for_processing"}),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, {"secondary_capture"}),
    ],
)
def test_view_body_part_and_intent_are_checked(tmp_path: Path, values: dict[str, Any], codes: set[str]) -> None:
    path = write_radiograph(RAMP, (0.2, 0.2), tmp_path / "x.dcm", patient_id="p")
    scan = read(edited(path, **values))
    assert {f.code for f in scan.findings} - {"detector_spacing", "display_window"} == codes
    assert not any("Doe" in finding.message for finding in scan.findings)
    for code in codes:
        with pytest.raises(Refused) as refused:
            quality.check(scan, IngestConfig(refuse=(code,)))
        assert refused.value.code == code


@pytest.mark.parametrize("inverted", [False, True])
def test_the_window_is_applied_when_asked_for(tmp_path: Path, inverted: bool) -> None:
    path = write_radiograph(RAMP, (0.2, 0.2), tmp_path / "x.dcm", patient_id="p")
    edited(path, WindowCenter=2000, WindowWidth=1000, PhotometricInterpretation=f"MONOCHROME{2 - inverted}")
    (source,), _ = discover([path], IngestConfig(radiograph_window="voi"), key=b"k" * 32)
    array = read_source(source).channels[0].array.astype(int)
    shown = 65535 - array if inverted else array
    assert (shown[RAMP < 1499].max(), shown[RAMP > 2501].min()) == (0, 65535)
    inside = shown[(RAMP > 1510) & (RAMP < 2490)]
    assert np.all(np.diff(inside) > 0)
    assert shown[RAMP == 2000].item() == pytest.approx(32768, abs=100)


def test_known_magnification_is_taken_off(tmp_path: Path) -> None:
    path = write_radiograph(RAMP, (0.2, 0.2), tmp_path / "x.dcm", patient_id="p")
    scan = read(edited(path, EstimatedRadiographicMagnificationFactor="1.25"))
    assert scan.channels[0].spacing_mm == pytest.approx((0.16, 0.16))
