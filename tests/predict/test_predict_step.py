"""A batch job: every case accounted for, killed and started again without losing or redoing a finished case."""

import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from tiny_bundle import Threshold, box_volume, bundle, classifier, plan, predict_boxes, write_boxes
from torch import nn

from medseg.bundle import Bundle
from medseg.cohort import Case, Cohort, write_cohort
from medseg.files import DiskError, UserError, read_json, read_rows
from medseg.images import read_image, write_nifti, write_png
from medseg.ingest.dicom_write import write_series
from medseg.ledger import Row, read_ledger
from medseg.predict import Predictor, step
from medseg.predict.jobs import read_ahead, write_behind
from medseg.predict.outputs import CaseFolder
from medseg.predict.predictor import called_class
from medseg.predict.pyfunc import _load_pyfunc
from medseg.volume import Volume


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle(tmp_path_factory.mktemp("bundle") / "b", grid=plan(spacing_mm=(1.0, 1.0, 1.0)))


def run(model: Bundle, scans: object, out: Path, net: nn.Module | None = None, **more: object):  # type: ignore[no-untyped-def]
    given = scans if isinstance(scans, Cohort) else [scans]
    return step.run(model, given, out, predictor=Predictor(model, net=net or Threshold()), **more)  # type: ignore[arg-type]


def statuses(out: Path) -> dict[str, str]:
    return {row.case_id: row.status for row in read_ledger(out / "ledger.csv")}


