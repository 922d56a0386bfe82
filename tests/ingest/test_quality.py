"""Findings carry their numbers, and those that the config names keep a scan out."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg.config import IngestConfig
from medseg.ingest import quality
from medseg.ingest.nifti import read_channels
from medseg.ingest.scan import Refused, Scan
from medseg.ingest.sources import discover
from medseg.volume import Volume


def ct(offset: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """Air around soft tissue, in Hounsfield units before offset and scale."""
    rng = np.random.default_rng(0)
    array = np.full((24, 24, 12), -1000.0)
    array[4:20, 4:20] = rng.normal(40, 30, (16, 16, 12))
    array[10:13, 10:13] = 700
    return np.rint((array + offset) * scale * 100).astype(np.float32) / 100


def scan(array: np.ndarray, spacing: float = 1.0, modality: str = "") -> Scan:
    return Scan("c", "p", (Volume(array, np.diag([spacing] * 3 + [1.0])),), modality, "volume", "nifti", (), "")


@pytest.mark.parametrize(("offset", "scale", "ok"), [(0, 1, True), (1024, 1, False), (1000, 0.001, False)])
def test_ct_that_is_not_in_hounsfield_units_is_refused(offset: float, scale: float, ok: bool) -> None:
    given = scan(ct(offset, scale), modality="CT")
    if not ok:
        with pytest.raises(Refused, match="ounsfield") as refused:
            quality.check(given)
        assert refused.value.code == "not_hounsfield"
    codes = {finding.code for finding in quality.check(given, IngestConfig(refuse=()))}
    assert ("not_hounsfield" in codes) != ok


@pytest.mark.parametrize(("modality", "taken"), [(("CT",), "CT"), (("CT", "MR"), ""), ((), "")])
def test_a_nifti_file_names_no_modality_so_that_of_the_config_is_taken(
    modality: tuple[str, ...], taken: str, tmp_path: Path
) -> None:
    nib.save(nib.Nifti1Image(ct(), np.eye(4)), tmp_path / "a.nii")
    sources, _ = discover([tmp_path], IngestConfig(modality=modality))
    assert [source.modality for source in sources] == [taken]


def test_a_crop_without_air_is_ct_all_the_same() -> None:
    found = {finding.code for finding in quality.check(scan(ct()[4:20, 4:20], modality="CT"))}
    assert "no_air" in found


@pytest.mark.parametrize(("spacing", "unit"), [(0.001, "metres"), (1000.0, "micrometres")])
def test_wrong_units_are_refused_by_the_extent(spacing: float, unit: str) -> None:
    with pytest.raises(Refused, match=f"stored in {unit}") as refused:
        quality.check(scan(ct(), spacing))
    assert refused.value.code == "implausible_extent"


def test_mirrored_forms_are_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ct(), np.diag([-1.0, 1, 1, 1]))
    image.set_sform(np.diag([-1.0, 1, 1, 1]), 1)
    image.set_qform(np.eye(4), 1)
    nib.save(image, tmp_path / "a.nii")
    channels, findings = read_channels((tmp_path / "a.nii",))
    given = Scan("c", "p", channels, "", "volume", "nifti", (), "", findings)
    with pytest.raises(Refused, match="mirror images"):
        quality.check(given)
