import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from dicom_reader import evaluations
from orthanc import INSTALLED, PASSWORD, USER, Orthanc, running_orthanc
from synthetic import calibrated_bundle, chest, tiny_config
from typer.testing import CliRunner

from flows.steps import predict_flow
from flows.watch_pacs import watch_pacs_flow
from medseg import pacs_watch
from medseg.bundle_writing import save_bundle
from medseg.cli import app
from medseg.files import UserError, read_json
from medseg.ingest.dicom_write import write_radiograph
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


KILLED_AT_WORK = """
import os, signal, sys
from pathlib import Path
from medseg import pacs_watch
from medseg.ingest.pacs import Pacs
from medseg.predict.outputs import CaseFolder
model, url, out, workspace, where = sys.argv[1:]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if where == "fetch":
    parts = Pacs.get_parts
    def some(self, path, place):
        for number, part in enumerate(parts(self, path, place)):
            if number == 3:
                die()
            yield part
    Pacs.get_parts = some
elif where == "predict":
    CaseFolder.write = die
else:
    finish = CaseFolder._finish
    CaseFolder._finish = lambda *given, **named: die(finish(*given, **named))
pacs_watch.run(model, url, Path(out), Path(workspace), stable_s=0)
"""


def test_a_watch_killed_within_fetching_and_predicting_answers_once(
    archive: Orthanc, model: str, tmp_path: Path
) -> None:
    url = f"{archive.url}?Modality=MR"
    places = [str(tmp_path / "out"), str(tmp_path / "workspace")]
    fetched = tmp_path / "workspace" / "spool"
    for where in ("fetch", "predict", "after the case"):
        command = [sys.executable, "-c", KILLED_AT_WORK, model, url, *places, where]
        done = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, timeout=300)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert len(list(fetched.rglob("[!.]*.dcm"))) == (3 if where == "fetch" else 8)
    assert "SEG" not in archive.modalities()
    assert look(model, archive, tmp_path).figures["done"] == 1
    assert archive.modalities() == ["MR", "SEG", "SR"]
    assert look(model, archive, tmp_path).figures["known"] == 1
    assert len(list((tmp_path / "workspace" / "runs").iterdir())) == 1


def test_a_series_that_comes_late_into_a_known_study_is_taken_too(archive: Orthanc, model: str, tmp_path: Path) -> None:
    assert look(model, archive, tmp_path).figures["done"] == 1
    first = pydicom.dcmread(tmp_path / "one" / "0001.dcm")
    with running_orthanc(tmp_path / "elsewhere") as other:
        late = other.send_series(tmp_path / "late", "ROE^JANE", "late", value=80)
    for path in late:
        data = pydicom.dcmread(path)
        data.StudyInstanceUID = first.StudyInstanceUID
        data.save_as(path)
    archive.send(*late)
    waiting = look(model, archive, tmp_path, stable_s=600)
    assert waiting.figures == {"done": 0, "waiting": 1, "known": 0, "failed": 0}
    assert look(model, archive, tmp_path).figures["done"] == 1
    assert archive.modalities() == ["MR", "MR", "SEG", "SEG", "SR", "SR"]  # the first series' results were there
    assert look(model, archive, tmp_path).figures == {"done": 0, "waiting": 0, "known": 1, "failed": 0}


def found_and_fetched(server: Orthanc, study: str, modality: str, written: Path) -> pydicom.Dataset:
    """The one instance of a modality in a study: searched for (QIDO-RS), and as the server holds it."""
    mine = pydicom.dcmread(written)
    found = server.http.get(f"/dicom-web/studies/{study}/series", params={"Modality": modality}).json()
    assert [one["0020000E"]["Value"] for one in found] == [[mine.SeriesInstanceUID]]
    (held,) = server.http.post("/tools/lookup", content=str(mine.SOPInstanceUID)).json()
    back = pydicom.dcmread(io.BytesIO(server.http.get(f"{held['Path']}/file").content))
    assert (back.Modality, back.SeriesInstanceUID, back.PatientID) == (modality, mine.SeriesInstanceUID, mine.PatientID)
    assert back.get("PixelData") == mine.get("PixelData")
    return back