def test_one_bad_case_never_stops_the_batch(tmp_path: Path, model: Bundle) -> None:
    scans = write_boxes(tmp_path / "scans", 2)
    write_nifti(scans / "flat.nii.gz", Volume(np.full((12, 12, 12), 7, np.int16), np.eye(4)))
    write_nifti(scans / "dark.nii.gz", Volume(np.arange(1728, dtype=np.int16).reshape(12, 12, 12) // 40, np.eye(4)))
    (scans / "broken.nii.gz").write_bytes((scans / "scan-00.nii.gz").read_bytes()[:150])
    (scans / "note.dcm").write_text("no image")
    result = run(model, scans, tmp_path / "out")
    found = statuses(tmp_path / "out")
    assert result.status == "partial"
    assert result.exit_code == 3
    (unnamed,) = (case_id for case_id in found if case_id.startswith("file-"))
    assert found == {
        **{"scan-00": "done", "scan-01": "done", "dark": "flagged"},
        **{"flat": "rejected", "broken": "rejected", unnamed: "rejected"},
    }
    reasons = {row.case_id: row.reason for row in read_ledger(tmp_path / "out" / "ledger.csv")}
    assert "Nothing was found" in reasons["dark"]
    assert "value 7" in reasons["flat"]
    assert read_rows(tmp_path / "out" / "rejects.csv")[0]["source"] == "note.dcm"
    assert read_json(tmp_path / "out" / "summary.json")["rejected"] == 3


def test_an_error_of_one_case_is_kept_with_its_cause_and_tried_again(tmp_path: Path, model: Bundle) -> None:
    class Falls(Threshold):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] == 16 and float(x.min()) == float(x.max()):
                raise RuntimeError("no answer for /secret/Doe_Jane.nii.gz")
            return super().forward(x)

    scans = write_boxes(tmp_path / "scans", 1)
    low = Volume((np.arange(16**3).reshape(16, 16, 16) % 99 - 120).astype(np.int16), np.eye(4))
    write_nifti(scans / "low.nii.gz", low)  # below the intensity window, so constant for the network
    run(model, scans, tmp_path / "out", Falls())
    assert statuses(tmp_path / "out") == {"scan-00": "done", "low": "failed"}
    reason = read_json(tmp_path / "out" / "low" / "result.json")["reason"]
    assert "RuntimeError: no answer" in reason
    assert "Jane" not in reason
    assert "Traceback" in (tmp_path / "out" / "low" / "failure.txt").read_text()
    before = (tmp_path / "out" / "scan-00" / "result.json").stat().st_mtime_ns
    again = run(model, scans, tmp_path / "out")
    assert statuses(tmp_path / "out")["low"] == "flagged"
    assert again.figures["resumed"] == 1
    assert not (tmp_path / "out" / "low" / "failure.txt").exists()
    assert (tmp_path / "out" / "scan-00" / "result.json").stat().st_mtime_ns == before


def test_finished_cases_are_redone_only_when_scan_model_or_outputs_changed(tmp_path: Path, model: Bundle) -> None:
    scans, out = write_boxes(tmp_path / "scans", 3), tmp_path / "out"
    run(model, scans, out)
    assert run(model, scans, out).figures["resumed"] == 3
    (out / "scan-00" / "mask.nii.gz").unlink()
    (out / "scan-01" / "explanation").mkdir()
    write_nifti(scans / "scan-01.nii.gz", box_volume(np.diag([2.0, 1.0, 1.0, 1.0]))[0])
    assert run(model, scans, out).figures["resumed"] == 1
    assert (out / "scan-00" / "mask.nii.gz").is_file()
    assert not (out / "scan-01" / "explanation").exists()  # it explained another scan
    other = bundle(tmp_path / "other", grid=plan(spacing_mm=(1.0, 1.0, 1.0)), run_id="run-2")
    assert run(other, scans, out).figures["resumed"] == 0


def contents(out: Path) -> dict[str, object]:
    rows = [{**row, "seconds": ""} for row in read_rows(out / "ledger.csv")]
    masks = {path.parent.name: path.read_bytes() for path in sorted(out.glob("*/mask.nii.gz"))}
    return {"ledger": rows, "masks": masks}


def test_killed_at_any_moment_and_started_again_equals_uninterrupted(tmp_path: Path, model: Bundle) -> None:
    fork = multiprocessing.get_context("fork")  # starts at once; the child computes in one thread, so forking is safe
    scans = write_boxes(tmp_path / "scans", 16)
    predict_boxes(model.folder, scans, tmp_path / "whole")
    out, kept, kills = tmp_path / "out", {}, 0
    rng = random.Random(1)
    for _ in range(3):
        process = fork.Process(target=predict_boxes, args=(model.folder, scans, out))
        process.start()
        while not list(out.glob("*/mask.nii.gz")):
            time.sleep(0.01)
            assert process.is_alive() or process.exitcode == 0
        time.sleep(rng.uniform(0, 0.2))
        kills += process.is_alive()
        process.kill()
        process.join()
        for path in out.glob("*/result.json"):
            assert read_json(path)["status"] == "done"
            nib.load(path.with_name("mask.nii.gz")).get_fdata()
            assert kept.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert kills
    result = step.run(model, [scans], out, predictor=Predictor(model, net=Threshold()))
    assert result.figures["resumed"] == len(kept)
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.rglob(".part-*"))


def test_cohort_cases_are_predicted_by_split(tmp_path: Path, model: Bundle) -> None:
    folder = tmp_path / "cohort"
    write_boxes(folder / "images", 2)
    cases = tuple(
        Case(f"c{n}", f"p{n}", (f"images/scan-{n:02d}.nii.gz",), split=split, source_kind="dicom")
        for n, split in enumerate(("train", "test"))
    )
    cohort = write_cohort(Cohort(folder, cases, {"thing": 1}), [], {})
    run(model, cohort, tmp_path / "out", split="test")
    assert statuses(tmp_path / "out") == {"c1": "done"}
    result = read_json(tmp_path / "out" / "c1" / "result.json")
    assert result["image"] == [str(folder / "images" / "scan-01.nii.gz")]
    assert result["patient_id"] == "p1"
    with pytest.raises(UserError, match="no case in split 'val'"):
        run(model, cohort, tmp_path / "out", split="val")


