"""What training takes: the reversible U-Net in its three modes, and MONAI's networks, each row in a fresh process.

    python -m benchmarks.memory row --size 96 --mode reversible --blocks 2
    python -m benchmarks.memory modes --size 96 --blocks 2 4 16          store, checkpoint and reversible side by side
    python -m benchmarks.memory limits --budget-gib 4                    largest volume, deepest, widest that trains
    python -m benchmarks.memory whole --images flair.nii.gz t1c.nii.gz --label seg.nii.gz    4 × 240 × 240 × 155
    python -m benchmarks.memory kept --blocks 2 4 16                     bytes a voxel kept for the backward pass
    python -m benchmarks.memory depthwise                                torch's depthwise convolution and medseg's

A row is one or more training steps (Dice and cross-entropy, AdamW, batch 1, 4 channels in, 3 classes). Its peak is the
resident set of the process on a CPU, which counts the libraries too (`libraries_gib`: before the network is built),
and the allocated memory on a GPU. `step_s` is the median time of the steps, without the first where there are more.

glibc serves blocks below a threshold that grows up to 32 MiB from a heap that it hardly gives back, which can double
the resident set of a step on a CPU; `--mmap-mib` fixes the threshold (MALLOC_MMAP_THRESHOLD_), at the price of page
faults, of which there are more with `--small-pages`. Peaks with and without are figures of the same computation.

In `limits` a row fails when its peak is above the budget, or when it asks for a quarter more than that: then
the system refuses, so that no other process suffers. Sides are multiples of 16, and widths of those of the smallest.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

IN_CHANNELS, CLASSES = 4, 3
WIDTHS = (16, 32, 64, 128)
MODES = ("store", "checkpoint", "reversible")
OURS = "reversible_unet"
MONAI = ("UNet", "CheckpointUNet", "DynUNet", "SegResNet")


def build(network: str, mode: str, widths: Sequence[int], blocks: int, chunks: int | None, block: str) -> Any:
    """The network of a row; `blocks` per level where it can be chosen, residual units in MONAI's U-Nets."""
    import torch
    from monai.networks.nets.unet import CheckpointUNet, UNet

    from medseg.models import build_model

    torch.manual_seed(0)
    levels, ends = len(widths), {"in_channels": IN_CHANNELS, "out_channels": CLASSES}
    if network == OURS:
        depth = {"blocks_down": (blocks,) * levels, "blocks_up": (blocks,) * (levels - 1)}
        return build_model(
            OURS, spatial_dims=3, **ends, channels=tuple(widths), memory=mode, chunks=chunks, block=block, **depth
        )
    if network in ("UNet", "CheckpointUNet"):
        shape = {"channels": widths, "strides": (2,) * (levels - 1), "num_res_units": blocks, "norm": "instance"}
        return (UNet if network == "UNet" else CheckpointUNet)(spatial_dims=3, **ends, **shape)
    if network == "DynUNet":
        return build_model("dynunet", spatial_dims=3, **ends, channels=tuple(widths))
    shape = {"blocks_down": (blocks,) * levels, "blocks_up": (blocks,) * (levels - 1)}
    return build_model("segresnet", spatial_dims=3, **ends, init_filters=widths[0], **shape)