def test_what_is_stored_is_found_by_a_search_and_comes_back_as_it_was(
    archive: Orthanc, model: str, tmp_path: Path
) -> None:
    assert look(model, archive, tmp_path).figures["done"] == 1
    study = str(pydicom.dcmread(tmp_path / "one" / "0001.dcm").StudyInstanceUID)
    for modality, name in (("SEG", "mask.dcm"), ("SR", "report.dcm")):
        (written,) = (tmp_path / "out").rglob(name)
        assert found_and_fetched(archive, study, modality, written).PatientID == "ROE^JANE"


def test_verdict_and_map_are_stored_beside_their_radiograph_once(archive: Orthanc, tmp_path: Path) -> None:
    radiograph = write_radiograph(chest(), (0.2, 0.2), tmp_path / "r.dcm", patient_id="DOE^JOHN")
    archive.send(radiograph)
    model = str(calibrated_bundle(tmp_path / "classifier"))
    for figure in ("done", "known"):
        result = pacs_watch.run(
            model, f"{archive.url}?Modality=DX", tmp_path / "out", tmp_path / "workspace", stable_s=0
        )
        assert result.figures[figure] == 1
        assert archive.modalities() == ["DX", "MR", "OT", "SR"]
    source = pydicom.dcmread(radiograph)
    (map_,), (report,) = ((tmp_path / "out").rglob(name) for name in ("overlay.dcm", "report.dcm"))
    capture = found_and_fetched(archive, source.StudyInstanceUID, "OT", map_)
    assert capture.SOPClassUID.name == "Secondary Capture Image Storage"
    assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    verdict = found_and_fetched(archive, source.StudyInstanceUID, "SR", report)
    (evidence,) = verdict.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert evidence.SeriesInstanceUID == source.SeriesInstanceUID


def test_a_radiograph_without_a_verdict_is_answered_with_the_reason(archive: Orthanc, tmp_path: Path) -> None:
    turned = np.ascontiguousarray(np.rot90(chest()))
    archive.send(write_radiograph(turned, (0.2, 0.2), tmp_path / "r.dcm", patient_id="DOE^JOHN"))
    model = str(calibrated_bundle(tmp_path / "classifier"))
    pacs_watch.run(model, f"{archive.url}?Modality=DX", tmp_path / "out", tmp_path / "workspace", stable_s=0)
    assert archive.modalities() == ["DX", "MR", "SR"]
    (report,) = (tmp_path / "out").rglob("report.dcm")
    assert ("reason_not_assessable", "not_frontal_chest") in evaluations(pydicom.dcmread(report))


def test_the_watch_runs_as_a_flow_and_its_parameters_name_no_one(
    archive: Orthanc, model: str, tmp_path: Path, prefect_server: Path
) -> None:
    places = {"out": str(tmp_path / "out"), "workspace": str(tmp_path / "workspace")}
    for expected in ("done", "known"):
        result = watch_pacs_flow(model, f"{archive.url}?Modality=MR", stable_s=0, **places)
        assert result.figures[expected] == 1
    with pytest.raises(UserError, match="may not name PatientID"):
        watch_pacs_flow(model, f"{archive.url}?PatientID=ROE", stable_s=0, **places)
    with pytest.raises(UserError, match="may not name PatientName"):
        predict_flow(model, [f"{archive.url}?PatientName=ROE"], places["out"], places["workspace"])
    assert archive.modalities() == ["MR", "SEG", "SR"]


def test_predict_stores_its_results_when_asked_to(archive: Orthanc, model: str, tmp_path: Path) -> None:
    arguments = ["predict", model, str(tmp_path / "one"), "--out", str(tmp_path / "out"), "--json"]
    arguments += ["--workspace", str(tmp_path / "workspace"), "--store"]
    refused = CliRunner().invoke(app, [*arguments, "http://elsewhere"])
    assert refused.exit_code == 2
    assert not (tmp_path / "out").exists()
    for stored, present in ((2, 0), (0, 2)):
        done = CliRunner().invoke(app, [*arguments, archive.url])
        assert done.exit_code == 0, done.output
        figures = json.loads(done.stdout.strip().splitlines()[-1])["figures"]
        assert (figures["stored"], figures["present"]) == (stored, present)
    assert archive.modalities() == ["MR", "SEG", "SR"]