def test_classifier_gives_probabilities_and_obeys_its_operating_point(tmp_path: Path) -> None:
    grid = plan(spatial_dims=2, patch_size=(32, 32), size_px=(32, 32))
    made = bundle(
        tmp_path / "b", classifier(), grid, calibration={"temperature": 2.0},
        operating_point={"target": "ill", "threshold": 0.0},
    )  # fmt: skip
    picture = np.random.default_rng(0).integers(0, 255, (80, 70)).astype(np.uint8)
    write_png(tmp_path / "scans" / "chest.png", picture)
    result = step.run(made, [tmp_path / "scans"], tmp_path / "out")
    found = read_json(tmp_path / "out" / "chest" / "result.json")
    assert result.status == "done"
    assert sum(found["probs"].values()) == pytest.approx(1, abs=1e-6)
    assert found["predicted"] == "ill"
    assert (tmp_path / "out" / "chest" / "preview.png").is_file()
    assert called_class({"normal": 0.6, "ill": 0.4}, ("ill", 0.3)) == "ill"
    assert called_class({"normal": 0.6, "ill": 0.4}, None) == "normal"
    logits = {}
    for temperature in (1.0, 2.0):
        other = bundle(tmp_path / f"t{temperature}", classifier(), grid, calibration={"temperature": temperature})
        probs = other.predict(tmp_path / "scans" / "chest.png").probs
        logits[temperature] = np.log(probs["ill"] / probs["normal"])
    assert logits[1.0] == pytest.approx(2 * logits[2.0], rel=1e-4)


def test_radiograph_masks_have_the_picture_s_own_size(tmp_path: Path) -> None:
    from tiny_bundle import config

    made = bundle(tmp_path / "b", config(dims=2), plan(spatial_dims=2, patch_size=(16, 16), size_px=(32, 32)))
    picture = np.zeros((90, 70), dtype=np.uint8)
    picture[20:60, 10:40] = 100
    write_png(tmp_path / "scans" / "chest.png", picture)
    run(made, tmp_path / "scans", tmp_path / "out")
    mask = read_image(tmp_path / "out" / "chest" / "mask.png").array
    assert mask.shape == picture.shape
    inside, truth = mask == 1, picture > 50
    assert 2 * (inside & truth).sum() / (inside.sum() + truth.sum()) > 0.95


def test_wrong_kind_of_scan_and_cut_structures_are_said(tmp_path: Path, model: Bundle) -> None:
    volume, _ = box_volume(np.diag([1.0, 1.0, 9.0, 1.0]))
    volume.array[:, :, 0] = 100
    write_series(volume, tmp_path / "scans" / "cut", patient_id="p")
    write_png(tmp_path / "scans" / "flat.png", np.arange(6400).reshape(80, 80).astype(np.uint8))
    run(model, tmp_path / "scans", tmp_path / "out")
    found = {row.source_kind: row for row in read_ledger(tmp_path / "out" / "ledger.csv")}
    assert found["png"].status == "rejected"
    assert "takes volumes" in found["png"].reason
    codes = [f["code"] for f in read_json(tmp_path / "out" / found["dicom"].case_id / "result.json")["flags"]]
    assert {"other_spacing", "touches_border"} <= set(codes)


def test_patients_names_stay_out_of_ledger_and_summary(tmp_path: Path, model: Bundle) -> None:
    volume, _ = box_volume(np.eye(4))
    write_series(volume, tmp_path / "scans" / "Doe_Jane", patient_id="Doe_Jane")
    (tmp_path / "scans" / "Doe_Jane" / "cut.dcm").write_bytes(
        (tmp_path / "scans" / "Doe_Jane" / "0001.dcm").read_bytes()[:200]
    )
    (tmp_path / "scans" / "Doe_John.zip").write_bytes(b"no archive")
    run(model, tmp_path / "scans", tmp_path / "out", workspace=tmp_path / "workspace")
    for name in ("ledger.csv", "summary.json", "predict.json"):
        assert "Doe" not in (tmp_path / "out" / name).read_text()
    (result,) = (read_json(path) for path in (tmp_path / "out").glob("case-*/result.json"))
    assert result["patient_id"].startswith("patient-")


