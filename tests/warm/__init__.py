"""Trainers that need not import torch and diffusers: each is forked from an interpreter that has done so once.

A start of the trainer spends four to six seconds of a processor on imports, and the tests start it many times. On Linux
they name `WarmPython.python` as its interpreter: a small program (`standin`) that hands arguments, environment, folder
and open files to a server (`server`), waits for the fork that runs them, and ends as that one ended. What is no plain
start of the trainer, or would read other variables while it imports, is given to the real interpreter. Elsewhere, and
where not everything can be imported, it is the real interpreter.

What is about starting itself belongs to the real one: signals, what imports print, packages that are missing.
"""

import atexit
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def _available() -> bool:
    """Linux since 5.3 tells a process' end by a descriptor."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


AVAILABLE = _available()
_started: dict[tuple[str, str], "WarmPython"] = {}


class WarmPython:
    """A server for one interpreter; it imports at the first start, with the variables of that one.

    Args:
        real: the interpreter.
        server: the program that forks; it serves the pack that it lies in.

    Attributes:
        python: what to start instead; `real` itself where there are no such servers.
    """

    def __init__(self, real: str = sys.executable, server: Path = HERE / "server.py") -> None:
        self.python, self.process, self._folder = real, None, None
        if not AVAILABLE:
            return
        self._folder = Path(tempfile.mkdtemp(prefix="warm"))  # short: a socket's address has at most 107 bytes
        address = str(self._folder / "socket")
        # the variables of an interpreter's own start come with each request
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        with socket.socket(socket.AF_UNIX) as listener:  # from here: the first request may come before the server runs
            listener.bind(address)
            listener.listen(64)
            command = [real, "-u", server, str(listener.fileno()), self._folder / "log"]
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(listener.fileno(),),
                start_new_session=True,
            )
        self.process.stdout.close()  # the server writes to its log
        words = [real, "-S", "-E", HERE / "standin.py", address, real]
        script = self._folder / "python"
        script.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
        script.chmod(0o755)
        self.python = str(script)

    def told(self) -> list[str]:
        """A line for every start: "forked ...", or "real ..." with why the real interpreter had to take it."""
        log = self._folder and self._folder / "log"
        return log.read_text(errors="replace").splitlines() if log and log.is_file() else []

    def close(self) -> None:
        """End the server and all that it forked."""
        if self.process is None:
            return
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:  # in the middle of imports
            self.process.kill()
            self.process.wait(20)
        shutil.rmtree(self._folder, ignore_errors=True)
        self.process = self._folder = None

    def __enter__(self) -> "WarmPython":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def warm_python(real: str = sys.executable, purpose: str = "tests") -> str:
    """The interpreter to start trainers with; its server ends with this process.

    Args:
        real: the interpreter that it stands for.
        purpose: starts whose variables differ, such as those of a host, each want a server of their own.
    """
    if (real, purpose) not in _started:
        _started[real, purpose] = WarmPython(real)
        atexit.register(_started[real, purpose].close)
    return _started[real, purpose].python
