"""A training in words: what happens, how it ended, why it failed and what to do."""

import re
from collections.abc import Mapping
from typing import Any

from ...qrlora_core import QRLoRAError
from ...train.events import TrainEvent
from .watch import Ending

_NO_MEMORY = re.compile(r"out of memory|OutOfMemory|MemoryError|can't allocate memory|bad_alloc|Cannot allocate", re.I)
_NO_DISK = re.compile(r"No space left on device|disk is full|Disk quota exceeded|not enough space", re.I)


class TrainingError(QRLoRAError):
    """A training ended without an adapter; the message says why and what to do."""


def failure(ending: Ending, log_name: str, checkpoint_step: int) -> str:
    """Why a training that was not stopped has no adapter, in words; "" when it says that it has one."""
    reason = _reason(ending)
    if not reason:
        return ""
    lines = [reason]
    if checkpoint_step:
        lines.append(f"The checkpoint of step {checkpoint_step} is kept: queue again to go on from there.")
    if ending.garbage:
        lines.append(f"{ending.garbage} lines of its events could not be read.")
    return "\n".join([*lines, last_lines(log_name, ending)])


def last_lines(log_name: str, ending: Ending) -> str:
    """The end of the trainer's output, for a message."""
    return f"Last lines of {log_name}:\n{ending.tail or '(nothing was printed)'}"


def _reason(ending: Ending) -> str:
    failed = ending.last.get("failed")
    if ending.hung:
        return (
            f"The trainer reported nothing for {ending.hung:.0f} s and was ended. If a step really takes that long, "
            "raise silence_seconds in Train \u0394R Options."
        )
    if failed is not None:
        return f"Training failed ({failed.data['reason']}): {failed.data['message']}"
    if ending.code == 0:
        return "" if "finished" in ending.last else "The trainer ended without an error, but reported no adapter."
    if ending.code == 2:
        return "The trainer refused its settings."
    if "stopped" in ending.last:
        return f"The trainer was stopped from outside at step {ending.step} (a signal, or the file 'stop')."
    if _NO_MEMORY.search(ending.tail):
        return f"Out of memory after step {ending.step}. {_MEMORY_ADVICE}"
    if _NO_DISK.search(ending.tail):
        return f"The disk is full (after step {ending.step}). Make room and queue again."
    if ending.code in (-9, 137):
        return (
            f"The trainer was killed after step {ending.step}. Usually the operating system does that when the RAM "
            f"runs out. {_MEMORY_ADVICE}"
        )
    code = ending.code & 0xFFFFFFFF
    how = f"signal {-ending.code}" if -64 < ending.code < 0 else f"exit code {ending.code} (0x{code:X})"
    return f"The trainer crashed after step {ending.step} ({how})."


_MEMORY_ADVICE = (
    "Choose a smaller preset, more offload, gradient_checkpointing 'on', or a lower resolution or batch_size in Train "
    "\u0394R and its options."
)


def describe(event: TrainEvent) -> str:
    """An event as one line for people."""
    data: Mapping[str, Any] = event.data
    if event.kind == "step":
        memory = f", {data['peak_memory'] / 1e9:.1f} GB" if data["peak_memory"] else ""
        return (
            f"step {data['step']}/{data['steps']}, loss {data['smoothed_loss']:.4f}, {data['seconds']:.2f} s/step, "
            f"{spoken_duration(data['eta'])} left{memory}"
        )
    if event.kind == "phase":
        count = f" {data['done']}/{data['total']}" if data["total"] else ""
        return f"{data['phase']}{count}: {data['text']}" if data["text"] else f"{data['phase']}{count}"
    if event.kind == "saved":
        return f"step {data['step']}: {data['what']} saved"
    if event.kind == "strengths":
        return f"step {data['step']}: looked at strengths"
    if event.kind == "sample":
        return f"step {data['step']}: sample"
    if event.kind == "validation":
        return f"step {data['step']}: validation loss {data['loss']:.4f}"
    return str(data.get("message", event.kind))


def spoken_duration(seconds: float) -> str:
    """ "42 s", "3 min", "2 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
