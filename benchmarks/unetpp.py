"""U-Net++ and its prunings beside MONAI's BasicUNetPlusPlus of the same widths, measured in one run.

    python benchmarks/unetpp.py                        3D, 64³, widths 32 32 64 128 256
    python benchmarks/unetpp.py --dims 2 --size 256 --features 32 64 128 256 512
    python benchmarks/unetpp.py --device cuda --size 128

FLOPs are those torch counts (two per multiplication and addition). The forward passes of all rows take turns, so that
a change of the machine's load meets all of them; the median is given. A training step (all heads, Dice and
cross-entropy, AdamW) runs in a fresh process per row; its peak is the resident set of that process on a CPU, which
counts the libraries too, and the allocated memory on a GPU.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from monai.networks.nets import BasicUNetPlusPlus
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medseg.losses import DiceCELoss
from medseg.models import build_model
from medseg.models.unetpp import UNetPP
from medseg.train.device import peak_memory_gb

IN_CHANNELS, CLASSES = 1, 3
MONAI = "MONAI"


def build(row: str, dims: int, features: Sequence[int]) -> nn.Module:
    """The network of a row: `MONAI`, or `L<k>`: medseg's, pruned to level k."""
    torch.manual_seed(0)
    if row == MONAI:
        return BasicUNetPlusPlus(
            spatial_dims=dims,
            in_channels=IN_CHANNELS,
            out_channels=CLASSES,
            features=(*features, features[0]),
            deep_supervision=True,
        )
    net = build_model(
        "unetpp",
        spatial_dims=dims,
        in_channels=IN_CHANNELS,
        out_channels=CLASSES,
        depth=len(features) - 1,
        features=tuple(features),
        deep_supervision=True,
    )
    assert isinstance(net, UNetPP)
    return net.prune_to(int(row.removeprefix("L")))


def rows_of(features: Sequence[int]) -> list[str]:
    """MONAI's has one depth only, 4."""
    levels = [f"L{k}" for k in range(len(features) - 1, 0, -1)]
    return [MONAI, *levels] if len(features) == 5 else levels


def gflop(net: nn.Module, image: Tensor) -> float:
    """Of one forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(image)
    return counter.get_total_flops() / 1e9


def forward_ms(nets: Mapping[str, nn.Module], image: Tensor, repeats: int) -> dict[str, float]:
    """Median per row; the rows take turns, after one warm-up each."""
    seconds: dict[str, list[float]] = {row: [] for row in nets}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for row, net in nets.items():
                took = timed(lambda net=net: net(image), image.device)
                if repeat:
                    seconds[row].append(took)
    return {row: 1e3 * statistics.median(values) for row, values in seconds.items()}


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds, until the device has finished."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def training_step(row: str, options: argparse.Namespace) -> dict[str, float]:
    """Peak memory (1e9 bytes) and median seconds of training steps in this process."""
    device = torch.device(options.device)
    net = build(row, options.dims, options.features).to(device).train()
    optimizer, loss = torch.optim.AdamW(net.parameters()), DiceCELoss(1.0, 1.0)
    image = random_image(options)
    label = torch.randint(0, CLASSES, image[:, :1].shape, device=device)

    def step() -> None:
        logits = net(image)
        heads = list(logits.values()) if isinstance(logits, dict) else logits
        optimizer.zero_grad(set_to_none=True)
        torch.stack([loss(head, label) for head in heads]).mean().backward()
        optimizer.step()

    seconds = [timed(step, device) for _ in range(options.steps + 1)][1:]
    return {"peak_gb": peak_memory_gb(device), "step_s": statistics.median(seconds)}


def random_image(options: argparse.Namespace) -> Tensor:
    """The input of every row."""
    shape = (options.batch, IN_CHANNELS, *[options.size] * options.dims)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(options.device)


def in_fresh_process(row: str) -> dict[str, float]:
    """`training_step` with the options of this call, in a process where nothing else has run."""
    command = [sys.executable, __file__, *sys.argv[1:], "--row", row]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the training step of {row} failed:\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def table(options: argparse.Namespace) -> str:
    """All rows as Markdown; shares are relative to medseg's full network."""
    rows, image = rows_of(options.features), random_image(options)
    nets = {row: build(row, options.dims, options.features).to(options.device).eval() for row in rows}
    counted = {row: gflop(net, image) for row, net in nets.items()}
    weights = {row: sum(p.numel() for p in net.parameters()) / 1e6 for row, net in nets.items()}
    forward = forward_ms(nets, image, options.repeats)
    nets.clear()
    full = f"L{len(options.features) - 1}"
    lines = [
        f"{options.dims}D, {' × '.join(map(str, image.shape))}, widths {options.features}, {options.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {options.repeats}",
        "",
        "| network | parameters (M) | GFLOP | of full | forward (ms) | of full | step (s) | step peak (GB) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        step = in_fresh_process(row)
        lines.append(
            f"| {row} | {weights[row]:.2f} | {counted[row]:.1f} | {counted[row] / counted[full]:.0%} "
            f"| {forward[row]:.1f} | {forward[row] / forward[full]:.0%} "
            f"| {step['step_s']:.2f} | {step['peak_gb']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Read the options; print the table, or one row's training step as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, choices=(2, 3), default=3)
    parser.add_argument("--size", type=int, default=64, help="side of the image")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--features", type=int, nargs="+", default=[32, 32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=9, help="forward passes per row")
    parser.add_argument("--steps", type=int, default=3, help="training steps per row after the first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(training_step(options.row, options)))
    else:
        print(table(options))


if __name__ == "__main__":
    main()
