"""The step `explain`: maps on the scan's own grid, resumable, one bad case never in the way of the others."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medseg.cohort import Case, Cohort
from medseg.config import ExplainChecksConfig, ExplainConfig
from medseg.explain.passmark import CHECKS
from medseg.explain.step import run
from medseg.explain.window import choose_window, cut, paste
from medseg.files import UserError, read_json, read_rows, sha256_file, write_json
from medseg.images import read_image, write_nifti, write_png
from medseg.plan import Plan
from medseg.volume import Volume, world_of

ALL_OFF = dict.fromkeys(CHECKS)
LABELS = {"object": 1}
CLASSES = {"normal": 0, "lesion": 1}
BUNDLE = {"sha256": "b" * 64}
PLAN = Plan(spatial_dims=3, patch_size=(16, 16, 16), batch_size=8, spacing_mm=(2.0, 2.0, 2.0))
FLAT_PLAN = Plan(spatial_dims=2, patch_size=(32, 32), batch_size=4, size_px=(32, 32))
OBLIQUE = np.array([[-0.3, 1.7, 0.4, 30], [1.4, 0.5, -0.3, -40], [-0.2, 0.1, 2.6, 12], [0, 0, 0, 1]])


class Segmenter(nn.Module):
    """Class 1 scores the (normalised) intensity, class 0 a constant: bright voxels are the object."""

    def __init__(self, dims: int = 3) -> None:
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        self.body, self.head = conv(1, 3, 1, bias=False), conv(3, 2, 1)
        self.body.weight.data = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, *[1] * dims)
        self.head.weight.data.zero_()
        self.head.weight.data.view(2, 3)[1, 0] = 1.0
        self.head.bias.data = torch.tensor([2.0, 0.0])

    def forward(self, x_BCDHW: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x_BCDHW))


class Classifier(nn.Module):
    """The lesion's logit is the mean of the bright part of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.act, self.head = nn.Conv2d(1, 1, 1), nn.ReLU(inplace=True), nn.Linear(1, 2)
        self.body.weight.data.fill_(1.0)
        self.body.bias.data.fill_(-1.0)
        self.head.weight.data = torch.tensor([[-1.0], [1.0]])

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.body(x_BCHW)).mean((2, 3), keepdim=True).flatten(1))


def _volume(shape: tuple[int, ...] = (28, 22, 18)) -> tuple[np.ndarray, np.ndarray]:
    """A bright box well inside the field of view, and its mask."""
    mask = np.zeros(shape, np.uint8)
    mask[6:12, 8:14, 5:10] = 1
    return np.where(mask > 0, 600, 100).astype(np.int16), mask


def _volume_cohort(tmp_path: Path, names: str = "ab", affine: np.ndarray = OBLIQUE) -> tuple[Cohort, Path]:
    folder, predictions = tmp_path / "cohort", tmp_path / "predictions"
    cases = []
    for name in names:
        image, mask = _volume()
        path = write_nifti(folder / f"{name}.nii.gz", Volume(image, affine))
        write_nifti(predictions / name / "mask.nii.gz", Volume(mask, affine))
        write_json(predictions / name / "result.json", _result(sha256_file(path)))
        cases.append(Case(name, name, (path.name,), split="test", shape=image.shape))
    return Cohort(folder, tuple(cases), LABELS), predictions


def _result(digest: str, **more: object) -> dict[str, object]:
    return {"status": "done", "input_sha256": digest, "bundle": BUNDLE, "probs": {}, "predicted": None, **more}


def _radiographs(tmp_path: Path, names: str = "ab") -> tuple[Path, Path]:
    scans, predictions = tmp_path / "scans", tmp_path / "predictions"
    for name in names:
        image = np.full((48, 64), 50, np.uint8)
        image[8:16, 40:52] = 200
        image[0, 0] = ord(name)
        path = write_png(scans / f"{name}.png", image)
        probs = {"normal": 0.1, "lesion": 0.9}
        write_json(predictions / name / "result.json", _result(sha256_file(path), probs=probs, predicted="lesion"))
    return scans, predictions


