"""A child that crashes, hangs, is killed, has children, says nonsense: it is seen, named, and nothing is left."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.nodes.pack import ROOT, load

process, watching, runs = load("training.process"), load("training.watch"), load("training.runs")
feeds, wording = load("training.feed"), load("training.wording")
FAKE = ROOT / "tests" / "fake_trainer.py"
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.name == "nt", reason="the fake trainer uses signals and limits of POSIX"),
]


@pytest.fixture
def run(tmp_path):
    """A run folder with a space, an umlaut and a Chinese name in its path."""
    folder = tmp_path / "Mein Ordner \u00e4\u00f6" / "\u8bad\u7ec3 run"
    folder.mkdir(parents=True)
    one = runs.RunFolder(folder)
    one.settings.write_text(json.dumps({"run_dir": str(folder), "output": str(one.adapter(50)), "steps": 50}))
    yield one
    marks = [p for p in psutil.process_iter(["cmdline"]) if any("qrlora-fake" in x for x in p.info["cmdline"] or [])]
    assert not marks, "grandchildren are left"


def start(run, scenario, **part):
    (run.folder / "part.json").write_text(json.dumps({"scenario": scenario, **part}))
    arguments = ["fit", "--settings", str(run.settings), "--events", str(run.events), "--stop-file", str(run.stop)]
    command = [sys.executable, str(FAKE), "start.py", *arguments, "--lifeline"]
    environment = {**os.environ, "QRLORA_FAKE": str(run.folder / "part.json"), "PYTHONUNBUFFERED": "1"}
    feed = feeds.EventFeed(run.events)  # before the child, whose first events may be there at once
    child = process.Child(command, run.folder, run.log, environment)
    child.feed = feed
    return child


def follow(run, child, cancel=(), stop_after=1e9, stop_seconds=5.0, silence=60.0):
    """Watch to the end; `cancel`: seconds after which Cancel is pressed. The ending, seconds, what was reported."""
    feed, began, told, presses = child.feed, time.monotonic(), [], list(cancel)

    def cancelled():
        if presses and time.monotonic() - began > presses[0]:
            presses.pop(0)
            return True
        return False

    ending = watching.watch(
        child,
        feed,
        stop_file=run.stop,
        stop_seconds=stop_seconds,
        silence_seconds=silence,
        cancelled=cancelled,
        stop_asked=lambda: time.monotonic() - began > stop_after,
        news=lambda events, stopping: told.append((events, stopping)),
    )
    assert not psutil.pid_exists(child.pid) and child.poll() is not None
    return ending, time.monotonic() - began, told


def words(run, ending):
    return wording.failure(ending, "log.txt", run.checkpoint_step())


def test_success(run):
    child = start(run, "ok")
    ending, _, told = follow(run, child)
    assert ending.code == 0 and ending.step == 50 and not ending.asked and words(run, ending) == ""
    assert [e.data["step"] for events, _ in told for e in events if e.kind == "step"] == list(range(1, 51))
    assert "step 50" in run.log.read_text() and "fake_trainer.py" in run.log.read_text()


@pytest.mark.parametrize(
    "scenario,expected",
    [
        ("crash", ["crashed after step 1", "exit code 1", "RuntimeError: the fake trainer broke", "step 1 is kept"]),
        ("failed", ["(loss)", "the loss is NaN at step 7; lower learning_rate"]),
        ("killed", ["was killed after step 1", "RAM", "about to be killed"]),
        ("memory", ["Out of memory after step 1", "preset", "MemoryError"]),
        ("garbage", ["reported no adapter", "events could not be read", "end of garbage"]),
        ("silent", ["reported no adapter", "nothing was printed"]),
        ("settings_refused", ["refused its settings", "rank is 0"]),
    ],
)
def test_failures_are_named(run, scenario, expected):
    ending, seconds, _ = follow(run, start(run, scenario))
    assert all(word in words(run, ending) for word in expected), words(run, ending)
    assert seconds < 10


def test_a_hang_is_ended_although_it_ignores_the_terminate_signal(run):
    ending, seconds, _ = follow(run, start(run, "hang"), silence=1.0)
    assert 1.0 < seconds < 10 and "reported nothing for 1 s" in words(run, ending) and "hanging" in words(run, ending)


@pytest.mark.parametrize("then", ["crash", "hang"])
def test_grandchildren_go_too(run, then):
    child = start(run, "family", then=then)
    time.sleep(1.0)
    family = psutil.Process(child.pid).children(recursive=True)
    assert len(family) == 5
    ending, seconds, _ = follow(run, child, silence=2.0)
    assert not any(process.alive(one) for one in family)
    assert seconds < 12 and words(run, ending)


def test_cancel_waits_for_the_checkpoint(run):
    ending, seconds, told = follow(run, start(run, "ok", seconds=0.1), cancel=[0.7])
    assert ending.code == 3 and ending.asked and seconds < 2.5
    assert run.checkpoint_step() == ending.step > 0
    assert told[-1][1] and not told[0][1]
    run.stop.unlink()
    again, _, _ = follow(run, start(run, "ok"))
    assert again.code == 0 and again.last["started"].data["first_step"] == ending.step


def test_cancel_of_a_trainer_that_does_not_listen(run):
    ending, seconds, _ = follow(run, start(run, "ok", seconds=0.1, deaf=True), cancel=[0.5], stop_seconds=1.0)
    assert ending.asked and ending.code != 0 and 1.5 < seconds < 10


def test_a_second_cancel_does_not_wait(run):
    ending, seconds, _ = follow(run, start(run, "hang"), cancel=[0.5, 1.0], stop_seconds=60.0)
    assert ending.asked and seconds < 10


def test_the_stop_button_is_a_cancel(run):
    ending, seconds, _ = follow(run, start(run, "ok", seconds=0.1), stop_after=0.6)
    assert ending.code == 3 and ending.asked and seconds < 2.5


def test_the_trainer_ends_when_its_parent_is_killed(run, tmp_path):
    """The parent of this test's child dies by SIGKILL, as a ComfyUI does that is killed."""
    (run.folder / "part.json").write_text(json.dumps({"scenario": "ok", "seconds": 1.0}))
    code = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.nodes.test_supervision import start, runs, Path
