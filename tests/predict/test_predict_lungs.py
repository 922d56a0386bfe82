"""A classifier that looks for lungs: one view at training, calibration, prediction and explanation; its lung model
travels with it; what it makes of lungs that cannot be true."""

import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import bundle, classifier, config
from torch import Tensor, nn

from medseg import audits
from medseg.bundle import Bundle, load_bundle
from medseg.bundle_writing import with_verdict
from medseg.cohort import Case, Cohort, write_cohort
from medseg.config import Config, ExplainChecksConfig, ExplainConfig, ReportConfig, validate_config
from medseg.data.cache import load_examples
from medseg.data.lungs import lung_fields
from medseg.data.phantom import draw_radiographs, render_radiograph
from medseg.evaluate.scoring import Scorer
from medseg.explain import step as explain_step
from medseg.explain.passmark import CHECKS
from medseg.files import UserError, read_json
from medseg.images import read_image, write_png
from medseg.plan import Plan
from medseg.predict import Predictor, step, view_of
from medseg.predict.jobs import cohort_jobs
from medseg.report import step as report_step
from medseg.report.panels import LUNGS, rgb_of
from medseg.shelf import export_model
from medseg.train.step import check_cohort
from medseg.verdict import Verdict

SIZE = 64
PLAN = Plan(2, (32, 32), 2, size_px=(32, 32))
VERDICT = Verdict("ill", "temperature", 0.0, withhold=("lungs_area", "lungs_parts"))
CHECKED = ExplainChecksConfig(**dict.fromkeys(set(CHECKS) - {"energy"}))  # type: ignore[arg-type]


class Recorder(nn.Module):
    """Remembers the first image that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.seen = nn.Conv2d(1, 2, 1), None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.seen is None:
            self.seen = x_BCHW.detach().clone()
        return self.body(x_BCHW).mean((2, 3))


def lung_seeing(**lungs: object) -> Config:
    made = classifier()
    return validate_config({**made.model_dump(mode="json"), "lungs": lungs}, "tiny")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Four radiographs; all but the last come with a mask of their lungs."""
    folder = tmp_path_factory.mktemp("chests")
    cases = []
    for number, params in enumerate(draw_radiographs(5, 4)):
        drawn, name = render_radiograph(params, SIZE), f"chest-{number}"
        write_png(folder / "images" / f"{name}.png", drawn.image)
        write_png(folder / "labels" / f"{name}.png", drawn.lung_mask)
        cases.append(
            Case(name, f"p{number}", (f"images/{name}.png",), "radiograph", split="train", shape=drawn.image.shape,
                 target=("normal", "ill")[number % 2], label=f"labels/{name}.png" if number < 3 else "")
        )  # fmt: skip
    return write_cohort(Cohort(folder, tuple(cases), {"normal": 0, "ill": 1}), [], {"made_by": "tests"})


