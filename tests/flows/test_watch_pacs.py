import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from orthanc import INSTALLED, PASSWORD, USER, Orthanc, running_orthanc
from synthetic import tiny_config

from medseg import pacs_watch
from medseg.bundle import save_bundle
from medseg.files import UserError, read_json
from medseg.models import build_from_config
from medseg.plan import Plan
from medseg.result import Result

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason="Orthanc with its DICOMweb plugin is not installed"),
]
KILLED_AT = """
import os, signal, sys
from pathlib import Path
from medseg import pacs_watch
model, url, out, workspace, stage, after = sys.argv[1:]
write = pacs_watch.Journal.write
def deadly(self, entry):
    if entry.stage == stage and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, entry)
    if entry.stage == stage:
        os.kill(os.getpid(), signal.SIGKILL)
    return entry
pacs_watch.Journal.write = deadly
pacs_watch.run(model, url, Path(out), Path(workspace), stable_s=0)
"""


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Orthanc]:
    monkeypatch.setenv("MEDSEG_DICOMWEB_USER", USER)
    monkeypatch.setenv("MEDSEG_DICOMWEB_PASSWORD", PASSWORD)
    with running_orthanc(tmp_path / "orthanc") as server:
        server.send_series(tmp_path / "one", "ROE^JANE", "one")
        yield server


@pytest.fixture
def model(tmp_path: Path) -> str:
    config = tiny_config("explain.max_cases=0")
    torch.manual_seed(0)
    net = build_from_config(config.model, spatial_dims=3, in_channels=1, out_channels=config.task.out_channels)
    window = {"normalise": "ct", "intensity_low": 0.0, "intensity_high": 100.0, "intensity_mean": 50.0}
    plan = Plan(spatial_dims=3, patch_size=(16, 16, 16), batch_size=1, intensity_sd=10.0, **window)
    facts = {"run_id": "run-1", "cohort_sha256": "c" * 64, "metrics": {}}
    save_bundle(tmp_path / "bundle", state_dict=net.state_dict(), config=config, plan=plan, **facts)
    return str(tmp_path / "bundle")


def look(model: str, server: Orthanc, folder: Path, stable_s: float = 0) -> Result:
    url = f"{server.url}?Modality=MR"
    return pacs_watch.run(model, url, folder / "out", folder / "workspace", stable_s=stable_s)


def test_each_study_is_segmented_once_and_new_ones_are_taken(archive: Orthanc, model: str, tmp_path: Path) -> None:
    waiting = look(model, archive, tmp_path, stable_s=600)
    assert waiting.figures == {"done": 0, "waiting": 1, "known": 0, "failed": 0}
    assert look(model, archive, tmp_path).figures["done"] == 1
    assert "SEG" in archive.modalities()
    held = archive.modalities()
    assert look(model, archive, tmp_path).figures == {"done": 0, "waiting": 0, "known": 1, "failed": 0}
    assert archive.modalities() == held
    assert not list((tmp_path / "workspace" / "spool").rglob("*.dcm"))
    assert not any("ROE" in path.read_text() for path in (tmp_path / "workspace" / "pacs").rglob("*.json"))
    archive.send_series(tmp_path / "two", "DOE^JOHN", "two", value=90)
    assert look(model, archive, tmp_path).figures == {"done": 1, "waiting": 0, "known": 1, "failed": 0}
    assert archive.modalities().count("SEG") == 2


def test_a_watch_killed_around_every_stage_answers_once(archive: Orthanc, model: str, tmp_path: Path) -> None:
    url = f"{archive.url}?Modality=MR"
    places = [str(tmp_path / "out"), str(tmp_path / "workspace")]
    for stage, after in (("seen", "1"), ("fetched", ""), ("predicted", ""), ("storing", "1"), ("done", "")):
        command = [sys.executable, "-c", KILLED_AT, model, url, *places, stage, after]
        done = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, timeout=300)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert look(model, archive, tmp_path).figures["done"] == 1
    assert archive.modalities().count("SEG") == 1
    assert look(model, archive, tmp_path).figures["known"] == 1
    assert len(list((tmp_path / "workspace" / "runs").iterdir())) == 1
    journal = next((tmp_path / "workspace" / "pacs").rglob("study-*.json"))
    assert read_json(journal)["stage"] == "done"


def test_a_rule_that_names_a_patient_is_refused(archive: Orthanc, model: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="may not name PatientID"):
        pacs_watch.run(model, f"{archive.url}?PatientID=1", tmp_path / "out", tmp_path / "workspace")
