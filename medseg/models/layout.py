"""The layout of tensors in memory that oneDNN, torch's library of kernels on a CPU, is fast in.

Shape legend: B batch, C channels, D H W the spatial axes in array order (H W for 2D).
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

_Net = TypeVar("_Net", bound=nn.Module)

ONEDNN = frozenset({torch.float32, torch.bfloat16})
"""The types oneDNN computes in; fp64 torch computes by itself."""

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def placed(net: _Net, device: torch.device) -> _Net:
    """`net` on the device, the weights of its convolutions with their channels innermost.

    What a convolution puts out follows its weights, so most networks keep that layout from the first layer on; oneDNN
    and the tensor cores of a GPU are fast in it. Values, and the files that weights are saved in, stay the same.
    """
    net = net.to(device)
    for parameter in net.parameters():
        if layout := CHANNELS_LAST.get(parameter.ndim - 2):
            # not by `contiguous`: weights of one channel have both layouts, and their strides must name the one meant
            parameter.data = torch.empty_like(parameter, memory_format=layout).copy_(parameter.detach())
    return net


def fast_on_cpu(x_BCDHW: Tensor) -> Tensor:
    """x with its channels innermost where it lies on a CPU, in a type that oneDNN computes in; otherwise x itself.

    Small images leave that layout: torch gives them to kernels of its own, which put out the usual one. Wherever a
    layer may be the first of several large ones, this brings it back; for a tensor that has it, no copy is made.
    """
    if x_BCDHW.device.type != "cpu" or x_BCDHW.dtype not in ONEDNN:
        return x_BCDHW
    return x_BCDHW.contiguous(memory_format=CHANNELS_LAST[x_BCDHW.ndim - 2])
