"""ComfyUI's Python with the host's packages imported once, and a copy of it for each program that needs them.

Importing torch and what belongs to it takes most of the time of a short program in ComfyUI. On Linux one process
imports the packages (nothing of the host itself, whose imports read the command line), and each program runs in a fork
of it: with a command line, a folder and an environment of its own. Elsewhere each starts its own Python. Nothing but
its output and its end is asked of such a program; what has to be a process like any other is in `tests.warm`.

This file is also what that process runs: it reads a question per line, and answers with an exit code.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = (
    *("torch", "torch._dynamo", "torchvision", "torchaudio", "torchsde", "transformers", "comfy_kitchen"),
    *("scipy.stats", "scipy.integrate", "safetensors.torch", "einops", "aiohttp", "av", "alembic", "sqlalchemy"),
    *("requests", "PIL.Image", "yaml", "pydantic", "psutil", "tqdm.auto", "numpy"),
)
LONGEST = 900  # seconds for a program


class HostPython:
    """Runs programs in an interpreter, as `subprocess.run` does."""

    def __init__(self, python):
        self._python, self._process = python, None

    def run(self, arguments, folder, environment=None):
        """Run `python *arguments` in a folder; what it printed and its exit code.

        Args:
            arguments: `["-m", module, ...]` or `[script, ...]`.
            folder: where it runs.
            environment: variables that it has besides.
        """
        arguments = [str(one) for one in arguments]
        more = {"PYTHONDONTWRITEBYTECODE": "1", **(environment or {})}
        if sys.platform != "linux":
            command = [self._python, *arguments]
            return subprocess.run(
                command,
                cwd=folder,
                env={**os.environ, **more},
                capture_output=True,
                text=True,
                check=False,
                timeout=LONGEST,
            )
        if self._process is None:
            # a pool of threads would not outlive a fork, nor would a card that torch has asked by other ways than NVML
            alone = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONDONTWRITEBYTECODE": "1"}
            self._process = subprocess.Popen(
                [self._python, __file__], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, **alone},
            )  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            files = [f"{scratch}/{name}" for name in ("stdout", "stderr")]
            question = {"arguments": arguments, "folder": str(folder), "environment": more, "files": files}
            print(json.dumps(question), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
            assert answer, "the process that holds the packages ended"
            printed = [Path(file).read_text(encoding="utf-8", errors="replace") for file in files]
        return subprocess.CompletedProcess(arguments, int(answer), *printed)

    def end(self):
        if self._process is not None:
            self._process.communicate()


def serve():
    """Import the packages, and fork for what is asked for until nobody asks any more; in a fork, what was asked."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    del sys.path[0]
    for name in PACKAGES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            return json.loads(line)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    return None


def become(arguments, folder, environment, files):
    """Be a Python that was started with these arguments."""
    signal.alarm(LONGEST)
    for number, file in enumerate([os.devnull, *files]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    os.environ.update(environment)
    os.chdir(folder)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, folder)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__" and (asked := serve()):
    become(**asked)
