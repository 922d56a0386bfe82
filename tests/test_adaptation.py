"""`medseg models adapt`: a bundle for a new site, made of its images and of none of its labels."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic import radiograph_cohort, segmentation_cohort, tiny_config, tiny_radiograph_config

from medseg import adaptation, calibrations
from medseg.bundle import Bundle, load_bundle, read_weights
from medseg.bundle_writing import save_bundle
from medseg.cohort import Cohort, read_cohort, write_cohort
from medseg.config import Config
from medseg.evaluate.calibrate import CannotCalibrate
from medseg.files import UserError
from medseg.plan import Plan
from medseg.result import Result
from medseg.runs import find_run, read_run
from medseg.train import step
from medseg.verdict import Verdict

PLAN = Plan(2, (32, 32), 4, size_px=(32, 32))
FITTED = {"trained_sites": ["home"], "n": 20, "n_positive": 10, "split": "val", "cohort_sha256": "c" * 64}


def _bundle(folder: Path, config: Config, plan: Plan = PLAN, *, members: int = 0) -> Bundle:
    """Untrained networks; one with a verdict, or joined folds."""
    torch.manual_seed(0)
    states = [step.build_network(config, plan).state_dict() for _ in range(max(members, 1))]
    verdict = Verdict("tb", "temperature", 0.4, fitted=FITTED) if config.task.kind == "classification" else None
    about = [{"run_id": f"r{n}", "fold": n, "temperature": 1.0} for n in range(members)]
    evidence = {"folds": 2, "cross_validation": {"auc": {"value": 0.8, "ci_low": 0.7, "ci_high": 0.9}}}
    save_bundle(
        folder, state_dict=states if members else states[0], config=config, plan=plan, run_id="run-1",
        cohort_sha256="c" * 64, metrics={"val_auc": 0.9}, members=about, evidence=evidence if members else None,
        verdict=None if members else verdict,
    )  # fmt: skip
    return load_bundle(folder)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cohort, Bundle, Result]:
    """A workspace, a cohort of another site, a bundle, and what came of adapting it."""
    place = tmp_path_factory.mktemp("adapted")
    before = _bundle(place / "before", tiny_radiograph_config("tracking.register_as=tiny"))
    cohort = radiograph_cohort(place / "elsewhere")
    return place, cohort, before, adaptation.run(str(before.folder), cohort.folder, place)


def test_the_new_bundle_says_where_it_came_from(adapted: tuple[Path, Cohort, Bundle, Result]) -> None:
    place, cohort, before, result = adapted
    after = load_bundle(result.run_id, place)
    assert (after.facts["made_from"], after.facts["trained_in"]) == (before.sha256, "run-1")
    about = after.facts["adapted"]
    assert (about["cohort_sha256"], about["cases"], about["sites"]) == (cohort.sha256, 24, ["north", "south"])
    assert after.trained_sites == before.trained_sites == ["home"], "adapting there trains nothing"
    assert after.verdict is after.operating_point is None
    assert after.temperature == 1
    assert "medseg models calibrate" in result.text
    assert "re-estimated on 24 images" in (after.folder / "MODEL_CARD.md").read_text()
    assert read_run(find_run(place, result.run_id))["status"] == "FINISHED"
    assert str(result.figures["model"]).startswith("models:/tiny/")
    assert after.predict(cohort.image_paths(cohort.cases[0])[0]).probs.keys() == {"normal", "tb"}


def test_only_statistics_of_batch_norms_change(adapted: tuple[Path, Cohort, Bundle, Result]) -> None:
    place, _, before, result = adapted
    old, new = read_weights(before), read_weights(load_bundle(result.run_id, place))
    assert old.keys() == new.keys()
    changed = {name.rpartition(".")[2] for name, value in old.items() if not torch.equal(value, new[name])}
    assert changed == {"running_mean", "running_var"}


def test_no_label_is_read(adapted: tuple[Path, Cohort, Bundle, Result], tmp_path: Path) -> None:
    place, cohort, before, result = adapted
    bare = [replace(case, target="", label="") for case in cohort.cases]
    write_cohort(replace(cohort, cases=tuple(bare)), [], {"made_by": "tests"})
    again = adaptation.run(str(before.folder), cohort.folder, place, out=tmp_path / "bare")
    first, second = (
        load_bundle(where, place).folder / "weights.safetensors" for where in (result.run_id, tmp_path / "bare")
    )
    assert first.read_bytes() == second.read_bytes()
    assert again.figures["cases"] == 24


def test_an_adapted_model_is_calibrated_like_any_other(
    adapted: tuple[Path, Cohort, Bundle, Result], tmp_path: Path
) -> None:
    place, _, _, result = adapted
    radiograph_cohort(tmp_path / "labelled")
    for positive in ("tb", "normal"):  # an untrained network's scores run against one of the two, which is refused
        with suppress(CannotCalibrate):
            overrides = [f"verdict.positive={positive}"]
            calibrations.run(result.run_id, tmp_path / "labelled", place, out=tmp_path / "new", overrides=overrides)
    after = load_bundle(tmp_path / "new")
    assert after.verdict is not None
    assert after.verdict.fitted["trained_sites"] == ["home"]


def test_each_joined_fold_is_adapted(adapted: tuple[Path, Cohort, Bundle, Result], tmp_path: Path) -> None:
    place = adapted[0]
    before = _bundle(tmp_path / "joined", tiny_radiograph_config('tracking.register_as=""'), members=2)
    adaptation.run(str(before.folder), radiograph_cohort(tmp_path / "elsewhere").folder, place, out=tmp_path / "new")
    after = load_bundle(tmp_path / "new")
    for member in after.members:
        old, new = (read_weights(bundle, str(member["weights"])) for bundle in (before, after))
        assert any(not torch.equal(value, new[name]) for name, value in old.items())


def test_what_cannot_be_adapted_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = tiny_radiograph_config('tracking.register_as=""')
    bundle = _bundle(tmp_path / "model", config)
    cohort = radiograph_cohort(tmp_path / "cohort")
    segmenter = _bundle(tmp_path / "segmenter", tiny_config(), Plan(3, (16, 16, 16), 2))
    with pytest.raises(UserError, match="is no classifier"):
        adaptation.run(str(segmenter.folder), cohort.folder, tmp_path)
    volumes = segmentation_cohort(tmp_path / "volumes", 2)
    write_cohort(replace(volumes, channels=("t1",)), [], {"made_by": "tests"})
    with pytest.raises(UserError, match="has the channels t1, the model takes image"):
        adaptation.run(str(bundle.folder), volumes.folder, tmp_path)
    write_cohort(replace(cohort, cases=cohort.cases[:1]), [], {"made_by": "tests"})
    with pytest.raises(UserError, match="take two or more"):
        adaptation.run(str(bundle.folder), cohort.folder, tmp_path)
    own = read_cohort(radiograph_cohort(tmp_path / "own").folder)
    same = replace(bundle, facts={**bundle.facts, "cohort_sha256": own.sha256})
    with pytest.raises(UserError, match="was trained on it"):
        adaptation._cases(same, own, None)
    assert {case.split for case in adaptation._cases(same, own, "test")} == {"test"}


def test_a_network_without_batch_norm_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    config = tiny_radiograph_config('model={name: squeezenet, version: "1.1"}', 'tracking.register_as=""')
    bundle = _bundle(tmp_path / "model", config)
    with pytest.raises(UserError, match=r"squeezenet1_1 without batch norm.*medseg models calibrate"):
        adaptation.run(str(bundle.folder), radiograph_cohort(tmp_path / "cohort").folder, tmp_path)