def measure(options: argparse.Namespace) -> dict[str, float | str]:
    """Training steps in this process; peaks in GiB (2**30 bytes)."""
    import torch

    from medseg.losses import DiceCELoss
    from medseg.train.device import peak_memory_gb

    if options.refuse_gib:
        most = int(options.refuse_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    device, loss = torch.device(options.device), DiceCELoss(1.0, 1.0)
    image, label = tensors(options)
    libraries = peak_memory_gb(torch.device("cpu"))
    widths = [width * options.widen for width in options.widths]
    net = build(options.network, options.mode, widths, options.blocks, options.chunks, options.block).to(device).train()
    optimizer = torch.optim.AdamW(net.parameters())
    image, label = image.to(device), label.to(device)
    seconds, value = [], torch.zeros(())
    for _ in range(options.steps):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            value = loss(net(image), label)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        value = value.detach().cpu()
        seconds.append(time.perf_counter() - start)
    return {
        "peak_gib": round(peak_memory_gb(device) * 1e9 / 2**30, 3),
        "libraries_gib": round(libraries * 1e9 / 2**30, 3),
        "step_s": round(statistics.median(seconds[1:] or seconds), 2),
        "first_step_s": round(seconds[0], 2),
        "loss": round(float(value), 5),
        "parameters_m": round(sum(p.numel() for p in net.parameters()) / 1e6, 3),
        "shape": "x".join(map(str, image.shape[1:])),
    }


def tensors(options: argparse.Namespace) -> tuple[Any, Any]:
    """Image (1, 4, D, H, W) and label (1, 1, D, H, W): random, or the scans given, repeated and padded with 0."""
    import torch

    if not options.images:
        sides = options.shape or [options.size] * 3
        sides = [-(-side // 8) * 8 for side in sides]
        draw = torch.Generator().manual_seed(0)
        label = torch.randint(0, CLASSES, (1, 1, *sides), generator=draw, dtype=torch.uint8)
        return torch.randn(1, IN_CHANNELS, *sides, generator=draw), label
    scans = [volume(path) for path in options.images]
    image = torch.stack([scans[i % len(scans)] for i in range(IN_CHANNELS)])
    label = volume(options.label).clamp(0, CLASSES - 1).to(torch.uint8) if options.label else (scans[0] > 1).byte()
    pad = [n for side in reversed(scans[0].shape) for n in (0, -side % 8)]
    return torch.nn.functional.pad(image, pad)[None], torch.nn.functional.pad(label, pad)[None, None]


def volume(path: Path) -> Any:
    """The voxels of a NIfTI file as float32."""
    import nibabel as nib
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(nib.load(path).dataobj, dtype=np.float32))


def row(options: argparse.Namespace, **changes: object) -> dict[str, Any] | None:
    """`measure` in a fresh process with some options changed; None when it does not fit."""
    order = {**vars(options), **changes}
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0" if order["small_pages"] else "1"}
    if order["mmap_mib"] is not None:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(int(order["mmap_mib"] * 2**20))
    command = [sys.executable, "-m", "benchmarks.memory", "measured"]
    done = subprocess.run(
        command, input=json.dumps(order, default=str), capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        refused = ("can't allocate memory", "out of memory", "std::bad_alloc", "Cannot allocate", "could not create")
        if done.returncode < 0 or any(word in done.stderr for word in refused):
            return None
        raise SystemExit(f"a row failed ({changes}):\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def modes_table(options: argparse.Namespace) -> None:
    """One line per number of blocks and mode."""
    print("| blocks per level | memory | peak (GiB) | of it libraries | step (s) | loss |\n|---|---|---|---|---|---|")
    for blocks in options.blocks_list:
        for mode in options.modes:
            found = row(options, blocks=blocks, mode=mode)
            if found is None:
                print(f"| {blocks} | {mode} | does not fit | | | |", flush=True)
                continue
            print(
                f"| {blocks} | {mode} | {found['peak_gib']:.2f} | {found['libraries_gib']:.2f} "
                f"| {found['step_s']:.1f} | {found['loss']:.5f} |",
                flush=True,
            )


def limits_table(options: argparse.Namespace) -> None:
    """Largest side, most blocks, largest factor of the widths within the budget, each with its peak and step."""
    print(
        f"budget {options.budget_gib} GiB, widths {options.widths}, {options.blocks} blocks per level, {options.device}"
    )
    print("| network | largest volume | deepest (blocks) | widest (×) |\n|---|---|---|---|", flush=True)
    names = [(OURS, mode) for mode in options.modes] + [(name, "") for name in options.networks]
    for network, mode in names:

        def fits(network: str = network, mode: str = mode, **changes: object) -> dict[str, Any] | None:
            refuse = 1.25 * options.budget_gib + 1 if options.device == "cpu" else None
            found = row(options, network=network, mode=mode, refuse_gib=refuse, **changes)
            return found if found and found["peak_gib"] <= options.budget_gib else None

        side = most([16 * n for n in range(2, 25)], lambda side: fits(size=side))
        deep = most([1, 2, 3, 4, 6, 8, 12, 16, 24], lambda n: fits(size=options.size, blocks=n))
        wide = most([1, 2, 3, 4, 6, 8, 12, 16], lambda n: fits(size=options.size, widen=n))
        cells = (said(side, "³"), said(deep) if network != "DynUNet" else "fixed", said(wide))
        print(f"| {network} {mode} | {' | '.join(cells)} |", flush=True)


def most(grid: Sequence[int], fits: Callable[[int], dict[str, Any] | None]) -> tuple[int, dict[str, Any]] | None:
    """The largest entry that fits, by bisection, with what was measured there."""
    low, high, best = 0, len(grid), None
    while low < high:
        middle = (low + high) // 2 if best or high < len(grid) else min(low + 2, high - 1)
        found = fits(grid[middle])
        if found:
            best, low = (grid[middle], found), middle + 1
        else:
            high = middle
    return best


def said(found: tuple[int, dict[str, Any]] | None, unit: str = "") -> str:
    """A cell of the table."""
    if found is None:
        return "none"
    return f"{found[0]}{unit} ({found[1]['peak_gib']:.2f} GiB, {found[1]['step_s']:.1f} s)"


def kept_table(options: argparse.Namespace) -> None:
    """What the forward pass keeps for the backward pass, per voxel of the image: it grows with the volume alone."""
    import torch

    print("| blocks per level | memory | kept (bytes a voxel) |\n|---|---|---|")
    for blocks in options.blocks_list:
        for mode in options.modes:
            net = build(OURS, mode, options.widths, blocks, options.chunks, options.block).train()
            parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
            kept: dict[int, Any] = {}

            def pack(saved: Any, kept: dict[int, Any] = kept) -> Any:
                kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage()  # kept, so none recurs
                return saved

            image, _ = tensors(options)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
                logits = net(image)
            total = sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)
            print(f"| {blocks} | {mode} | {total / image[0, 0].numel():.0f} |", flush=True)
            del logits


def depthwise_table(options: argparse.Namespace) -> None:
    """Best of five of a forward and a backward pass, for one chunk's channels and for a whole expansion."""
    import torch

    from medseg.models.depthwise import depthwise

    def timed(work: Callable[[], object]) -> float:
        work()
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
        return 1e3 * min(taken)

    def native(x: Any, weight: Any) -> Any:
        return torch.nn.functional.conv3d(x, weight, padding=1, groups=len(weight))

    print(f"{options.size}³, {torch.get_num_threads()} threads\n")
    print("| channels | dtype | layout and way | forward (ms) | with backward (ms) |\n|---|---|---|---|---|")
    for channels in (8, 32):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(1, channels, *[options.size] * 3, dtype=dtype)
            weight = torch.randn(channels, 1, 3, 3, 3, dtype=dtype)
            ways = {
                "torch, channels first": (x, native),
                "torch, channels last": (x.contiguous(memory_format=torch.channels_last_3d), native),
                "medseg": (x, depthwise),
            }
            for name, (image, way) in ways.items():
                leaf, kernel = image.requires_grad_(), weight.requires_grad_()
                with torch.no_grad():
                    forward = timed(lambda leaf=leaf, kernel=kernel, way=way: way(leaf, kernel))
                both = timed(lambda leaf=leaf, kernel=kernel, way=way: _pulled(way(leaf, kernel), leaf, kernel))
                print(f"| {channels} | {str(dtype)[6:]} | {name} | {forward:.1f} | {both:.1f} |", flush=True)


def _pulled(y: Any, *leaves: Any) -> object:
    import torch

    return torch.autograd.grad(y, leaves, torch.ones_like(y))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("row", "modes", "limits", "whole", "kept", "depthwise"))
    parser.add_argument("--network", choices=(OURS, *MONAI), default=OURS)
    parser.add_argument("--mode", choices=MODES, default="reversible")
    parser.add_argument("--size", type=int, default=96, help="side of the cube")
    parser.add_argument("--shape", type=int, nargs=3, help="instead of a cube; rounded up to multiples of 8")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2], help="per level")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="channels of each level")
    parser.add_argument("--widen", type=int, default=1, help="multiplies the widths")
    parser.add_argument("--chunks", type=int, help="by default what medseg takes")
    parser.add_argument("--block", choices=("mbconv", "conv"), default="mbconv")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget-gib", type=float, default=4.0)
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--networks", nargs="*", choices=MONAI, default=list(MONAI), help="of MONAI, for limits")
    parser.add_argument("--images", type=Path, nargs="+", help="NIfTI volumes of one shape; repeated up to 4 channels")
    parser.add_argument("--label", type=Path, help="their NIfTI label map")
    parser.add_argument("--small-pages", action="store_true", help="without medseg's setting THP_MEM_ALLOC_ENABLE")
    parser.add_argument("--mmap-mib", type=float, help="blocks from this size on go back to the system when freed")
    parser.set_defaults(refuse_gib=None)
    options = parser.parse_args()
    options.blocks_list, options.blocks = options.blocks, options.blocks[0]
    if options.what == "whole" and not options.images:
        options.shape = options.shape or [240, 240, 155]
    return options


def main() -> None:
    """Read the options and print the table, or the row as JSON."""
    if sys.argv[1:] == ["measured"]:
        print(json.dumps(measure(argparse.Namespace(**json.load(sys.stdin)))))
        return
    options = read_options()
    if options.what in ("row", "whole"):
        print(json.dumps(row(options) or {"fits": False}))
    else:
        tables = {"modes": modes_table, "limits": limits_table, "kept": kept_table, "depthwise": depthwise_table}
        tables[options.what](options)


if __name__ == "__main__":
    main()
