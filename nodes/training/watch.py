"""Watching a training: read its events, hear Cancel, end it when it hangs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...train.events import TrainEvent
from .feed import EventFeed
from .process import Child

POLL_SECONDS = 0.2


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
