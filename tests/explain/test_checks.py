"""The checks of a map, each with an answer known beforehand."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from medseg.config import ExplainChecksConfig
from medseg.data.imputation import impute, neighbour_weights
from medseg.explain import LAYERLESS, explain_score
from medseg.explain.checks import (
    area,
    energy_in_region,
    method_agreement,
    overlap_of_shifted,
    rank_correlation,
    removal_rank,
)
from medseg.explain.hooks import run_order
from medseg.explain.passmark import CHECKS, Explained, failed, judge, measure
from medseg.explain.perturb import Probe, deletion_insertion, road
from medseg.explain.randomise import cascade
from medseg.explain.summary import share_passing, summarise
from medseg.explain.targets import Score
from medseg.models.ensemble import Ensemble

SIDE = 24


class Corner(nn.Module):
    """Class 1 is likely where the first quarter of every axis is bright; nothing else counts."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        self.layer = conv(1, 1, 1, bias=False)
        self.layer.weight.data.fill_(1.0)
        self.head = nn.Linear(1, 2)
        self.head.weight.data = torch.tensor([[-4.0], [4.0]])
        self.head.bias.data = torch.tensor([2.0, -2.0])
        self.dims = dims

    def forward(self, x_BCDHW: torch.Tensor) -> torch.Tensor:
        part = self.layer(x_BCDHW)[(slice(None), slice(None), *[slice(0, SIDE // 4)] * self.dims)]
        return self.head(part.flatten(2).mean(2))


def _probe(dims: int = 2, side: int = SIDE) -> tuple[Probe, np.ndarray]:
    """An image with a bright corner, and the mask of the corner."""
    mask = np.zeros([side] * dims, bool)
    mask[tuple([slice(0, side // 4)] * dims)] = True
    rng = np.random.default_rng(0)
    image = np.where(mask, 1.0, 0.1 * rng.random(mask.shape)).astype(np.float32)
    return Probe(Corner(dims).eval(), torch.from_numpy(image)[None, None], Score(torch.tensor([1]))), mask


def _explained(values: np.ndarray, **more: object) -> Explained:
    probe, mask = _probe(values.ndim)
    return Explained(probe, "hirescam", "layer", torch.from_numpy(values.astype(np.float32))[None], mask, **more)  # type: ignore[arg-type]


def test_order_of_removal_breaks_ties_and_keeps_the_order() -> None:
    values = np.array([[0.0, 5.0, 0.0], [2.0, 0.0, 0.0]])
    rank = removal_rank(values, seed=1)
    assert (rank[0, 1], rank[1, 0]) == (0, 1)
    assert sorted(rank.ravel()) == list(range(6))
    many = removal_rank(np.zeros((50, 50)), seed=0)
    assert abs(many[:25].mean() / many.mean() - 1) < 0.05, "equal values must not go row by row"
    assert (many < 0.3 * many.size).sum() == 750, "exactly the share asked for"


def test_area_is_the_mean_of_a_line() -> None:
    assert area(np.array([1.0, 0.5, 0.0])) == pytest.approx(0.5)
    assert area(np.array([0.2, 0.2, 0.2, 0.2])) == pytest.approx(0.2)


def test_rank_correlation() -> None:
    values = np.random.default_rng(0).random((300, 300))
    assert rank_correlation(values, np.exp(5 * values)) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
    assert abs(rank_correlation(values, np.random.default_rng(1).random((300, 300)))) < 0.02
    assert rank_correlation(values, np.zeros_like(values)) == 0
    assert np.isnan(rank_correlation(np.zeros(9), np.ones(9)))
    columns = np.broadcast_to(np.arange(512) % 2, (512, 512))  # evenly spaced values would be of one column
    assert rank_correlation(columns, columns) == pytest.approx(1)


def test_energy_in_a_dilated_region() -> None:
    values, mask = np.zeros((9, 9)), np.zeros((9, 9), np.uint8)
    mask[4, 4] = 1
    values[4, 4], values[4, 6], values[0, 0] = 1, 2, 1
    assert [energy_in_region(values, mask, n) for n in (0, 1, 2)] == [0.25, 0.25, 0.75]
    assert energy_in_region(values, np.zeros_like(mask), 3) == 0


def test_agreement_does_not_mind_the_scale_of_the_grid() -> None:
    fine = np.zeros((64, 64))
    fine[8:24, 40:56] = 1
    ramp = np.add.outer(np.arange(64), np.arange(64)) / 1000
    assert method_agreement(fine + ramp, fine + ramp - 1e-9) == pytest.approx(1)
    assert method_agreement(fine, fine[::-1]) < 0.1
    assert method_agreement(fine, fine + 5 * np.random.default_rng(0).normal(size=(64, 64))) < 0.9


def test_shifted_maps_are_laid_over_each_other() -> None:
    values = np.arange(30.0).reshape(5, 6)
    shift = (2, -1)
    moved = np.roll(values, shift, axis=(0, 1))
    first, second = overlap_of_shifted(values, moved, shift)
    assert first.shape == (3, 5)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("dims", [2, 3])
def test_deletion_and_insertion_tell_a_true_map_from_a_false_one(dims: int) -> None:
    """The corner decides: away first, the probability falls at once; put in first, it rises at once."""
    probe, mask = _probe(dims)
    true = deletion_insertion(probe, mask.astype(float), (6,) * dims, steps=5, random_maps=3)
    false = deletion_insertion(probe, -mask.astype(float), (6,) * dims, steps=5, random_maps=3)
    assert true["deletion"] > 0.1
    assert true["insertion"] > 0.1
    assert (false["deletion"], false["insertion"]) < (-0.1, -0.1)
    assert true["deletion_auc"] == pytest.approx(false["insertion_auc"]), "one curve, read from both ends"
    assert true["random_auc"] == false["random_auc"]


def test_deletion_by_hand() -> None:
    """Removed at the first of two steps: the curve is p(image), p(removed), p(removed)."""
    probe, mask = _probe()
    x, mean = probe.x_1CDHW[0], float(probe.x_1CDHW.mean())
    found = deletion_insertion(probe, mask.astype(float), (4, 4), steps=2, random_maps=1)
    from medseg.explain.perturb import _baselines

    areas = []
    for filling in _baselines(probe.x_1CDHW):
        removed = torch.where(torch.from_numpy(mask), filling, x)
        p = probe.probabilities([x, removed, filling])
        assert p[1] == pytest.approx(p[2])
        areas.append((p[0] + 3 * p[1]) / 4)
    assert found["deletion_auc"] == pytest.approx(np.mean(areas), rel=1e-6)
    level = torch.full((1, 1, SIDE, SIDE), mean)
    assert probe.probabilities([_baselines(probe.x_1CDHW)[1]])[0] == pytest.approx(
        float(probe.net(level).softmax(1)[0, 1].detach())
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_road_tells_a_true_map_from_a_false_one(dims: int) -> None:
    probe, mask = _probe(dims)
    true, false = (road(probe, sign * mask.astype(float), steps=5) for sign in (1, -1))
    assert true["road"] > 0.2
    assert true["road"] == pytest.approx(-false["road"], abs=0.01)


def test_neighbour_weights_are_those_of_the_paper() -> None:
    expected = torch.tensor([[1, 2, 1], [2, 0, 2], [1, 2, 1]], dtype=torch.float64) / 12
    torch.testing.assert_close(neighbour_weights(2)[0, 0], expected)
    assert float(neighbour_weights(3).sum()) == pytest.approx(1)


@pytest.mark.parametrize("dims", [2, 3])
def test_imputation_solves_its_equations(dims: int) -> None:
    """Each missing pixel is the weighted mean of those of its neighbours that lie in the image."""
    torch.manual_seed(0)
    x = torch.rand(2, 2, *[9] * dims, dtype=torch.float64)
    missing = torch.rand(2, *[9] * dims) < 0.7
    found = impute(x, missing, noise=0, tolerance=1e-10, max_iterations=2000)
    hidden = missing[:, None].expand_as(x)
    torch.testing.assert_close(found[~hidden], x[~hidden], rtol=0, atol=0)
    conv, weights = (nn.functional.conv2d, nn.functional.conv3d)[dims - 2], neighbour_weights(dims)
    flat = found.flatten(0, 1)[:, None]
    mean = conv(flat, weights, padding=1) / conv(torch.ones_like(flat), weights, padding=1)
    torch.testing.assert_close(found[hidden], mean.view_as(x)[hidden], rtol=1e-6, atol=1e-7)
    assert torch.equal(impute(x, torch.zeros_like(missing)), x)


def test_imputation_continues_a_plane_quickly_and_adds_noise() -> None:
    """A linear image is harmonic for symmetric weights: a hole in it is filled exactly."""
    plane = torch.add(*torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 2, 64), indexing="ij"))[None, None]
    missing = torch.zeros(1, 64, 64, dtype=torch.bool)
    missing[:, 10:50, 20:56] = True
    smooth = impute(plane, missing, noise=0)
    torch.testing.assert_close(smooth, plane, rtol=0, atol=0.01)
    grain = (impute(plane, missing, noise=0.05) - smooth)[missing[:, None]]
    assert float(grain.std()) == pytest.approx(0.05 * float(plane.max() - plane.min()), rel=0.05)
    with pytest.raises(ValueError, match="leaves no pixel"):
        impute(plane, torch.ones(1, 64, 64, dtype=torch.bool))


def test_randomisation_goes_from_the_top_and_leaves_the_network() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    before = copy.deepcopy(net.state_dict())
    changed = []
    for copied in cascade(net, torch.randn(1, 1, 12, 12), stages=3):
        state = copied.state_dict()
        changed.append({name for name, value in before.items() if not torch.equal(state[name], value)})
        assert float(state["3.weight"].std()) == pytest.approx(float(before["3.weight"].std()), rel=0.3)
    assert changed == [{"3.weight", "3.bias"}, {"3.weight", "3.bias"}, {"3.weight", "3.bias", "0.weight", "0.bias"}]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_randomisation_of_joined_networks_goes_from_the_top_of_all() -> None:
    net = Ensemble([nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)) for _ in range(2)]).eval()
    before = copy.deepcopy(net.state_dict())
    first = next(iter(cascade(net, torch.randn(1, 1, 12, 12), stages=2))).state_dict()
    changed = {name for name, value in before.items() if not torch.equal(first[name], value)}
    assert changed == {f"members.{k}.2.{what}" for k in (0, 1) for what in ("weight", "bias")}


def test_an_order_that_was_seen_before_spares_a_pass_and_changes_nothing() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)).eval()
    x = torch.randn(1, 1, 9, 9)
    passes: list[int] = []
    net.register_forward_hook(lambda *_: passes.append(1))
    with run_order(net) as order:
        net(x)
    assert order == ["0", "4"]
    found = [[stage.state_dict() for stage in map(copy.deepcopy, cascade(net, x, 2, 0, o))] for o in ((), order)]
    assert len(passes) == 2  # the one above, and one to find the order
    for mine, other in zip(*found, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_probabilities_do_not_depend_on_how_many_copies_are_seen_at_once(batch_size: int) -> None:
    probe, _ = _probe(dims=3, side=8)
    copies = list(torch.randn(7, *probe.x_1CDHW.shape[1:], generator=torch.Generator().manual_seed(0)))
    alone = np.concatenate([probe.probabilities([one]) for one in copies])
    found = Probe(probe.net, probe.x_1CDHW, probe.score, batch_size).probabilities(copies)
    np.testing.assert_allclose(found, alone, rtol=1e-6)


def test_a_map_that_ignores_the_weights_fails_the_randomisation() -> None:
    """An edge detector passes for an explanation until the weights are drawn anew."""
    probe, mask = _probe()

    class Edges(Explained):
        def again(self, x_BCDHW, score, *, net=None):  # type: ignore[no-untyped-def]
            return x_BCDHW.diff(dim=2, append=x_BCDHW[:, :, -1:])[:, 0].abs().numpy()

    edges = probe.x_1CDHW.diff(dim=2, append=probe.x_1CDHW[:, :, -1:])[:, 0].abs()
    checks = ExplainChecksConfig()
    found = judge(measure(Edges(probe, "hirescam", "layer", edges, mask), checks), checks)
    assert found["randomisation"]["value"] == pytest.approx(1)
    assert "randomisation" in failed(found)


def test_a_true_map_passes_and_a_false_one_is_named() -> None:
    """HiResCAM of the corner, against a map of everything else."""
    mask = _probe()[1]
    checks = ExplainChecksConfig(dilate_px=0, randomisation=None, stability=None)  # the corner does not move along
    true = judge(measure(_explained(np.where(mask, 1.0, 0.0)), checks), checks)
    assert list(true) == [name for name in CHECKS if name not in ("randomisation", "stability")]
    assert not failed(true)
    assert true["energy"] == {"value": 1.0, "threshold": 0.5, "passed": True, "mask_share": mask.mean()}
    false = judge(measure(_explained(np.where(mask, 0.0, 1.0)), checks), checks)
    assert set(failed(false)) >= {"energy", "deletion", "insertion", "road", "agreement"}


def test_stability_knows_a_map_that_jumps() -> None:
    probe, _ = _probe()

    class Jumps(Explained):
        def again(self, x_BCDHW, score, *, net=None):  # type: ignore[no-untyped-def]
            return np.random.default_rng(1).random(x_BCDHW[:, 0].shape).astype(np.float32)

    class Follows(Explained):
        def again(self, x_BCDHW, score, *, net=None):  # type: ignore[no-untyped-def]
            return x_BCDHW[:, 0].numpy()

    only = ExplainChecksConfig(**dict.fromkeys(CHECKS, None) | {"stability": 0.7})
    maps = probe.x_1CDHW[:, 0]
    assert measure(Follows(probe, "hirescam", "layer", maps), only)["stability"]["value"] == pytest.approx(1)
    assert abs(measure(Jumps(probe, "hirescam", "layer", maps), only)["stability"]["value"]) < 0.1


@pytest.mark.parametrize("method", LAYERLESS)
def test_a_method_without_a_layer_is_held_against_one_that_has_one(method: str) -> None:
    """Where both would be the same method, LayerCAM takes the place of the second, at the last layer there is."""
    probe, _ = _probe()
    only = ExplainChecksConfig(**dict.fromkeys(CHECKS, None) | {"agreement": 0.2, "agreement_with": method})
    maps = explain_score(probe.net, probe.x_1CDHW, probe.score, method, "input", size="layer")
    found = measure(Explained(probe, method, "input", maps), only)["agreement"]
    assert found["with"] == "layercam"
    assert found["value"] is not None
    assert found["value"] > 0.2


def test_checks_that_cannot_be_made_say_so() -> None:
    probe, _ = _probe()
    checks = ExplainChecksConfig(max_voxels=10, randomisation=None, stability=None, agreement=None)
    found = judge(measure(Explained(probe, "hirescam", "layer", probe.x_1CDHW[:, 0]), checks), checks)
    assert set(found) == {"deletion", "insertion", "road"}, "no energy without a mask"
    for check in found.values():
        assert (check["value"], check["passed"]) == (None, None)
        assert "max_voxels" in check["note"]
    assert not failed(found)


def test_share_of_cases_that_pass() -> None:
    passed = [True] * 30 + [False] * 10
    found = share_passing(passed, [str(n) for n in range(40)])
    assert (found["n"], found["share"]) == (40, 0.75)
    assert 0.6 < found["ci_low"] < 0.66 < 0.84 < found["ci_high"] < 0.9  # type: ignore[operator]
    one = share_passing(passed, ["one"] * 40)
    assert (one["ci_low"], one["ci_high"]) == (None, None)
    few = share_passing(passed, [str(n // 10) for n in range(40)])  # four patients, one of them fails throughout
    assert few["ci_high"] - few["ci_low"] > found["ci_high"] - found["ci_low"]  # type: ignore[operator]


def test_summary_is_by_method_and_check() -> None:
    def about(method: str, value: float | None, evidence: bool = True) -> dict[str, object]:
        passed = None if value is None else value >= 0.5
        check = {"value": value, "threshold": 0.5, "passed": passed}
        checks = {"energy": check} if evidence else {}
        return {"method": method, "layer": "l", "evidence": evidence, "checks": checks, "passed": passed}

    cases = [("p1", about("a", 0.8)), ("p2", about("a", 0.2)), ("p3", about("a", None, False)), ("p1", about("b", 0.6))]
    found = summarise(cases)
    assert list(found) == ["a/l", "b/l"]
    assert (found["a/l"]["maps"], found["a/l"]["no_evidence"]) == (3, 1)
    energy = found["a/l"]["checks"]["energy"]
    assert (energy["n"], energy["share"], energy["mean"], energy["threshold"]) == (2, 0.5, 0.5, 0.5)
    assert found["b/l"]["all_passed"]["share"] == 1
