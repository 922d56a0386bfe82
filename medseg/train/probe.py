"""Measure training: peak memory and time, in a process of its own so that nothing else counts.

The process runs the loop that trains, over made-up cases of the plan's size: batches are drawn and augmented ahead,
the optimiser, the moving average, the checkpoint and the validation of the largest case are the real ones. Of that
validation only the first window is computed; the others are filled with 0, so that a large case costs no minutes.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medseg.config import Config, dump_config, validate_config
from medseg.files import UserError, dump_json
from medseg.plan import Plan, plan_of

_OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "can't allocate memory", "MemoryError")
_KILLED = 9
_TIMEOUT_S = 900


class OutOfMemory(Exception):
    """The trial was stopped by the device or the system."""


def probe(
    config: Config, plan: Plan, *, steps: int = 3, case_size: Sequence[int] | None = None, timeout_s: float = _TIMEOUT_S
) -> dict[str, float]:
    """Train a few steps in the plan's patch, batch and memory mode, on random data.

    Args:
        case_size: voxels per axis of the largest validation case on the network's grid; None leaves validation out.
        timeout_s: seconds after which the trial is given up.

    Returns:
        `step_gb`: peak (1e9 bytes; resident set of the process on a CPU, allocated on a GPU) of the steps; `peak_gb`:
        with validation and a checkpoint after them; `step_seconds`: median after the first step; `data_wait_share`.

    Raises:
        OutOfMemory: the trial did not fit the device.
        UserError: it failed for another reason.
    """
    order = {"config": dump_config(config), "plan": plan, "steps": steps, "case_size": case_size}
    what = f"plan.patch_size {list(plan.patch_size)} with plan.batch_size {plan.batch_size}"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "medseg.train.probe"],
            input=dump_json(order),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{what}: a trial took longer than {timeout_s:.0f} s; make it smaller.") from error
    if done.returncode != 0:
        cause = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
        if done.returncode == -_KILLED or any(sign in cause for sign in _OUT_OF_MEMORY):
            raise OutOfMemory(what)
        raise UserError(f"{what}: a trial failed ({cause}); change the patch, the batch or the model.")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _main() -> None:
    import yaml

    order = json.load(sys.stdin)
    config = validate_config(yaml.safe_load(order["config"]), "the probe's config")
    print(json.dumps(_measure(config, plan_of(order["plan"]), order["steps"], order["case_size"])))


def _measure(config: Config, plan: Plan, steps: int, case_size: Sequence[int] | None) -> dict[str, float]:
    import numpy as np

    from medseg.config import TrackingConfig
    from medseg.tracking.store import open_store
    from medseg.train import step
    from medseg.train.device import peak_memory_gb, reset_peak_memory
    from medseg.train.loop import train_loop

    config = step.with_plan(config, plan)
    device, bf16 = step.prepare_torch(config)
    annotated = _annotated(plan)
    examples = _examples(config, plan.patch_size, 2 * plan.batch_size, annotated)
    training, source, loss = step.assemble(config, plan, step.build_network(config, plan), examples, device)
    validate = None
    if case_size:
        validate = partial(
            _validate_one_window,
            loss=loss,
            examples=_examples(config, case_size, 1, annotated),
            plan=plan,
            labels=config.task.labels,
            device=device,
            bf16=bf16,
        )
    # One step is one epoch here, so that the history has a row per step.
    settings = config.train.model_copy(update={"epochs": steps, "steps_per_epoch": 1, "validate_every": steps + 1})
    with tempfile.TemporaryDirectory(prefix="medseg-probe-") as folder:
        if device.type == "cpu":  # MLflow's store is resident in training too: 70 MB, a tenth of a small network's peak
            open_store(Path(folder), TrackingConfig())
        reset_peak_memory(device)
        train_loop(
            training,
            source,
            loss,
            settings,
            folder=Path(folder),
            device=device,
            bf16=bf16,
            validate=validate,
            on_epoch=lambda figures: None,
            stop=lambda: False,
        )
    rows = training.history[1:]
    return {
        "step_gb": round(training.history[-1]["peak_memory_gb"], 4),
        "peak_gb": round(peak_memory_gb(device), 4),
        "step_seconds": round(float(np.median([row["seconds"] for row in rows])), 4),
        "data_wait_share": round(float(np.median([row["data_wait_share"] for row in rows])), 4),
    }


def _annotated(plan: Plan) -> tuple[bool, ...]:
    """Which classes a made-up label tells of: as few as the cohort's, since masked classes take memory too."""
    classes, cases = plan.fingerprint.get("classes", {}), plan.fingerprint.get("read_cases", 0)
    known = [found.get("annotated", cases) == cases for found in classes.values()]
    return () if all(known) else (True, *known)


