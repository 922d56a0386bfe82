"""The bundle: what comes back is what was saved, bit for bit, or nothing comes back."""

import json
from pathlib import Path

import pytest
import torch

from medseg.bundle import Bundle, load_bundle, read_weights
from medseg.bundle_writing import save_bundle
from medseg.config import Config, validate_config
from medseg.files import UserError, read_json, sha256_file
from medseg.models import build_from_config
from medseg.models.layout import placed
from medseg.models.norms import with_norms
from medseg.plan import Plan
from medseg.predict import load_network
from medseg.runs import create_run

CONFIG = validate_config(
    {
        "name": "tiny",
        "task": {"kind": "segmentation", "labels": {"left": 1, "right": 2}, "channels": ["t1", "t2"]},
        "model": {"name": "unet", "channels": [4, 8], "strides": [2]},
        "loss": {"name": "dice_ce"},
    },
    "test",
)
PLAN = Plan(3, (16, 16, 16), 2, spacing_mm=(1.0, 1.0, 1.5), fingerprint={"cases": 7}, reasons={"batch_size": "two"})


def network(config: Config = CONFIG) -> torch.nn.Module:
    torch.manual_seed(1)
    return build_from_config(config.model, spatial_dims=3, in_channels=2, out_channels=3).eval()


def save(folder: Path, config: Config = CONFIG, **facts: object) -> Path:
    given = {"run_id": "r1", "cohort_sha256": "c" * 64, "metrics": {"val_loss": 0.25}, **facts}
    return save_bundle(folder, state_dict=network().state_dict(), config=config, plan=PLAN, **given)  # type: ignore[arg-type]


def load(folder: Path) -> Bundle:
    return load_bundle(folder)


def test_round_trip_gives_equal_logits_bit_for_bit(tmp_path: Path) -> None:
    bundle = load(save(tmp_path / "b"))
    x = torch.randn(1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same = with_norms(placed(network(), torch.device("cpu")))
        assert torch.equal(load_network(bundle, torch.device("cpu"))(x), same(x))
    assert (bundle.config, bundle.plan, bundle.labels) == (CONFIG, PLAN, {"left": 1, "right": 2})
    assert bundle.identity() == {"name": "tiny", "sha256": bundle.sha256, "run_id": "r1"}
    assert (bundle.temperature, bundle.operating_point) == (1.0, None)


def test_hash_names_the_content(tmp_path: Path) -> None:
    first, same = load(save(tmp_path / "a")), load(save(tmp_path / "b"))
    assert first.sha256 == same.sha256
    assert load(save(tmp_path / "c", run_id="r2")).sha256 != first.sha256
    assert load(save(tmp_path / "d", operating_point={"target": "left", "threshold": 0.4})).sha256 != first.sha256
    facts = read_json(tmp_path / "a" / "bundle.json")
    assert facts["files"]["weights.safetensors"] == sha256_file(tmp_path / "a" / "weights.safetensors")


@pytest.mark.parametrize("name", ["weights.safetensors", "config.yaml", "plan.yaml", "MODEL_CARD.md"])
def test_a_changed_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "b") / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} differs from its hash"):
        load(tmp_path / "b")
    path.unlink()
    with pytest.raises(UserError, match=rf"{name} is missing"):
        load(tmp_path / "b")


def test_changed_facts_are_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "b", operating_point={"target": "left", "threshold": 0.4}) / "bundle.json"
    facts = json.loads(path.read_text())
    facts["operating_point"]["threshold"] = 0.1
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="was changed since"):
        load(tmp_path / "b")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    other = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"channels": (4, 16)})})
    bundle = load(save(tmp_path / "b", other))
    with pytest.raises(UserError, match="weights do not fit model 'unet'"):
        load_network(bundle)


def test_saving_again_replaces_the_whole_bundle(tmp_path: Path) -> None:
    save(tmp_path / "b")
    (tmp_path / "b" / "stray").write_text("x")
    save(tmp_path / "b", run_id="r2")
    assert load(tmp_path / "b").run_id == "r2"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert not (tmp_path / "b" / "stray").exists()


def test_a_failed_save_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "b")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path / "b", run_id="r2")
    assert load(tmp_path / "b").run_id == "r1"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_found_by_folder_run_folder_or_run_id(tmp_path: Path) -> None:
    run = create_run(tmp_path, "tiny")
    save(run.path / "bundle", run_id=run.id)
    for name in (run.path / "bundle", run.path, run.id):
        assert load_bundle(name, tmp_path).run_id == run.id
    with pytest.raises(UserError, match="neither a bundle folder"):
        load_bundle("no/such/folder", tmp_path)
    with pytest.raises(UserError, match="holds no bundle"):
        load_bundle(tmp_path, tmp_path)
    with pytest.raises(UserError, match="is not in"):
        load_bundle("no-such-run", tmp_path)


def test_card_says_what_it_is_and_what_it_is_not_for(tmp_path: Path) -> None:
    card = (save(tmp_path / "b") / "MODEL_CARD.md").read_text()
    for fact in (
        "left, right",
        "t1, t2",
        "7 cases",
        "c" * 64,
        "Research only",
        "| val loss | 0.25 |",
        "1 × 1 × 1.5 mm",
    ):
        assert fact in card
    assert "simulated" not in card
    simulated = CONFIG.model_copy(update={"ingest": CONFIG.ingest.model_copy(update={"simulated": True})})
    assert "simulated" in (save(tmp_path / "s", simulated) / "MODEL_CARD.md").read_text()


def test_nothing_is_pickled_and_any_layout_of_weights_is_saved(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    state = {"a": shared, "b": shared.T, "count": torch.tensor(3)}
    folder = save_bundle(
        tmp_path / "b", state_dict=state, config=CONFIG, plan=PLAN, run_id="r", cohort_sha256="", metrics={}
    )
    back = read_weights(load(folder))
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert not any(b"\x80\x04" in path.read_bytes()[:2] or path.suffix == ".pkl" for path in folder.iterdir())
