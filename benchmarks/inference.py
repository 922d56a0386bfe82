"""Label reduction in slabs beside MONAI's sliding window with argmax: peak memory and time, one fresh process per row.

    python benchmarks/inference.py                                          30 classes, 192³, patch 64³
    python benchmarks/inference.py --classes 100 --size 384 --patch 96 --rows medseg medseg-half
    python benchmarks/inference.py --classes 100 --size 256 256 200 --out 512 512 300 --patch 96 --net unet \\
        --rows medseg

The peak is the highest resident set of the process beyond what it held when image, label map, network and libraries
lay in memory; it includes the network's pass over one window. `network` and `rest` are processor seconds (all cores)
inside the network and outside it: blending, resampling and argmax, and the network's last layer where medseg applies
it to parts of a window; `wall` is what a clock shows. With `--out`, MONAI's
logits are interpolated as a whole, which needs the memory of all classes on that grid. `buffered` is MONAI's
`buffer_steps=1`.
"""

import argparse
import json
import math
import subprocess
import sys
import time

import numpy as np
import psutil
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn
from torch.nn import functional

from medseg.models import build_model
from medseg.predict import segment_array
from medseg.train.device import peak_memory_gb

ROWS = ("medseg", "medseg-half", "monai", "buffered")


def clock() -> float:
    """Seconds of this process on all cores, in user mode and in the system: other work on the machine hardly counts."""
    return time.process_time()


class Timed(nn.Module):
    """Adds up the seconds spent in a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.spent = net, [0.0]  # a list, which copies of the module share

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.spent[0]

    def forward(self, x: Tensor) -> Tensor:
        """The network's answer."""
        start = clock()
        logits: Tensor = self.net(x)
        self.spent[0] += clock() - start
        return logits


def build(options: argparse.Namespace) -> nn.Module:
    """`point`: one 1×1×1 convolution, so that little but the reduction is measured; `unet`: a small U-Net."""
    torch.manual_seed(0)
    if options.net == "point":
        return nn.Conv3d(1, options.classes, 1).eval()
    shape = {"channels": [16, 32, 64, 128], "strides": [2, 2, 2], "num_res_units": 1}
    return build_model("unet", spatial_dims=3, in_channels=1, out_channels=options.classes, **shape).eval()


def segment(row: str, net: nn.Module, image: np.ndarray, options: argparse.Namespace) -> tuple[np.ndarray, float]:
    """Labels, and the working set that was announced (0 for MONAI)."""
    patch, announced = (options.patch,) * 3, []
    if row.startswith("medseg"):
        sweep_gb = options.memory_gb if row == "medseg" else options.half_gb
        labels = segment_array(
            net, image, patch, options.overlap, options.out, sweep_gb, announce=lambda found: announced.append(found)
        )
        print(announced[0], file=sys.stderr)
        return labels, announced[0].total_gb
    more = {"buffer_steps": 1, "buffer_dim": 0} if row == "buffered" else {}
    with torch.inference_mode():
        batch = torch.from_numpy(image)[None]
        logits = sliding_window_inference(batch, patch, 1, net, options.overlap, mode="gaussian", **more)
        if options.out:
            logits = functional.interpolate(logits, tuple(options.out), mode="trilinear", align_corners=False)
        return logits.argmax(1)[0].to(torch.uint8).numpy(), 0.0


def measure(row: str, options: argparse.Namespace) -> dict[str, float | str]:
    """One row, in this process."""
    net = Timed(build(options))
    image = np.random.default_rng(0).normal(size=(1, *options.size)).astype(np.float32)
    room = np.ones(options.out or options.size, dtype=np.uint8)
    some = np.zeros((1, 18, 18, 18), dtype=np.float32)  # loads libraries and their kernels, and starts threads
    segment_array(net, some, (16, 16, 16), out_shape=(20, 20, 20) if options.out else None)
    net.spent[0], before = 0.0, psutil.Process().memory_info().rss  # `room` included, which stands for the labels
    del room
    start, wall = clock(), time.perf_counter()
    labels, announced = segment(row, net, image, options)
    seconds, wall = clock() - start, time.perf_counter() - wall
    peak = peak_memory_gb(torch.device("cpu"))
    return {
        "peak_gb": peak - before / 1e9,
        "announced_gb": announced,
        "network_s": net.seconds,
        "rest_s": seconds - net.seconds,
        "wall_s": wall,
        "sum": int(labels.astype(np.int64).sum()),
    }


def in_fresh_process(row: str) -> dict[str, float]:
    """`measure` with the options of this call, where nothing else has run."""
    command = [sys.executable, __file__, *sys.argv[1:], "--row", row]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"row {row} ended with {done.returncode}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def table(options: argparse.Namespace) -> str:
    """All rows as Markdown."""
    full_gb = 4e-9 * options.classes * math.prod(options.size)
    lines = [
        f"{options.classes} classes, {options.size} to {options.out or options.size}, patch {options.patch}³, overlap "
        f"{options.overlap}, network {options.net}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"the logits of the whole image would take {full_gb:.1f} GB",
        "",
        "| row | peak (GB) | announced (GB) | network (s) | rest (s) | wall (s) | sum of labels |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in options.rows:
        found = in_fresh_process(row)
        lines.append(
            f"| {row} | {found['peak_gb']:.2f} | {found['announced_gb'] or math.nan:.2f} | {found['network_s']:.1f} "
            f"| {found['rest_s']:.1f} | {found['wall_s']:.1f} | {found['sum']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Read the options; print the table, or one row's figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=30)
    parser.add_argument("--size", type=int, nargs="+", default=[192], help="of the image: one side, or three")
    parser.add_argument("--out", type=int, nargs=3, help="shape of the labels; by default the image's")
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--net", choices=("point", "unet"), default="point")
    parser.add_argument("--memory-gb", type=float, default=8.0, help="limit of row medseg")
    parser.add_argument("--half-gb", type=float, default=2.0, help="limit of row medseg-half")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["medseg", "monai", "buffered"])
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.size = options.size * 3 if len(options.size) == 1 else options.size
    if options.row:
        print(json.dumps(measure(options.row, options)))
    else:
        print(table(options))


if __name__ == "__main__":
    main()
