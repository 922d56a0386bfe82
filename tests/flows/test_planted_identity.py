"""From DICOM to results under Prefect: no planted mark is in the cohort, the runs, MLflow or Prefect, or a log."""

import os
from pathlib import Path

import pytest
from planted import plant, traces
from prefect.settings import get_current_settings
from prefect.testing.utilities import prefect_test_harness
from synthetic import TINY

from flows import road, steps

SETS = [*TINY, "train.epochs=1", "explain.max_cases=1", "report={max_cases: 1, viewer_cases: 0}"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_no_planted_mark_leaves_the_scans(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scans, labels, workspace = tmp_path / "scans", tmp_path / "labels", tmp_path / "workspace"
    marks = plant(scans, 8, labels, size=20)
    capfd.readouterr()
    cohort, out = str(workspace / "cohorts" / "c"), str(tmp_path / "out")
    with prefect_test_harness(server_startup_timeout=90):
        address = get_current_settings().server.database.connection_url
        assert address is not None
        database = Path(address.get_secret_value().rpartition(":///")[2])
        done = road.road_flow([str(scans)], "hippocampus", cohort, str(labels), SETS, workspace=str(workspace))
        predicted = steps.predict_flow(done.run_id, [str(scans)], out, workspace=str(workspace))
        stored = b"".join(path.read_bytes() for path in database.parent.glob(f"{database.name}*"))
    assert predicted.figures["done"] or predicted.figures.get("flagged")
    shown = capfd.readouterr()
    assert [mark for mark in marks if mark in shown.out + shown.err] == []
    assert [mark for mark in marks if mark.encode() in stored] == []
    private = workspace / "pseudonyms.csv"
    assert private.stat().st_mode & 0o777 == 0o600
    private.unlink()  # the one file that names them, for its owner
    assert (workspace / "mlflow.db").is_file()
    assert traces(workspace, marks) == []
    assert [hit for hit in traces(Path(out), marks) if not hit[1].endswith(".dcm")] == []  # those go to the archive
    assert traces(Path(os.environ["PREFECT_HOME"]), marks) == []
