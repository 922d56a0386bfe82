"""What radiographs are matched to is measured on the training cases, and on no others."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from synthetic import radiograph_cohort, tiny_radiograph_config

from medseg.data.appearance import PERCENTILES, detail_of, landmarks_of
from medseg.data.lung_view import LungView
from medseg.data.preprocess import prepare
from medseg.images import read_image, write_png
from medseg.plan import Appearance
from medseg.train.planning import make_plan, plan_key

MATCHED = tiny_radiograph_config("plan.appearance={histogram: landmarks, match_sharpness: true}")


def test_the_plan_holds_what_the_training_cases_measure(tmp_path: Path) -> None:
    cohort = radiograph_cohort(tmp_path)
    assert make_plan(tiny_radiograph_config(), cohort).appearance == Appearance()
    plan = make_plan(MATCHED, cohort)
    looks = plan.appearance
    assert (len(looks.landmarks), len(looks.detail_sd)) == (len(PERCENTILES), 5)
    assert "training cases" in plan.reasons["appearance"]

    def images(appearance: Appearance) -> list[np.ndarray]:
        made = replace(plan, appearance=appearance)
        return [prepare([read_image(cohort.image_paths(case)[0])], made).image[0] for case in cohort.split("train")]

    bare = images(Appearance())
    assert np.allclose(np.mean([landmarks_of(image) for image in bare], axis=0), looks.landmarks, atol=1e-5)
    graded = images(replace(looks, detail_sd=()))
    assert np.allclose(np.median([detail_of(image) for image in graded], axis=0), looks.detail_sd, rtol=1e-4)
    spread = [np.std([detail_of(image)[2] for image in images(looks)]), np.std([detail_of(i)[2] for i in bare])]
    assert spread[0] < spread[1]


def test_validation_and_test_cases_have_no_say(tmp_path: Path) -> None:
    cohort = radiograph_cohort(tmp_path)
    before = make_plan(MATCHED, cohort).appearance
    for case in cohort.cases:
        if case.split != "train":
            write_png(cohort.image_paths(case)[0], np.arange(1440, dtype=np.uint16).reshape(40, 36))
    assert make_plan(MATCHED, cohort).appearance == before


def test_sharpness_is_that_of_the_lungs_rectangle_where_no_more_is_seen(tmp_path: Path) -> None:
    cohort = radiograph_cohort(tmp_path)
    labels = np.zeros((40, 36), dtype=np.uint8)
    labels[8:30, 6:16] = labels[8:30, 20:30] = 1
    boxed = tiny_radiograph_config("lungs={mask: box}", "plan.appearance={crop_padding: true, match_sharpness: true}")
    assert boxed.lungs is not None
    view = LungView(boxed.lungs, segment=lambda _: labels)
    looks = make_plan(boxed, cohort, view).appearance
    whole = tiny_radiograph_config("plan.appearance={crop_padding: true, match_sharpness: true}")
    assert make_plan(whole, cohort).appearance.detail_sd != looks.detail_sd
    plan = replace(make_plan(boxed, cohort, view), appearance=replace(looks, detail_sd=()))
    images = [view.show([read_image(cohort.image_paths(case)[0])]) for case in cohort.split("train")]
    found = [detail_of(prepare(shown, plan).image[0]) for shown in images]
    assert np.allclose(np.median(found, axis=0), looks.detail_sd, rtol=1e-4)


def test_folds_that_see_other_lungs_are_planned_anew(tmp_path: Path) -> None:
    cohort = radiograph_cohort(tmp_path)
    sets = ("plan.appearance={crop_padding: true, match_sharpness: true}",)
    keys = {
        plan_key(tiny_radiograph_config(*sets, f"lungs={{mask: box, dilate: {by}}}"), cohort) for by in (0.02, 0.05)
    }
    assert len(keys) == 2
