"""The verdict and the audit on the road: in the bundle, at a new site, in the registry, before the alias moves."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import radiograph_cohort, tiny_radiograph_config

from medseg import audits, calibrations, road, shelf
from medseg.bundle import load_bundle
from medseg.bundle_writing import with_verdict
from medseg.cohort import Case, read_cohort, write_cohort
from medseg.files import UserError, read_json, read_rows
from medseg.images import read_image, write_png
from medseg.ledger import read_ledger
from medseg.result import Result
from medseg.runs import read_run
from medseg.tracking import find_version, record_audit

SETTINGS = (
    "train={epochs: 4, validate_every: 4, warmup_steps: 2, learning_rate: 0.01, precision: fp32}",
    "verdict={positive: tb, min_cases: 6, min_per_class: 2, prevalence: 0.2}",
    "audit={probe_size: 32, probe_epochs: 2, probe_folds: 2, min_group: 2, train_epochs: 1}",
    "explain.max_cases=0",
    "tracking.register_as=tiny_tb",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result]:
    """A workspace, a cohort and the result of a training with a calibrated bundle."""
    place = tmp_path_factory.mktemp("verdict road")
    cohort = radiograph_cohort(place / "cohort", 48)
    cases = [replace(case, split="train") for case in cohort.cases]
    for split, chosen in (("val", range(0, 10)), ("test", range(10, 26))):
        for number in chosen:
            cases[number] = replace(cases[number], split=split)
    write_cohort(replace(cohort, cases=tuple(cases)), [], {"made_by": "tests"})
    return place, place / "cohort", road.train(tiny_radiograph_config(*SETTINGS), place / "cohort", place)


def test_training_calibrates_on_its_validation_split(trained: tuple[Path, Path, Result]) -> None:
    place, cohort_dir, result = trained
    bundle = load_bundle(result.run_id, place)
    verdict = bundle.verdict
    assert verdict is not None
    assert (verdict.positive, verdict.method, verdict.fitted["n"], verdict.fitted["split"]) == (
        "tb", "temperature", 10, "val"
    )  # fmt: skip
    assert verdict.fitted["cohort_sha256"] == read_cohort(cohort_dir).sha256
    assert bundle.operating_point == ("tb", verdict.threshold)
    assert verdict.fitted["trained_sites"] == ["north", "south"]
    assert result.figures["threshold"] == pytest.approx(verdict.threshold, abs=1e-5)
    assert read_json(place / "runs" / result.run_id / "train.json")["figures"]["val_specificity"] is not None
    assert f"calibration `{verdict.id}`" in (bundle.folder / "MODEL_CARD.md").read_text()
    for site in ("north", "south"):
        assert site in [row["group"] for row in verdict.subgroups]
    (bundle.folder / "verdict.json").write_text("{}")
    with pytest.raises(UserError, match="differs from its hash"):
        load_bundle(bundle.folder)
    with_verdict(bundle, bundle.folder, verdict)
    assert load_bundle(bundle.folder).sha256 == bundle.sha256, "the same verdict makes the same bundle"


def test_predict_writes_the_verdict_everywhere(trained: tuple[Path, Path, Result], tmp_path: Path) -> None:
    place, _, result = trained
    bundle = load_bundle(result.run_id, place)
    assert bundle.verdict is not None
    never = replace(bundle.verdict, threshold=0.0, withhold=("few_pixels",))
    always = load_bundle(with_verdict(bundle, tmp_path / "b", never))
    scans = tmp_path / "scans"
    rng = np.random.default_rng(0)
    write_png(scans / "large.png", rng.integers(0, 4000, (80, 80)).astype(np.uint16))
    write_png(scans / "small.png", rng.integers(0, 4000, (40, 36)).astype(np.uint16))
    write_png(scans / "empty.png", np.full((80, 80), 7, np.uint16))
    road.predict(str(always.folder), [str(scans)], tmp_path / "out", place)
    told = {name: read_json(tmp_path / "out" / name / "result.json")["verdict"] for name in ("large", "small", "empty")}
    assert {name: verdict["call"] for name, verdict in told.items()} == {
        "large": "refer", "small": "not assessable", "empty": "not assessable"
    }  # fmt: skip
    large = told["large"]
    assert large["score"] == round(100 * large["probability"])
    assert (large["threshold"], large["calibration"]) == (0.0, always.verdict.id if always.verdict else "")
    assert large["sensitivity"]["ci_low"] < large["sensitivity"]["ci_high"]
    assert told["small"]["score"] is told["empty"]["probability"] is None
    rows = {row.case_id: row for row in read_ledger(tmp_path / "out" / "ledger.csv")}
    assert (rows["large"].verdict, rows["large"].score) == ("refer", str(large["score"]))
    assert (rows["small"].verdict, rows["small"].probability) == ("not assessable", "")
    assert float(rows["large"].probability) == pytest.approx(large["probability"], abs=1e-5)
    page = road.report(str(tmp_path / "out"), place).paths["report"].read_text()
    assert "not assessable" in page
    served = _served(always.folder, scans / "large.png")
    assert (served["verdict"], served["threshold"]) == ("refer", 0.0)
    assert served["sensitivity_ci_low"] == large["sensitivity"]["ci_low"]


def _served(bundle_dir: Path, scan: Path) -> dict[str, object]:
    import pandas as pd

    from medseg.predict.pyfunc import PathModel

    return dict(PathModel(load_bundle(bundle_dir)).predict(pd.DataFrame({"path": [str(scan)]})).iloc[0])


def test_a_new_site_gets_its_own_bundle_with_provenance(trained: tuple[Path, Path, Result], tmp_path: Path) -> None:
    place, _, result = trained
    before = load_bundle(result.run_id, place)
    radiograph_cohort(tmp_path / "elsewhere", 24)
    made = calibrations.run(
        result.run_id, tmp_path / "elsewhere", place, out=tmp_path / "new", overrides=["verdict.prevalence=0.03"]
    )
    after = load_bundle(tmp_path / "new")
    assert after.verdict is not None
    assert (after.verdict.method, after.verdict.fitted["n"], after.verdict.fitted["new_site"]) == ("platt", 24, True)
    assert after.verdict.point["prevalence"] == after.config.verdict.prevalence == 0.03
    assert (after.facts["made_from"], after.facts["trained_in"]) == (before.sha256, before.run_id)
    assert after.verdict.fitted["trained_sites"] == ["north", "south"], "calibrating there trains nothing"
    assert after.run_id == made.run_id != before.run_id
    assert read_run(replace(_folder(place, made.run_id)))["status"] == "FINISHED"
    assert (after.folder / "weights.safetensors").read_bytes() == (before.folder / "weights.safetensors").read_bytes()
    assert "would halve its width" in made.text
    assert before.verdict is not None
    assert after.verdict.fitted["borrowed"] == {"cases": 20, "calibration": before.verdict.id}
    assert after.verdict.positives == before.verdict.positives, "the spread that was lent can be lent on"
    assert f"the calibration before, {before.verdict.id}" in made.text
    version = find_version("models:/tiny_tb/latest", place)
    assert version.bundle_sha256 == after.sha256
    assert made.figures["model"] == version.uri
    calibrations.run(
        result.run_id, tmp_path / "elsewhere", place, out=tmp_path / "own", overrides=["verdict.borrowed_cases=0"]
    )
    own = load_bundle(tmp_path / "own").verdict
    assert own is not None
    assert "borrowed" not in own.fitted
    assert (own.scale, own.shift) == (after.verdict.scale, after.verdict.shift), "the mapping is the cases' own in both"
    assert len(own.positives) == 12


def _folder(place: Path, run_id: str):  # type: ignore[no-untyped-def]
    from medseg.runs import find_run

    return find_run(place, run_id)


def test_a_folder_that_is_no_bundle_is_never_replaced(trained: tuple[Path, Path, Result], tmp_path: Path) -> None:
    place, cohort_dir, result = trained
    kept = tmp_path / "thesis" / "chapter.txt"
    kept.parent.mkdir()
    kept.write_text("dear")
    with pytest.raises(UserError, match="exists and is no bundle"):
        calibrations.run(result.run_id, cohort_dir, place, out=kept.parent)
    assert kept.read_text() == "dear"


@pytest.mark.parametrize("change", ["one class", "few", "limit"])
def test_what_cannot_be_calibrated_is_refused(trained: tuple[Path, Path, Result], tmp_path: Path, change: str) -> None:
    place, _, result = trained
    cohort = radiograph_cohort(tmp_path / "elsewhere", 24)
    if change == "few":
        write_cohort(replace(cohort, cases=cohort.cases[:5]), [], {})
    elif change == "one class":
        write_cohort(replace(cohort, cases=cohort.cases[::2]), [], {})
    words = {"one class": "0 positive and 12 negative", "few": "2 positive and 3 negative", "limit": "only fields"}
    sets = ["audit.max_twins=1"] if change == "limit" else []
    with pytest.raises(UserError, match=words[change]):
        calibrations.run(result.run_id, tmp_path / "elsewhere", place, overrides=sets)


@pytest.mark.slow
def test_too_small_a_validation_split_trains_without_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # type: ignore[type-arg]
    radiograph_cohort(tmp_path / "cohort", 24)
    config = tiny_radiograph_config("train.epochs=1", "tracking.register_as=''")
    result = road.train(config, tmp_path / "cohort", tmp_path)
    bundle = load_bundle(result.run_id, tmp_path)
    assert (bundle.verdict, bundle.operating_point) == (None, None)
    assert "carries no verdict" in capsys.readouterr().err
    assert str(tmp_path) not in str(result.figures)


@pytest.mark.slow
def test_the_audit_stands_between_a_classifier_and_the_alias(trained: tuple[Path, Path, Result]) -> None:
    place, cohort_dir, result = trained
    with pytest.raises(UserError, match="sites \\(not audited\\)"):
        shelf.promote_model(result.run_id, "champion", place)
    assert shelf.promote_model(result.run_id, "trial", place).figures["alias"] == "trial"
    made = road.evaluate(result.run_id, cohort_dir, place, audit=True, overrides=["audit.leave_one_site_out=true"])
    audit = read_json(made.paths["audit_json"])
    states = {item["name"]: item["status"] for item in audit["items"]}
    assert states["lungs_blacked_out"] == states["masks"] == "not assessable"
    assert made.figures["audit"] == audit["status"] != "pass"
    left_out = [row for row in audit["items"][0]["details"] if row["unseen"] == "yes"]
    assert {(row["trained"], row["site"]) for row in left_out} == {
        ("without north", "north"),
        ("without south", "south"),
    }
    without = sorted(path.name for path in (place / "runs").glob("without-*"))
    assert len(without) == 2
    for name in without:
        assert read_run(_folder(place, name))["status"] == "FINISHED"
    page = made.paths["report"].read_text()
    for words in ("What it really reads", "The verdict", "Lungs blacked out", "halve the interval"):
        assert words in page
    version = find_version(f"models:/tiny_tb/{_first(place)}", place)
    assert version.audits[0]["items"] == states
    still = [name for name, status in states.items() if status != "pass"]
    reasons = [f"{name}: a test, nobody is read by it" for name in still]
    with pytest.raises(UserError, match=still[-1]):
        shelf.promote_model(version.uri, "champion", place, reasons[:-1])
    with pytest.raises(UserError, match="item: reason"):
        shelf.promote_model(version.uri, "champion", place, ["masks"])
    moved = shelf.promote_model(version.uri, "champion", place, reasons)
    assert set(moved.figures["overridden"]) == set(still)  # type: ignore[call-overload]
    kept = find_version("models:/tiny_tb@champion", place)
    assert kept.overrides["champion"] == dict.fromkeys(still, "a test, nobody is read by it")
    assert all(row["status"] == "measured" for row in read_rows(made.paths["cases_csv"]))


def _first(place: Path) -> int:
    from medseg.tracking import show_model

    return min(version.version for version in show_model("tiny_tb", place))


def test_all_items_passed_need_no_reason_and_a_failure_elsewhere_bars(trained: tuple[Path, Path, Result]) -> None:
    place, _, _ = trained
    version = find_version("models:/tiny_tb/1", place)
    items = dict.fromkeys(load_bundle(version.uri, place).config.audit.required, "pass")
    record_audit(version.bundle_sha256, {"cohort_sha256": "x", "split": "test", "items": items}, place)
    for audit in find_version(version.uri, place).audits:  # of the test before, whose items did not all pass
        record_audit(version.bundle_sha256, {**audit, "items": items}, place)
    assert shelf.promote_model(version.uri, "champion", place).figures["alias"] == "champion"
    with pytest.raises(UserError, match="stands in the way"):
        shelf.promote_model(version.uri, "champion", place, ["masks: for fun"])
    failed = {**items, "borders": "fail"}
    record_audit(version.bundle_sha256, {"cohort_sha256": "y", "split": "test", "items": failed}, place)
    with pytest.raises(UserError, match="borders \\(failed\\)"):
        shelf.promote_model(version.uri, "champion", place)


def test_an_audit_takes_no_limits_and_no_other_models(trained: tuple[Path, Path, Result], tmp_path: Path) -> None:
    place, cohort_dir, result = trained
    with pytest.raises(UserError, match="its limits are those of the bundle"):
        road.audit(result.run_id, cohort_dir, place, overrides=["audit.max_border_shift=1"])
    with pytest.raises(UserError, match="add --audit"):
        road.evaluate(result.run_id, cohort_dir, place, overrides=["audit.lungs=x"])
    cohort = read_cohort(cohort_dir)
    mask = np.ones(read_image(cohort.image_paths(cohort.cases[0])[0]).array.shape, np.uint8)
    write_png(tmp_path / "lungs" / f"{cohort.cases[0].case_id}.png", mask)
    find = audits._find_lungs(str(tmp_path / "lungs"), None, place)
    assert find is not None
    image = read_image(cohort.image_paths(cohort.cases[0])[0])
    assert (find(cohort.cases[0], image) == mask).all()  # type: ignore[union-attr]
    assert find(Case("other", "p", ()), image) is None
    write_png(tmp_path / "lungs" / "other.png", mask[:-1])
    with pytest.raises(UserError, match="give a mask on its grid"):
        find(Case("other", "p", ()), image)
