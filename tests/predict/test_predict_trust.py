"""What the networks say while they predict, and what is made of it for people."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bundle import Threshold, bundle, config, plan, write_boxes
from torch import Tensor, nn

from medseg.confidence import Features
from medseg.files import read_json, read_rows, write_json
from medseg.images import read_image, write_nifti
from medseg.ledger import Row, read_ledger
from medseg.metrics import dice
from medseg.models import build_model
from medseg.models.ensemble import Ensemble
from medseg.models.features import mean_features
from medseg.predict import Predictor, answers, segment_array, step, watching
from medseg.predict.flags import check_volumes
from medseg.predict.heads import Headless
from medseg.predict.trust import judge, write_queue
from medseg.predict.watching import watched
from medseg.volume import Volume

LABELS = {"one": 1, "two": 2}


class Fixed(nn.Module):
    """Logits that follow from the intensity, shifted, so that networks differ."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([0 * x, x - self.shift, -x - self.shift], 1)


def test_sums_over_windows_are_those_of_the_whole_image() -> None:
    """One window covers the image, so the features can be calculated from the whole maps."""
    image = np.random.default_rng(0).normal(0, 2, (1, 20, 12, 12)).astype(np.float32)
    nets, temperatures = [Fixed(0.0), Fixed(0.7)], [1.0, 2.0]
    together = Ensemble(nets)
    with watched(together, temperatures) as watcher:
        segment_array(together, image, (20, 12, 12), 0.0)
    found = watcher.features(LABELS)
    logits = [net(torch.from_numpy(image)[None]) for net in nets]
    called = [z.argmax(1)[0].numpy() for z in logits]
    probs = [(z / t).softmax(1)[0].double().numpy() for z, t in zip(logits, temperatures, strict=True)]
    for name, value in LABELS.items():
        inside = [c == value for c in called]
        soft = [2 * p[value][m].sum() / (p[value].sum() + m.sum()) for p, m in zip(probs, inside, strict=True)]
        entropy = [(-(p * np.log(p)).sum(0) / math.log(3))[m].mean() for p, m in zip(probs, inside, strict=True)]
        assert found[name].soft_dice == pytest.approx(np.mean(soft), rel=1e-4)
        assert found[name].entropy == pytest.approx(np.mean(entropy), rel=1e-4)
        assert found[name].agreement == pytest.approx(dice(*inside))
    assert not any(member._forward_hooks for member in together.members), "nothing is left behind"


def test_watching_changes_no_label_and_one_network_has_none_to_agree_with() -> None:
    image = np.random.default_rng(1).normal(0, 2, (1, 24, 24, 24)).astype(np.float32)
    net = Fixed(0.3)
    plain = segment_array(net, image, (16, 16, 16), 0.5)
    with watched(net, [1.0]) as watcher:
        assert np.array_equal(segment_array(net, image, (16, 16, 16), 0.5), plain)
    found = watcher.features(LABELS)
    assert math.isnan(found["one"].agreement)
    assert found["one"].bound == 1
    assert judge(found, {})["one"].expected_dice is None


def test_only_empty_windows_and_absent_structures_say_nothing() -> None:
    net = Fixed(0.5)
    with watched(net, [1.0]) as watcher:
        net(torch.zeros(1, 1, 8, 8, 8))
        net(torch.full((1, 1, 8, 8, 8), 3.0))
        assert watcher.features(LABELS) == {}
        net(torch.linspace(2, 3, 512).reshape(1, 1, 8, 8, 8))
    assert set(watcher.features(LABELS)) == {"one"}


class Leaning(nn.Module):
    """Calls label 1 in the upper part along the first axis, whatever it sees; so a flipped pass calls the lower."""

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[2]).reshape(1, 1, -1, 1, 1).expand_as(x)
        return torch.cat([0 * x, (14.5 - place) + 0 * x, -9 + 0 * x], 1)


def test_agreement_of_mirrored_passes_is_that_of_the_whole_maps() -> None:
    """Two networks, eight flips, slabs that do not divide the window: the Dice of each flip with the plain pass."""
    image = np.random.default_rng(2).normal(0, 2, (1, 24, 8, 8)).astype(np.float32)
    nets = [Fixed(0.0), Leaning()]
    together = Ensemble(nets)
    with watched(together, [1.0, 1.0], (0, 1, 2)) as watcher:
        segment_array(together, image, (24, 8, 8), 0.0, mirror_axes=(0, 1, 2))
    found = watcher.features(LABELS)
    upper = np.arange(24) < 15
    with_flips_of_0 = dice(np.broadcast_to(upper, (1, 24)), np.broadcast_to(upper[::-1], (1, 24)))
    leaning = (3 * 1.0 + 4 * with_flips_of_0) / 7
    assert found["one"].mirrored == pytest.approx((1.0 + leaning) / 2)
    assert found["two"].mirrored == 1.0, "only the network that finds it counts, and it does not mind flips"
    assert judge(found, {})["one"].mirrored == pytest.approx(found["one"].mirrored, abs=1e-4)


