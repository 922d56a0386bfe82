"""The fingerprint, what follows from it, and the choice under a memory budget."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from synthetic import radiograph_cohort, segmentation_cohort, tiny_config, tiny_radiograph_config

from medseg.cohort import Case, Cohort, write_cohort
from medseg.config import DynUNetConfig, load_config
from medseg.data.preprocess import normalise_inplace
from medseg.files import UserError
from medseg.images import write_nifti
from medseg.plan import Plan, read_plan, write_plan
from medseg.train.budget import Chooser
from medseg.train.cohort_check import _check_patch, check_cohort
from medseg.train.device import peak_memory_gb
from medseg.train.draft import draft_plan
from medseg.train.fingerprint import measure_cohort, target_spacing
from medseg.train.memory_law import Candidate, Measured, TooLarge, fit_law
from medseg.train.planning import make_plan, measured_plan, plan_to_train
from medseg.train.pooling import divisors_of, pool_by_axis, stages_by_axis
from medseg.train.probe import shrink_patch
from medseg.train.step import _hold_contract, build_network, with_plan
from medseg.volume import Volume


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return segmentation_cohort(tmp_path_factory.mktemp("boxes"))


def _cohort(folder: Path, image: np.ndarray, label: np.ndarray, modality: str) -> Cohort:
    """Four cases of one image; voxels of 1 x 2 x 3 mm, so 0.006 ml."""
    cases = []
    for number in range(4):
        name = f"case-{number}"
        affine = np.diag([1.0, 2.0, 3.0, 1.0])
        write_nifti(folder / f"{name}.nii.gz", Volume(image, affine))
        write_nifti(folder / f"{name}-label.nii.gz", Volume(label, affine))
        cases.append(
            Case(
                name,
                name,
                (f"{name}.nii.gz",),
                split="train",
                modality=modality,
                label=f"{name}-label.nii.gz",
                shape=image.shape,
                spacing_mm=(1.0, 2.0, 3.0),
            )
        )
    return write_cohort(Cohort(folder, tuple(cases), {"anterior": 1, "posterior": 2}), [], {})


# ---- fingerprint


def test_spacing_is_the_median_and_along_slices_far_apart_the_tenth_percentile() -> None:
    spacings = np.array([[0.5, 0.5, 5.0], [0.5, 0.5, 6.0], [0.6, 0.6, 6.0], [0.5, 0.5, 8.0]])
    shapes = np.array([[300, 300, 30]] * 4)
    spacing, reason = target_spacing(spacings, shapes)
    assert spacing == (0.5, 0.5, pytest.approx(np.percentile(spacings[:, 2], 10)))
    assert "along S" in reason
    many_slices = np.array([[300, 300, 150]] * 4)  # spacing differs by more than 3, size does not
    assert target_spacing(spacings, many_slices)[0] == (0.5, 0.5, 6.0)
    assert target_spacing(np.array([[1.0, 1.0, 3.0]]), shapes[:1])[0] == (1.0, 1.0, 3.0)  # exactly 3 is not more


def test_the_coarse_axis_never_becomes_finer_than_the_others() -> None:
    spacings = np.array([[1.0, 1.0, 0.4], [1.0, 1.0, 6.0], [1.0, 1.0, 6.0], [1.0, 1.0, 6.0]])
    spacings[0, 2] = 0.4
    shapes = np.array([[300, 300, 30]] * 4)
    few = np.repeat(spacings, [2, 1, 1, 1], axis=0)
    assert target_spacing(few, np.repeat(shapes, [2, 1, 1, 1], axis=0))[0][2] == 1.0


def test_class_balance_and_volumes(tmp_path: Path) -> None:
    label = np.zeros((10, 10, 10), dtype=np.uint8)
    label[:5, :2, 0] = 1
    found = measure_cohort(
        cohort := _cohort(tmp_path, np.ones(label.shape, dtype=np.float32), label, "MR"),
        cohort.cases,
        tiny_config().task,
    )
    assert found.classes["anterior"] == {
        "annotated": 4,
        "voxel_share": 0.01,
        "cases": 4,
        "volume_ml": {"mean": pytest.approx(0.06), "sd": 0.0},
    }
    nothing = {"annotated": 4, "voxel_share": 0.0, "cases": 0, "volume_ml": {"mean": 0.0, "sd": 0.0}}
    assert found.classes["posterior"] == nothing
    partly = [replace(case, annotated="posterior" if number else "") for number, case in enumerate(cohort.cases)]
    found = measure_cohort(cohort, partly, tiny_config().task)
    assert (found.classes["anterior"]["annotated"], found.classes["posterior"]["annotated"]) == (1, 4)
    assert found.classes["anterior"]["voxel_share"] == 0.01, "of the voxels of the one case that tells of it"


def test_classes_of_a_classification_task(tmp_path: Path) -> None:
    cohort = radiograph_cohort(tmp_path)
    classes = make_plan(tiny_radiograph_config(), cohort).fingerprint["classes"]
    train = cohort.split("train")
    assert classes["tb"]["cases"] == sum(case.target == "tb" for case in train)
    assert classes["tb"]["share"] + classes["normal"]["share"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("modality", "zeros", "scheme"),
    [("CT", 0.0, "ct"), ("MR", 0.0, "zscore"), ("MR", 0.5, "zscore_nonzero"), ("CT", 0.5, "ct"), ("", 0.1, "zscore")],
)
def test_intensities_follow_modality_and_background(tmp_path: Path, modality: str, zeros: float, scheme: str) -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(40, 10, (10, 10, 10)).astype(np.float32)
    image[: int(10 * zeros)] = 0
    label = np.ones(image.shape, dtype=np.uint8)
    label[0] = 0
    plan = make_plan(tiny_config("plan={}"), _cohort(tmp_path, image, label, modality))
    assert plan.normalise == scheme
    if scheme == "ct":
        inside = image[1:]
        low, high = np.percentile(inside, [0.5, 99.5])
        assert (plan.intensity_low, plan.intensity_high) == (
            pytest.approx(low, rel=0.01),
            pytest.approx(high, rel=0.01),
        )
        assert plan.intensity_mean == pytest.approx(float(inside.mean()), rel=0.01)
        assert plan.intensity_sd == pytest.approx(float(inside.std()), rel=0.03)


def test_a_mask_of_zeros_stays_zero_and_sets_no_mean() -> None:
    rng = np.random.default_rng(1)
    channel = rng.normal(300, 50, (12, 12, 12)).astype(np.float32)
    channel[:6] = 0
    plan = Plan(spatial_dims=3, patch_size=(8, 8, 8), batch_size=1, normalise="zscore_nonzero")
    normalise_inplace(channel, plan)
    assert not channel[:6].any()
    assert channel[6:].mean() == pytest.approx(0, abs=1e-5)
    assert channel[6:].std() == pytest.approx(1, rel=1e-5)
    empty = np.zeros((4, 4, 4), dtype=np.float32)
    normalise_inplace(empty, plan)
    assert not empty.any()


# ---- pooling and patches


def test_isotropic_patches_are_halved_everywhere() -> None:
    strides, kernels = stages_by_axis((64, 64, 64), (1, 1, 1), 3)
    assert strides == [(2, 2, 2)] * 3
    assert kernels == [(3, 3, 3)] * 4


def test_a_coarse_axis_waits_until_the_others_have_caught_up() -> None:
    strides, kernels = stages_by_axis((256, 256, 32), (0.5, 0.5, 4.0), 4)
    assert strides == [(2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2)]  # 4.0 against 0.5, 1, 2, 4 mm
    assert kernels == [(3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3), (3, 3, 3)]


@pytest.mark.parametrize("patch", [(128, 128, 16), (20, 96, 96), (8, 8, 8), (250, 6, 30)])
def test_pooling_never_leaves_fewer_than_four_voxels(patch: tuple[int, ...]) -> None:
    strides, _ = stages_by_axis(patch, (1, 1, 1), 5)
    left = np.array(patch) / np.prod(strides, axis=0)
    assert (left >= np.minimum(patch, 4)).all()
    done = left / 2 < 4
    assert (done | (np.prod(strides, axis=0) == 2**5)).all()  # and it stops only there


def test_a_network_that_leaves_its_strides_null_gets_them_from_the_plan() -> None:
    model = DynUNetConfig(channels=(8, 16, 32))
    assert pool_by_axis(model, (64, 64, 64), (1, 1, 1)) == {}  # its own default is right
    chosen = pool_by_axis(model, (64, 64, 12), (1, 1, 5))
    assert chosen["strides"] == [(2, 2, 1), (2, 2, 1)]
    assert chosen["kernels"] == [(3, 3, 1), (3, 3, 1), (3, 3, 3)]
    assert divisors_of(model, 3, chosen) == (4, 4, 1)
    assert pool_by_axis(DynUNetConfig(channels=(8, 16, 32), strides=(2, 2)), (64, 64, 12), (1, 1, 5)) == {}


def test_a_network_pooled_by_axis_is_built_and_travels_in_the_config() -> None:
    config = tiny_config("model={name: dynunet, channels: [4, 8, 8]}")
    plan = Plan(3, (32, 32, 6), 1, network=pool_by_axis(config.model, (32, 32, 6), (1, 1, 5)))
    filled = with_plan(config, plan)
    assert filled.model.size_problem(plan.patch_size) is None
    assert build_network(filled, plan)(torch.zeros(1, 1, *plan.patch_size)).shape == (1, 3, 32, 32, 6)


def test_a_patch_is_held_against_the_pooling_that_the_spacing_gives(tmp_path: Path) -> None:
    image = np.zeros((32, 32, 8), dtype=np.uint8)
    label = np.ones(image.shape, dtype=np.uint8)
    label[0] = 2
    cohort = _cohort(tmp_path, image, label, "MR")
    for case in cohort.cases:
        write_nifti(tmp_path / case.images[0], Volume(image, np.diag([1.0, 1.0, 5.0, 1.0])))
    network = "model={name: dynunet, channels: [4, 8, 8]}"
    check_cohort(tiny_config(network, "plan.patch_size=[32, 32, 9]"), cohort)  # 5 mm slices are not pooled
    with pytest.raises(UserError, match=r"set it to \(32, 32, 10\) \(voxels of 1 × 1 × 1 mm\)"):
        check_cohort(tiny_config(network, "plan={patch_size: [32, 32, 9], spacing_mm: [1, 1, 1]}"), cohort)


def test_a_patch_of_volumes_is_not_held_against_radiographs(tmp_path: Path) -> None:
    config = load_config("lungs", ["model={name: dynunet}", "plan.patch_size=[33, 48, 32]"])
    _check_patch(config, radiograph_cohort(tmp_path, 4))  # their files have no spacing to go by


def test_candidates_grow_smaller_and_stay_legal(boxes: Cohort) -> None:
    config = tiny_config("plan={memory_gb: 4}")
    candidates = draft_plan(config, boxes, boxes.split("train")).candidates
    assert candidates[0].patch == (24, 16, 16)  # the field of view and no more, whatever the budget
    assert [one.batch for one in candidates[:3]] == [4, 3, 2]
    assert all(a.voxels > b.voxels for a, b in itertools.pairwise(candidates))
    assert all(n % 8 == 0 and n >= 16 for one in candidates for n in one.patch)


def test_without_a_budget_a_cpu_step_is_bounded(tmp_path: Path) -> None:
    image = np.zeros((160, 144, 128), dtype=np.uint8)
    label = np.ones(image.shape, dtype=np.uint8)
    label[0] = 2
    cohort = _cohort(tmp_path, image, label, "CT")
    for case in cohort.cases:
        write_nifti(tmp_path / case.images[0], Volume(image, np.eye(4)))
    plan = make_plan(tiny_config("plan={}", "device=cpu"), cohort)
    assert np.prod(plan.patch_size) <= 96**3
    assert plan.patch_size == (88, 88, 88) or np.prod(plan.patch_size) > 0.6 * 96**3
    assert plan.batch_size == 2


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 0.02])
def test_a_patch_is_shrunk_legally(share: float) -> None:
    made = shrink_patch((96, 64, 48), 2, (16, 16, 8), share)
    assert made is not None
    patch, batch = made
    assert all(n % d == 0 and n >= 2 * d for n, d in zip(patch, (16, 16, 8), strict=True))
    assert batch * np.prod(patch) < 2 * 96 * 64 * 48
    assert shrink_patch((16, 16), 1, (8, 8), share) is None


# ---- the law and the choice, with a device made of arithmetic


class Device:
    """Peak = fixed + slope(mode) * voxels, a floor for validation, and a log of what was asked."""

    def __init__(self, slopes: dict[str, float], fixed: float = 0.5, floor: float = 0.0) -> None:
        self.slopes, self.fixed, self.floor = slopes, fixed, floor
        self.asked: list[tuple[Candidate, str]] = []

    def __call__(self, candidate: Candidate, mode: str, steps: int) -> Measured:
        self.asked.append((candidate, mode))
        mvoxels = candidate.voxels / 1e6
        step = self.fixed + self.slopes[mode] * mvoxels
        return Measured(candidate, mode, step, max(step, self.floor), 2 * mvoxels)


_WANTED = Candidate((96, 96, 96), 2)
_CANDIDATES = (_WANTED, *(Candidate((n, n, n), 2) for n in range(88, 24, -8)))
_SLOPES = {"store": 5.0, "checkpoint": 2.0, "reversible": 1.0}


def _chooser(device: Device, budget_gb: float, candidates: tuple[Candidate, ...] = _CANDIDATES) -> Chooser:
    def shrink(candidate: Candidate, share: float) -> Candidate | None:
        made = shrink_patch(candidate.patch, candidate.batch, (8, 8, 8), share)
        return Candidate(*made) if made else None

    return Chooser(candidates, tuple(device.slopes), budget_gb, device, shrink, clock=lambda: 0.0)


def test_the_law_is_recovered_and_its_residual_reported() -> None:
    device = Device({"": 3.0})
    points = [device(Candidate((n, n, n), 2), "", 3) for n in (24, 40, 64)]
    law = fit_law(points)
    assert (law.fixed_gb, law.gb_per_mvoxel) == (pytest.approx(0.5), pytest.approx(3.0))
    assert law.residual == pytest.approx(0, abs=1e-12)
    assert law.predict(2_000_000) == pytest.approx(6.5)
    assert law.fitting(6.5) == pytest.approx(2_000_000, abs=2)
    off = fit_law([replace(points[0], step_gb=2 * points[0].step_gb), *points[1:]])
    assert off.residual == pytest.approx(0.5)
    assert fit_law(points[1:]).residual is None


def test_validation_of_a_large_case_is_a_floor() -> None:
    device = Device({"": 1.0}, floor=3.0)
    law = fit_law([device(Candidate((n, n, n), 1), "", 3) for n in (24, 40)])
    assert law.predict(1000) == 3.0
    assert law.predict(10_000_000) == pytest.approx(10.5)
    assert law.fitting(2.9) == 0


@pytest.mark.parametrize(
    ("budget_gb", "mode", "whole"),
    [(20.0, "store", True), (5.0, "checkpoint", True), (2.5, "reversible", True), (1.5, "reversible", False)],
)
def test_the_fastest_mode_in_which_the_wanted_patch_fits(budget_gb: float, mode: str, whole: bool) -> None:
    device = Device(_SLOPES)
    choice = _chooser(device, budget_gb).choose()
    assert choice.mode == mode
    assert (choice.candidate == _WANTED) == whole
    assert choice.measured is not None
    assert choice.measured.peak_gb <= budget_gb
    assert choice.predicted_gb == pytest.approx(choice.measured.peak_gb)
    larger = [one for one in _CANDIDATES if one.voxels > choice.candidate.voxels]
    assert all(0.5 + _SLOPES[mode] * one.voxels / 1e6 > 0.95 * budget_gb for one in larger)
    slower = [m for m in _SLOPES if list(_SLOPES).index(m) > list(_SLOPES).index(mode)]
    assert not any(asked in slower for _, asked in device.asked)  # what is not needed is not measured


def test_only_the_choice_is_measured_at_full_size() -> None:
    device = Device(_SLOPES)
    choice = _chooser(device, 20.0).choose()
    *small, last = device.asked
    assert last == (choice.candidate, choice.mode)
    assert all(candidate.voxels <= 0.6 * choice.candidate.voxels for candidate, _ in small)
    assert 2 <= len(small) <= 3


def test_a_choice_that_proves_too_large_is_taken_down() -> None:
    class Cliff(Device):
        """Above a size another algorithm takes 6 GB more, which no smaller step could tell."""

        def __call__(self, candidate: Candidate, mode: str, steps: int) -> Measured:
            found = super().__call__(candidate, mode, steps)
            more = 6.0 * (candidate.voxels > 1_100_000)
            return replace(found, step_gb=found.step_gb + more, peak_gb=found.peak_gb + more)

    choice = _chooser(Cliff({"": 2.0}), 5.0).choose()
    assert choice.measured is not None
    assert choice.measured.peak_gb <= 5.0
    assert choice.candidate == Candidate((80, 80, 80), 2)
    assert "taken down" in choice.notes["memory_gb"]


def test_a_device_that_runs_out_counts_as_too_large() -> None:
    class Small(Device):
        def __call__(self, candidate: Candidate, mode: str, steps: int) -> Measured:
            if candidate.voxels > 800_000:
                raise TooLarge(str(candidate))
            return super().__call__(candidate, mode, steps)

    choice = _chooser(Small({"": 1.0}), 50.0).choose()
    assert choice.candidate.voxels <= 800_000


def test_what_cannot_fit_is_one_sentence_that_names_what_would() -> None:
    fixed = (Candidate((96, 96, 96), 4),)
    device = Device({"store": 5.0, "reversible": 2.0})
    with pytest.raises(UserError) as caught:
        _chooser(device, 3.0, fixed).choose()
    sentence = str(caught.value)
    assert "96×96×96 with batch_size 4" in sentence
    assert "18.19 GB in memory mode store" in sentence
    assert "7.58 GB in memory mode reversible" in sentence
    assert "plan.batch_size 1" in sentence  # 0.5 + 2 * 0.885 = 2.27
    found = re.search(r"plan\.patch_size \[(\d+), (\d+), (\d+)\]", sentence)
    assert found
    voxels = 4 * np.prod([int(n) for n in found.groups()])
    assert 0.5 + 2 * voxels / 1e6 <= 3.0
    assert "% of the channels" in sentence
    assert sentence.count(". ") == 0


def test_a_budget_below_the_libraries_says_so() -> None:
    with pytest.raises(UserError, match=r"plan\.memory_gb 0\.4.*plan\.memory_gb 0\.\d"):
        _chooser(Device({"": 1.0}), 0.4).choose()


def test_without_time_the_choice_stays_a_prediction() -> None:
    now = iter(range(0, 10_000, 40))
    device = Device({"": 0.1})
    huge = (Candidate((640, 640, 640), 2),)
    chooser = _chooser(device, 1000.0, huge)
    chooser.clock, chooser.ends_at = lambda: float(next(now)), 60.0
    choice = chooser.choose()
    assert choice.measured is None
    assert choice.predicted_gb == pytest.approx(0.5 + 0.1 * 2 * 640**3 / 1e6)
    measured = choice.laws[""].points[-1]
    step = measured.step_seconds * huge[0].voxels / measured.candidate.voxels
    assert choice.predicted_seconds == pytest.approx(step, rel=0.05), "the time grows with the voxels"
    assert "not measured" in choice.notes["memory_gb"]


def test_steps_too_small_for_a_law_are_measured_at_once() -> None:
    device = Device({"": 5.0})
    choice = _chooser(device, 2.0, (Candidate((16, 16, 16), 1),)).choose()
    assert device.asked == [(Candidate((16, 16, 16), 1), "")]
    assert choice.measured is not None
    assert choice.predicted_gb == choice.measured.peak_gb


# ---- the plan


def test_a_measured_plan_survives_the_disk(boxes: Cohort, tmp_path: Path) -> None:
    device = Device({"": 50.0})
    plan = measured_plan(tiny_config("plan={memory_gb: 1.5}"), boxes, device)
    assert plan.predicted_memory_gb == pytest.approx(plan.memory_gb, rel=0.01)
    assert plan.memory_gb is not None
    assert plan.memory_gb <= 1.5
    assert plan.memory_law["budget_gb"] == 1.5
    assert plan.memory_law["modes"]["only"]["gb_per_mvoxel"] == pytest.approx(50.0)
    again = read_plan(write_plan(tmp_path / "plan.yaml", plan))
    assert again.patch_size == plan.patch_size
    assert again.memory_law["modes"] == write_read(plan.memory_law["modes"])


def write_read(tree: object) -> object:
    """As YAML gives it back: tuples as lists."""
    import yaml

    from medseg.files import plain

    return yaml.safe_load(yaml.safe_dump(plain(tree)))


def test_a_budget_takes_radiographs_to_smaller_batches_then_sizes(tmp_path: Path) -> None:
    cohort = radiograph_cohort(tmp_path)
    device = Device({"": 10.0}, fixed=0.4)
    wide = measured_plan(tiny_radiograph_config("plan={memory_gb: 9}"), cohort, device)
    assert (wide.size_px, wide.batch_size) == ((224, 224), 8)
    tight = measured_plan(tiny_radiograph_config("plan={memory_gb: 2.1}"), cohort, device)
    assert (tight.size_px, tight.batch_size) == ((224, 224), 3)
    tighter = measured_plan(tiny_radiograph_config("plan={memory_gb: 1}"), cohort, device)
    assert tighter.size_px[0] < 224
    assert tighter.size_px == tighter.patch_size
    assert "taken down" in tighter.reasons["batch_size"]


def test_training_without_a_plan_measures_only_for_a_budget(boxes: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Literal["measured"]] = []

    def measured(*_: object, lungs: None = None) -> None:
        asked.append("measured")

    monkeypatch.setattr("medseg.train.planning.measured_plan", measured)
    assert plan_to_train(tiny_config("plan={}", "device=cpu"), boxes).memory_gb is None
    assert asked == []
    plan_to_train(tiny_config("plan={memory_gb: 4}", "device=cpu"), boxes)
    assert asked == ["measured"]


def test_every_number_has_its_reason(boxes: Cohort) -> None:
    plan = measured_plan(tiny_config("plan={}", "device=cpu"), boxes, Device({"": 1.0}))
    assert {"spacing_mm", "patch_size", "batch_size", "normalise", "memory_gb", "memory_law"} <= set(plan.reasons)
    assert "free" in plan.reasons["memory_law"]


class _Log:
    """What a run would tell MLflow."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.tags: dict[str, str] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics |= metrics

    def set_tag(self, name: str, value: str) -> None:
        self.tags[name] = value


