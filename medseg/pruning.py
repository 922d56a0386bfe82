"""`medseg models prune`: what each level of a trained U-Net++ is worth, and the smallest that is good enough."""

import ctypes
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medseg.bundle import Bundle, load_bundle
from medseg.bundle_writing import save_bundle
from medseg.cohort import Cohort, read_cohort
from medseg.evaluate import step as evaluate_step
from medseg.files import UserError, write_rows
from medseg.folds import as_trained
from medseg.models.unetpp import UNetPP
from medseg.predict import Predictor
from medseg.predict import step as predict_step
from medseg.predict.windows import peak_over_start
from medseg.result import Result
from medseg.runs import find_run

_TIMED_RUNS = 5


@dataclass(frozen=True)
class Level:
    """One row of the table. `gflop`, `window_ms` and `window_mb` (1e6 bytes: what the pass takes at its peak beside
    weights and image) are of one inference window of the plan's patch size, on the device at hand; `mean_dice` is over
    the classes of the split."""

    level: int
    parameters: int
    gflop: float
    window_ms: float
    window_mb: float
    mean_dice: float


def run(model: str, cohort_dir: Path, workspace: Path, *, max_dice_loss: float = 0.005, split: str = "val") -> Result:
    """Measure every level on a split that the test figures do not come from; save the smallest level whose mean Dice
    is at most `max_dice_loss` below the whole network's, as `runs/<id>/pruned/bundle`.

    Raises:
        UserError: the model is no U-Net++ with deep supervision.
    """
    bundle = load_bundle(model, workspace)
    cohort = as_trained(bundle.config, read_cohort(cohort_dir))
    whole = Predictor(bundle)
    if not isinstance(whole.net, UNetPP) or not whole.net.config.deep_supervision:
        raise UserError(
            f"model {model!r} is a {bundle.config.model.name!r} without heads to prune to; "
            "train one with model.name 'unetpp' and model.deep_supervision true."
        )
    out = find_run(workspace, bundle.run_id).path / "pruned"
    nets = [whole.net.prune_to(level) for level in range(1, whole.net.config.depth + 1)]
    costs = _costs(nets, (len(bundle.config.task.channels), *bundle.plan.patch_size))
    levels = [
        Level(level, _size(net), *cost, _mean_dice(bundle, cohort, split, net, level, out))
        for level, (net, cost) in enumerate(zip(nets, costs, strict=True), start=1)
    ]
    chosen = next(level for level in levels if levels[-1].mean_dice - level.mean_dice <= max_dice_loss)
    net = nets[chosen.level - 1]
    saved = save_bundle(
        out / "bundle",
        state_dict={name: value.cpu() for name, value in net.state_dict().items()},
        config=bundle.config.model_copy(update={"model": net.config}),
        plan=bundle.plan,
        run_id=bundle.run_id,
        cohort_sha256=cohort.sha256,
        metrics={f"{split}_mean_dice": chosen.mean_dice},
        calibration=bundle.facts["calibration"],
        operating_point=bundle.facts["operating_point"],
    )
    rows = [vars(level) for level in levels]
    table = write_rows(out / "levels.csv", list(rows[0]), rows)
    figures = {"level": chosen.level, "mean_dice": chosen.mean_dice, "max_dice_loss": max_dice_loss, "split": split}
    paths = {"bundle": saved, "levels": table}
    return Result("models", "done", paths, figures, bundle.run_id, rows=rows).write(out)


def _size(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def _mean_dice(bundle: Bundle, cohort: Cohort, split: str, net: UNetPP, level: int, out: Path) -> float:
    folder = out / f"level_{level}"
    predict_step.run(bundle, cohort, folder / "predictions", split=split, predictor=Predictor(bundle, net=net))
    measured = evaluate_step.run(
        cohort,
        folder / "predictions",
        folder,
        split=split,
        bundle_facts=bundle.identity(),
        labels=bundle.config.task.labels,
        kind="segmentation",
    )
    return float(str(measured.figures["mean_dice"]))


@torch.inference_mode()
def _costs(nets: Sequence[nn.Module], shape: tuple[int, ...]) -> list[tuple[float, float, float]]:
    """GFLOP, median milliseconds and peak MB of one window for each network; they take turns, so that a change of the
    machine's load meets all."""
    device = next(nets[0].parameters()).device
    image = torch.zeros(1, *shape, device=device)
    gflop, peaks = [], []
    seconds: list[list[float]] = [[] for _ in nets]
    for net in nets:
        with FlopCounterMode(display=False) as counter:
            net.eval()(image)
        gflop.append(counter.get_total_flops() / 1e9)
    for _ in range(_TIMED_RUNS):
        for net, took in zip(nets, seconds, strict=True):
            start = time.perf_counter()
            net(image).sum().item()
            took.append(time.perf_counter() - start)
    for net in nets:
        with suppress(OSError, AttributeError):  # without glibc
            ctypes.CDLL(None).malloc_trim(0)  # what is free but resident would hide a part of the peak
        with peak_over_start(device) as peak:
            logits = net(image)
        del logits
        peaks.append(peak.gb)
    return [
        (round(count, 3), round(1000 * statistics.median(took), 1), round(1000 * gb, 1))
        for count, took, gb in zip(gflop, seconds, peaks, strict=True)
    ]
