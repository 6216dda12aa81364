"""Run folders, their lock, published names, and the owner's file."""

import errno
import hashlib
import itertools
import json
import os
import subprocess
import sys

import pytest

from tests.nodes.pack import ROOT, load

runs, publish, locks, owner, jobs, preflight, process = (
    load(f"training.{n}") for n in ("runs", "publish", "locks", "owner", "jobs", "preflight", "process")
)
events = __import__(f"{owner.__name__.split('.')[0]}.train.events", fromlist=["TrainEvent"])


def with_checkpoint(root, name, step):
    folder = root / name / "checkpoints"
    folder.mkdir(parents=True)
    if step:
        (folder / f"step-{step:08}.safetensors").write_bytes(b"checkpoint")
    return runs.RunFolder(root / name)


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


def test_an_empty_file_is_no_checkpoint(tmp_path):
    run = with_checkpoint(tmp_path, "ink-0123456789ab", 10)
    (run.folder / "checkpoints" / "step-00000020.safetensors").touch()
    assert run.checkpoint_step() == 10


@pytest.mark.parametrize("links", [True, False])
def test_publishing_never_overwrites(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*_):
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", refuse)
    source = tmp_path / "adapter.safetensors"
    source.write_bytes(b"trained")
    folder = tmp_path / "results"
    names = [publish.publish(source, folder, "sub/\u00e9t\u00e9").name for _ in range(3)]
    assert names == [f"\u00e9t\u00e9{number}.safetensors" for number in ("", "_00002", "_00003")]
    assert all(path.read_bytes() == b"trained" for path in (folder / "sub").iterdir())
    assert not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(runs.PathError, match="refused"):
        publish.publish(source, folder, "../out")