def _examples(config: Config, size: Sequence[int], count: int, annotated: tuple[bool, ...] = ()) -> list[Any]:
    """Made-up cases that share one noise image; every class that is annotated occurs."""
    import numpy as np

    from medseg.cohort import Case
    from medseg.data.cache import Example

    rng = np.random.default_rng(0)
    classes = config.task.out_channels
    tile = rng.normal(0, 1, 4096).astype(np.float32)
    image = np.resize(tile, (len(config.task.channels), *size))
    case = Case("probe", "probe", ("probe",))
    if config.task.kind == "classification":
        numbers = range(max(count, classes))
        if config.task.multi_label:
            return [Example(case, image, None, (), tuple((n + k) % 2 for k in range(classes))) for n in numbers]
        return [Example(case, image, None, (), number % classes) for number in numbers]
    values = rng.integers(0, classes, 4096).astype(np.uint8)
    if annotated:
        values[~np.array(annotated)[values]] = 0
    label = np.resize(values, tuple(size))
    points = rng.integers(0, size, (classes - 1, 100, len(size))).astype(np.int32)
    return [Example(case, image, label, tuple(points), -1, annotated)] * count


def _validate_one_window(net: Any, **arguments: Any) -> dict[str, float]:
    """The real validation of a network whose windows after the first cost nothing."""
    import torch

    from medseg.train.validate import validate

    class OneWindow(torch.nn.Module):
        """Computes the first window, and answers 0 for the others."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.first: tuple[torch.dtype, int] | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Logits of the window's size."""
            if self.first is not None:
                dtype, classes = self.first
                return x.new_zeros((x.shape[0], classes, *x.shape[2:]), dtype=dtype)
            logits: torch.Tensor = self.net(x)
            self.first = logits.dtype, logits.shape[1]
            return logits

    whole = arguments["examples"][0].label is None
    return validate(net if whole else OneWindow(), **arguments)


def shrink_patch(
    patch: Sequence[int], batch: int, divisors: Sequence[int], share: float
) -> tuple[tuple[int, ...], int] | None:
    """A legal patch and batch of at most about `share` of the voxels of a step, in like proportions.

    Args:
        divisors: per axis, what a patch must be a multiple of; at least two of them stay, so that the deepest level of
            a network keeps more than one position per axis, unless the patch itself has fewer.

    Returns:
        None where there is none that is smaller.
    """
    least = [min(n, 2 * d) for n, d in zip(patch, divisors, strict=True)]
    made, items, target = list(patch), batch, share * batch * math.prod(patch)
    while items * math.prod(made) > target:
        free = [axis for axis in range(len(made)) if made[axis] - divisors[axis] >= least[axis]]
        if free:
            axis = max(free, key=lambda axis: made[axis] / patch[axis])
            made[axis] = (made[axis] - 1) // divisors[axis] * divisors[axis]
        elif items > 1:
            items -= 1  # a smaller batch takes what the patch cannot give
        else:
            break
    return (tuple(made), items) if items * math.prod(made) < batch * math.prod(patch) else None


if __name__ == "__main__":
    _main()
