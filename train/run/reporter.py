"""What a run says while it works: events for a host, a progress bar for a person at a terminal."""

import sys
import time
from types import TracebackType
from typing import Any

import psutil
import torch
from tqdm import tqdm

from ..events import EventWriter, Kind

_SMOOTHING = 0.95  # of the smoothed loss: about the mean of the last 20 steps
_SPEED_SMOOTHING = 0.8


class Reporter:
    """Sends events and draws progress; a run of several processes has one that speaks and others that are silent.

    Attributes:
        smoothed_loss: exponential average of the loss, None before the first step.
    """

    def __init__(self, events: EventWriter, device: torch.device, speaks: bool = True) -> None:
        self._events = events if speaks else EventWriter(None)
        self._device = device
        self._bar: Any = None
        self._draws = speaks and sys.stderr.isatty()
        self._phase: tuple[str, float] = ("", 0.0)
        self._last_step = 0.0
        self._seconds: float | None = None
        self._peak = 0
        self.smoothed_loss: float | None = None

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_bar()

    def emit(self, kind: Kind, **data: Any) -> None:
        """Pass an event on."""
        self._events.emit(kind, **data)

    def phase(self, phase: str, done: int = 0, total: int = 0, text: str = "") -> None:
        """Say what is being done; within one phase at most four times a second, and always at its end."""
        now = time.monotonic()
        if self._phase[0] == phase and now - self._phase[1] < 0.25 and done != total:
            return
        if self._phase[0] != phase:
            self._open_bar(text or phase, total)
        self._phase = (phase, now)
        self._events.emit("phase", phase=phase, done=done, total=total, text=text or phase)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def start_steps(self, done: int, steps: int) -> None:
        """The next things reported are steps."""
        self.phase("train", done, steps, "training")
        self._last_step = time.monotonic()

    def step(self, step: int, steps: int, loss: float, lr: float) -> None:
        """Report one optimizer step: its number from 1, mean loss and learning rate."""
        now = time.monotonic()
        seconds, self._last_step = now - self._last_step, now
        weight = _SPEED_SMOOTHING if self._seconds is not None else 0.0
        self._seconds = weight * (self._seconds or 0.0) + (1 - weight) * seconds
        weight = _SMOOTHING if self.smoothed_loss is not None else 0.0
        self.smoothed_loss = weight * (self.smoothed_loss or 0.0) + (1 - weight) * loss
        self._events.emit(
            "step",
            step=step,
            steps=steps,
            loss=loss,
            smoothed_loss=self.smoothed_loss,
            lr=lr,
            seconds=round(self._seconds, 4),
            eta=round(self._seconds * (steps - step), 1),
            peak_memory=self.peak_memory(),
        )
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{self.smoothed_loss:.4f}", lr=f"{lr:.1e}", refresh=False)
            self._bar.update(step - self._bar.n)

    def peak_memory(self) -> int:
        """Bytes: the most the GPU held so far; on a CPU the most that this process was seen to hold."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        self._peak = max(self._peak, psutil.Process().memory_info().rss)
        return self._peak

    def _open_bar(self, text: str, total: int) -> None:
        self._close_bar()
        if self._draws:
            self._bar = tqdm(total=total or None, desc=text, dynamic_ncols=True, file=sys.stderr)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
