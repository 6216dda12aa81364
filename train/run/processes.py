"""This process among those that train together: its device, its number, and what all have to agree on."""

import ctypes
import os
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from ..config import FitConfig
from ..errors import TrainError
from .estimate import MemoryPlan

# of glibc's mallopt; both take bytes
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALLEST_GIVEN_BACK = 1 << 20
# How long processes wait for one that works alone: the first one draws and measures strengths at the end, and NCCL's
# own ten minutes may not be enough for that
_PATIENCE = timedelta(hours=3)


def make_accelerator(config: FitConfig) -> Any:
    """Accelerate's view of this process: its device, its number, how many there are.

    Raises:
        TrainError: reason "settings": the device cannot be used, or the launcher's processes do not find each other.
    """
    try:
        wanted = None if config.device == "auto" else torch.zeros(1, device=config.device).device
    except (RuntimeError, AssertionError) as error:
        raise TrainError("settings", f"device {config.device!r} cannot be used: {error}") from error
    if wanted is not None and wanted.type != "cpu":
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", config.device)
    # without a graphics card accelerate joins a launcher's processes only when it is told that they are for the CPU
    on_cpu = config.device == "cpu" or (wanted is None and not _has_accelerator())
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:  # each would train by itself, into the same files
        raise TrainError(
            "settings", f"the launcher started {started} processes, but accelerate joined {accelerator.num_processes}"
        )
    if wanted is not None and accelerator.device.type != wanted.type:  # the launcher or its config file says otherwise
        raise TrainError("settings", f"device is {config.device!r}, but accelerate was set up for {accelerator.device}")
    return accelerator


def _has_accelerator() -> bool:
    """Whether device "auto" is anything but the CPU."""
    if hasattr(torch, "accelerator"):  # since torch 2.6; knows every kind of card
        return bool(torch.accelerator.is_available())
    return bool(torch.cuda.is_available() or torch.backends.mps.is_available())


def give_memory_back() -> None:
    """Have the C library give back what is freed, where it can be told to (glibc).

    Otherwise it keeps tensors of up to 32 MB for later ones of that size, which adds up in a small training. Steps
    become slower: every such tensor asks the system for its memory anew.
    """
    with suppress(OSError, AttributeError):  # Windows, macOS, musl
        library = ctypes.CDLL(None)
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            library.mallopt(parameter, _SMALLEST_GIVEN_BACK)


def agreed_plan(plan: MemoryPlan, accelerator: Any) -> MemoryPlan:
    """The main process's plan, in all processes: their cards may have different amounts of memory free."""
    if accelerator.num_processes == 1:
        return plan
    agreed: MemoryPlan = broadcast_object_list([plan])[0]
    return agreed
