"""Repeat scans in the order of time: the earlier mask reaches the network, and the batch may die in between."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bundle import bundle, config, plan
from torch import Tensor, nn

from medseg.bundle import Bundle
from medseg.bundle_writing import with_retest
from medseg.cohort import Case, Cohort, read_cohort, write_cohort
from medseg.files import read_json
from medseg.images import read_image, write_nifti
from medseg.ingest.dicom_write import write_series
from medseg.ledger import read_ledger
from medseg.predict import Predictor, step
from medseg.volume import Volume

SHAPE = (24, 20, 18)
EXAMS = (("zulu", 0, 12), ("mike", 400, 10), ("alfa", 800, 8))  # case_id, day, length of the box: it shrinks


class Repeats(nn.Module):
    """Label 1 is where the prior has it; without a prior, where the image is positive."""

    def forward(self, x: Tensor) -> Tensor:
        background = torch.zeros_like(x[:, :1])
        if x.shape[1] == 1:
            return torch.cat([background, x], 1)
        known = x[:, 1:].sum(1, keepdim=True)
        return torch.cat([background, known * (2 * x[:, 2:3] - 1) + (1 - known) * x[:, :1]], 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = config(model={"name": "prior_unet", "channels": [4, 8, 16]})
    return bundle(tmp_path_factory.mktemp("bundle") / "b", made, plan(spacing_mm=(1.0, 1.0, 1.0)))


def head(length: int) -> Volume:
    """A textured ellipsoid that stays as it is, with a bright box inside that may shrink."""
    at = np.indices(SHAPE) - (np.array(SHAPE) / 2)[:, None, None, None]
    inside = (at**2 / np.square((11, 9, 8))[:, None, None, None]).sum(0) < 1
    array = np.where(inside, 20 + 10 * np.sin(np.indices(SHAPE).sum(0)), 0).astype(np.int16)
    array[6 : 6 + length, 7:13, 6:12] = 100
    return Volume(array, np.diag([1.0, 1.0, 1.0, 1.0]))


def make_cohort(folder: Path) -> Cohort:
    cases = []
    for name, day, length in EXAMS:
        write_nifti(folder / "images" / f"{name}.nii.gz", head(length))
        cases.append(Case(name, "p", (f"images/{name}.nii.gz",), exam_day=day, source_kind="nifti"))
    write_nifti(folder / "images" / "other.nii.gz", head(9))
    cases.append(Case("other", "q", ("images/other.nii.gz",), source_kind="nifti"))
    return write_cohort(Cohort(folder, tuple(cases), {"thing": 1}), [], {})


def run(model: Bundle, cohort: Cohort, out: Path, net: nn.Module | None = None):  # type: ignore[no-untyped-def]
    return step.run(model, cohort, out, predictor=Predictor(model, net=net or Repeats()))


def result(out: Path, name: str) -> dict[str, object]:
    found: dict[str, object] = read_json(out / name / "result.json")
    return found


def test_each_examination_is_shown_the_mask_of_the_one_before(tmp_path: Path, model: Bundle) -> None:
    cohort = make_cohort(tmp_path / "cohort")
    run(model, cohort, tmp_path / "out")
    masks = {name: read_image(tmp_path / "out" / name / "mask.nii.gz").array for name, _, _ in EXAMS}
    assert masks["zulu"].sum() == 12 * 6 * 6, "the first examination has no prior"
    for name in ("mike", "alfa"):
        assert np.array_equal(masks[name], masks["zulu"]), "this network repeats what it is shown"
    assert [result(tmp_path / "out", name)["prior"] and result(tmp_path / "out", name)["prior"]["case_id"]
            for name in ("zulu", "mike", "alfa", "other")] == [None, "zulu", "mike", None]  # fmt: skip
    assert result(tmp_path / "out", "mike")["prior"]["similarity"] > 0.9
    assert [row.case_id for row in read_ledger(tmp_path / "out" / "ledger.csv")] == ["alfa", "mike", "other", "zulu"]


def test_stopped_after_any_case_and_started_again_gives_the_same(tmp_path: Path, model: Bundle) -> None:
    cohort = make_cohort(tmp_path / "cohort")
    run(model, cohort, tmp_path / "whole")

    class Dies(Repeats):
        def __init__(self, after: int) -> None:
            super().__init__()
            self.left = after

        def forward(self, x: Tensor) -> Tensor:
            self.left -= len(x)  # windows of the call
            if self.left < 0:
                raise KeyboardInterrupt
            return super().forward(x)

    windows = 8  # two along each axis, in every case
    for after in (windows, 2 * windows + 3):
        out = tmp_path / f"after-{after}"
        with pytest.raises(KeyboardInterrupt):
            run(model, cohort, out, Dies(after))
        again = run(model, cohort, out)
        assert again.figures["resumed"] == after // windows
        for name in ("zulu", "mike", "alfa", "other"):
            whole, resumed = (result(folder, name) for folder in (tmp_path / "whole", out))
            assert whole["output_sha256"] == resumed["output_sha256"]
            assert whole["prior"] == resumed["prior"]
    assert run(model, cohort, tmp_path / "whole").figures["resumed"] == 4


def test_a_later_result_is_made_anew_when_its_prior_changes(tmp_path: Path, model: Bundle) -> None:
    cohort = make_cohort(tmp_path / "cohort")
    run(model, cohort, tmp_path / "out")
    write_nifti(tmp_path / "cohort" / "images" / "zulu.nii.gz", head(11))
    assert run(model, cohort, tmp_path / "out").figures["resumed"] == 1, "only the other patient's"
    assert read_image(tmp_path / "out" / "alfa" / "mask.nii.gz").array.sum() == 11 * 6 * 6


def test_a_prior_that_does_not_align_is_not_shown_and_said(tmp_path: Path, model: Bundle) -> None:
    cohort = make_cohort(tmp_path / "cohort")
    noise = np.random.default_rng(0).integers(0, 40, SHAPE).astype(np.int16)
    write_nifti(tmp_path / "cohort" / "images" / "zulu.nii.gz", Volume(noise, np.eye(4)))
    run(model, cohort, tmp_path / "out")
    assert read_image(tmp_path / "out" / "mike" / "mask.nii.gz").array.sum() == 10 * 6 * 6
    found = result(tmp_path / "out", "mike")
    assert [flag["code"] for flag in found["flags"]] == ["prior_unaligned"]
    assert "0.7 is asked for" in found["reason"]


def test_a_failed_examination_is_passed_over(tmp_path: Path, model: Bundle) -> None:
    cohort = make_cohort(tmp_path / "cohort")
    (tmp_path / "cohort" / "images" / "mike.nii.gz").write_bytes(b"damaged")
    run(model, cohort, tmp_path / "out")
    assert result(tmp_path / "out", "mike")["status"] == "failed"
    assert result(tmp_path / "out", "alfa")["prior"]["case_id"] == "zulu"


def test_other_networks_are_given_nothing_more(tmp_path: Path) -> None:
    plain = bundle(tmp_path / "b", grid=plan(spacing_mm=(1.0, 1.0, 1.0)))
    seen = []

    class Looks(Repeats):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.shape[1])
            return super().forward(x)

    cohort = make_cohort(tmp_path / "cohort")
    run(plain, cohort, tmp_path / "out", Looks())
    assert set(seen) == {1}
    assert result(tmp_path / "out", "alfa")["prior"] is None


def test_changes_are_those_of_the_masks_and_judged_by_the_bundles_noise(tmp_path: Path) -> None:
    plain = bundle(tmp_path / "b", grid=plan(spacing_mm=(1.0, 1.0, 1.0)))
    cohort = make_cohort(tmp_path / "cohort")
    run(plain, cohort, tmp_path / "out")
    (patient,) = read_json(tmp_path / "out" / "changes.json")["patients"]
    assert [(exam["case_id"], exam["day"]) for exam in patient["exams"]] == [(name, day) for name, day, _ in EXAMS]
    change = patient["structures"]["thing"]
    assert change["volumes_ml"] == pytest.approx([length * 36 / 1000 for *_, length in EXAMS])
    assert change["per_year_percent"] == pytest.approx(-100 / 12 * 2 / 400 * 365.25)
    assert change["verdict"] == "unknown"
    for cv, verdict in ((1.0, "beyond the noise"), (40.0, "within the noise")):
        labels = {"thing": {"cv_percent": cv, "cv_low": 0.5, "cv_high": 99.0, "patients": 5, "scans": 10}}
        told = {"labels": labels, "within_days": 30, "cohort_sha256": "c" * 64}
        made = with_retest(plain, tmp_path / f"cv{cv}", told, run_id="r")
        judged = replace(plain, sha256=plain.sha256, facts={**plain.facts, "retest": told})
        run(judged, cohort, tmp_path / "out")
        found = read_json(tmp_path / "out" / "changes.json")
        assert found["patients"][0]["structures"]["thing"]["verdict"] == verdict
        assert found["retest"]["thing"]["source"] == "measured"
        assert (made / "weights.safetensors").read_bytes() == (tmp_path / "b" / "weights.safetensors").read_bytes()
    alone = replace(cohort, cases=tuple(case for case in cohort.cases if case.case_id in ("zulu", "other")))
    run(plain, alone, tmp_path / "out")
    assert not (tmp_path / "out" / "changes.json").exists(), "one examination has no change"


def test_a_batch_of_dicom_is_ordered_by_its_study_dates_and_writes_none(tmp_path: Path, model: Bundle) -> None:
    for n, (name, date) in enumerate((("x", "20210305"), ("y", "20190201"), ("z", "20200310"))):
        folder = tmp_path / "scans" / name
        write_series(head(12 - n), folder, modality="MR", patient_id="Doe", seed_uid=name)
        import pydicom

        for file in folder.glob("*"):
            data = pydicom.dcmread(file)
            data.StudyDate = date
            data.save_as(file)
    out = tmp_path / "out"
    step.run(model, [tmp_path / "scans"], out, workspace=tmp_path / "w", predictor=Predictor(model, net=Repeats()))
    (patient,) = read_json(out / "changes.json")["patients"]
    assert [exam["day"] for exam in patient["exams"]] == [0, 403, 763]
    lengths = [round(v * 1000 / 36) for v in patient["structures"]["thing"]["volumes_ml"]]
    assert lengths == [11, 11, 11], "the first by date is the one with 11, and the network repeats it"
    text = "".join(p.read_text() for p in out.rglob("*.json")) + (out / "ledger.csv").read_text()
    assert not any(date in text for date in ("20210305", "20190201", "20200310", "2019-02-01", "Doe"))


def test_the_day_survives_the_table(tmp_path: Path) -> None:
    cohort = make_cohort(tmp_path / "cohort")
    assert [case.exam_day for case in read_cohort(cohort.folder).cases] == [800, 400, None, 0]
