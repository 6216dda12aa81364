"""The trainer's events, read from the file that it appends to."""

from pathlib import Path

from ...train.events import EventError, TrainEvent, parse

_LONGEST_LINE = 1 << 20


class EventFeed:
    """New events of a file that another process appends to. Lines that are no events are counted and left out.

    Args:
        path: the file, which may not be there yet.
        from_start: also what is there already, of earlier starts.
    """

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.is_file() and not from_start else 0
        self._unfinished = b""  # the beginning of a line whose end is not there yet
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
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        if len(self._unfinished) > _LONGEST_LINE:
            self._unfinished, self.garbage = b"", self.garbage + 1
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
    feed, events = EventFeed(path, from_start=True), []
    while some := feed.read():
        events += some
    return events
