"""What an interpreter is before its first line, and how a fork of `server` becomes that."""

import contextlib
import fcntl
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

# Variables of an interpreter's own start that each fork follows
OWN = {"PYTHONUNBUFFERED", "PYTHONIOENCODING", "PYTHONDONTWRITEBYTECODE"}
# Others of that kind, and of the system's libraries: they are read before the first line
_EARLY = ("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "GLIBC_")


def early(environment):
    """The variables that a process reads before it can be told others."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_EARLY) and name not in {*OWN, "PYTHONPATH"}
    }


def paths(environment):
    """The folders of PYTHONPATH."""
    return list(filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)))


def state():
    """What imports may not have changed for good: name -> something that can be compared."""
    return {
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "open files": open_files(),
        "warnings": list(warnings.filters),
        "logging": (logging.root.handlers[:], logging.root.level, logging.root.manager.disable),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "sys.path": list(sys.path),
        "folder": str(Path.cwd()),
        "umask": _umask(),
    }


def open_files():
    """Number -> what is open there."""
    found = {}
    for path in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):  # the listing's own
            found[int(path.name)] = str(path.readlink())
    return found


def _umask():
    value = os.umask(0)
    os.umask(value)
    return value


def take_files(files):
    """Give received files their numbers (number -> descriptor). Nothing else stays open."""
    lowest = max([*files, *files.values()]) + 1
    moved = {number: fcntl.fcntl(received, fcntl.F_DUPFD, lowest) for number, received in files.items()}
    for other in open_files():
        if other > 2 and other not in moved.values():
            os.close(other)
    for number, descriptor in moved.items():
        os.dup2(descriptor, number)
        os.close(descriptor)


def become(request, scripts):
    """Make this fork what a new interpreter is with the request's arguments, environment and folder.

    Returns:
        Whether the first argument is a script, in the folder `scripts`; otherwise the two first are "-m" and a module.
    """
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    _open_streams()
    if "numpy" in sys.modules:  # Python's own does it by itself; torch's first numbers are always the same
        sys.modules["numpy"].random.seed()
    arguments = request["arguments"]
    by_path = arguments[0] != "-m"
    sys.orig_argv = [sys.executable, *arguments]
    sys.argv = list(arguments) if by_path else ["-m", *arguments[2:]]
    sys.path[0:1] = [str(scripts) if by_path else str(Path.cwd()), *paths(os.environ)]
    return by_path


def _open_streams():
    """As an interpreter sets them up. The objects stay: loggers of imported packages hold them.

    They are those of `python -u`; where that is not asked for, text waits in the upper of their two layers.
    """
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    through = bool(os.environ.get("PYTHONUNBUFFERED"))
    named = {"encoding": encoding} if encoding else {}
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        how = "backslashreplace" if stream is sys.stderr else errors or None
        lines = not through and (stream is sys.stderr or stream.isatty())
        stream.reconfigure(**named, errors=how, line_buffering=lines, write_through=through)