@pytest.mark.process
def test_a_locked_folder_is_locked_for_other_processes_and_free_when_they_die(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.nodes.pack import load
with load("training.runs").RunFolder(Path(sys.argv[1])).locked() as held:
    print(held is not None, flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline().strip() == "True"
    run = runs.RunFolder(tmp_path / "run")
    with run.locked() as descriptor:
        assert descriptor is None
    other.kill()
    other.wait()
    with run.locked() as descriptor:
        assert descriptor is not None


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="flock is of POSIX")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks_can_be_trained_on(tmp_path, monkeypatch, caplog, number):
    """A folder on a network drive is not "taken by another ComfyUI" for ever; a trainer that still runs keeps it."""
    import fcntl

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    run = runs.RunFolder(tmp_path / "run")
    with run.locked() as descriptor:
        assert descriptor is not None
    assert "no file locks" in caplog.text
    trainer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    run.note_trainer(trainer.pid)
    with run.locked() as descriptor:
        assert descriptor is None
    trainer.kill()
    trainer.wait()
    with run.locked() as descriptor:
        assert descriptor is not None


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_is_a_dangling_link_is_taken(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    source, folder = tmp_path / "adapter.safetensors", tmp_path / "results"
    source.write_bytes(b"trained")
    folder.mkdir()
    (folder / "ink.safetensors").symlink_to(folder / "gone.safetensors")
    assert publish.publish(source, folder, "ink").name == "ink_00002.safetensors"
    assert (folder / "ink.safetensors").is_symlink() and not (folder / "gone.safetensors").exists()


def test_a_file_and_its_links_are_hashed_once(tmp_path, monkeypatch):
    hashed = []
    real = hashlib.sha256
    monkeypatch.setattr(publish.hashlib, "sha256", lambda *data: hashed.append(1) or real(*data))
    source = tmp_path / "adapter.safetensors"
    source.write_bytes(b"trained")
    published = publish.publish(source, tmp_path / "results", "ink")
    sums = {publish.checksum(source), publish.checksum(published), publish.checksum(source)}
    assert sums == {real(b"trained").hexdigest()} and len(hashed) == 1
    source.write_bytes(b"changed")
    assert publish.checksum(source) == real(b"changed").hexdigest()


def test_results_are_only_what_was_recorded(tmp_path):
    run = runs.RunFolder(tmp_path / "run")
    assert run.results() == {}
    run.record(10, "abc")
    run.record(10, "abc", {"one": "one.safetensors"})
    run.record(10, "abc", {"two": "two.safetensors"})
    assert run.results()[10].published == {"one": "one.safetensors", "two": "two.safetensors"}
    run.record(10, "def", {"new": "new.safetensors"})
    assert run.results()[10] == runs.Result("def", {"new": "new.safetensors"})


@pytest.mark.parametrize(
    "text",
    [
        "[1",
        "[]",
        '{"10": 5}',
        '{"10": {"sha256": 5}}',
        '{"10": {"published": {}}}',
        '{"x": {"sha256": "a"}}',
        '{"10": {"sha256": null}}',
        "[" * 100_000,
        '{"10":' * 100_000,
    ],
    ids=lambda text: text[:20],
)
def test_a_damaged_result_was_never_vouched_for(tmp_path, text):
    run = runs.RunFolder(tmp_path)
    (tmp_path / "result.json").write_text(text)
    assert run.results() == {}
    run.record(10, "abc", {"one": "one.safetensors"})
    assert run.results()[10].sha256 == "abc"


def test_odd_names_in_a_result_are_left_out(tmp_path):
    (tmp_path / "result.json").write_text('{"10": {"sha256": "a", "published": {"x": 3, "y": "y.safetensors"}}}')
    assert runs.RunFolder(tmp_path).results() == {10: runs.Result("a", {"y": "y.safetensors"})}
    (tmp_path / "result.json").write_text('{"10": {"sha256": "a", "published": [1]}}')
    assert runs.RunFolder(tmp_path).results() == {10: runs.Result("a", {})}


@pytest.mark.parametrize(
    "text",
    ["{}", "[1]", '{"pid": null}', '{"pid": 1e400, "created": 1}', '{"pid": 99999999999999, "created": 1}']
    + ['{"pid": -1, "created": 1}', '{"pid": true, "created": 1}', '{"pid": 5, "created": "x"}', "[" * 100_000],
    ids=lambda text: text[:30],
)
def test_a_damaged_note_of_a_trainer_is_none(tmp_path, text):
    run = runs.RunFolder(tmp_path)
    run.trainer.write_text(text)
    assert run.earlier_trainer() is None


@pytest.mark.process
def test_the_trainer_of_an_earlier_session_is_ended_but_not_a_stranger(tmp_path):
    run = runs.RunFolder(tmp_path / "run")
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


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A preflight whose interpreter is a small script; how often it was started."""
    python = tmp_path / "env" / "bin" / "python"
    packages = tmp_path / "env" / "lib" / "python3.12" / "site-packages"
    packages.mkdir(parents=True)
    python.parent.mkdir()
    count = tmp_path / "count"
    answer = json.dumps({"problems": [], "estimate": {"disk": 1}})
    python.write_text(f"#!/bin/sh\necho asked >> '{count}'\necho '{answer}'\n")
    python.chmod(0o755)
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"one")
    monkeypatch.setattr(preflight, "_reports", {})
    values = {"model": str(model), "rank": 8, "steps": 10}

    def ask(**changes):
        settings = tmp_path / "settings.json"
        settings.write_text(json.dumps(values | changes))
        preflight.preflight(owner.Owner(str(python), "", ""), settings, tmp_path / "log.txt", lambda: False)
        return len(count.read_text().splitlines())

    ask.python, ask.packages, ask.model, ask.answers = python, packages, model, preflight._reports
    return ask


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="the interpreter is a shell script")
def test_the_trainers_python_is_asked_once(asked):
    assert [asked(), asked(), asked(steps=99), asked(run_dir="elsewhere", seed=3)] == [1, 1, 1, 1]
    assert asked(rank=16) == 2
    (asked.packages / "diffusers-1.dist-info").mkdir()
    assert asked() == 3, "a package was installed"
    asked.model.write_bytes(b"another")
    assert asked() == 4
    (asked.python.parent / "Lib" / "site-packages").mkdir(parents=True)  # as an embedded Python for Windows has it
    assert [asked(), asked()] == [5, 5]
    asked.python.write_text(asked.python.read_text() + "\n")
    assert [asked(), asked()] == [6, 6]


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="the interpreter is a shell script")
def test_problems_are_asked_about_again_and_the_disk_each_time(asked):
    text = asked.python.read_text()
    asked.python.write_text(text.replace('"problems": []', '"problems": [{"what": "no torch", "fix": "install it"}]'))
    for _ in range(2):
        with pytest.raises(preflight.PreflightError, match="no torch"):
            asked()
    asked.python.write_text(text)
    assert asked() == 3
    (report,) = asked.answers.values()
    report["estimate"]["disk"] = 10**18
    with pytest.raises(preflight.PreflightError, match="GB of disk"):
        asked()


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
        assert len(kept) <= 2000 and kept[0] == 1 and kept[-1] == first + 99
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
