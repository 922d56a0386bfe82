"""What a training did not teach is said: structures never found, classifiers that guess."""

import math
from pathlib import Path

import pytest
from synthetic import radiograph_cohort, tiny_radiograph_config

from medseg import road
from medseg.bundle import load_bundle
from medseg.config import BinaryCrossEntropyConfig, CrossEntropyConfig, DiceCEConfig
from medseg.losses import guessing_loss
from medseg.runs import find_run, read_run
from medseg.tracking.store import open_store
from medseg.unlearned import not_learned


def test_structures_that_no_validation_case_shows_are_named() -> None:
    figures = {"train_loss": 0.6, "val_score": 0.4, "val_dice_cord": 0.7, "val_dice_larynx": 0.0}
    (sentence,) = not_learned(figures)
    assert sentence.startswith("not found in the validation cases: larynx (")
    assert not not_learned(figures | {"val_dice_larynx": 0.2})
    assert not not_learned(figures | {"val_dice_larynx": math.nan})  # no validation case tells of it


def test_a_classifier_that_guesses_is_told_from_one_that_has_learned_a_little() -> None:
    figures = {"train_loss": 0.6926, "guessing_loss": math.log(2)}
    (sentence,) = not_learned(figures)
    assert sentence.startswith("the training loss, 0.693, is that of guessing, 0.693:")
    assert not not_learned(figures | {"train_loss": 0.65})
    assert not not_learned({"train_loss": 0.6926})  # of a bundle made before guessing was measured


def test_losses_that_come_on_top_are_taken_off_before() -> None:
    figures = {"train_loss": 1.2, "train_site_loss": 0.6, "guessing_loss": math.log(2)}
    assert not not_learned(figures)
    assert not_learned(figures | {"train_site_loss": 0.5})


def test_the_loss_of_guessing_is_the_entropy_of_the_shares() -> None:
    shares = (0.1, 0.3, 0.6)
    entropy = -sum(share * math.log(share) for share in shares)
    assert guessing_loss(CrossEntropyConfig(), [10, 30, 60], 100) == pytest.approx(entropy, rel=1e-5)
    assert guessing_loss(CrossEntropyConfig(balance=True), [10, 30, 60], 100) == pytest.approx(math.log(3), rel=1e-5)
    assert guessing_loss(DiceCEConfig(), [], 100) is None


def test_the_loss_of_guessing_labels_that_are_not_exclusive_is_the_mean_of_theirs() -> None:
    entropy = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (0.2, 0.5)]
    assert guessing_loss(BinaryCrossEntropyConfig(), [20, 50], 100) == pytest.approx(sum(entropy) / 2, rel=1e-5)
    # with `balance` the present of the first count four times: 80 against 80 votes in 100 cases
    balanced = (1.6 * math.log(2) + math.log(2)) / 2
    assert guessing_loss(BinaryCrossEntropyConfig(balance=True), [20, 50], 100) == pytest.approx(balanced, rel=1e-5)


def test_a_training_says_that_it_taught_nothing_wherever_its_result_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort, place = radiograph_cohort(tmp_path / "cohort"), tmp_path / "ws"
    config = tiny_radiograph_config("train.weight_decay=900", "train.distance_cases=0")  # every weight decays to 0
    trained = road.train(config, cohort.folder, place)
    assert "Warning: the training loss, 0.69" in capsys.readouterr().err
    bundle = load_bundle(trained.paths["bundle"])
    (sentence,) = not_learned(bundle.facts["metrics"])
    assert sentence[1:] in (trained.paths["bundle"] / "MODEL_CARD.md").read_text()
    assert sentence[1:] in road.report(trained.run_id, place).paths["report"].read_text()
    run = open_store(place, config.tracking).client.get_run(read_run(find_run(place, trained.run_id))["mlflow_run_id"])
    assert run.data.tags["medseg.not_learned"] == sentence
