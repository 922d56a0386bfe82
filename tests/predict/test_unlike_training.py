"""Scans unlike the training cohort: flagged with number and limit, from the one pass, whatever the order of windows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_bundle import DENSENET, Threshold, config, plan

from medseg.bundle import Bundle, load_bundle
from medseg.bundle_writing import save_bundle, with_verdict
from medseg.cohort import Case
from medseg.data.cache import Example
from medseg.data.preprocess import prepare
from medseg.files import UserError, read_json, read_rows
from medseg.images import write_nifti
from medseg.ledger import read_ledger
from medseg.models import build_from_config
from medseg.models.features import _mean_and_deviation, mean_features
from medseg.models.precision import Precision, autocast
from medseg.plan import Plan
from medseg.predict import Predictor, segment_array, step
from medseg.report import step as report_step
from medseg.train.distance import fit_cohort_distance
from medseg.verdict import Verdict
from medseg.volume import Volume

Draw = Callable[[np.random.Generator], NDArray[np.float32]]
SHAPE = (20, 18, 16)


def head(rng: np.random.Generator) -> NDArray[np.float32]:
    """A bright ellipsoid with a dark core, never twice the same, in noise; intensities of 0 to 100."""
    middle = np.array(SHAPE) / 2 + rng.normal(0, 1, 3)
    places = np.indices(SHAPE) - middle.reshape(3, 1, 1, 1)
    radius = np.sqrt(((places / (np.array(SHAPE) * rng.uniform(0.3, 0.4)).reshape(3, 1, 1, 1)) ** 2).sum(0))
    image = 20 + 60.0 * (radius < 1) - 30 * (radius < rng.uniform(0.35, 0.5)) + rng.normal(0, 4, SHAPE)
    return image.astype(np.float32)


def inverted(rng: np.random.Generator) -> NDArray[np.float32]:
    return 100 - head(rng)


def noise(rng: np.random.Generator) -> NDArray[np.float32]:
    return rng.normal(40, 25, SHAPE).astype(np.float32)


def bars(rng: np.random.Generator) -> NDArray[np.float32]:
    """Other anatomy of the same intensities."""
    return (20 + 60.0 * (np.indices(SHAPE).sum(0) % 8 < 3) + rng.normal(0, 4, SHAPE)).astype(np.float32)


def examples(draw: Draw, count: int, seed: int, grid: Plan) -> list[Example]:
    """Cases on the network's grid; of a plan of radiographs the middle slice of each."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        array = draw(rng) if grid.spatial_dims == 3 else draw(rng)[SHAPE[0] // 2]
        image = prepare([Volume(array, np.eye(4))], grid).image
        label = np.zeros(SHAPE, np.uint8) if grid.spatial_dims == 3 else None
        found.append(Example(Case(f"c{number}", f"p{number}", ()), image, label, (), 0))
    return found


def bundle(folder: Path, kind: str, precision: Precision = "auto") -> Bundle:
    """A network as it was drawn, with the distance from forty training and sixteen unseen heads."""
    grid = plan() if kind == "segmentation" else plan(spatial_dims=2, patch_size=(32, 32), size_px=(32, 32))
    settings = config(
        model={"name": "unet", "channels": [8, 16], "strides": [2]},
        predict={"mirror_axes": [1], "precision": precision},
    )
    if kind != "segmentation":
        task = {"kind": "classification", "labels": {"a": 0, "b": 1, "c": 2}, "spatial_dims": 2}
        loss = "binary_cross_entropy" if kind == "multi_label" else "cross_entropy"
        task["multi_label"] = kind == "multi_label"
        computing = {"precision": precision}
        settings = config(task=task, model={**DENSENET, "init_features": 16}, loss={"name": loss}, predict=computing)
    torch.manual_seed(1)
    task_of = settings.task
    net = build_from_config(
        settings.model, spatial_dims=task_of.spatial_dims, in_channels=1, out_channels=task_of.out_channels
    )
    train, unseen = examples(head, 40, 1, grid), examples(head, 16, 2, grid)
    distance = fit_cohort_distance(net, train, unseen, grid, settings.predict, torch.device("cpu"), most_cases=100)
    save_bundle(
        folder,
        state_dict=net.state_dict(),
        config=settings,
        plan=grid,
        run_id="r",
        cohort_sha256="c" * 64,
        metrics={},
        distance=distance,
    )
    return load_bundle(folder)


@pytest.fixture(scope="module")
def segmenting(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle(tmp_path_factory.mktemp("bundle") / "b", "segmentation")


def distance_of(predictor: Predictor, image: NDArray[np.float32], precision: Precision | None = None) -> float:
    """As `predict` measures it, of an image on the network's grid, in the precision of the bundle or in another."""
    made = predictor.bundle
    classifies = made.config.task.kind == "classification"
    computing = autocast(precision or made.config.predict.precision, predictor.device, one_image=classifies)
    with predictor._measuring() as measured, torch.inference_mode(), computing:
        if classifies:
            predictor.net(torch.from_numpy(image)[None])
        else:
            segment_array(predictor.net, image, made.plan.patch_size, 0.5, mirror_axes=(1,))
    found = measured()
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["segmentation", "classification", "multi_label"])
def test_cases_like_the_cohort_are_not_flagged_and_others_are(kind: str, tmp_path: Path) -> None:
    made = bundle(tmp_path / "b", kind)
    assert made.distance is not None
    limit, predictor = made.distance.limit, Predictor(made)
    assert limit is not None
    for draw, flagged in ((head, False), (inverted, True), (noise, True), (bars, True)):
        cases = examples(draw, 20 if draw is head else 3, 9, made.plan)
        beyond = [distance_of(predictor, case.image) > limit for case in cases]
        assert sum(beyond) <= 1 if not flagged else all(beyond), draw.__name__


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_measures_in_the_precision_of_prediction(kind: str, precision: Precision, tmp_path: Path) -> None:
    made = bundle(tmp_path / "b", kind, precision)
    assert made.distance is not None
    predictor, wanted, unseen = Predictor(made), made.distance.members[0].held_out, examples(head, 16, 2, made.plan)
    other: Precision = "bf16" if precision == "fp32" else "fp32"
    off = [
        [abs(distance_of(predictor, case.image, computing) - one) for case, one in zip(unseen, wanted, strict=True)]
        for computing in (precision, other)
    ]
    assert max(off[0]) < 1e-3 < max(off[1])


