"""The head-and-neck road on a look-alike: partial labels from ingest to the pages."""

from pathlib import Path

import numpy as np
import pytest
from synthetic import TINY, contoured, headneck_lookalike

from medseg import folds, road
from medseg.bundle import load_bundle
from medseg.cohort import read_cohort
from medseg.config import Config, load_config
from medseg.data.cache import load_examples
from medseg.files import read_json, read_rows
from medseg.result import Result
from medseg.runs import find_run
from medseg.splits import take_fold
from medseg.train.planning import make_plan

SETS = (*TINY, "device=cpu", "explain.max_cases=0", "report.viewer_cases=0", "tracking.register_as=''")


def config_of(*overrides: str) -> Config:
    return load_config("headneck", [*SETS, *overrides])


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result]:
    """Workspace, cohort folder, and what the evaluation of a network of two epochs gave."""
    folder = tmp_path_factory.mktemp("headneck")
    source = headneck_lookalike(folder / "d")
    made = road.ingest([str(source)], folder / "cohort", None, "headneck", list(SETS), folder / "ws")
    assert made.status == "done"
    trained = road.train(config_of(), folder / "cohort", folder / "ws")
    return folder / "ws", folder / "cohort", road.evaluate(trained.run_id, folder / "cohort", folder / "ws")


def number_of(case_id: str) -> int:
    return int(case_id.removeprefix("pt_"))


def test_what_is_not_contoured_is_not_measured_and_each_figure_says_on_how_many_cases_it_rests(
    evaluated: tuple[Path, Path, Result],
) -> None:
    workspace, cohort_dir, result = evaluated
    labels = load_config("headneck").task.labels
    test = [number_of(case.case_id) for case in read_cohort(cohort_dir).split("test")]
    folder = find_run(workspace, result.run_id).path / "evaluation" / "test"
    metrics = read_json(folder / "metrics.json")
    for name, value in labels.items():
        known = sum(value in contoured(number) for number in test)
        assert metrics["annotated"][name] == metrics["classes"][name]["dice"]["n"] == known
    assert min(metrics["annotated"].values()) < len(test)
    for row in read_rows(folder / "cases.csv"):
        for name, value in labels.items():
            filled = bool(row[f"dice_{name}"]) and bool(row[f"volume_error_ml_{name}"])
            assert filled == (value in contoured(number_of(row["case_id"])))
    for entry in read_json(folder / "cases.json"):
        known = contoured(number_of(entry["case_id"]))
        assert entry["not_annotated"] == [name for name, value in labels.items() if value not in known]
    page = result.paths["report"].read_text()
    assert "a row rests on those in which its structure is" in page
    assert "Not contoured in the reference, so not judged:" in page


def test_the_cohort_page_counts_contoured_cases(evaluated: tuple[Path, Path, Result]) -> None:
    workspace, cohort_dir, _ = evaluated
    page = road.report(str(cohort_dir), workspace).paths["report"].read_text()
    assert "Cases with the structure contoured" in page


def test_the_model_card_names_structures_that_are_not_contoured_everywhere(
    evaluated: tuple[Path, Path, Result],
) -> None:
    workspace, cohort_dir, result = evaluated
    cohort, bundle = read_cohort(cohort_dir), load_bundle(result.run_id, workspace)
    train = cohort.split("train")
    known = sum(4 in cohort.annotated(case) for case in train)
    classes = bundle.plan.fingerprint["classes"]
    assert (classes["left_parotid"]["annotated"], classes["brainstem"]["annotated"]) == (known, len(train))
    card = (bundle.folder / "MODEL_CARD.md").read_text()
    assert f"left_parotid in {known}" in card
    assert "brainstem in" not in card


def test_what_is_annotated_survives_folds_and_the_cache(evaluated: tuple[Path, Path, Result], tmp_path: Path) -> None:
    _, cohort_dir, _ = evaluated
    cohort = read_cohort(cohort_dir)
    fold = take_fold(cohort, 1, 3, seed=0)
    for _ in range(2):  # made, then read again
        for example in load_examples(fold, fold.split("train"), make_plan(config_of(), fold), tmp_path):
            known = contoured(number_of(example.case.case_id))
            assert example.annotated == (() if len(known) == 7 else tuple(v == 0 or v in known for v in range(8)))
            assert all(bool(len(example.points[value - 1])) == (value in known) for value in range(1, 8))


@pytest.mark.slow
def test_folds_with_partial_labels_join(evaluated: tuple[Path, Path, Result]) -> None:
    """A prediction of what is not contoured counts for no operation of the post-processing and no expected Dice."""
    workspace, cohort_dir, _ = evaluated
    runs = [
        road.train(config_of("train.folds=2", f"train.fold={fold}"), cohort_dir, workspace).run_id for fold in (0, 1)
    ]
    bundle = load_bundle(folds.join(runs, workspace).run_id, workspace)
    cohort = read_cohort(cohort_dir)
    dealt = [case for case in cohort.cases if case.split != "test"]
    for choice in bundle.evidence["postprocessing"]:
        value = cohort.label_names[choice["label"]]
        assert choice["n"] == sum(value in cohort.annotated(case) for case in dealt)
    assert np.isfinite(bundle.facts["calibration"]["temperature"])


@pytest.mark.slow
def test_masking_finds_what_training_on_the_same_labels_as_whole_ones_misses(tmp_path: Path) -> None:
    """A structure contoured in half of the cases, and taken for background in the others, is taught to be missed."""
    longer = (
        "train={epochs: 40, learning_rate: 0.02, ema_decay: 0.9, validate_every: 40, warmup_steps: 5, precision: fp32}"
    )
    source, dice = headneck_lookalike(tmp_path / "d", 18), {}
    for meaning in ("not_contoured", "absent"):
        sets = [*SETS, longer, "augment={probability: 0}", f"ingest.label_missing={meaning}"]
        road.ingest([str(source)], tmp_path / meaning, None, "headneck", sets, tmp_path / "ws")
        run = road.train(load_config("headneck", sets), tmp_path / meaning, tmp_path / "ws").run_id
        figures = road.evaluate(run, tmp_path / "not_contoured", tmp_path / "ws").figures
        dice[meaning] = np.mean([figures[f"dice_{name}"] for name in ("left_parotid", "oesophagus", "larynx")])
    assert dice["not_contoured"] > dice["absent"] + 0.03