@pytest.mark.parametrize(("factor", "kept"), [(1.0, True), (1.08, True), (0.92, True), (1.3, False), (0.7, False)])
def test_training_says_whether_the_plan_kept_its_word(
    factor: float, kept: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu, log = torch.device("cpu"), _Log()
    promised = factor * peak_memory_gb(cpu)
    plan = Plan(3, (16, 16, 16), 2, predicted_memory_gb=promised, memory_law={"device": "cpu"})
    figures = _hold_contract(plan, cpu, log, 5)
    assert figures["memory_error"] == pytest.approx(factor - 1, abs=0.01)
    assert log.metrics == figures
    assert log.tags["medseg.memory_contract"].startswith("kept" if kept else "missed")
    assert ("Warning: the plan foretold" in capsys.readouterr().err) != kept


def test_a_plan_of_another_device_promises_nothing_here() -> None:
    plan = Plan(3, (16, 16, 16), 2, predicted_memory_gb=9.0, memory_law={"device": "NVIDIA H200"})
    assert _hold_contract(plan, torch.device("cpu"), _Log(), 5) == {}


def test_the_plan_fills_only_what_the_config_left_null() -> None:
    config = tiny_config()
    assert with_plan(config, Plan(3, (16, 16, 16), 2)) is config
    filled = with_plan(config, Plan(3, (16, 16, 16), 2, network={"strides": [4]}))
    assert filled.model.strides == (4,)
    assert filled.model.channels == config.model.channels
    assert with_plan(filled, Plan(3, (16, 16, 16), 2, network={"strides": [4]})) == filled  # so a run can be resumed
