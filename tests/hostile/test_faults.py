"""Faults of the machine and of time: folders that cannot be written, locales, many merges, long trainings."""

import errno
import gc
import json
import ntpath
import os
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qrlora_core as core
from tests.core.test_merge import NAMES, make, of
from tests.hostile import readers
from tests.hostile.mutate import TEXTS
from train.events import EventWriter, TrainEvent

ROOT = Path(__file__).resolve().parents[2]
texts = (
    st.sampled_from(TEXTS) | st.text(max_size=200) | st.text(st.sampled_from("0123456789:.,-;eE <>()[]\n"), max_size=60)
)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("place", ["mkdir", "open", "write", "publish"])
def test_a_folder_that_cannot_be_written_is_told_and_left_as_it_was(tmp_path, monkeypatch, code, place):
    """Root may write everywhere, so the file system's answer is played."""
    target = tmp_path / "sub" / "a.safetensors"

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    if place == "mkdir":
        monkeypatch.setattr(Path, "mkdir", refuse)
    elif place == "open":
        opened = Path.open
        monkeypatch.setattr(
            Path, "open", lambda self, mode="r", **k: refuse() if "x" in mode else opened(self, mode, **k)
        )
    elif place == "write":
        monkeypatch.setattr("qrlora_core.whole.os.fsync", refuse)
    else:
        monkeypatch.setattr("qrlora_core.whole.os.link", refuse)
        monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(core.PathError, match=r"a\.safetensors cannot be written"):
        core.save_adapter(make(1), target)
    monkeypatch.undo()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    core.save_adapter(make(1), target)


@pytest.mark.process
def test_a_locale_without_unicode(tmp_path):
    """LC_ALL=C and Python's UTF-8 mode off, as in many containers: names and captions are what they are."""
    program = """
import sys
from pathlib import Path
import qrlora_core as core
from tests.core.test_merge import make
from train.settings import load_settings
from train.data.captions import caption_of
from train.events import EventWriter, read_events
folder = Path(sys.argv[1])
name = "caf\\u00e9 \\u8bad\\u7ec3"
(folder / "s.json").write_bytes('{"trigger": "<\\u732b>"}'.encode())
assert load_settings(folder / "s.json")["trigger"] == "<\\u732b>"
(folder / "p.txt").write_bytes("ein K\\u00e4tzchen".encode())
assert caption_of(folder / "p.png", "", "") == "ein K\\u00e4tzchen"
writer = EventWriter.open(str(folder / "e.jsonl"))
writer.emit("failed", reason="data", message=name)
assert read_events(folder / "e.jsonl")[0].data["message"] == name
path = core.save_adapter(make(1), folder / "a.safetensors", metadata={"qrlora.trigger": "<\\u732b>"})
assert core.open_adapter(path).metadata["qrlora.trigger"] == "<\\u732b>"
"""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONIOENCODING", None)
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-1500:]


@given(texts)
def test_no_name_leaves_its_folder_on_windows_either(name):
    """What is accepted here is joined as Windows would join it, and must stay inside there, too."""
    try:
        path = core.contained_path(Path("folder"), name)
    except core.PathError:
        return
    inside = path.relative_to(Path("folder").resolve())
    joined = ntpath.normpath(ntpath.join("C:\\folder", *inside.parts))
    assert joined.lower().startswith("c:\\folder\\") and PureWindowsPath(joined).drive.lower() == "c:"
    assert not PureWindowsPath(name).is_absolute() and not PureWindowsPath(name).drive
    assert ":" not in joined[2:] and not any(part != part.rstrip(" .") for part in inside.parts)


@given(texts)
def test_any_text_of_a_widget_is_read_or_refused(text):
    adapter = make(1)
    for read in (
        lambda: core.parse_schedule(text),
        lambda: core.parse_schedule(text, "sigma"),
        lambda: core.parse_ranges(text, "double_ranges"),
        lambda: core.parse_scales(text, "alphas"),
        lambda: core.triggers_of(adapter, text),
    ):
        try:
            read()
        except core.SettingError as error:
            assert len(str(error)) < 7000
    assert core.holds(text, "<c>") in (True, False)
    assert core.holds("a <c> dog", text) in (True, False)


def test_a_thousand_merges_of_342_layers_keep_no_memory():
    names = [target.name for target in core.flux_targets(19, 38, 16)]
    style, content = of(make(1, names=names, rank=2)), of(make(2, names=names, rank=2, basis_seed=3))
    process = psutil.Process()

    def run(count):
        for index in range(count):
            recipe = core.merge(style, index / count, content, 1.0)
            core.merge_report(recipe)
            core.layer_sum(recipe, NAMES[0])
        gc.collect()

    assert len(names) == 342
    run(50)
    before = process.memory_info().rss
    run(1000)
    assert process.memory_info().rss - before < 30e6


def test_the_events_of_a_hundred_thousand_steps(tmp_path):
    """Written, read as they come, kept thinned: neither the page's summary nor the memory grows with the steps."""
    path, sent = tmp_path / "events.jsonl", []
    numbers = {"steps": 100_000, "smoothed_loss": 0.5, "lr": 1e-4, "seconds": 0.1, "eta": 1.0, "peak_memory": 1}
    with path.open("w") as file:
        for step in range(1, 100_001):
            file.write(TrainEvent("step", {"step": step, "loss": 1 / step, **numbers}, float(step)).line() + "\n")
    job = readers.jobs.Job("1", None, lambda kind, message: sent.append(len(json.dumps(message))))
    job.catch_up(readers.feed.earlier_events(path))
    steps = job.steps()
    assert steps[-1]["step"] == 100_000 and steps[0]["step"] == 1 and len(steps) <= 4001
    assert len(job.summary()["events"]) <= 2001 and sent[-1] < 1_000_000
    EventWriter.open(str(path)).close()
