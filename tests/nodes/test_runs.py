"""Run folders, their lock, published names, and the owner's file."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from tests.nodes.pack import ROOT, load

runs, owner, jobs, preflight, process = (
    load(f"training.{n}") for n in ("runs", "owner", "jobs", "preflight", "process")
)
events = __import__(f"{owner.__name__.split('.')[0]}.train.events", fromlist=["TrainEvent"])


def with_checkpoint(root, name, step):
    folder = root / name / "checkpoints"
    folder.mkdir(parents=True)
    if step:
        (folder / f"step-{step:08}.safetensors").touch()
    return runs.Run(root / name)


def test_key_does_not_depend_on_order():
    assert runs.key_of({"a": 1, "b": [2.5]}) == runs.key_of({"b": [2.5], "a": 1}) != runs.key_of({"a": 1, "b": [2]})


def test_the_run_that_got_furthest_is_gone_on_with(tmp_path):
    key = "0123456789ab"
    assert runs.choose_run(tmp_path, "styles/ink", key, 100, "auto").name == f"ink-{key}"
    with_checkpoint(tmp_path, f"ink-{key}", 10)
    with_checkpoint(tmp_path, f"other name-{key}-2", 50)
    with_checkpoint(tmp_path, f"ink-{key}-3", 500)
    with_checkpoint(tmp_path, f"ink-{key}x", 60)
    assert runs.choose_run(tmp_path, "ink", key, 100, "auto").name == f"other name-{key}-2"
    assert runs.choose_run(tmp_path, "ink", key, 20, "auto").name == f"ink-{key}"
    assert runs.choose_run(tmp_path, "ink", key, 5, "auto").name == f"ink-{key}-2"
    assert runs.choose_run(tmp_path, "ink", key, 100, "never").name == f"ink-{key}-2"
    assert runs.choose_run(tmp_path, "ink", key, 100, "require").checkpoint_step() == 50
    with pytest.raises(runs.PathError, match="no checkpoint"):
        runs.choose_run(tmp_path, "ink", "ba9876543210", 100, "require")


@pytest.mark.parametrize("links", [True, False])
def test_publishing_never_overwrites(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*_):
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", refuse)
    source = tmp_path / "adapter.safetensors"
    source.write_bytes(b"trained")
    folder = tmp_path / "results"
    names = [runs.publish(source, folder, "sub/\u00e9t\u00e9").name for _ in range(3)]
    assert names == [f"\u00e9t\u00e9{number}.safetensors" for number in ("", "_00002", "_00003")]
    assert all(path.read_bytes() == b"trained" for path in (folder / "sub").iterdir())
    assert not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(runs.PathError, match="refused"):
        runs.publish(source, folder, "../out")


@pytest.mark.process
def test_a_locked_folder_is_locked_for_other_processes_and_free_when_they_die(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.nodes.pack import load
with load("training.runs").Run(Path(sys.argv[1])).locked() as held:
    print(held is not None, flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline().strip() == "True"
    run = runs.Run(tmp_path / "run")
    with run.locked() as descriptor:
        assert descriptor is None
    other.kill()
    other.wait()
    with run.locked() as descriptor:
        assert descriptor is not None


def test_results_are_only_what_was_recorded(tmp_path):
    run = runs.Run(tmp_path / "run")
    assert run.finished(10) == "" and run.results() == {}
    run.record(10, "abc")
    run.record(10, "abc", {"one": "one.safetensors"})
    run.record(10, "abc", {"two": "two.safetensors"})
    assert run.results()["10"]["published"] == {"one": "one.safetensors", "two": "two.safetensors"}
    run.record(10, "def", {"new": "new.safetensors"})
    assert run.finished(10) == "def" and list(run.results()["10"]["published"]) == ["new"]
    (run.folder / "result.json").write_text("[1")
    assert run.finished(10) == ""


@pytest.mark.process
def test_the_trainer_of_an_earlier_session_is_ended_but_not_a_stranger(tmp_path):
    run = runs.Run(tmp_path / "run")
    one = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    run.note_trainer(one.pid)
    pid, created = run.earlier_trainer()
    assert not process.end_process(pid, created - 100) and one.poll() is None
    assert process.still_runs(pid, created) and process.end_process(pid, created)
    one.wait(5)
    assert not process.still_runs(pid, created)


def test_the_owner_decides(tmp_path, monkeypatch):
    monkeypatch.delenv(owner.VARIABLE, raising=False)
    monkeypatch.setattr(owner, "_NAMES", ())
    assert owner.owner().python == sys.executable
    command = owner.owner().command(["fit", "--x"])
    assert command == [sys.executable, str(ROOT / "train" / "start.py"), "fit", "--x"]
    accelerate = tmp_path / "accelerate \u00fc.yaml"
    accelerate.touch()
    file = tmp_path / "owner.json"
    file.write_text(json.dumps({"python": sys.executable, "accelerate_config": str(accelerate)}))
    monkeypatch.setenv(owner.VARIABLE, str(file))
    command = owner.owner().command(["fit"], processes=2)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert command[command.index("--config_file") + 1] == str(accelerate) and command[-1] == "fit"


@pytest.mark.parametrize(
    "content,words",
    [
        ('{"pyhton": "x"}', "unknown key 'pyhton'"),
        ('{"python": "/nowhere/python"}', "which is not a file"),
        ('{"python": 3}', "expected the path"),
        ("{", "not valid"),
    ],
)
def test_a_wrong_owners_file_is_an_error(tmp_path, monkeypatch, content, words):
    file = tmp_path / "owner.json"
    file.write_text(content)
    monkeypatch.setenv(owner.VARIABLE, str(file))
    with pytest.raises(owner.ConfigError, match=words):
        owner.owner()


def test_an_owners_file_that_is_named_but_missing(tmp_path, monkeypatch):
    monkeypatch.setenv(owner.VARIABLE, str(tmp_path / "absent.toml"))
    with pytest.raises(owner.ConfigError, match="cannot be read"):
        owner.owner()


def test_the_environment_has_the_pack_and_no_network(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/before")
    found = owner.environment()
    assert found["PYTHONPATH"] == os.pathsep.join([str(ROOT), "/before"]) and found["HF_HUB_OFFLINE"] == "1"


@pytest.mark.process
def test_started_by_path_the_trainer_finds_itself(tmp_path):
    """As an embedded Python would: isolated, so that neither PYTHONPATH nor the current folder count."""
    command = [sys.executable, "-I", str(ROOT / "train" / "start.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "fit" in done.stdout, done.stderr


def test_memory_is_compared_with_what_is_free():
    report = {"estimate": {"vram": 20e9, "ram": 8e9}}
    preflight.require_memory(report, 24 * 10**9, 16 * 10**9)
    preflight.require_memory({"estimate": None}, 0, 0)
    with pytest.raises(preflight.PreflightError, match=r"about 20.0 GB of VRAM, 12.0 GB are free"):
        preflight.require_memory(report, 12 * 10**9, 16 * 10**9)
    with pytest.raises(preflight.PreflightError, match="RAM"):
        preflight.require_memory(report, 24 * 10**9, 4 * 10**9)


def step(number, first=None):
    if first is not None:
        data = {"pid": 1, "steps": 9, "first_step": first, "pack_version": "0", "run_dir": "r"}
        return events.TrainEvent("started", data)
    data = {"step": number, "steps": 9, "loss": 1.0, "smoothed_loss": 1.0, "lr": 1.0, "seconds": 1.0, "eta": 1.0}
    return events.TrainEvent("step", {**data, "peak_memory": 0}, float(number))


def test_a_page_gets_all_of_a_long_run_thinned():
    sent = []
    job = jobs.Job("1:2", None, lambda kind, message: sent.append((kind, message)))
    job.tell("running", "text", [step(number) for number in range(1, 5001)])
    summary = job.summary()
    steps = [one["step"] for one in summary["events"]]
    assert len(steps) <= 2000 and steps[0] == 1 and steps[-1] == 5000 and steps == sorted(steps)
    assert sent[0][0] == "qrlora.train" and len(sent[0][1]["events"]) == 5000


def test_what_is_kept_of_a_long_run_stays_small_even_and_up_to_date():
    job = jobs.Job("1", None, lambda *_: None)
    for first in range(1, 50_001, 100):
        job.remember(step(number) for number in range(first, first + 100))
        kept = [one["step"] for one in job.steps()]
        assert len(kept) <= 4000 and kept[0] == 1 and kept[-1] == first + 99
        assert len({after - before for before, after in itertools.pairwise(kept[:-1])}) == 1
    job.remember([step(0, first=30_000)])
    assert 29_900 < job.steps()[-1]["step"] <= 30_000


def test_a_page_learns_what_an_earlier_start_did():
    sent = []
    job = jobs.Job("1", None, lambda kind, message: sent.append((kind, message)))
    job.catch_up([step(0, first=0), *(step(number) for number in range(1, 3001))])
    ((kind, message),) = sent
    steps = [one["step"] for one in message["events"] if one["event"] == "step"]
    assert kind == "qrlora.train" and message == job.summary() and message["state"] == "preparing"
    assert len(steps) <= 2000 and steps[0] == 1 and steps[-1] == 3000


def test_steps_after_the_checkpoint_are_done_again():
    job = jobs.Job("1", None, lambda *_: None)
    job.remember([step(0, first=0), *(step(number) for number in range(1, 8)), step(0, first=5)])
    assert [one["step"] for one in job.steps()] == [1, 2, 3, 4, 5]


def test_a_page_learns_of_twenty_jobs_and_stops_the_right_one():
    several = jobs.Jobs()
    for number in range(30):
        job = several.start(str(number), None, lambda *_: None)
        job.tell("finished", "")
    last = several.start("29", "p", lambda *_: None)
    assert len(several.all()) == 20 and [one.node for one in several.all()].count("29") == 1
    assert not several.request_stop("28") and several.request_stop("29") and last.stop_requested
