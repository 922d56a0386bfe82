"""In which precision a network computes."""

from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]


def use_bf16(wanted: Precision, device: torch.device) -> bool:
    """Whether to autocast to bfloat16: `auto` says yes where the hardware multiplies in it."""
    if wanted != "auto":
        return wanted == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def autocast(wanted: Precision, device: torch.device) -> torch.autocast:
    """The block in which networks compute as is wanted, whatever holds around it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(wanted, device))