def _centre_mm(values: np.ndarray, affine: np.ndarray) -> np.ndarray:
    index = np.argwhere(values > 0)
    weights = values[values > 0].astype(np.float64)
    return world_of(affine, (index * weights[:, None]).sum(0)[None] / weights.sum())[0]


@pytest.mark.parametrize("affine", [OBLIQUE, np.diag([-2.0, 1.5, 3.0, 1.0]), OBLIQUE[:, [2, 0, 1, 3]]])
def test_the_map_of_a_volume_lies_where_the_object_is_in_the_world(tmp_path: Path, affine: np.ndarray) -> None:
    cohort, predictions = _volume_cohort(tmp_path, "a", affine)
    config = ExplainConfig(method="layercam", layer="body")
    result = run(config, Segmenter(), PLAN, LABELS, cohort, "test", predictions=predictions)
    assert (result.status, result.figures["maps"]) == ("done", 1)
    found = read_image(predictions / "a" / "explanation" / "map.nii.gz")
    image, mask = _volume()
    assert found.array.dtype == np.float32
    assert found.array.shape == image.shape
    np.testing.assert_allclose(found.affine, affine, atol=1e-5)
    np.testing.assert_allclose(_centre_mm(found.array, affine), _centre_mm(mask, affine), atol=0.4)
    about = read_json(predictions / "a" / "explanation" / "explanation.json")
    assert (about["method"], about["layer"], about["target"]) == ("layercam", "body", "object")
    assert about["evidence"] is True
    assert about["raw_max"] == pytest.approx(float(found.array.max()))
    energy = about["checks"]["energy"]
    assert energy["value"] > 0.8
    assert (energy["threshold"], energy["passed"]) == (0.5, True)


def test_a_volume_too_large_for_one_pass_is_explained_around_the_prediction(tmp_path: Path) -> None:
    """The window covers the object, so the map is the same as in one pass."""
    cohort, predictions = _volume_cohort(tmp_path, "a", np.diag([2.0, 2.0, 2.0, 1.0]))
    config = ExplainConfig(method="layercam", layer="body")
    maps = []
    for batch_size in (8, 1):
        plan = Plan(spatial_dims=3, patch_size=(16, 16, 16), batch_size=batch_size, spacing_mm=(2.0, 2.0, 2.0))
        write_json(predictions / "a" / "result.json", _result(str(batch_size)))  # another input: not resumed
        run(config, Segmenter(), plan, LABELS, cohort, predictions=predictions)
        maps.append(read_image(predictions / "a" / "explanation" / "map.nii.gz").array)
    about = read_json(predictions / "a" / "explanation" / "explanation.json")
    assert [last - first for first, last in about["window"]] == [16, 16, 16]
    assert maps[0].max() > 0
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-6)


def test_radiographs_from_files_explain_the_predicted_class(tmp_path: Path) -> None:
    scans, predictions = _radiographs(tmp_path)
    result = run(ExplainConfig(), Classifier(), FLAT_PLAN, CLASSES, [scans], predictions=predictions)
    assert result.figures["maps"] == 2
    activation = np.load(predictions / "a" / "explanation" / "map.npy", allow_pickle=False)
    assert (activation.shape, activation.dtype) == ((48, 64), np.float32)
    about = read_json(predictions / "a" / "explanation" / "explanation.json")
    assert (about["target"], about["layer"], about["evidence"]) == ("lesion", "act", True)
    row, column = np.argwhere(activation == activation.max()).mean(axis=0)
    assert 8 <= row < 16
    assert 40 <= column < 52


def test_no_evidence_is_said_and_not_stretched(tmp_path: Path) -> None:
    """Everything bright speaks for the lesion, so nothing speaks for normal."""
    scans, predictions = _radiographs(tmp_path, "a")
    config = ExplainConfig(target="normal")
    result = run(config, Classifier(), FLAT_PLAN, CLASSES, [scans], predictions=predictions)
    about = read_json(predictions / "a" / "explanation" / "explanation.json")
    assert (about["target"], about["raw_max"], about["evidence"]) == ("normal", 0, False)
    assert result.figures["no_evidence"] == 1