def test_the_distance_does_not_change_with_the_order_of_windows_or_their_batches(segmenting: Bundle) -> None:
    predictor, (case,) = Predictor(segmenting), examples(head, 1, 5, segmenting.plan)
    wanted = distance_of(predictor, case.image, "fp32")
    for window_batch in (2, 3):
        with predictor._measuring() as measured:
            segment_array(predictor.net, case.image, (16, 16, 16), 0.5, window_batch=window_batch, mirror_axes=(1,))
        assert measured() == pytest.approx(wanted, rel=1e-5)
    image = torch.from_numpy(case.image)[None]
    parts = [image[:, :, i : i + 16, j : j + 16] for i in (0, 4) for j in (0, 2)]
    found = []
    for order in (parts, parts[::-1]):
        with mean_features(predictor.net, classifies=False) as (features,), torch.inference_mode():
            for part in order:
                predictor.net(part)
                predictor.net(torch.full_like(part, 7.0))  # padding, or even air, says nothing
        found.append(features.mean())
    assert np.allclose(*found, rtol=1e-6)


def test_measuring_costs_no_pass_and_changes_no_label(segmenting: Bundle, tmp_path: Path) -> None:
    without, passes, masks = replace(segmenting, distance=None), [], []
    write_nifti(tmp_path / "scan.nii.gz", Volume(head(np.random.default_rng(3)), np.eye(4)))
    for made in (segmenting, without):
        predictor, calls = Predictor(made), []
        predictor.net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        prediction = predictor.predict_file(tmp_path / "scan.nii.gz")
        passes.append(len(calls))
        masks.append(prediction.mask.array)
        assert (prediction.feature_distance is None) == (made is without)
    assert passes[0] == passes[1] > 0
    assert np.array_equal(*masks)
    assert not any(module._forward_hooks for module in Predictor(segmenting).net.modules())
    other = Predictor(segmenting, net=Threshold()).predict_file(tmp_path / "scan.nii.gz")
    assert other.feature_distance is None, "nothing is known of another network's features"


def test_result_ledger_queue_and_page_name_the_distance_and_its_limit(segmenting: Bundle, tmp_path: Path) -> None:
    rng, limit = np.random.default_rng(4), round(segmenting.distance.limit, 4)
    for name, draw in (("usual", head), ("odd", bars)):
        write_nifti(tmp_path / "scans" / f"{name}.nii.gz", Volume(draw(rng), np.eye(4)))
    step.run(segmenting, [tmp_path / "scans"], tmp_path / "out")
    rows = {row.case_id: row for row in read_ledger(tmp_path / "out" / "ledger.csv")}
    for name, beyond in (("usual", False), ("odd", True)):
        result = read_json(tmp_path / "out" / name / "result.json")
        distance = result["feature_distance"]
        flags = [flag for flag in result["flags"] if flag["code"] == "unlike_training"]
        assert distance["limit"] == limit
        assert (rows[name].feature_distance, rows[name].distance_limit) == (distance["value"], limit)
        assert (distance["value"] > limit) == beyond == bool(flags)
        assert all((flag["number"], flag["threshold"]) == (distance["value"], limit) for flag in flags)
        assert ("unlike the training cohort" in rows[name].reason) == beyond
        assert result["windows"] == {"all": 4, "even": 0, "air": 0}
    queue = read_rows(tmp_path / "out" / "review_queue.csv")
    assert [row["case_id"] for row in queue] == ["odd", "usual"]
    page = report_step.run(segmenting.config.report, tmp_path / "out").paths["report"].read_text()
    assert "Distance from training" in page
    assert "those unlike the training cohort at the top" in page


def test_a_new_verdict_keeps_the_distance_and_a_changed_file_is_noticed(tmp_path: Path) -> None:
    made = bundle(tmp_path / "b", "classification")
    again = load_bundle(with_verdict(made, tmp_path / "again", Verdict("b", "temperature", 0.5)))
    assert again.distance.facts() == made.distance.facts() == made.facts["feature_distance"]
    assert f"beyond {made.distance.limit:.3g}" in (again.folder / "MODEL_CARD.md").read_text()
    path = again.folder / "distance.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"distance\.safetensors differs from its hash"):
        load_bundle(again.folder)


def test_deviations_are_those_of_torch_for_either_layout() -> None:
    x = 5 + 2 * torch.randn(2, 3, 20, 30, 10, generator=torch.Generator().manual_seed(0))
    deviation, mean = torch.std_mean(x.double().flatten(2), 2)
    for laid_out in (x, x.contiguous(memory_format=torch.channels_last_3d)):
        found = _mean_and_deviation(laid_out).double()
        torch.testing.assert_close(found, torch.cat([mean, deviation], 1), rtol=1e-6, atol=0)
