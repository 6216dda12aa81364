"""A fork is what a new interpreter would be, ends as it would end, and what it cannot be is left to the real one."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import base_settings, small_cache
from tests.warm import AVAILABLE, HERE, WarmPython, warm_python
from train.config import FitConfig, as_table
from train.events import read_events
from train.run.fit import fit
from train.settings import make_config

ROOT = HERE.parents[1]
pytestmark = [pytest.mark.process, pytest.mark.skipif(not AVAILABLE, reason="forks of servers are for Linux")]

# A trainer that says what it finds
REPORT = """
import json, os, random, sys, threading, time
sys.path.insert(0, {tests!r})
import fresh
sys.path.remove({tests!r})
found = fresh.state()
import numpy
found["warnings"] = [str(one) for one in found["warnings"]]
found["signals"] = [str(one) for one in found["signals"]]
found["logging"] = [len(found["logging"][0]), *found["logging"][1:]]
for name in ("stdin", "stdout", "stderr"):
    stream = getattr(sys, name)
    found[name] = [stream.encoding, stream.errors, stream.line_buffering, stream.write_through, stream.fileno()]
found |= {{
    "argv": sys.argv, "orig_argv": sys.orig_argv, "executable": sys.executable, "name": __name__,
    "main": sys.modules["__main__"].__name__, "environment": dict(os.environ), "bytecode": sys.dont_write_bytecode,
    "thread": threading.current_thread() is threading.main_thread(), "prefix": sys.prefix,
    "process": os.getpid(), "random": [random.random(), float(numpy.random.rand())],
}}
print(json.dumps(found), flush=True)
if sys.argv[1] == "wait":
    sys.stdin.read() and time.sleep(3600)
    os.abort()
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(scope="module", autouse=True)
def heed_interrupts():
    """A shell that starts tests in the background has them ignore SIGINT, and so everything that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """A pack whose trainer is REPORT, with all that the server imports, in a folder with a space."""
    root = tmp_path_factory.mktemp("a pack")
    shutil.copytree(HERE, root / "tests" / "warm", ignore=shutil.ignore_patterns("__pycache__", "test_*"))
    for name in ("train", "train/run", "train/model"):
        (root / name).mkdir()
        (root / name / "__init__.py").touch()
    for name in ("cli", "check", "failures", "run/plan", "run/fit", "run/strengths"):
        (root / "train" / f"{name}.py").touch()
    shutil.copy(ROOT / "train" / "imports.py", root / "train")
    shutil.copy(ROOT / "train" / "start.py", root / "train")
    (root / "train" / "model" / "backbones.py").write_text("BACKBONES = ()")
    (root / "train" / "__main__.py").write_text(REPORT.format(tests=str(root / "tests" / "warm")))
    (root / "diffusers.py").write_text("import numpy, os\nos.environ['SET_BY_AN_IMPORT'] = 'yes'")
    with WarmPython(server=root / "tests" / "warm" / "server.py") as warm:
        yield root, warm


def environment(**more):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**inherited, "PYTHONPATH": str(ROOT), **more}


STARTS = {
    "by path": (["train/start.py", "0", "\u00fc \u8bad"], "tests", {}),
    "by name": (["-m", "train", "7"], ".", {}),
    "as the node does": (["train/start.py", "0"], "tests", {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}),
    "few letters": (["-m", "train", "0"], ".", {"PYTHONIOENCODING": "ascii:replace", "PYTHONDONTWRITEBYTECODE": "1"}),
}


@pytest.mark.parametrize("how", STARTS)
def test_a_fork_finds_what_a_new_interpreter_finds(pack, how):
    root, warm = pack
    arguments, folder, more = STARTS[how]
    arguments = [str(root / one) if one.endswith("start.py") else one for one in arguments]
    found = []
    with (root / "lock").open("a") as lock:
        for python in (warm.python, sys.executable):
            done = subprocess.run(
                [python, *arguments], cwd=root / folder, env=environment(**more), capture_output=True, timeout=120,
                pass_fds=(lock.fileno(),), stdin=subprocess.DEVNULL,
            )  # fmt: skip
            assert done.returncode == int(arguments[-1 if how != "by path" else 1]), done.stderr
            found.append(json.loads(done.stdout))
    assert warm.told()[-1].startswith("forked"), warm.told()
    fork, new = found
    assert fork["environment"].pop("SET_BY_AN_IMPORT") == "yes"
    for each in found:  # which pipe, and what differs from one program to the next
        each["open files"] = {number: name.split(":[")[0] for number, name in each["open files"].items()}
        each.pop("process"), each.pop("random")
    changed = set(fork["environment"].items()) ^ set(new["environment"].items())
    assert {name for name, _ in changed} <= {"PWD", "OLDPWD", "_"}, "the shell's own"
    assert fork | {"environment": {}} == new | {"environment": {}}
    assert any(name.endswith("/lock") for name in new["open files"].values())


def test_forks_share_no_random_numbers(pack):
    root, warm = pack
    command = [warm.python, "-m", "train", "0"]
    asked = [subprocess.run(command, cwd=root, env=environment(), capture_output=True, check=True) for _ in range(2)]
    one, other = (json.loads(done.stdout) for done in asked)
    assert not set(one["random"]) & set(other["random"]) and one["process"] != other["process"]


REFUSED = {
    "another module": (["-m", "train.start"], {}, "no trainer"),
    "a line of code": (["-c", "pass"], {}, "no trainer"),
    "a flag of Python": (["-B", "-m", "train", "0"], {}, "no trainer"),
    "threads": (["-m", "train", "0"], {"OMP_NUM_THREADS": "7"}, "variables: OMP_NUM_THREADS"),
    "an unknown variable": (["-m", "train", "0"], {"NOBODY_KNOWS": "1"}, "variables: NOBODY_KNOWS"),
    "hashes": (["-m", "train", "0"], {"PYTHONHASHSEED": "1"}, "early variables: PYTHONHASHSEED"),
    "other packages": (["-m", "train", "0"], {"PYTHONPATH": "/nowhere"}, "variables: PYTHONPATH"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_fork_cannot_be_is_left_to_the_real_interpreter(pack, what):
    root, warm = pack
    arguments, more, why = REFUSED[what]
    subprocess.run([warm.python, "-m", "train", "0"], cwd=root, env=environment(), capture_output=True, check=True)
    before = len(warm.told())
    done = subprocess.run([warm.python, *arguments], cwd=root, env=environment(**more), capture_output=True, timeout=60)
    assert done.returncode == (1 if what == "another module" else 0), done.stderr
    assert [line.startswith(f"real {why}") for line in warm.told()[before:]] == [True], warm.told()


def test_a_sitecustomize_is_not_passed_over(pack, tmp_path):
    root, warm = pack
    (tmp_path / "sitecustomize.py").write_text("import os\nos._exit(5)")
    done = subprocess.run([warm.python, "-m", "train", "0"], cwd=root, env=environment(PYTHONPATH=str(tmp_path)))
    assert done.returncode == 5 and warm.told()[-1] == "real a sitecustomize.py"


IMPURE = {
    "threads": "import threading, time; threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
    "logging": "import logging; logging.basicConfig()",
    "open files": "kept = open('/dev/null')",
    "folder": "import os; os.chdir('/')",
    "signals": "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)",
}


@pytest.mark.parametrize("what", IMPURE)
def test_imports_that_leave_something_make_the_server_useless(pack, tmp_path, what):
    shutil.copytree(pack[0], tmp_path / "other", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "other" / "diffusers.py").write_text(IMPURE[what])
    with WarmPython(server=tmp_path / "other" / "tests" / "warm" / "server.py") as warm:
        done = subprocess.run([warm.python, "-m", "train", "3"], cwd=tmp_path / "other", capture_output=True)
        assert done.returncode == 3, done.stderr
        assert warm.told() == [f"real imports leave another state: {what}"]


def test_an_interpreter_without_packages_answers_for_itself(tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    with WarmPython(str(tmp_path / "bare" / "bin" / "python")) as warm:
        done = subprocess.run([warm.python, "-m", "train", "check", "--json"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and "torch is not installed" in done.stdout and not done.stderr
        assert [line.startswith("real imports: ModuleNotFoundError") for line in warm.told()] == [True]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    small_cache(folder / "data.safetensors")
    return folder


@pytest.fixture
def start(shared, tmp_path):
    """Starts a real training; what a failed test leaves behind is ended."""
    started = []

    def start(name="run", python=None, **changes):
        config = make_config(FitConfig, base_settings(shared, tmp_path / name), changes)
        (tmp_path / f"{name}.json").write_text(json.dumps(as_table(config)))
        events = tmp_path / f"{name}.jsonl"
        line = [python or warm_python(), "-m", "train", "fit", "--settings", tmp_path / f"{name}.json"]
        line += ["--events", events, "--lifeline"]
        started.append(
            subprocess.Popen(
                line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
        return started[-1], events, config

    yield start
    for process in started:
        end(process)


def end(process):
    process.kill()
    process.wait(60)
    process.stdin.close()
    process.stdout.close()


def running(process, events):
    """The process that trains, once it does."""
    until = time.monotonic() + 240
    while time.monotonic() < until and process.poll() is None:
        kinds = {event.kind: event for event in read_events(events)} if events.exists() else {}
        if "step" in kinds:
            assert kinds["started"].data["pid"] != process.pid, "the real interpreter"
            return psutil.Process(kinds["started"].data["pid"])
        time.sleep(0.02)
    pytest.fail(f"it did not train: {process.poll()}")


def gone(process):
    until = time.monotonic() + 60
    while time.monotonic() < until and process.is_running():
        time.sleep(0.02)
    return not process.is_running()


def test_what_a_fork_trains_is_bit_equal(start):
    """Twice at once, and to what this process trains."""
    starts = [start(name) for name in ("one", "other")]
    wanted = fit(make_config(FitConfig, {**as_table(starts[0][2]), "run_dir": f"{starts[0][2].run_dir} again"}))
    for process, _, config in starts:
        said = process.stdout.read()
        assert process.wait(240) == 0 and said.splitlines()[-1].startswith("INFO adapter written"), said
        made = load_file(Path(config.run_dir) / "adapter.safetensors")
        assert all(torch.equal(value, made[key]) for key, value in load_file(wanted).items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on(start, number):
    process, events, _ = start(steps=100_000)
    trainer = running(process, events)
    process.send_signal(number)
    assert process.wait(120) == 3 and read_events(events)[-1].kind == "stopped" and gone(trainer)


def test_the_end_of_its_input_ends_a_fork(start):
    process, events, _ = start(steps=100_000)
    trainer = running(process, events)
    process.stdin.close()
    assert process.wait(60) in (3, 4) and gone(trainer)


@pytest.fixture
def waiting(pack):
    """Starts a trainer that waits for the end of its input, with the lock of a folder; the fork's process."""
    root, _ = pack
    started = []

    def start(python):
        with (root / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            process = subprocess.Popen(
                [python, "-m", "train", "wait"], cwd=root, env=environment(), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(lock.fileno(),),
            )  # fmt: skip
        started.append(process)
        trainer = psutil.Process(json.loads(process.stdout.readline())["process"])
        with (root / "lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return process, trainer

    yield start
    for process in started:
        end(process)
    with (root / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system took it back


def test_with_the_one_that_stands_in_the_fork_ends(pack, waiting):
    process, trainer = waiting(pack[1].python)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL and gone(trainer)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_by_what_a_fork_is_ended_is_told(pack, waiting, number):
    process, trainer = waiting(pack[1].python)
    if number == signal.SIGKILL:
        trainer.kill()
    else:
        process.stdin.close()
    assert process.wait(60) == -number


@pytest.mark.parametrize("how", ["closed", "killed", "left alone"])
def test_nothing_outlives_the_server(pack, waiting, how):
    with WarmPython(server=pack[0] / "tests" / "warm" / "server.py") as warm:
        process, trainer = waiting(warm.python)
        if how == "killed":
            warm.process.kill()
        elif how == "closed":
            warm.close()
        else:  # as when the tests themselves are killed
            warm.process.stdin.close()
            assert warm.process.wait(60) == 0 and not Path(warm.python).parent.exists()
        assert gone(trainer) and process.wait(60) != 0