child = start(runs.RunFolder(Path({str(run.folder)!r})), "ok", seconds=1.0)
print(child.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    child = psutil.Process(pid)
    time.sleep(1.0)
    assert process.alive(child)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 5
    while process.alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not process.alive(child)


def test_an_interpreter_that_is_not_there(run):
    with pytest.raises(process.ChildError, match="cannot be started"):
        process.Child(["/nowhere/python"], run.folder, run.log, {})


def test_output_is_drained_and_limited(run, monkeypatch):
    monkeypatch.setattr(process, "_LONGEST_LOG", 100_000)
    code = "import sys\nfor _ in range(40000): sys.stdout.write('x' * 99 + chr(10))\nprint('the end')"
    child = process.Child([sys.executable, "-c", code], run.folder, run.log, dict(os.environ))
    until = time.monotonic() + 20
    while child.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    child.end()
    assert child.poll() == 0 and child.tail(1) == "the end"
    assert run.log.stat().st_size < 300_000


def test_a_progress_bar_is_one_line_of_the_tail(run):
    code = r"import sys; sys.stdout.write('start\n' + '\r'.join(f'{n} %' for n in range(100)) + '\nend\n')"
    child = process.Child([sys.executable, "-c", code], run.folder, run.log, dict(os.environ))
    while child.poll() is None:
        time.sleep(0.02)
    child.end()
    assert child.tail() == "start\n99 %\nend"


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 4 MB, where the test may mount one."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no tmpfs here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(small_disk):
    folder = small_disk / "run"
    folder.mkdir()
    run = runs.RunFolder(folder)
    run.settings.write_text(json.dumps({"run_dir": str(folder), "output": str(run.adapter(50)), "steps": 50}))
    ending, _, _ = follow(run, start(run, "full_disk"))
    assert "The disk is full (after step 1)" in words(run, ending), words(run, ending)
    with pytest.raises(Exception, match="cannot be written"):
        run.write(run.settings, {"x": "y" * 100_000})
    assert json.loads(run.settings.read_text())["steps"] == 50 and not list(folder.glob(".*.tmp"))
    shutil.copyfile(os.devnull, folder / "checkpoints.tmp")


def test_events_are_read_in_pieces(tmp_path):
    path = tmp_path / "events.jsonl"
    line = json.dumps({"v": 1, "event": "sample", "time": 1.0, "step": 1, "file": "x"})
    feed = feeds.EventFeed(path)
    assert feed.read() == []
    for piece, count in ((line[:20], 0), (line[20:], 0), ("\n" + line + "\n{", 2), ("}\n", 0), (line + "\n", 1)):
        with path.open("a") as file:
            file.write(piece)
        assert len(feed.read()) == count
    assert feed.garbage == 1
    assert feeds.EventFeed(path).read() == [] and len(feeds.earlier_events(path)) == 3


def test_old_events_are_not_this_runs(run):
    with run.events.open("w") as file:
        file.write(json.dumps({"v": 1, "event": "finished", "time": 1, "step": 9, "file": "a", "sha256": "b"}) + "\n")
    ending, _, _ = follow(run, start(run, "silent"))
    assert "reported no adapter" in words(run, ending)


def test_paths(run):
    assert isinstance(run.folder, Path) and "\u8bad\u7ec3" in str(run.folder)
