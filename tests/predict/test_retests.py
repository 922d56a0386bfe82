"""`models calibrate` of a segmentation model: its noise from repeat scans, in a bundle of its own, and on the page."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import bundle, plan

from medseg import calibrations
from medseg.bundle import Bundle, load_bundle
from medseg.cohort import Case, Cohort, write_cohort
from medseg.config import ReportConfig
from medseg.files import UserError, read_json
from medseg.images import read_image, write_nifti
from medseg.predict import step
from medseg.report import step as report_step
from medseg.volume import Volume

EXAMS = {"p": (0, 10), "q": (0, 5, 400), "r": (0,), "s": (0, 90)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle(tmp_path_factory.mktemp("bundle") / "b", grid=plan(spacing_mm=(1.0, 1.0, 1.0)))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    folder, cases = tmp_path_factory.mktemp("cohort") / "c", []
    rng = np.random.default_rng(2)
    for patient, days in EXAMS.items():
        for day in days:
            name = f"{patient}-{day}"
            array = rng.integers(0, 40, (20, 18, 16)).astype(np.int16)
            array[4:12, 4:12, 4:12] += 50
            write_nifti(folder / "images" / f"{name}.nii.gz", Volume(array, np.eye(4)))
            cases.append(Case(name, patient, (f"images/{name}.nii.gz",), split="test", exam_day=day))
    return write_cohort(Cohort(folder, tuple(cases), {"thing": 1}), [], {})


def test_the_noise_is_that_of_the_repeat_scans_and_travels_with_the_bundle(
    model: Bundle, cohort: Cohort, tmp_path: Path
) -> None:
    made = calibrations.run(str(model.folder), cohort.folder, tmp_path, overrides=["predict.change.retest_days=20"])
    after = load_bundle(made.paths["bundle"])
    found = after.retest["labels"]["thing"]
    masks = {c.case_id: tmp_path / "runs" / str(made.run_id) / "predictions" / c.case_id for c in cohort.cases}
    assert not masks["r-0"].exists(), "who has no repeat scan is not segmented"
    squares = []
    for names in (("p-0", "p-10"), ("q-0", "q-5")):
        volumes = np.array([read_image(masks[name] / "mask.nii.gz").array.sum() for name in names], float)
        squares.append((((volumes / volumes.mean()) - 1) ** 2).sum())
    assert found["cv_percent"] == pytest.approx(100 * np.sqrt(np.mean(squares)))
    assert (found["patients"], found["scans"], after.retest["within_days"]) == (2, 4, 20)
    assert after.facts["made_from"] == model.sha256
    assert after.config == model.config
    assert (after.folder / "weights.safetensors").read_bytes() == (model.folder / "weights.safetensors").read_bytes()
    assert "thing" in (after.folder / "MODEL_CARD.md").read_text().split("Test-retest")[1]
    assert f"{found['cv_percent']:.2f} %" in str(made.text)


def test_without_repeat_scans_the_sentence_says_what_to_do(model: Bundle, cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"two scans at most 3 days apart \(exam_day\); ingest repeat scans"):
        calibrations.run(str(model.folder), cohort.folder, tmp_path, overrides=["predict.change.retest_days=3"])
    trained_on = replace(cohort, cases=tuple(replace(case, split="train") for case in cohort.cases))
    again = write_cohort(trained_on, [], {})
    seen = bundle(tmp_path / "seen", grid=plan(), cohort_sha256=again.sha256)
    with pytest.raises(UserError, match="no patient that model 'tiny' has not seen"):
        calibrations.run(str(seen.folder), cohort.folder, tmp_path)
    write_cohort(cohort, [], {})
    with pytest.raises(UserError, match=r"only fields of predict\.change"):
        calibrations.run(str(model.folder), cohort.folder, tmp_path, overrides=["verdict.prevalence=0.1"])


@pytest.mark.parametrize("known", [True, False])
def test_the_page_tells_change_from_noise(known: bool, model: Bundle, cohort: Cohort, tmp_path: Path) -> None:
    labels = {"thing": {"cv_percent": 0.001, "cv_low": 0.0005, "cv_high": 0.002, "patients": 9, "scans": 18}}
    told = {"retest": {"labels": labels, "within_days": 20}} if known else {}
    step.run(replace(model, facts={**model.facts, **told}), cohort, tmp_path / "out")
    result = report_step.run(ReportConfig(max_cases=2, viewer_cases=0), tmp_path / "out")
    text = result.paths["report"].read_text()
    changes = read_json(tmp_path / "out" / "changes.json")
    assert [patient["patient_id"] for patient in changes["patients"]] == ["p", "q", "s"]
    section = text.split("Change over time")[1].split("</section>")[0]
    plain = re.sub(r"<[^>]+>", " ", section)
    for patient in changes["patients"]:
        change = patient["structures"]["thing"]
        assert f"{change['volumes_ml'][0]:.2f}" in plain
        if change["per_year_percent"] is not None:
            assert f"{abs(change['per_year_percent']):.1f}" in plain
    assert ("3 of 3 changes exceed" in plain) == known
    assert ("is not known" in plain) == (not known)
    assert "too short" in plain, "ten days"
    assert section.count("data:image/svg+xml") == 2
    assert "2 of 3 patients are shown" in plain
