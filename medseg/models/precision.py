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


def autocast(wanted: Precision, device: torch.device, *, one_image: bool = False) -> torch.autocast:
    """The block in which networks compute as is wanted, whatever holds around it.

    Args:
        one_image: all that the network gets is one image of a classifier; there `auto` keeps fp32, for bf16 saves
            nothing.
    """
    chosen: Precision = "fp32" if one_image and wanted == "auto" else wanted
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(chosen, device))
