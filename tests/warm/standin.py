"""Stands in for an interpreter: `standin.py SOCKET REAL ARGUMENTS...`, with the standard library alone.

It asks the server for a fork with these arguments, and ends as that fork ends: with its exit code, or by its signal.
Without an answer, or where the server refuses, it becomes the real interpreter.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main():
    where, real, *arguments = sys.argv[1:]
    stream = forked(where, arguments)
    if stream is None:
        os.execv(real, [real, *arguments])
    for number in PASSED_ON:  # until now one of these has ended us, as it ends a Python that still imports
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: stream.send(bytes([number])))
    code = b""
    while len(code) < 4:
        more = stream.recv(4 - len(code))
        if not more:
            sys.exit("the server of warm trainers is gone, and the trainer with it")
        code += more
    end(int.from_bytes(code, "big", signed=True))


def forked(where, arguments):
    """The connection to the server, once it has forked; None when it does not."""
    numbers = [int(path.name) for path in Path("/proc/self/fd").iterdir()]
    files = [number for number in numbers if inherited(number)]
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": str(Path.cwd()), "files": files}
    data = json.dumps(request).encode()
    stream = socket.socket(socket.AF_UNIX)
    try:
        stream.connect(where)
        socket.send_fds(stream, [len(data).to_bytes(4, "big")], files)
        stream.sendall(data)
        return stream if stream.recv(1) == b"S" else None
    except OSError:
        return None


def inherited(number):
    """Whether a program that we become would have this open file."""
    try:
        return os.get_inheritable(number)
    except OSError:  # the listing's own
        return False


def end(code):
    if code >= 0:
        os._exit(code)
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


main()
