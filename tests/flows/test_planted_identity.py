"""From scans to results under Prefect: no planted mark is in the cohort, the runs, MLflow or Prefect, or a log."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from planted import plant, traces
from prefect.settings import get_current_settings
from prefect.testing.utilities import prefect_test_harness
from synthetic import TINY, segmentation_cohort

from flows import road, steps

SETS = [*TINY, "train.epochs=1", "explain.max_cases=1", "report={max_cases: 1, viewer_cases: 0}", "ingest.names=keyed"]


def _plant_dicom(scans: Path, labels: Path) -> list[str]:
    return plant(scans, 8, labels, size=20)


def _plant_nifti(scans: Path, labels: Path) -> list[str]:
    """Volumes and label maps named after patients, in a folder named after one, and a file that is no volume."""
    made = segmentation_cohort(scans.parent / "made").folder
    folder = scans / "ZQXDOE"
    folder.mkdir(parents=True)
    labels.mkdir()
    for kind, target in (("images", folder), ("labels", labels)):
        for path in (made / kind).iterdir():
            shutil.move(path, target / path.name.replace("case", "ZQXJOHN"))
    (folder / "ZQXBAD.nii.gz").write_bytes(b"no volume")
    return ["ZQXDOE", "ZQXJOHN", "ZQXBAD"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("planted", [_plant_dicom, _plant_nifti])
def test_no_planted_mark_leaves_the_scans(
    planted: Callable[[Path, Path], list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scans, labels, workspace = tmp_path / "scans", tmp_path / "labels", tmp_path / "workspace"
    marks = planted(scans, labels)
    listed = tmp_path / "today.txt"
    listed.write_text("".join(f"{folder}\n" for folder in scans.iterdir() if folder.is_dir()))
    sources = [f"@{listed}"]
    capfd.readouterr()
    cohort, out = str(workspace / "cohorts" / "c"), str(tmp_path / "out")
    with prefect_test_harness(server_startup_timeout=240):
        address = get_current_settings().server.database.connection_url
        assert address is not None
        database = Path(address.get_secret_value().rpartition(":///")[2])
        done = road.road_flow(sources, "hippocampus", cohort, str(labels), SETS, workspace=str(workspace))
        predicted = steps.predict_flow(done.run_id, sources, out, workspace=str(workspace))
        explained = steps.explain_flow(done.run_id, sources, out, workspace=str(workspace))
        stored = b"".join(path.read_bytes() for path in database.parent.glob(f"{database.name}*"))
    assert predicted.figures["done"] or predicted.figures.get("flagged")
    assert explained.figures["maps"]
    shown = capfd.readouterr()
    assert [mark for mark in marks if mark in shown.out + shown.err] == []
    assert [mark for mark in marks if mark.encode() in stored] == []
    private = workspace / "pseudonyms.csv"
    assert private.stat().st_mode & 0o777 == 0o600
    private.unlink()  # the one file that names them, for its owner
    assert (workspace / "mlflow.db").is_file()
    assert traces(workspace, marks) == []
    if planted is _plant_dicom:  # names of NIfTI files stay in the folder of the results, which lies beside the scans
        assert [hit for hit in traces(Path(out), marks) if not hit[1].endswith(".dcm")] == []
    assert traces(Path(os.environ["PREFECT_HOME"]), marks) == []
