"""The probe is a training: its figures are those of a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from synthetic import segmentation_cohort, tiny_config, tiny_radiograph_config

from medseg.config import Config
from medseg.data.cache import load_examples, release
from medseg.files import UserError
from medseg.plan import Plan
from medseg.train import probe as probing
from medseg.train.device import peak_memory_gb, reset_peak_memory
from medseg.train.planning import make_plan
from medseg.train.probe import OutOfMemory, _examples, _validate_one_window, probe
from medseg.train.step import assemble, build_network, prepare_torch
from medseg.train.validate import validate

CPU = torch.device("cpu")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux's record of the peak")


@LINUX
def test_the_peak_is_this_process_own_and_starts_anew() -> None:
    held = bytearray(400_000_000)
    assert peak_memory_gb(CPU) > 0.4
    code = "import torch; from medseg.train.device import peak_memory_gb; print(peak_memory_gb(torch.device('cpu')))"
    before = peak_memory_gb(CPU)
    del held
    reset_peak_memory(CPU)
    assert peak_memory_gb(CPU) < before - 0.35
    held = bytearray(1_500_000_000)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    del held
    assert float(child.stdout) < 1.2  # `getrusage` would report the parent's 1.5 GB


def test_a_trial_trains_validates_and_measures() -> None:
    config = tiny_config("device=cpu", "train.precision=fp32")
    plan = Plan(spatial_dims=3, patch_size=(16, 16, 16), batch_size=2, spacing_mm=(1.0, 1.0, 1.0))
    found = probe(config, plan, case_size=(160, 160, 160))
    assert 0.2 < found["step_gb"] < 1.2
    # Three classes, blended, argmaxed and compared: at least logits and one copy in fp32 of 160³ voxels.
    assert found["peak_gb"] > found["step_gb"] + 2 * 3 * 4 * 160**3 / 1e9
    assert found["step_seconds"] > 0
    assert 0 <= found["data_wait_share"] < 1


SETS = ("task.multi_label=true", "loss={name: binary_cross_entropy, balance: true}", "verdict={}")


@pytest.mark.parametrize("config", [tiny_config(), tiny_radiograph_config(), tiny_radiograph_config(*SETS)])
def test_made_up_cases_train_and_validate_like_real_ones(config: Config) -> None:
    dims = config.task.spatial_dims
    size = (32,) * dims if dims == 2 else (16,) * dims
    plan = Plan(spatial_dims=dims, patch_size=size, batch_size=2)
    device, _ = prepare_torch(config.model_copy(update={"device": "cpu"}))
    training, source, loss = assemble(config, plan, build_network(config, plan), _examples(config, size, 4), device)
    batch = source.make(source.draw(0))
    assert batch.image.shape == (2, 1, *size)
    assert torch.isfinite(loss(training.net(batch.image), batch.target))
    case = _examples(config, (32,) * dims, 1)
    arguments = {"loss": loss, "examples": case, "plan": plan, "labels": config.task.labels, "device": device}
    scores = _validate_one_window(training.average, **arguments, bf16=False)
    assert scores.keys() == validate(training.average, **arguments, bf16=False).keys()


class _Done:
    def __init__(self, returncode: int, stderr: str) -> None:
        self.returncode, self.stderr, self.stdout = returncode, stderr, ""


@pytest.mark.parametrize(
    ("code", "stderr", "error"),
    [
        (-9, "", OutOfMemory),
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", OutOfMemory),
        (1, "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", OutOfMemory),
        (1, "ValueError: strides", UserError),
    ],
)
def test_the_cause_of_a_failed_trial(
    monkeypatch: pytest.MonkeyPatch, code: int, stderr: str, error: type[Exception]
) -> None:
    monkeypatch.setattr(probing.subprocess, "run", lambda *a, **k: _Done(code, stderr))
    plan = Plan(spatial_dims=3, patch_size=(16, 16, 16), batch_size=2)
    with pytest.raises(error, match=r"plan\.patch_size \[16, 16, 16\]"):
        probe(tiny_config(), plan)


def test_the_order_and_the_answer_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: object, **given: str) -> _Done:
        order = json.loads(given["input"])
        assert order["plan"]["memory_mode"] == "checkpoint"
        done = _Done(0, "")
        done.stdout = 'noise\n{"step_gb": 1.0}\n'
        return done

    monkeypatch.setattr(probing.subprocess, "run", answer)
    plan = Plan(spatial_dims=3, patch_size=(16, 16, 16), batch_size=2, memory_mode="checkpoint")
    assert probe(tiny_config(), plan) == {"step_gb": 1.0}


@LINUX
def test_pages_of_cached_cases_leave_the_process(tmp_path: Path) -> None:
    cohort = segmentation_cohort(tmp_path / "cohort", 4)
    plan = make_plan(tiny_config(), cohort)
    example = load_examples(cohort, cohort.cases, plan, tmp_path / "cache")[0]
    once = example.image.sum()

    def resident() -> int:
        """Kilobytes of the mapping that are in this process."""
        text = Path("/proc/self/smaps").read_text().split(Path(example.image.filename).name)[1]
        return int(text.split("Rss:")[1].split()[0])

    assert resident() > 0
    release(example.image)
    assert resident() == 0
    assert example.image.sum() == once  # and come back when asked for
    release(example.image[0, :4] + 1)  # an array in memory is left alone
