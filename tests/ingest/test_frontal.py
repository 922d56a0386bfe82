"""Pictures that look like a turned chest are told from upright ones, and from what is no chest."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from synthetic import chest

from medseg.config import IngestConfig, VerdictConfig
from medseg.ingest import quality
from medseg.ingest.frontal import check_frontal, likeness
from medseg.ingest.scan import Refused, Scan
from medseg.volume import Volume

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
REAL, VOLUMES = DATA / "cxr_tb" / "images", DATA / "headneck_ct" / "images"


def codes(image: NDArray[np.generic]) -> list[str]:
    return [finding.code for finding in check_frontal(image)]


@pytest.mark.parametrize("size", [(300, 280), (90, 64), (900, 1100)])
def test_an_upright_chest_passes_at_any_size_and_depth(size: tuple[int, int]) -> None:
    image = chest(*size)
    assert codes(image) == []
    assert codes((image >> 4).astype(np.uint8)) == []
    assert codes(image[:, ::-1]) == []
    assert likeness(image) == pytest.approx(likeness(image // 2), abs=0.02)


def test_black_bars_around_it_do_not_count() -> None:
    barred = np.zeros((420, 400), np.uint16)
    barred[:300, 60:340] = chest()
    assert codes(barred) == []


@pytest.mark.parametrize(("turns", "degrees"), [(1, 270), (2, 180), (3, 90)])
def test_a_turned_chest_is_refused_with_its_turn_and_its_numbers(turns: int, degrees: int) -> None:
    turned = np.rot90(chest(), turns)  # counter-clockwise
    (finding,) = check_frontal(turned)
    assert finding.code == "not_frontal_chest"
    assert f"turned by {degrees} degrees clockwise" in finding.message
    assert (finding.number or 0) > (finding.threshold or 1)
    scan = Scan("c", "p", (Volume(np.ascontiguousarray(turned), np.eye(4)),), "", "radiograph", "png", (), "")
    with pytest.raises(Refused, match="turned by"):
        quality.check(scan)
    assert "not_frontal_chest" in {found.code for found in quality.check(scan, IngestConfig(refuse=()))}


def test_what_is_no_chest_is_flagged_and_can_be_refused() -> None:
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:200, :200]
    disc = (1000 * ((rows - 100) ** 2 + (columns - 100) ** 2 < 6000)).astype(np.uint16) + rng.integers(
        0, 50, (200, 200), np.uint16
    )
    for image in (rng.integers(0, 4000, (200, 200)).astype(np.uint16), (rows * 20).astype(np.uint16), disc):
        assert codes(image) == ["no_chest"]
    scan = Scan("c", "p", (Volume(disc, np.eye(4)),), "", "radiograph", "png", (), "")
    assert "no_chest" in {found.code for found in quality.check(scan)}
    with pytest.raises(Refused, match="looks like no"):
        quality.check(scan, IngestConfig(refuse=("no_chest",)))
    assert "no_chest" in VerdictConfig().withhold, "no verdict on a picture of something else"


def test_dark_air_that_nothing_encloses_is_no_lung() -> None:
    """As beside a neck below bright shoulders; and a leg, darker than the white edges of its plate."""
    rows, columns = (np.mgrid[:300, :280] + 0.5) / np.reshape([300, 280], (2, 1, 1))
    aside = np.abs(columns - 0.5)
    neck = np.where((rows < 0.12) | (rows > 0.8) | (aside < 0.08), 3000, 0)
    leg = np.where(aside > 0.35, 4000, np.where(aside < 0.08, 1600, 400))
    noise = np.random.default_rng(0).normal(0, 100, neck.shape)
    for image in (neck, leg):
        assert set(codes(image + noise)) & {"no_chest", "chest_doubtful"}


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_a_photograph_gets_no_verdict_or_is_doubtful(name: str) -> None:
    from sklearn.datasets import load_sample_image

    grey = load_sample_image(name).mean(axis=2)
    assert set(codes(grey)) <= {"no_chest", "chest_doubtful", "not_frontal_chest"}
    assert codes(grey)


@pytest.mark.shared_data
@pytest.mark.skipif(not REAL.is_dir(), reason="the real scans (../shared/data) are not here")
def test_no_real_chest_is_refused_and_turned_ones_are() -> None:
    paths = sorted(REAL.glob("*.png"))[::100]
    images = [np.asarray(Image.open(path).convert("L")) for path in paths]
    assert not any("not_frontal_chest" in codes(image) for image in images)
    for turns in (1, 2, 3):
        caught = sum(codes(np.rot90(image, turns)) == ["not_frontal_chest"] for image in images)
        assert caught >= 0.9 * len(images)


@pytest.mark.shared_data
@pytest.mark.skipif(not VOLUMES.is_dir(), reason="the real scans (../shared/data) are not here")
def test_projections_of_head_and_neck_are_no_chests() -> None:
    for path in sorted(VOLUMES.glob("*.nii.gz"))[::25]:
        array = np.asarray(nib.load(path).dataobj)  # type: ignore[attr-defined]
        for axis in range(3):
            assert codes(np.rot90(array.mean(axis))[::-1]), f"{path.name} along axis {axis}"
