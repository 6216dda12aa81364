"""When to stop: a signal, a file that appears, or the end of the process that started this one."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

log = logging.getLogger(__name__)

# The starter is gone: nobody will read what we say. Whatever is not saved by then can be had again from the last
# checkpoint, and half-written files have temporary names.
ORPHAN_SECONDS = 4.0
ORPHAN_EXIT = 4


class Stopped(BaseException):
    """The run was asked to stop. Not an Exception, so that no library takes it for a failure."""


class StopWatch:
    """Knows whether the run was asked to stop.

    Attributes:
        stop_file: its appearance is a request.
        orphaned: whoever started this process is gone.
    """

    def __init__(self, stop_file: Path | None = None) -> None:
        self.stop_file = stop_file
        self.orphaned = False
        self._asked = threading.Event()

    @property
    def asked(self) -> bool:
        """Whether to stop; looks at the stop file."""
        if not self._asked.is_set() and self.stop_file is not None and self.stop_file.exists():
            log.info("stop file found")
            self._asked.set()
        return self._asked.is_set()

    def ask(self) -> None:
        """Ask the run to stop."""
        self._asked.set()

    def check(self) -> None:
        """Raise Stopped when the run was asked to stop."""
        if self.asked:
            raise Stopped

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT (and Ctrl-Break on Windows) ask to stop; a second one is the system's business again."""
        names = ("SIGTERM", "SIGINT", "SIGBREAK")
        wanted = [getattr(signal, name) for name in names if hasattr(signal, name)]
        if threading.current_thread() is not threading.main_thread():
            wanted = []
        before = {number: signal.getsignal(number) for number in wanted}

        def on_signal(number: int, frame: FrameType | None) -> None:
            log.info("signal %s: stopping with a checkpoint", number)
            self.ask()
            signal.signal(number, before[number])

        for number in wanted:
            signal.signal(number, on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def hold_lifeline(self) -> None:
        """Watch standard input: its end means that whoever started this process is gone.

        The run is asked to stop, and after ORPHAN_SECONDS the process ends whatever it is doing.
        """

        def wait() -> None:
            # not through sys.stdin: a thread that holds its lock at exit is a fatal error of the interpreter
            with suppress(OSError):
                while os.read(0, 1):
                    pass
            self.orphaned = True
            self.ask()
            threading.Event().wait(ORPHAN_SECONDS)
            os._exit(ORPHAN_EXIT)

        threading.Thread(target=wait, name="lifeline", daemon=True).start()
