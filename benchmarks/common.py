"""What every benchmark prints first: on what it ran."""

import os
import platform
from pathlib import Path

import torch


def machine() -> str:
    """Processor or GPU, cores, threads and versions, in one line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}{gpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
