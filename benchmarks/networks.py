"""Parameters and GFLOP of every registered network with its default settings, as a Markdown table.

    python benchmarks/networks.py                      classifiers 1×224², segmentation networks 1×64³
    python benchmarks/networks.py --size 96            segmentation networks 1×96³
    python benchmarks/networks.py --only unet resnet   some of them

FLOP are those torch counts for one forward pass of one image in evaluation (two per multiplication and addition; norms,
activations and interpolation count nothing). The pass runs on the meta device: shapes alone, no arithmetic, little
memory. A network whose optional package is missing is listed as such. An image is given the next legal size above the
stated one where the network does not take that, and the row says which.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medseg.files import UserError
from medseg.models import MODELS, build_model

FLAT_PX = 224
# The published depths and sizes of a network, beside its default.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "densenet": [{"depth": depth} for depth in (121, 169, 201, 264)],
    "resnet": [{"depth": depth} for depth in (18, 34, 50, 101, 152)],
    "mednext": [{"size": size} for size in "SBML"],
    "squeezenet": [{"version": version} for version in ("1.0", "1.1")],
}


def cost(net: nn.Module, shape: Sequence[int]) -> tuple[int, float]:
    """Parameters, and GFLOP of one forward pass; `net` lies on the meta device."""
    net.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.empty(1, *shape, device="meta"))
    return sum(parameter.numel() for parameter in net.parameters()), counter.get_total_flops() / 1e9


def row(name: str, params: dict[str, Any], dims: int, side: int) -> str:
    """One line of the table."""
    config = MODELS[name][0](**params)
    size = config.legal_size((side,) * dims)
    shown = ", ".join([f"`{name}`", *(f"{field} {value}" for field, value in params.items())])
    shape = f"1 × {' × '.join(str(n) for n in size)}"
    try:
        net = build_model(name, spatial_dims=dims, in_channels=1, out_channels=2, **params)
        parameters, gflop = cost(net.to("meta"), (1, *size))
    except UserError as error:
        return f"| {shown} | {shape} | not built: {error} | |"
    return f"| {shown} | {shape} | {parameters / 1e6:.2f} | {gflop:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="voxels per axis for segmentation networks in 3D")
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    print("| network | image | parameters (million) | GFLOP |\n|---|---|---:|---:|")
    for name in options.only:
        classifies = MODELS[name][0].classifies
        for params in VARIANTS.get(name, [{}]):
            print(row(name, params, 2 if classifies else 3, FLAT_PX if classifies else options.size), flush=True)


if __name__ == "__main__":
    main()