def test_out_must_not_lie_among_the_scans(tmp_path: Path, model: Bundle) -> None:
    scans = write_boxes(tmp_path / "scans", 1)
    with pytest.raises(UserError, match="inside the scans"):
        run(model, scans, scans / "out")
    with pytest.raises(UserError, match="does not exist"):
        run(model, tmp_path / "nowhere", tmp_path / "out")


def test_reading_stays_one_ahead_and_keeps_order_and_errors() -> None:
    started: list[int] = []

    def read(job: int) -> int:
        started.append(job)
        if job == 2:
            raise ValueError("two")
        return job * 10

    seen: list[object] = []
    for job, get in read_ahead(range(5), read):
        time.sleep(0.01)
        assert len(started) <= job + 2
        try:
            seen.append(get())
        except ValueError as error:
            seen.append(str(error))
    assert seen == [0, 10, "two", 30, 40]


def test_writing_stays_one_behind_and_keeps_order_and_errors() -> None:
    made: list[int] = []
    written: list[int] = []

    def write(job: int) -> int:
        time.sleep(0.02)
        written.append(job)
        if job == 2:
            raise ValueError("two")
        return job * 10

    def work() -> Iterator[tuple[int, Callable[[], int]]]:
        for job in range(5):
            made.append(job)
            assert len(made) <= len(written) + 2
            yield job, partial(write, job)

    seen: list[object] = []
    for job, get in write_behind(work()):
        assert job in written
        try:
            seen.append(get())
        except ValueError as error:
            seen.append(str(error))
    assert seen == [0, 10, "two", 30, 40]
    assert made == written


def test_writing_runs_beside_the_network_and_its_errors_reach_their_case(
    tmp_path: Path, model: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, threads = CaseFolder.write, []

    def failing(folder: CaseFolder, *given: object) -> Row:
        threads.append(threading.current_thread().name)
        if folder.path.name == "scan-01":
            raise RuntimeError("cannot be drawn")
        return write(folder, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(CaseFolder, "write", failing)
    result = run(model, write_boxes(tmp_path / "scans", 3), tmp_path / "out")
    assert statuses(tmp_path / "out") == {"scan-00": "done", "scan-01": "failed", "scan-02": "done"}
    assert "cannot be drawn" in read_json(tmp_path / "out" / "scan-01" / "result.json")["reason"]
    assert all(name.startswith("write") for name in threads)
    assert 0 < float(str(result.figures["working_set_gb"])) < 4

    def full(folder: CaseFolder, *given: object) -> Row:
        raise DiskError("the disk is full")

    monkeypatch.setattr(CaseFolder, "write", full)
    with pytest.raises(DiskError, match="disk is full"):
        run(model, tmp_path / "scans", tmp_path / "other")
    assert read_ledger(tmp_path / "other" / "ledger.csv") == ()


def test_python_door_and_pyfunc_serve_by_reference(tmp_path: Path) -> None:
    made = bundle(tmp_path / "b", grid=plan(spacing_mm=(1.0, 1.0, 1.0)))
    scans = write_boxes(tmp_path / "scans", 2)
    prediction = made.predict(scans / "scan-00.nii.gz")
    assert np.allclose(prediction.mask.affine, nib.load(scans / "scan-00.nii.gz").affine)
    with pytest.raises(UserError, match="holds 2 scans"):
        made.predict(scans)
    served = _load_pyfunc(str(made.folder))
    table = served.predict(pd.DataFrame({"path": [str(scans)]}), {"out": str(tmp_path / "out")})
    assert list(table["case_id"]) == ["scan-00", "scan-01"]
    assert table["volume_ml_thing"][0] == pytest.approx(prediction.volumes_ml["thing"])
    assert np.array_equal(read_image(Path(table["mask"][0])).array, prediction.mask.array)
    with pytest.raises(UserError, match="column 'path'"):
        served.predict(pd.DataFrame({"file": []}))