def test_a_scan_is_found_again_by_its_bytes_and_not_mistaken_for_a_changed_one(tmp_path: Path) -> None:
    scans, predictions = _radiographs(tmp_path, "abc")
    (predictions / "a").rename(predictions / "case-pseudonym")
    write_png(scans / "b.png", np.eye(64, dtype=np.uint8))
    (scans / "c.png").unlink()
    result = run(ExplainConfig(), Classifier(), FLAT_PLAN, CLASSES, [scans], predictions=predictions)
    rows = {row["case_id"]: row for row in read_rows(predictions / "explanations.csv")}
    assert rows["case-pseudonym"]["status"] == "done"
    assert (result.status, rows["b"]["status"], rows["c"]["status"]) == ("partial", "failed", "failed")
    assert "changed" in rows["b"]["reason"]
    assert "not found" in rows["c"]["reason"]


def test_run_again_redoes_only_what_is_missing_or_was_made_otherwise(tmp_path: Path) -> None:
    scans, predictions = _radiographs(tmp_path)
    first, second = (predictions / name / "explanation" / "explanation.json" for name in "ab")

    def explain(config: ExplainConfig) -> tuple[int, int]:
        run(config, Classifier(), FLAT_PLAN, CLASSES, [scans], predictions=predictions)
        return first.stat().st_mtime_ns, second.stat().st_mtime_ns

    before = explain(ExplainConfig())
    second.unlink()  # as when killed between the map and its description
    again = explain(ExplainConfig())
    assert again[0] == before[0]
    assert again[1] != before[1]
    changed = explain(ExplainConfig(method="hirescam"))
    assert changed[0] != again[0]
    assert read_json(first)["method"] == "hirescam"


def test_one_bad_case_does_not_stop_the_others_and_rejected_cases_are_not_tried(tmp_path: Path) -> None:
    cohort, predictions = _volume_cohort(tmp_path, "abc")
    (cohort.folder / "a.nii.gz").write_bytes(b"broken")
    write_json(predictions / "c" / "result.json", {"status": "rejected", "reason": "tilted"})
    result = run(ExplainConfig(layer="body"), Segmenter(), PLAN, LABELS, cohort, "test", predictions=predictions)
    rows = read_rows(predictions / "explanations.csv")
    assert [(row["case_id"], row["status"]) for row in rows] == [("a", "failed"), ("b", "done")]
    assert "cannot be read" in rows[0]["reason"]
    assert result.exit_code == 3
    assert not list((predictions / "a").glob("explanation/*"))


def test_at_most_max_cases_and_only_of_the_split(tmp_path: Path) -> None:
    cohort, predictions = _volume_cohort(tmp_path, "abcd")
    config = ExplainConfig(layer="body", max_cases=2)
    assert run(config, Segmenter(), PLAN, LABELS, cohort, predictions=predictions).figures["maps"] == 2
    with pytest.raises(UserError, match="val"):
        run(config, Segmenter(), PLAN, LABELS, cohort, "val", predictions=predictions)
    with pytest.raises(UserError, match="liver"):
        run(ExplainConfig(target="liver"), Segmenter(), PLAN, LABELS, cohort, predictions=predictions)


def test_window_covers_the_whole_where_it_fits_and_the_region_where_not() -> None:
    region = np.zeros((40, 13, 70), bool)
    region[30:38, 2:9, 60:64] = True
    whole = choose_window(region, (16, 16, 32), 10**6)
    assert whole == ((0, 48), (0, 16), (0, 96))
    window = choose_window(region, (16, 16, 32), 16 * 16 * 32)
    assert [last - first for first, last in window] == [16, 16, 32]
    image = np.random.default_rng(0).random((1, 40, 13, 70))
    for chosen in (whole, window):
        part = cut(image, chosen)
        assert part.shape[1:] == tuple(last - first for first, last in chosen)
        pasted = paste(part[0], chosen, region.shape)
        np.testing.assert_array_equal(pasted[region], image[0][region])
    np.testing.assert_array_equal(paste(cut(image, whole)[0], whole, region.shape), image[0])
    inside = paste(cut(region[None], window)[0], window, region.shape)
    assert inside.sum() == region.sum(), "the window leaves nothing of the region out"


def _of(predictions: Path, case_id: str) -> dict[str, object]:
    return read_json(predictions / case_id / "explanation" / "explanation.json")


