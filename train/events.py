"""What a running trainer tells whoever started it: one JSON object a line, on a file or pipe of its own.

Standard library only, so that a host can read the lines without torch. A line is
`{"v": 1, "event": <kind>, "time": <unix seconds>, ...fields}`; `FIELDS` lists the fields of each kind. Readers ignore
fields they do not know, so that fields can be added.
"""

import errno
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TextIO, get_args

VERSION = 1

Kind = Literal[
    "started", "phase", "step", "validation", "sample", "strengths", "saved", "finished", "stopped", "failed"
]
KINDS: tuple[str, ...] = get_args(Kind)

_NUMBER = (int, float)
# A reader that is gone: closed pipes, and what Windows calls them. A full disk is none of these.
_CLOSED = (errno.EPIPE, errno.EINVAL, errno.ESHUTDOWN, errno.ECONNRESET)
# kind -> field -> accepted types. Every field listed here is required.
FIELDS: Mapping[str, Mapping[str, tuple[type, ...]]] = MappingProxyType(
    {
        # everything is loaded, the steps begin. first_step: steps already done by the run that is resumed
        "started": {"pid": (int,), "steps": (int,), "first_step": (int,), "pack_version": (str,), "run_dir": (str,)},
        # phase: load, basis, train, save, encode, ...; done and total count what is worked on, total 0: not known
        "phase": {"phase": (str,), "done": (int,), "total": (int,), "text": (str,)},
        # loss: mean of the step; smoothed: exponential average; seconds: per step; eta in seconds; memory in bytes
        "step": {
            "step": (int,),
            "steps": (int,),
            "loss": _NUMBER,
            "smoothed_loss": _NUMBER,
            "lr": _NUMBER,
            "seconds": _NUMBER,
            "eta": _NUMBER,
            "peak_memory": (int,),
        },
        # mean loss over fixed items, noise and timesteps: comparable from step to step
        "validation": {"step": (int,), "loss": _NUMBER},
        # file: a safetensors file of sample latents, relative to run_dir
        "sample": {"step": (int,), "file": (str,)},
        # file: JSON with what the adapter does at several strengths, relative to run_dir; its lists come along
        "strengths": {"step": (int,), "file": (str,)},
        # what: checkpoint or adapter; file: relative to run_dir where it lies inside, otherwise as given
        "saved": {"step": (int,), "what": (str,), "file": (str,)},
        # the adapter was written, opened again and checked
        "finished": {"step": (int,), "file": (str,), "sha256": (str,)},
        # ended on request; checkpoint: file to resume from, "" when nothing was done yet
        "stopped": {"step": (int,), "checkpoint": (str,)},
        # reason: one of REASONS; message says what to do
        "failed": {"reason": (str,), "message": (str,)},
    }
)
_DEEPEST = 20  # brackets in one another that an event may have
_LARGEST = 1 << 63  # what a count may be; larger ones cannot become floats
_LATEST = 1e15  # unix seconds; also keeps NaN and infinity out
_CUT = "#cut"  # ends a line that a killed writer left half done; no JSON ends so
REASONS = ("settings", "data", "model", "memory", "disk", "loss", "resume", "library", "internal")


class EventError(ValueError):
    """A line is not an event."""


@dataclass(frozen=True, slots=True)
class TrainEvent:
    """One thing that happened.

    Attributes:
        kind: one of KINDS.
        data: the fields that FIELDS lists for the kind, and perhaps more.
        time: unix seconds.

    Raises:
        EventError: an unknown kind, or a field that is missing or of another type.
    """

    kind: str
    data: Mapping[str, Any]
    time: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        if self.kind not in FIELDS:
            raise EventError(f"event kind {self.kind!r:.80} is not one of {', '.join(KINDS)}")
        for name, types in FIELDS[self.kind].items():
            value = self.data.get(name)
            fits = isinstance(value, types) and not isinstance(value, bool)
            if not fits or (isinstance(value, int) and not abs(value) < _LARGEST):
                raise EventError(
                    f"{self.kind}.{name} is {value!r:.80}, expected {' or '.join(t.__name__ for t in types)}"
                )

    def line(self) -> str:
        """The event as one line of ASCII JSON, without the line break. NaN and infinite numbers become null.

        `parse` reads null as NaN where a number belongs, so that a reader can go on calculating.
        """
        fields = {"v": VERSION, "event": self.kind, "time": round(self.time, 3), **self.data}
        return json.dumps(_finite(fields), separators=(",", ":"))


