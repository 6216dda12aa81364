"""A child process that is watched: its output drained, its whole tree ended, nothing left behind.

No shell, no console signals. The child gets a pipe as standard input that nobody writes to: it ends when this process
dies, however it dies, and the child may take that as its sign to end too.
"""

import logging
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

TERMINATE_SECONDS = 3.0  # between asking the tree to end and ending it
KILL_SECONDS = 5.0
_TAIL_BYTES = 32_768
_LONGEST_LOG = 64_000_000  # a library that prints for ever must not fill the disk
_LOOK_EVERY = 0.5  # seconds between looks for grandchildren


class ChildError(RuntimeError):
    """A child process could not be started."""


class Child:
    """A started process.

    Args:
        command: program and arguments.
        folder: where it runs.
        log_file: its standard output and error are appended here.
        environment: all of its environment.
        pass_fds: descriptors that it inherits (POSIX).

    Attributes:
        pid: of the process itself.
        started: unix seconds.

    Raises:
        ChildError: the program cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        log_file: Path,
        environment: Mapping[str, str],
        pass_fds: Sequence[int] = (),
    ) -> None:
        options: dict[str, object] = {}
        if os.name == "nt":
            flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW  # type: ignore[attr-defined,unused-ignore]
            options["creationflags"] = flags
        else:  # its own session: Ctrl-C in ComfyUI's terminal asks ComfyUI, which asks the child
            options.update(start_new_session=True, pass_fds=tuple(pass_fds))
        self.started = time.time()
        try:
            self._process = subprocess.Popen(
                list(command),
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                **options,  # type: ignore[call-overload]
            )
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ChildError(f"{command[0]} cannot be started: {reason}") from error
        self.pid = self._process.pid
        self._tail = bytearray()
        self._seen: dict[int, psutil.Process] = {}
        self._looked = 0.0
        self._drain = threading.Thread(target=self._read, args=(log_file, " ".join(command)), daemon=True)
        self._drain.start()

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if time.monotonic() - self._looked > _LOOK_EVERY:
            self._look()
        code: int | None = self._process.poll()
        return code

    def tail(self, lines: int = 30) -> str:
        """The last lines of its output. A progress bar that redraws itself counts as one."""
        text = bytes(self._tail).decode("utf-8", errors="replace").replace("\r\n", "\n")
        kept = [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
        return "\n".join([line for line in kept if line][-lines:])

    def end(self) -> None:
        """End the process and all that it started; returns when they are gone. Does nothing when they are."""
        with suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        tree = self._tree()
        for process in tree:
            _signal(process, kill=False)
        self._wait(tree, TERMINATE_SECONDS)
        survivors = self._tree()
        for process in survivors:
            _signal(process, kill=True)
        self._wait(survivors, KILL_SECONDS)
        self._drain.join(KILL_SECONDS)
        if self._process.poll() is None or self._tree():
            log.error("QR-LoRA: the trainer (process %d) does not end; please end it by hand", self.pid)

    def _look(self) -> None:
        """Remember what it has started by now: after its death nothing tells whose child a process was."""
        self._looked = time.monotonic()
        with suppress(psutil.Error):
            for process in psutil.Process(self.pid).children(recursive=True):
                self._seen.setdefault(process.pid, process)

    def _tree(self) -> list[psutil.Process]:
        """The living processes of the tree; the process itself stays its own until it is waited for."""
        self._look()
        tree = dict(self._seen)
        if self._process.poll() is None:
            with suppress(psutil.Error):
                tree[self.pid] = psutil.Process(self.pid)
        if os.name != "nt":  # those that lost their parent are still in the session
            for pid in psutil.pids():
                with suppress(OSError, psutil.Error):
                    if pid not in tree and os.getsid(pid) == self.pid:
                        process = psutil.Process(pid)
                        if process.create_time() >= self.started - 1.0:
                            tree[pid] = process
        return [process for process in tree.values() if alive(process)]

    def _wait(self, processes: list[psutil.Process], seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._process.poll() is not None and not any(alive(process) for process in processes):
                return
            time.sleep(0.05)

    def _read(self, log_file: Path, title: str) -> None:
        """Drain the output: whatever happens to the log, a pipe that nobody reads would stop the child."""
        assert self._process.stdout is not None
        written = 0
        with suppress(OSError, ValueError), self._process.stdout as stream:
            file = None
            with suppress(OSError):
                file = log_file.open("ab", buffering=0)
                file.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n".encode(errors="replace"))
            while chunk := stream.read(65_536):
                self._tail = (self._tail + chunk)[-_TAIL_BYTES:]
                if file is not None and written < _LONGEST_LOG:
                    try:
                        written += file.write(chunk) or 0
                    except OSError:  # a full disk
                        written = _LONGEST_LOG
            if file is not None:
                file.close()


def alive(process: psutil.Process) -> bool:
    """Whether it still runs; a zombie that its own parent has to collect does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def still_runs(pid: int, created: float) -> bool:
    """Whether a process noted earlier is still there, and not another one with its number."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created) <= 1.0 and alive(process)
    except psutil.Error:
        return False


def end_process(pid: int, created: float) -> bool:
    """End a process of an earlier session and its tree, if it is still that one. Whether there was one to end."""
    if not still_runs(pid, created):
        return False
    try:
        process = psutil.Process(pid)
        tree = [*process.children(recursive=True), process]
    except psutil.Error:
        return False
    for member in tree:
        _signal(member, kill=False)
    _, survivors = psutil.wait_procs(tree, TERMINATE_SECONDS)
    for member in survivors:
        _signal(member, kill=True)
    psutil.wait_procs(survivors, KILL_SECONDS)
    return True


def _signal(process: psutil.Process, kill: bool) -> None:
    with suppress(psutil.Error, OSError):
        process.kill() if kill else process.terminate()
