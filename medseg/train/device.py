"""Where and in which precision to compute."""

import gc
import os
import resource
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal

import psutil
import torch

from medseg.files import UserError
from medseg.models.precision import use_bf16 as use_bf16
from medseg.runs import container_memory


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device meant by the configuration. Raises UserError when a GPU is demanded and there is none."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("device 'cuda': no GPU is visible to torch; set device to 'auto' or 'cpu'.")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def check_compiler(device: torch.device) -> None:
    """Raises UserError where `torch.compile` cannot work: on a CPU it calls the C++ compiler of the system."""
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise UserError("train.compile true: no C++ compiler was found; install g++, or set train.compile to false.")


def device_name(device: torch.device) -> str:
    """`cpu`, or the model of the GPU: a measured peak is valid for the same device only."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def free_memory_gb(device: torch.device) -> float:
    """What is free now, in GB (1e9 bytes): on the GPU; on a CPU what the system or the container would give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    return min(psutil.virtual_memory().available, container_memory()) / 1e9


def peak_memory_gb(device: torch.device) -> float:
    """Peak since `reset_peak_memory`, in GB (1e9 bytes): allocated on a GPU, resident for the process on a CPU.

    Linux's own record is read, since `getrusage` hands a process the peak of the one that started it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def reset_peak_memory(device: torch.device) -> None:
    """Start the peak anew; on a CPU only where Linux lets a process do so, elsewhere the peak is since its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
