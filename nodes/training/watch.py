"""Watching a training: read its events, hear Cancel, end it when it hangs, and say truthfully how it ended."""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...qrlora_core import QRLoRAError
from ...train.events import EventError, TrainEvent, parse
from .process import Child

POLL_SECONDS = 0.2
_LONGEST_LINE = 1 << 20
_NO_MEMORY = re.compile(r"out of memory|OutOfMemory|MemoryError|can't allocate memory|bad_alloc|Cannot allocate", re.I)
_NO_DISK = re.compile(r"No space left on device|disk is full|Disk quota exceeded|not enough space", re.I)


class TrainingError(QRLoRAError):
    """A training ended without an adapter; the message says why and what to do."""


class EventFeed:
    """New events of a file that another process appends to. Lines that are no events are counted and left out."""

    def __init__(self, path: Path) -> None:
        """Start at the file's present end: what is there is of earlier starts."""
        self._path = path
        self._offset = path.stat().st_size if path.is_file() else 0
        self._rest = b""
        self.garbage = 0

    def read(self) -> list[TrainEvent]:
        """The events since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(8 * _LONGEST_LINE)
        except OSError:  # not there yet
            return []
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            self._rest, self.garbage = b"", self.garbage + 1
        return [event for line in lines if (event := self._event(line)) is not None]

    def _event(self, line: bytes) -> TrainEvent | None:
        text = line.decode("utf-8", errors="replace").strip()
        try:
            return parse(text) if text else None
        except EventError:
            self.garbage += 1
            return None


def earlier_events(path: Path) -> list[TrainEvent]:
    """All events of a file, whatever else is in it."""
    feed = EventFeed(Path(os.devnull))
    feed._path, feed._offset = path, 0
    found: list[TrainEvent] = []
    while some := feed.read():
        found += some
    return found


@dataclass(slots=True)
class Ending:
    """How a training ended.

    Attributes:
        code: exit code of the process; negative: the signal that ended it (POSIX).
        last: the last event of each kind, of this start only.
        asked: it was asked to stop.
        hung: seconds of silence after which it was ended, 0 when it was not.
        garbage: lines that were no events.
        tail: the last lines of its output.
    """

    code: int = 0
    last: dict[str, TrainEvent] = field(default_factory=dict)
    asked: bool = False
    hung: float = 0.0
    garbage: int = 0
    tail: str = ""

    @property
    def step(self) -> int:
        """The last step that was reported."""
        steps = [event.data["step"] for event in self.last.values() if "step" in event.data]
        return max(steps, default=0)


def watch(
    child: Child,
    feed: EventFeed,
    *,
    stop_file: Path,
    stop_seconds: float,
    silence_seconds: float,
    cancelled: Callable[[], bool],
    stop_asked: Callable[[], bool],
    news: Callable[[Sequence[TrainEvent], bool], None],
) -> Ending:
    """Stay with a child until it and all it started are gone, whatever happens meanwhile.

    Args:
        child: just started.
        feed: its events.
        stop_file: made to ask it for a checkpoint and the end.
        stop_seconds: how long that may take; then it is ended. A second Cancel ends it at once.
        silence_seconds: it is ended when it reports nothing for so long.
        cancelled: whether Cancel was pressed since the last call.
        stop_asked: whether the stop button was pressed.
        news: called five times a second with new events, and whether it is stopping.
    """
    ending = Ending()
    heard, stopping_since = time.monotonic(), 0.0
    try:
        while True:
            code = child.poll()
            events = feed.read()
            now = time.monotonic()
            heard = now if events else heard
            ending.last.update({event.kind: event for event in events})
            pressed = cancelled()
            if (pressed or stop_asked()) and not ending.asked and code is None:
                ending.asked, stopping_since, pressed = True, now, False
                stop_file.touch()
            news(events, ending.asked)
            if code is not None and not events:
                break
            if ending.asked and code is None and (pressed or now - stopping_since > stop_seconds):
                break
            if not ending.asked and code is None and now - heard > silence_seconds:
                ending.hung = now - heard
                break
            if code is None:
                time.sleep(POLL_SECONDS)
    finally:
        child.end()
    last = feed.read()
    ending.last.update({event.kind: event for event in last})
    if last:
        news(last, ending.asked)
    code = child.poll()
    ending.code = -9 if code is None else code
    ending.garbage, ending.tail = feed.garbage, child.tail()
    return ending


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


def told(event: TrainEvent) -> str:
    """An event as one line for people."""
    data: Mapping[str, Any] = event.data
    if event.kind == "step":
        memory = f", {data['peak_memory'] / 1e9:.1f} GB" if data["peak_memory"] else ""
        return (
            f"step {data['step']}/{data['steps']}, loss {data['smoothed_loss']:.4f}, {data['seconds']:.2f} s/step, "
            f"{duration(data['eta'])} left{memory}"
        )
    if event.kind == "phase":
        count = f" {data['done']}/{data['total']}" if data["total"] else ""
        return f"{data['phase']}{count}: {data['text']}" if data["text"] else f"{data['phase']}{count}"
    if event.kind == "saved":
        return f"step {data['step']}: {data['what']} saved"
    if event.kind == "sample":
        return f"step {data['step']}: sample"
    if event.kind == "validation":
        return f"step {data['step']}: validation loss {data['loss']:.4f}"
    return str(data.get("message", event.kind))


def duration(seconds: float) -> str:
    """ "42 s", "3 min", "2 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
