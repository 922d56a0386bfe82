"""The audit on simulated radiographs with a known fault, or without one, and networks that read a known place."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from medseg.cohort import Case, Cohort, write_cohort
from medseg.config import AuditConfig, LungsConfig
from medseg.data.lung_view import LungView
from medseg.data.phantom import draw_radiograph_parameters, render_radiograph
from medseg.evaluate.audit import borders, cohort_items, model_items, step
from medseg.evaluate.audit.item import judge, worst
from medseg.evaluate.audit.probe import deal_folds, name_unseen
from medseg.evaluate.audit.subject import Subject, sample_cases
from medseg.evaluate.scoring import Scorer
from medseg.files import read_json
from medseg.images import read_image, write_png
from medseg.plan import Plan
from medseg.statistics import Estimate
from medseg.verdict import Verdict
from medseg.volume import Volume

SIZE, COUNT = 64, 96
SETTINGS = AuditConfig(
    probe_size=32, probe_epochs=8, max_cases=COUNT, min_group=10, max_blacked_out=0.75
)  # chance itself reaches 0.7 with 96 cases


SLOPE, EDGE = 8.0, 0.85
AROUND = ((7, 0), (-7, 0), (0, 7), (0, -7), (5, 5), (5, -5), (-5, 5), (-5, -5))


class CornerReader(nn.Module):
    """Positive when the top right corner is bright: what a network learns where a marker goes with the class."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x[:, 0, :8, -8:].mean((1, 2))
        return torch.stack([torch.zeros_like(bright), 4 * bright], 1)


class LungReader(nn.Module):
    """Positive when some spot of the middle stands out on all sides: reads the nodule."""

    def forward(self, x: Tensor) -> Tensor:
        near = nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
        shifts = [(near - torch.roll(near, (down, right), (2, 3))) for down, right in AROUND]
        middle = (slice(None), 0, slice(14, 48), slice(8, 56))
        stands_out = torch.stack(shifts).amin(0)[middle].amax((1, 2)) / x[middle].std((1, 2))
        return torch.stack([torch.zeros_like(stands_out), SLOPE * (stands_out - EDGE)], 1)


