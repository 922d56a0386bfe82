"""Where and in which precision to compute."""

import resource
import sys
from typing import Literal

import torch

from medseg.files import UserError


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device meant by the configuration. Raises UserError when a GPU is demanded and there is none."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("device 'cuda': no GPU is visible to torch; set device to 'auto' or 'cpu'.")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def use_bf16(wanted: Literal["auto", "fp32", "bf16"], device: torch.device) -> bool:
    """Whether to autocast to bfloat16: `auto` says yes where the hardware multiplies in it."""
    if wanted != "auto":
        return wanted == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def peak_memory_gb(device: torch.device) -> float:
    """Peak so far, in GB (1e9 bytes): allocated on a GPU, resident for the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