def parse(line: str) -> TrainEvent:
    """Read one line.

    Raises:
        EventError: not JSON, another version, an unknown kind, or fields that do not fit.
    """
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EventError(f"not JSON: {line[:80]!r}") from error
    if not isinstance(raw, dict) or raw.get("v") != VERSION:
        raise EventError(f"not an event of version {VERSION}: {line[:80]!r}")
    numbers = {name for name, types in FIELDS.get(str(raw.get("event")), {}).items() if types == _NUMBER}
    data = {
        key: math.nan if value is None and key in numbers else value
        for key, value in raw.items()
        if key not in ("v", "event", "time")
    }
    if _depth(raw) > _DEEPEST:
        raise EventError(f"an event of too many brackets: {line[:80]!r}")
    when = raw.get("time")
    # an integer of 400 digits is no time, and cannot become a float
    if not isinstance(when, _NUMBER) or isinstance(when, bool) or not abs(when) < _LATEST:
        raise EventError(f"an event without a time: {line[:80]!r}")
    return TrainEvent(str(raw.get("event")), data, float(when))


def read_events(path: Path) -> list[TrainEvent]:
    """All whole events of a file.

    A last line that is still being written is left out, and so is one that a killed writer left half done.

    Raises:
        EventError: a whole line is not an event.
        OSError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EventError(f"{Path(path).name} is not UTF-8 text: {error}") from error
    whole = text[: text.rfind("\n") + 1]
    return [parse(line) for line in whole.split("\n") if line.strip() and not line.endswith(_CUT)]


class EventWriter:
    """Writes events to a stream, each flushed at once; without a stream they are dropped.

    A stream that its reader has closed ends the reporting, not the training.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    @classmethod
    def open(cls, where: str) -> "EventWriter":
        """Append to a file; "-" is standard output, "" nothing.

        Raises:
            OSError: the file cannot be opened.
        """
        if not where:
            return cls(None)
        if where == "-":
            return cls(sys.stdout)
        path = Path(where)
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a", encoding="utf-8", newline="\n")
        if _ends_in_a_line(path):
            stream.write(f"{_CUT}\n")
        return cls(stream)

    def emit(self, kind: Kind, **data: Any) -> TrainEvent:
        """Write one event and return it.

        Raises:
            EventError: fields that do not fit the kind.
        """
        event = TrainEvent(kind, data)
        if self._stream is not None:
            try:
                self._stream.write(event.line() + "\n")
                self._stream.flush()
            except ValueError:  # closed on our side
                self._stream = None
            except OSError as error:
                if error.errno not in _CLOSED:
                    raise
                self._stream = None
        return event

    def close(self) -> None:
        """Let go of a file; standard output stays open."""
        if self._stream is not None and self._stream is not sys.stdout:
            self._stream.close()
        self._stream = None


def _ends_in_a_line(path: Path) -> bool:
    """Whether a writer before us was killed in the middle of a line."""
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return False
        file.seek(-1, 2)
        return file.read() != b"\n"


def _depth(value: Any) -> int:
    """How many tables and lists lie in one another; at most one more than _DEEPEST."""
    level, depth = [value], 0
    while level and depth <= _DEEPEST:
        tables = [
            list(container.values()) if isinstance(container, dict) else container
            for container in level
            if isinstance(container, dict | list)
        ]
        level, depth = [child for children in tables for child in children], depth + 1
    return depth


def _finite(value: Any) -> Any:
    """JSON knows no NaN: null, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