def test_without_mirroring_there_is_no_agreement_of_passes() -> None:
    net = Fixed(0.3)
    with watched(net, [1.0]) as watcher:
        segment_array(net, np.random.default_rng(1).normal(0, 2, (1, 16, 16, 16)).astype(np.float32), (16, 16, 16))
    assert math.isnan(watcher.features(LABELS)["one"].mirrored)
    assert judge(watcher.features(LABELS), {})["one"].mirrored is None


def test_expected_dice_comes_from_the_evidence_of_the_bundle() -> None:
    evidence = {"expected_dice": {"one": {"coefficients": [0.0, 1.0, 0.0], "low": -0.1, "high": 0.05, "n": 20}}}
    said = judge({"one": Features(0.9, 0.1), "two": Features(0.8, 0.2)}, evidence)
    assert said["one"].expected_dice == pytest.approx(0.9)
    assert said["one"].interval == pytest.approx((0.8, 0.95))
    assert said["two"].expected_dice is None


def test_volumes_outside_all_that_was_seen_are_flagged() -> None:
    known = {"volumes_ml": {"one": {"median": 3.0, "low": 2.0, "high": 4.5, "mad_log": 0.1, "n": 40}}}
    assert not list(check_volumes({"one": 4.4, "two": 900.0}, known))
    assert not list(check_volumes({"one": 4.6}, known)), "outside, but not far"
    assert not list(check_volumes({"one": 0.0}, known)), "nothing found has a flag of its own"
    (large,) = check_volumes({"one": 9.0}, known)
    assert large.code == "implausible_volume"
    assert large.number == pytest.approx(0.6745 * math.log(3) / 0.1, abs=0.01)
    assert "2 to 4.5 ml" in large.message
    assert [found.code for found in check_volumes({"one": 0.9}, known)] == ["implausible_volume"]
    assert not list(check_volumes({"one": 9.0}, {}))


def test_the_queue_puts_flags_first_and_then_the_least_trusted(tmp_path: Path) -> None:
    said = {
        "sure": ({"one": (0.95, 0.9), "two": (0.93, 0.9)}, []),
        "weak": ({"one": (0.95, 0.9), "two": (0.41, 0.5)}, []),
        "flag": ({"one": (0.97, 0.9)}, [{"code": "touches_border"}]),
        "none": ({}, [{"code": "empty_prediction"}]),
    }
    rows = [Row("gone", "failed")]
    for name, (structures, flags) in said.items():
        confidence = {s: {"expected_dice": e, "agreement": a, "soft_dice": 0.5} for s, (e, a) in structures.items()}
        write_json(tmp_path / name / "result.json", {"confidence": confidence, "flags": flags})
        rows.append(Row(name, "flagged" if flags else "done"))
    found = read_rows(write_queue(tmp_path / "review_queue.csv", rows))
    assert [row["case_id"] for row in found] == ["flag", "none", "weak", "sure"]
    assert [row["rank"] for row in found] == ["1", "2", "3", "4"]
    assert (found[2]["structure"], found[2]["expected_dice"]) == ("two", "0.41")


def test_the_queue_puts_what_is_unlike_the_cohort_before_all_else(tmp_path: Path) -> None:
    said = {
        "near": (0.5, ["touches_border"]),
        "far": (1.4, ["unlike_training"]),
        "farther": (2.5, ["touches_border", "unlike_training"]),
        "calm": (0.3, []),
        "less calm": (0.8, []),
    }
    rows = []
    for name, (distance, flags) in said.items():
        write_json(tmp_path / name / "result.json", {"confidence": {}, "flags": [{"code": code} for code in flags]})
        status = "flagged" if flags else "done"
        rows.append(Row(name, status, feature_distance=distance, distance_limit=1.0))
    found = read_rows(write_queue(tmp_path / "review_queue.csv", rows))
    assert [row["case_id"] for row in found] == ["farther", "far", "near", "less calm", "calm"]
    assert (found[0]["feature_distance"], found[0]["distance_limit"]) == ("2.5", "1.0")


