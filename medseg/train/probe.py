"""Measure a training step: peak memory and time, in a process of its own so that nothing else counts."""

import json
import subprocess
import sys
import time
from dataclasses import replace

from medseg.config import Config, dump_config, validate_config
from medseg.files import UserError, dump_json
from medseg.plan import Plan

_STEPS = 4


def probe(config: Config, plan: Plan) -> tuple[Plan, dict[str, object]]:
    """Run a few steps on random data of the plan's patch and batch.

    Returns:
        The plan with `memory_gb` (peak, 1e9 bytes: resident set of the process on a CPU, allocated on a GPU) and
        `step_seconds` (median after the first step), and the same two as figures.

    Raises:
        UserError: the step needs more than `plan.memory_gb`, or does not run at all.
    """
    order = dump_json({"config": dump_config(config), "plan": plan})
    done = subprocess.run(
        [sys.executable, "-m", "medseg.train.probe"], input=order, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        cause = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
        raise UserError(
            f"plan.patch_size {plan.patch_size} with plan.batch_size {plan.batch_size}: a trial step failed ({cause}); "
            "make the patch, the batch or model.channels smaller."
        )
    measured = json.loads(done.stdout.splitlines()[-1])
    budget = config.plan.memory_gb
    if budget is not None and measured["memory_gb"] > budget:
        raise UserError(
            f"plan.memory_gb {budget}: a training step was measured at {measured['memory_gb']:.2f} GB; "
            "raise it, or make plan.patch_size or plan.batch_size smaller."
        )
    return replace(plan, **measured), measured


def _main() -> None:
    import numpy as np
    import torch
    import yaml

    from medseg.losses import build_loss
    from medseg.models import build_from_config
    from medseg.train.device import choose_device, peak_memory_gb, use_bf16

    order = json.load(sys.stdin)
    config = validate_config(yaml.safe_load(order["config"]), "the probe's config")
    patch, batch = order["plan"]["patch_size"], order["plan"]["batch_size"]
    device = choose_device(config.device)
    bf16 = use_bf16(config.train.precision, device)
    channels = len(config.task.channels)
    net = build_from_config(
        config.model,
        spatial_dims=config.task.spatial_dims,
        in_channels=channels,
        out_channels=config.task.out_channels,
    ).to(device)
    loss = build_loss(config.loss, [1] * config.task.out_channels).to(device)
    optimizer = torch.optim.AdamW(net.parameters())
    image = torch.randn(batch, channels, *patch, device=device)
    classifies = config.task.kind == "classification"
    target = torch.zeros(batch, device=device) if classifies else torch.zeros(batch, 1, *patch, device=device)
    seconds = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            value = loss(net(image), target)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        float(value.detach())
        seconds.append(time.perf_counter() - start)
    median = float(np.median(seconds[1:]))
    print(json.dumps({"memory_gb": round(peak_memory_gb(device), 3), "step_seconds": round(median, 4)}))


if __name__ == "__main__":
    _main()