def test_a_map_that_fails_is_named_in_its_case_the_table_and_the_cohort(tmp_path: Path) -> None:
    """The lungs are said to be where the network does not look."""
    scans, predictions = _radiographs(tmp_path)
    regions = tmp_path / "regions"
    wrong = np.zeros((48, 64), np.uint8)
    wrong[40:, :20] = 255
    right = np.zeros((48, 64), np.uint8)
    right[8:16, 40:52] = 255
    write_png(regions / "a.png", wrong)
    write_png(regions / "b.png", right)
    checks = ExplainChecksConfig(randomisation=None, dilate_px=1)
    config = ExplainConfig(checks=checks)
    result = run(config, Classifier(), FLAT_PLAN, CLASSES, [scans], predictions=predictions, regions=regions)
    bad, good = _of(predictions, "a"), _of(predictions, "b")
    assert "energy" in bad["failed_checks"]
    assert bad["checks"]["energy"]["value"] < 0.05
    assert bad["passed"] is False
    assert "energy" not in good["failed_checks"]
    assert (predictions / "a" / "explanation" / "map.npy").is_file(), "shown, with the failure named"
    rows = read_rows(predictions / "explanations.csv")
    assert "energy" in rows[0]["failed_checks"]
    summary = read_json(predictions / "explanation.json")["gradcam/act"]
    assert summary["maps"] == 2
    assert (summary["checks"]["energy"]["n"], summary["checks"]["energy"]["share"]) == (2, 0.5)
    assert summary["checks"]["energy"]["ci_low"] is not None
    assert result.figures["failed_checks"] >= 1
    assert set(good["checks"]) == {"energy", "deletion", "insertion", "road", "stability", "agreement"}
    assert good["checks"]["deletion"]["value"] > 0


def test_a_failed_map_is_withheld_when_asked_and_its_old_file_goes(tmp_path: Path) -> None:
    scans, predictions = _radiographs(tmp_path, "a")
    wrong = np.zeros((48, 64), np.uint8)
    wrong[40:, :20] = 255
    write_png(tmp_path / "regions" / "a.png", wrong)
    map_path = predictions / "a" / "explanation" / "map.npy"
    for on_failure, kept in (("show", True), ("withhold", False), ("show", True)):
        config = ExplainConfig(checks=ExplainChecksConfig(**ALL_OFF | {"energy": 0.5}), on_failure=on_failure)
        given = {"predictions": predictions, "regions": tmp_path / "regions"}
        result = run(config, Classifier(), FLAT_PLAN, CLASSES, [scans], **given)
        assert map_path.is_file() is kept
        assert _of(predictions, "a")["withheld"] is not kept
        assert result.figures["withheld"] == (not kept)


def test_which_cases_are_explained(tmp_path: Path) -> None:
    scans, predictions = _radiographs(tmp_path, "abcdef")
    for case_id, p in zip("abcdef", (0.9, 0.8, 0.51, 0.99, 0.6, 0.7), strict=True):
        path = predictions / case_id / "result.json"
        write_json(path, read_json(path) | {"probs": {"normal": 1 - p, "lesion": p}})
    off = ExplainChecksConfig(**ALL_OFF)

    def explained(**more: object) -> list[str]:
        config = ExplainConfig(max_cases=2, checks=off.model_copy(update={"seed": more.pop("seed", 0)}), **more)  # type: ignore[arg-type]
        run(config, Classifier(), FLAT_PLAN, CLASSES, [scans], predictions=predictions)
        return [row["case_id"] for row in read_rows(predictions / "explanations.csv")]

    assert explained() == ["a", "b"]
    assert explained(cases="doubtful") == ["c", "e"]
    drawn = {tuple(explained(cases="random", seed=seed)) for seed in range(6)}
    assert len(drawn) > 2
    assert explained(cases="random", seed=3) == explained(cases="random", seed=3)
    cohort, masks = _volume_cohort(tmp_path / "volumes", "a")
    config = ExplainConfig(layer="body", cases="doubtful")
    with pytest.raises(UserError, match="doubtful"):
        run(config, Segmenter(), PLAN, LABELS, cohort, predictions=masks)