def test_windows_taken_for_air_are_announced_in_result_and_ledger(tmp_path: Path) -> None:
    """A limit in HU, as the plan normalises by HU; two of five windows lie in uneven air."""
    array = np.random.default_rng(3).integers(20, 100, (48, 16, 16)).astype(np.int16)
    array[:24] = array[:24] // 20
    write_nifti(tmp_path / "scans" / "scan.nii.gz", Volume(array, np.eye(4)))
    masks = []
    for name, predict, air in (("some", {"air_below": 10.0}, 2), ("all", {}, 0)):
        made = bundle(tmp_path / name, config(predict=predict), plan(spacing_mm=(1.0, 1.0, 1.0)))
        step.run(made, [tmp_path / "scans"], tmp_path / f"out-{name}", predictor=Predictor(made, net=Threshold()))
        result = read_json(tmp_path / f"out-{name}" / "scan" / "result.json")
        assert result["windows"] == {"all": 5, "even": air, "air": air}
        assert [row.air_windows for row in read_ledger(tmp_path / f"out-{name}" / "ledger.csv")] == [air]
        masks.append(read_image(tmp_path / f"out-{name}" / "scan" / "mask.nii.gz").array)
    assert np.array_equal(*masks), "this network says the same of even air"


def test_results_and_ledger_carry_what_is_known(tmp_path: Path) -> None:
    """A bundle that was not calibrated gives features and a queue, but promises no Dice."""
    made = bundle(tmp_path / "b", grid=plan(spacing_mm=(1.0, 1.0, 1.0)))
    step.run(made, [write_boxes(tmp_path / "scans", 2)], tmp_path / "out", predictor=Predictor(made, net=Threshold()))
    result = read_json(tmp_path / "out" / "scan-00" / "result.json")
    said = result["confidence"]["thing"]
    assert (said["expected_dice"], said["agreement"], result["expected_dice"]) == (None, None, None)
    assert 0.7 < said["soft_dice"] <= 1
    assert [row.expected_dice for row in read_ledger(tmp_path / "out" / "ledger.csv")] == [None, None]
    assert len(read_rows(tmp_path / "out" / "review_queue.csv")) == 2


def test_a_sweep_that_makes_logits_in_parts_is_watched_to_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head makes the logits of a whole window once, to see whether parts give the same."""
    torch.manual_seed(0)
    classes, labels = 60, {f"label {n}": n for n in range(1, 60)}
    net = build_model("dynunet", spatial_dims=3, in_channels=1, out_channels=classes, channels=[4, 8, 16]).eval()
    image = np.random.default_rng(1).normal(size=(1, 48, 32, 32)).astype(np.float32)
    image[:, :16] = -1  # the first window is even, and so no figure counts it
    with mean_features(net, classifies=False) as (whole,), watched(net, [1.5]) as by_hooks:
        plain = segment_array(net, image, (16, 16, 16), 0.5, window_batch=2)
    made, head = list[int](), net.get_submodule("output_block.conv.conv")
    monkeypatch.setattr(head, "forward", lambda x, f=head.forward: made.append(x[0, 0].numel()) or f(x))
    monkeypatch.setattr(answers, "ADD_VALUES", 40_000)
    with mean_features(net, classifies=False) as (parts,), watched(net, [1.5], hooks=False) as in_parts:
        monkeypatch.setattr(watching, "_VALUES", 4 * classes * 16 * 16)
        labelled = segment_array(net, image, (16, 16, 16), 0.5, window_batch=2, watch=in_parts.see)
    assert np.array_equal(labelled, plain)
    assert sum(voxels >= 16**3 for voxels in made) == 1
    assert len(made) > 100
    found, wanted = in_parts.features(labels), by_hooks.features(labels)
    assert found.keys() == wanted.keys()
    for name, features in wanted.items():
        assert found[name].columns == pytest.approx(features.columns, rel=1e-6)
    np.testing.assert_allclose(parts.mean(), whole.mean(), rtol=1e-6)
    assert not net._forward_hooks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predicting_many_classes_never_holds_the_logits_of_a_window(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"name": "dynunet", "channels": [4, 8, 16]}
    settings = config({f"label {n}": n for n in range(1, 60)}, model=made, predict={"precision": precision})
    one = bundle(tmp_path / "bundle", settings, plan(patch_size=(16, 16, 16)))
    predictor, asked = Predictor(one, torch.device("cpu")), list[Tensor | None]()
    forward = Headless.forward
    monkeypatch.setattr(Headless, "forward", lambda self, x: asked.append(forward(self, x)) or asked[-1])
    scan = write_boxes(tmp_path / "scans", 1)
    found = predictor.predict_file(scan)
    assert found.confidence
    features = [one for one in asked if one is not None]
    assert len(features) == len(asked)
    assert sum(map(len, features)) == found.windows["all"] - 2  # all but those of the first batch
    assert {one.shape[1] for one in features} == {4}
