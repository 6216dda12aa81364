"""Forks trainers: `server.py DESCRIPTOR LOG`, started by `WarmPython` with an open socket and with pipes as standard
streams; the end of its input is its own end.

It imports nothing of others' before the first request, whose variables it takes over: some are read by imports. It
computes nothing, so no library starts threads that a fork would lack. A later request whose variables differ in more
than FREE, or that is no plain start of this pack's trainer, is left to the real interpreter.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
from pathlib import Path

import fresh

ROOT = Path(__file__).resolve().parents[2]
START = ROOT / "train" / "start.py"
# What a trainer imports. Modules of the pack bring torch, accelerate, diffusers and transformers along
MODULES = ("train.cli", "train.check", "train.failures", "train.run.plan", "train.run.fit", "train.run.strengths")
# Changed without being read by anything that is imported, or read by `fresh` itself
FREE = {*fresh.OWN, "PYTEST_CURRENT_TEST", "PWD", "OLDPWD", "SHLVL", "_"}


class Refused(Exception):
    """The real interpreter has to do it; the message says why."""


class Server:
    """Waits for requests and for the ends of its forks; `serve` returns in a fork only, with its request."""

    def __init__(self, descriptor, folder):
        self._folder = folder
        self._early = fresh.early(os.environ)
        self._environment = None  # of the first request, without FREE
        self._imported = {}  # variables that imports have set
        self._broken = ""
        self._forks = {}  # connection -> (process id, descriptor of the process)
        self._listener = socket.socket(fileno=descriptor)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(0, selectors.EVENT_READ, self._lifeline)

    def serve(self):
        while True:
            for key, _ in self._selector.select():
                if key.fileobj in self._selector.get_map():  # not dropped meanwhile
                    request = key.data()
                    if request is not None:
                        return request

    def _lifeline(self):
        if not os.read(0, 4096):
            for connection in list(self._forks):
                self._kill(connection)
            shutil.rmtree(self._folder, ignore_errors=True)  # whoever started us may have been killed
            os._exit(0)

    def _accept(self):
        connection, _ = self._listener.accept()
        connection.settimeout(20)
        received = []
        try:
            request = read(connection, received)
            self._require(request)
            return self._fork(request, received, connection)
        except Refused as reason:
            note(f"real {reason}")
            with contextlib.suppress(OSError):
                connection.sendall(b"E")
            connection.close()
        except (OSError, ValueError) as error:  # it was ended meanwhile
            note(f"gone {error}")
            connection.close()
        for number in received:
            os.close(number)
        return None

    def _require(self, request):
        """Raise Refused unless a fork is what a new interpreter would be."""
        arguments, environment = request["arguments"], request["environment"]
        by_name = arguments[:2] == ["-m", "train"] and Path(request["folder"]).resolve() == ROOT
        by_path = arguments and arguments[0].endswith("start.py") and Path(arguments[0]).resolve() == START
        if not by_name and not by_path:
            raise Refused(f"no trainer: {' '.join(arguments)[:80]}")
        if not {0, 1, 2} <= set(request["files"]):
            raise Refused("a closed standard stream")
        if fresh.early(environment) != self._early:
            raise Refused(f"early variables: {differing(fresh.early(environment), self._early)}")
        paths = fresh.paths(environment)
        if any((Path(path) / "sitecustomize.py").is_file() for path in paths):
            raise Refused("a sitecustomize.py")
        wanted = {name: value for name, value in environment.items() if name not in FREE}
        if self._environment is None:
            self._environment = wanted
            self._warm_up([str(ROOT), *paths])
        if self._broken:
            raise Refused(self._broken)
        if wanted != self._environment:
            raise Refused(f"variables: {differing(wanted, self._environment)}")

    def _warm_up(self, paths):
        """Import; what a new interpreter would not find so before its first line makes this server useless."""
        os.environ.clear()
        os.environ.update(self._environment)
        before = fresh.state()
        sys.path[0:0] = paths
        try:
            import_all()
        except Exception as error:  # noqa: BLE001 - the real interpreter says it better, whatever it is
            self._broken = f"imports: {type(error).__name__} {error}"
            return
        del sys.path[: len(paths)]
        self._imported = {name: value for name, value in os.environ.items() if self._environment.get(name) != value}
        left = [name for name, value in fresh.state().items() if value != before[name]]
        self._broken = f"imports leave another state: {', '.join(left)}" if left else ""
        gc.collect()
        gc.freeze()  # what is shared with forks stays shared

    def _fork(self, request, received, connection):
        server = os.getpid()
        process = os.fork()
        if process:
            note(f"forked {' '.join(request['arguments'])[:80]}")
            handle = os.pidfd_open(process)
            self._forks[connection] = process, handle
            self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear(connection))
            self._selector.register(handle, selectors.EVENT_READ, lambda: self._ended(connection))
            for number in received:
                os.close(number)
            with contextlib.suppress(OSError):
                connection.send(b"S")
            return None
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no fork outlives the server
        if os.getppid() != server:
            os._exit(1)
        os.setsid()
        self._let_go(connection)
        request["environment"] |= self._imported
        fresh.take_files(dict(zip(request["files"], received)))
        return request

    def _let_go(self, connection):
        """Close in a fork what is the server's: closed later, by a destructor, it might be another file by then."""
        self._selector.close()
        self._listener.close()
        connection.close()
        for other, (_, handle) in self._forks.items():
            other.close()
            os.close(handle)

    def _hear(self, connection):
        """Signals for a fork, or the end of the one that stands in for it."""
        process, _ = self._forks[connection]
        try:
            numbers = connection.recv(64)
        except OSError:
            numbers = b""
        for number in numbers:
            os.kill(process, number)  # not waited for yet, so it is still this one
        if not numbers:
            self._kill(connection)

    def _ended(self, connection):
        process, _ = self._forks[connection]
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        with contextlib.suppress(OSError):
            connection.sendall(code.to_bytes(4, "big", signed=True))
        self._drop(connection)

    def _kill(self, connection):
        process, _ = self._forks[connection]
        os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # it had no group of its own yet
            os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        self._drop(connection)

    def _drop(self, connection):
        _, handle = self._forks.pop(connection)
        for one in (connection, handle):
            self._selector.unregister(one)
        os.close(handle)
        connection.close()


def read(connection, received):
    """A request; `received` takes its open files in."""
    head, files, _, _ = socket.recv_fds(connection, 4, 253)
    received += files
    data = b""
    size = int.from_bytes(head, "big")
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise OSError("an incomplete request")
        data += more
    request = json.loads(data)
    if not head or len(request["files"]) != len(files):
        raise OSError("an incomplete request")
    return request


def import_all():
    """Import all of MODULES, and the classes of all families, quietly, as the trainer does."""
    quiet_imports = importlib.import_module("train.imports").quiet_imports
    with quiet_imports():
        for name in MODULES:
            importlib.import_module(name)
        diffusers = importlib.import_module("diffusers")
        for backbone in importlib.import_module("train.model.backbones").BACKBONES:
            getattr(diffusers, backbone.model_class, None)


def differing(one, other):
    return ", ".join(sorted(name for name in {*one, *other} if one.get(name) != other.get(name)))


def note(line):
    os.write(2, f"{line}\n".encode(errors="backslashreplace"))


def write_to(log):
    """Both streams go to a file from here on; that they began as pipes, which cannot seek, is what forks need."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    write_to(sys.argv[2])
    # a fork goes on here, below nothing that the server does: it ends as any program ends
    if fresh.become(Server(int(sys.argv[1]), Path(sys.argv[2]).parent).serve(), START.parent):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module("train", run_name="__main__", alter_sys=True)