@pytest.fixture(scope="module")
def lung_model(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A network that was never trained; what it takes for lungs is no lungs, but always the same."""
    return bundle(tmp_path_factory.mktemp("lungs") / "b", config({"lung": 1}, dims=2, lungs={}), PLAN)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, lung_model: Bundle) -> Bundle:
    made = lung_seeing(model="elsewhere", mask="dilated", dilate=0.02)
    return bundle(tmp_path_factory.mktemp("classifier") / "b", made, PLAN, lungs=lung_model, verdict=VERDICT)


def test_training_calibration_prediction_and_explanation_see_one_image(
    model: Bundle, cohort: Cohort, tmp_path: Path
) -> None:
    view, case = view_of(model), cohort.cases[0]
    example = load_examples(cohort, [case], PLAN, tmp_path / "cache", label_maps=False, lungs=view)[0]
    whole = load_examples(cohort, [case], PLAN, tmp_path / "cache", label_maps=False)[0]
    assert example.label is None, "a classifier's label map is no label"
    assert not np.array_equal(example.image, whole.image)
    predictor = Predictor(model)
    prepared = predictor.prepare(cohort_jobs(cohort, None)[0].read())
    assert prepared.lungs is not None
    assert 0.02 < prepared.lungs.mask.mean() < 0.9, "the untrained network hides something, and not all"
    scored, explained = Recorder(), Recorder()
    Scorer(scored, PLAN, view).score(cohort, [case])
    step.run(model, cohort, tmp_path / "out", predictor=predictor)
    settings = ExplainConfig(max_cases=1, method="gradients", checks=CHECKED)
    explain_step.run(
        settings, explained, PLAN, model.labels, cohort, predictions=tmp_path / "out", lungs=model.config.lungs
    )
    for seen in (prepared.image, scored.seen[0].numpy(), explained.seen[0].numpy()):  # type: ignore[index]
        np.testing.assert_array_equal(seen, example.image)


def test_the_map_is_held_against_the_lungs_and_the_page_draws_them(
    model: Bundle, cohort: Cohort, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    step.run(model, cohort, out)
    settings = ExplainConfig(method="gradients", checks=CHECKED.model_copy(update={"dilate_px": 0}))
    explain_step.run(
        settings, Predictor(model).net, PLAN, model.labels, cohort, predictions=out, lungs=model.config.lungs
    )
    for case in cohort.cases:
        fields = read_image(out / case.case_id / "lungs.png").array
        energy = read_json(out / case.case_id / "explanation" / "explanation.json")["checks"]["energy"]
        assert energy["mask_share"] == pytest.approx(fields.mean(), abs=0.03), "on the network's grid"
        assert 0 < energy["value"] <= 1
    report_step.run(ReportConfig(), out)
    drawn = np.asarray(_rgb(out / "report" / "overlays" / "chest-0.png"), dtype=int)
    close = np.abs(drawn - np.round(255 * np.array(rgb_of(LUNGS))).astype(int)).max(axis=-1) < 12
    assert close.sum() > 50


def _rgb(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_the_lung_model_travels_in_the_bundle(
    model: Bundle, lung_model: Bundle, cohort: Cohort, tmp_path: Path
) -> None:
    image = read_image(cohort.image_paths(cohort.cases[1])[0])
    alone = Predictor(lung_model).segment(image)
    again = load_bundle(with_verdict(model, tmp_path / "b", replace(VERDICT, threshold=0.3)))
    assert again.lungs is not None
    assert again.lungs.sha256 == lung_model.sha256 == again.facts["lungs"]["sha256"]
    step.run(again, [cohort.image_paths(cohort.cases[1])[0]], tmp_path / "out")
    found = read_image(tmp_path / "out" / "chest-1" / "lungs.png").array
    np.testing.assert_array_equal(found > 0, lung_fields(alone > 0))
    told = read_json(tmp_path / "out" / "chest-1" / "result.json")["lungs"]
    assert (told["mask"], told["model"]["sha256"]) == ("dilated", lung_model.sha256)
    assert told["area_share"] == pytest.approx(found.mean(), abs=1e-4)
    export_model(str(again.folder), tmp_path / "model.zip", tmp_path)
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    assert load_bundle(tmp_path / "unpacked" / again.name).sha256 == again.sha256


def test_a_bundle_whose_lung_model_was_exchanged_or_lost_is_refused(
    model: Bundle, lung_model: Bundle, tmp_path: Path
) -> None:
    other = bundle(tmp_path / "other", lung_model.config, PLAN, run_id="run-2")
    for name, words in (("lost", "is missing"), ("exchanged", "another model"), ("changed", "differs from its hash")):
        shutil.copytree(model.folder, tmp_path / name)
        if name == "changed":
            (tmp_path / name / "lungs" / "plan.yaml").write_text("{}")
        else:
            shutil.rmtree(tmp_path / name / "lungs")
        if name == "exchanged":
            shutil.copytree(other.folder, tmp_path / name / "lungs")
        with pytest.raises(UserError, match=words):
            load_bundle(tmp_path / name)


@pytest.mark.parametrize(("mask", "call"), [("tight", "not assessable"), ("none", "refer")])
def test_implausible_lungs_are_flagged_and_leave_no_verdict_where_nothing_else_was_seen(
    mask: str, call: str, lung_model: Bundle, cohort: Cohort, tmp_path: Path
) -> None:
    made = lung_seeing(model="elsewhere", mask=mask, area=[0.98, 0.99])
    loaded = bundle(tmp_path / "b", made, PLAN, lungs=lung_model, verdict=VERDICT)
    step.run(loaded, cohort, tmp_path / "out")
    result = read_json(tmp_path / "out" / "chest-0" / "result.json")
    flags = {flag["code"]: flag for flag in result["flags"]}
    assert flags["lungs_area"]["threshold"] == 0.98
    assert flags["lungs_area"]["number"] == pytest.approx(result["lungs"]["area_share"], abs=1e-4)
    assert result["status"] == "flagged"
    assert result["verdict"]["call"] == call
    assert ("lungs_area" in result["verdict"]["withheld_for"]) == (call == "not assessable")


def test_a_lung_segmentation_holds_its_own_mask_against_the_limits(cohort: Cohort, tmp_path: Path) -> None:
    made = config({"lung": 1}, dims=2, lungs={"area": [0.98, 0.99]})
    step.run(bundle(tmp_path / "b", made, PLAN), cohort, tmp_path / "out")
    result = read_json(tmp_path / "out" / "chest-0" / "result.json")
    mask = read_image(tmp_path / "out" / "chest-0" / "mask.png").array
    assert mask.shape == (SIZE, SIZE)
    (found,) = [flag for flag in result["flags"] if flag["code"] == "lungs_area"]
    assert found["number"] == pytest.approx(lung_fields(mask > 0).mean(), abs=1e-4)


def test_masks_may_be_those_of_the_cohort(cohort: Cohort, tmp_path: Path) -> None:
    made = lung_seeing(mask="tight")
    loaded = bundle(tmp_path / "b", made, PLAN)
    result = step.run(loaded, cohort, tmp_path / "out")
    assert (result.status, result.figures["rejected"]) == ("partial", 1)
    for case in cohort.cases[:3]:
        kept = read_image(cohort.folder / case.label).array
        found = read_image(tmp_path / "out" / case.case_id / "lungs.png").array
        np.testing.assert_array_equal(found > 0, lung_fields(kept > 0))
    bare = read_json(tmp_path / "out" / "chest-3" / "result.json")
    assert [flag["code"] for flag in bare["flags"]] == ["no_lung_mask"]
    with pytest.raises(UserError, match="'chest-3' of split 'train' has no lung mask"):
        check_cohort(made, cohort)
    view = view_of(loaded)
    with pytest.raises(UserError, match="no lung mask"):
        Scorer(Recorder(), PLAN, view).score(cohort, cohort.cases[3:])
    (example,) = load_examples(cohort, cohort.cases[:1], PLAN, tmp_path, label_maps=False, lungs=view)
    np.testing.assert_array_equal(Predictor(loaded).prepare(cohort_jobs(cohort, None)[0].read()).image, example.image)


def test_an_audit_asks_the_classifiers_own_lung_model(
    model: Bundle, lung_model: Bundle, cohort: Cohort, tmp_path: Path
) -> None:
    find, image = audits._find_lungs("", model.lungs, tmp_path), read_image(cohort.image_paths(cohort.cases[0])[0])
    assert find is not None
    np.testing.assert_array_equal(find(cohort.cases[0], image), Predictor(lung_model).segment(image))
    assert audits._settings(model, []).dilate == 0.03
    with pytest.raises(UserError, match="by the masks of its cohort"):
        audits._settings(bundle(tmp_path / "b", lung_seeing(mask="tight"), PLAN), [])
    with pytest.raises(UserError, match=r"audit\.lungs .* is no segmentation model"):
        audits._find_lungs(str(model.folder), None, tmp_path)