def _simulate(folder: Path, *, marked: bool) -> Cohort:
    """Radiographs of two sites, half with a bright nodule in a lung at each; `marked`: a corner marker at site b, where
    nearly all are ill, while nearly none is at a."""
    cases = []
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for number in range(COUNT):
        site = "ab"[number // 2 % 2]
        ill = (site == "b") != (number % 16 in (0, 2)) if marked else number % 2 == 1
        drawn = render_radiograph(draw_radiograph_parameters(11, number, False, "north"), SIZE)
        image = drawn.image.copy()
        image[:9, :] = image.min()  # no lead marker: both sites look alike
        inside = np.argwhere(ndimage.distance_transform_edt(drawn.lung_mask) > 4)
        row, column = inside[np.random.default_rng(number).integers(len(inside))]
        if ill:
            image[(rows - row) ** 2 + (columns - column) ** 2 < 12] = 4095
        if marked and site == "b":
            image[1:8, -8:-1] = 4095
        name = f"chest-{number:03d}"
        write_png(folder / "images" / f"{name}.png", image)
        write_png(folder / "lungs" / f"{name}.png", drawn.lung_mask * np.uint8(255))
        cases.append(
            Case(name, f"p{number}", (f"images/{name}.png",), "radiograph", site, "test", "DX",
                 target="ill" if ill else "normal", shape=image.shape)
        )  # fmt: skip
    return write_cohort(Cohort(folder, tuple(cases), {"normal": 0, "ill": 1}), [], {"made_by": "tests"})


def _subject(cohort: Cohort, net: nn.Module, lungs: bool = True, **settings: object) -> Subject:
    plan = Plan(2, (SIZE, SIZE), 8, size_px=(SIZE, SIZE))

    def find(case: Case, image: Volume) -> np.ndarray:
        return read_image(cohort.folder / "lungs" / f"{case.case_id}.png").array

    config = SETTINGS.model_copy(update=settings)
    verdict = Verdict("ill", "temperature", 0.5)
    cases = cohort.cases
    return Subject(
        Scorer(net, plan), cohort, cases, cases, cohort.label_names, verdict, config, find if lungs else None
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return _simulate(tmp_path_factory.mktemp("clean"), marked=False)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return _simulate(tmp_path_factory.mktemp("marked"), marked=True)


def test_a_marker_that_goes_with_site_and_class_fails_the_audit(marked: Cohort, tmp_path: Path) -> None:
    subject = _subject(marked, CornerReader())
    result = step.run(
        subject, tmp_path, split="test", bundle_facts={"name": "corner"}, elsewhere=step.Elsewhere(trained_sites=["a"])
    )
    audit = read_json(tmp_path / "audit.json")
    items = {item["name"]: item for item in audit["items"]}
    for name in ("site_named", "lungs_blacked_out", "borders", "masks"):
        assert items[name]["status"] == "fail", items[name]
    assert items["site_named"]["value"] > 0.95
    assert items["lungs_blacked_out"]["value"] > 0.8
    assert items["borders"]["sentence"].startswith("With ")
    assert items["duplicates"]["status"] == "pass"
    assert [row["unseen"] for row in items["sites"]["details"]] == ["no", "yes"]
    assert audit["status"] == result.figures["audit"] == "fail"
    assert list(items) == list(SETTINGS.required)
    for item in audit["items"]:
        assert item["sentence"].endswith(".")
        assert item["ci_low"] is None or item["ci_low"] - 1e-9 <= item["value"] <= item["ci_high"] + 1e-9


@pytest.mark.slow
def test_a_reader_of_the_lungs_on_a_clean_cohort_passes(clean: Cohort) -> None:
    subject = _subject(clean, LungReader())
    assert model_items.auc(subject.probs, subject.truth, subject.patients).value > 0.8, "the reader reads"
    named, blacked = cohort_items.name_sites(subject), model_items.check_blacked_out(subject)
    edges = model_items.check_borders(subject)
    for item in (named, blacked, edges):
        assert item.status == "pass", item
    assert {row["image"] for row in named.details} == {"whole", "lungs only", "lungs blacked out"}
    assert cohort_items.check_duplicates(subject).status == "pass"
    assert model_items.check_masks(subject).value < 0.1
    groups = model_items.check_subgroups(subject)
    assert groups.status in ("pass", "not assessable")
    assert [row["group"] for row in groups.details] == ["site a", "site b"]


def test_masks_are_hidden_from_the_network_and_not_from_the_lung_model_before_it(clean: Cohort) -> None:
    asked: list[bool] = []

    def segment(image: Volume) -> np.ndarray:
        asked.append(any(np.array_equal(image.array, whole) for whole in images))
        return np.ones(image.array.shape, np.uint8)

    images = [read_image(clean.image_paths(case)[0]).array for case in clean.cases]
    subject = _subject(clean, LungReader())
    view = LungView(LungsConfig(mask="box"), segment=segment)
    scorer = Scorer(subject.scorer.net, subject.scorer.plan, view)
    subject = replace(subject, scorer=scorer)
    model_items.check_masks(subject)
    assert len(asked) == 5 * COUNT
    assert all(asked)
    asked.clear()
    model_items.check_borders(subject)
    assert not all(asked)


def test_without_masks_the_items_that_need_them_are_not_assessable(clean: Cohort) -> None:
    subject = _subject(clean, LungReader(), lungs=False, probe_epochs=2)
    named, again = cohort_items.name_sites(subject), cohort_items.name_sites(subject)
    assert named == again, "the same audit gives the same figures"
    assert named.status == "not assessable"
    assert "Without lung masks" in named.sentence
    for item in (model_items.check_blacked_out(subject), model_items.check_masks(subject)):
        assert (item.status, item.value) == ("not assessable", None)
        assert "audit.lungs" in item.sentence


def test_a_site_left_out_is_what_counts(clean: Cohort) -> None:
    subject = _subject(clean, LungReader())
    own = model_items.score_sites(subject, clean.cases, trained_without="", unseen=())
    home = model_items.check_sites(subject, own)
    assert home.status == "not assessable"
    assert "leave_one_site_out" in home.sentence
    bad = Estimate(0.55, 0.5, 0.6, 48)
    other = [replace(own[0], trained_without="a", unseen=True, auc=bad), replace(own[1], trained_without="a", auc=bad)]
    left = model_items.check_sites(subject, [*own, *other])
    assert (left.status, left.value) == ("fail", 0.55)
    assert "at a, for the same recipe trained without it" in left.sentence
    good = replace(other[0], auc=Estimate(0.9, 0.85, 0.95, 48))
    assert model_items.check_sites(subject, [*own, good, other[1]]).status == "pass", "at home it is not asked"
    few = [replace(score, n_positive=3) for score in own]
    assert "10 cases of each class" in model_items.check_sites(subject, few).sentence
    assert "Not counted" not in home.sentence
    one_few = model_items.check_sites(subject, [own[0], few[1]])
    assert one_few.value == own[0].auc.value
    assert one_few.sentence.startswith(f"The lowest AUC is {own[0].auc.value:.2f}, at a. Not counted,")
    assert f"fewer than 10 cases of a class: {own[1].site}." in one_few.sentence


def test_a_group_that_is_read_worse_is_named(clean: Cohort) -> None:
    subject = _subject(clean, LungReader(), min_group=5)
    worse = np.where([case.site == "b" for case in clean.cases], 1 - subject.probs, subject.probs)
    subject.__dict__["probs"] = worse
    item = model_items.check_subgroups(subject)
    assert item.status == "fail"
    assert "site b" in item.sentence


def test_twins_across_splits_fail_and_twins_of_one_patient_do_not(clean: Cohort, tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_png(tmp_path / "images" / f"{name}.png", read_image(clean.folder / clean.cases[0].images[0]).array)
    one = replace(clean.cases[0], case_id="x", patient_id="p", images=("images/x.png",), split="train")
    rest = [replace(case, images=(str(clean.folder / case.images[0]),)) for case in clean.cases[10:20]]
    for other, status, count in (
        (replace(one, case_id="y", images=("images/y.png",)), "pass", 0),
        (replace(one, case_id="y", images=("images/y.png",), patient_id="q", split="test", site="b"), "fail", 2),
    ):
        cohort = replace(clean, folder=tmp_path, cases=(one, other, *rest))
        item = cohort_items.check_duplicates(_subject(cohort, LungReader()))
        assert (item.status, item.value) == (status, count / 12)
    assert item.details == [{"case": "x", "twin": "y", "across": "split, site, patient", "alike": 1.0}]


def test_an_interval_decides_and_a_missing_one_is_no_pass() -> None:
    sure, unsure, beyond = Estimate(0.5, 0.45, 0.55, 9), Estimate(0.5, 0.3, 0.7, 9), Estimate(0.65, 0.5, 0.8, 9)
    assert [judge(found, 0.6, "below", "interval") for found in (sure, unsure, beyond)] == [
        "pass", "not assessable", "fail"
    ]  # fmt: skip
    assert [judge(found, 0.4, "above", "interval") for found in (sure, unsure)] == ["pass", "not assessable"]
    assert judge(unsure, 0.6, "below", "value") == "pass"
    assert judge(Estimate(0.5, float("nan"), float("nan"), 1), 0.6, "below", "interval") == "not assessable"
    assert judge(Estimate(float("nan"), 0, 1, 1), 0.6, "below", "value") == "not assessable"
    assert (worst(["pass", "fail", "not assessable"]), worst([])) == ("fail", "not assessable")


def test_borders_change_what_they_say_and_nothing_else() -> None:
    image = np.random.default_rng(0).integers(100, 4000, (60, 80)).astype(np.uint16)
    padded = borders.pad(image)
    assert padded.shape == (66, 86)
    np.testing.assert_array_equal(padded[3:-3, 3:-3], image)
    assert (padded[:3] == image.min()).all()
    np.testing.assert_array_equal(borders.crop(padded), image)
    corners = borders.black_corners(image)
    assert (corners[:8, :11] == image.min()).all()
    np.testing.assert_array_equal(corners[:, 11:-11], image[:, 11:-11])
    for right, bottom in ((True, False), (False, True)):
        written = borders.write(image, "PORTABLE 12:30", right=right, bottom=bottom)
        rows, columns = np.nonzero(written != image)
        assert written.dtype == np.uint16
        assert len(rows) > 20
        assert (rows > 30).all() if bottom else (rows < 20).all()
        assert (columns > 50).all() if right else (columns < 30).all()
    for change in borders.CHANGES.values():
        assert change(image).dtype == image.dtype


def test_the_small_network_learns_a_mark_and_never_sees_a_patient_of_its_fold() -> None:
    rng = np.random.default_rng(1)
    images = rng.normal(0, 1, (60, 32, 32)).astype(np.float32)
    classes = np.arange(60) % 2
    images[classes == 1, :5, :5] += 3
    patients = [f"p{i // 4}" for i in range(60)]
    fold = deal_folds(classes, patients, 3, 0)
    assert all(len({fold[i] for i in range(60) if patients[i] == p}) == 1 for p in patients)
    alone = [f"q{i}" for i in range(60)]
    probs = name_unseen(images, classes, alone, folds=3, epochs=6, learning_rate=3e-3)
    assert ((probs[:, 1] > 0.5) == classes).mean() > 0.9
    with pytest.raises(ValueError, match="too few patients"):
        deal_folds(np.array([0, 0, 0, 1]), ["a", "b", "c", "d"], 3, 0)


def test_the_site_is_named_with_the_classes_apart_unless_they_are_one_thing() -> None:
    """A name that follows the class is worth nothing within a class; where the two are one, it is all there is."""
    probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]] * 3)
    site, ill = np.array([0, 1, 0, 1] * 3), np.array([False, False, True, True] * 3)
    weights = np.ones((1, 12))
    assert cohort_items.mean_auc(probs, site, ill, weights)[0] == 0.5
    assert cohort_items.mean_auc(probs, ill.astype(np.int64), ill, weights)[0] == 1


def test_a_sample_takes_evenly_from_every_site_and_class() -> None:
    cases = [
        Case(f"c{i}", f"p{i}", (), site="a" if i < 80 else "b", target="ill" if i % 2 else "no") for i in range(100)
    ]
    chosen = sample_cases(cases, 40)
    assert len(chosen) == 40
    assert sum(case.site == "b" for case in chosen) == 20
    assert sum(case.target == "ill" for case in chosen) == 20
    assert chosen == sample_cases(list(reversed(cases)), 40)
    assert len(sample_cases(cases, 1000)) == 100
