"""Whole runs: exact resume however a run ended, what is refused, what is written. In this process where possible."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from demo.small_flux import GOLDEN
from qrlora_core import PathError, WeightError, open_adapter, writing
from tests.train.conftest import base_settings, small_cache
from train.cli import main
from train.config import FitConfig, as_table
from train.errors import TrainError
from train.events import EventWriter, parse, read_events
from train.model.source import BaseModel
from train.run import checkpoint, lock
from train.run import fit as fit_module
from train.run.fit import fit
from train.run.lock import held_run_folder
from train.run.processes import make_accelerator
from train.run.stop import Stopped, StopWatch
from train.settings import make_config

ROOT = Path(__file__).resolve().parents[2]


# looks at the watch while the golden model is loaded; then three per step of two passes
LOADING = len(BaseModel(GOLDEN / "base_bfl.safetensors").specs)


class StopAt(StopWatch):
    """Asks to stop at its n-th look."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    @property
    def asked(self):
        self.looks -= 1
        return self.looks < 0


def tensors(config):
    """Adapter and newest checkpoint of a finished run, every tensor of them."""
    newest = checkpoint.newest_checkpoint(Path(config.run_dir))
    return load_file(Path(config.run_dir) / "adapter.safetensors") | newest.tensors("")


def same(one, other):
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different, different[:3]


def events_of(path):
    return [event.kind for event in read_events(path)]


@pytest.fixture
def elsewhere(tmp_path):
    """The same settings in another run folder."""
    return lambda config, name="other", **changes: replace(config, run_dir=str(tmp_path / name), **changes)


@pytest.mark.parametrize("method", ["delta_r", "delta_r_triangular", "qr"])
def test_a_run(settings, method, tmp_path):
    config = settings(method=method, sample_every=2, validate_every=2, checkpoint_every=1, trigger="<c>", name="mine")
    events = tmp_path / "events.jsonl"
    path = fit(config, EventWriter.open(str(events)))
    adapter = open_adapter(path)
    assert adapter.method == method and adapter.rank == 8 and len(adapter.layers) == 15
    assert adapter.metadata["qrlora.trigger"] == "<c>" and adapter.metadata["modelspec.title"] == "mine"
    assert adapter.metadata["qrlora.steps"] == "4" and str(tmp_path) not in str(adapter.metadata)
    assert any(float(adapter.layer(name).down.abs().max()) > 1e-4 for name in adapter.layers)
    kept = sorted(one.name for one in (Path(config.run_dir) / "checkpoints").iterdir())
    assert kept == ["step-00000003.safetensors", "step-00000004.safetensors"]
    latent = load_file(Path(config.run_dir) / "samples" / "step-00000004.safetensors")["latent"]
    assert latent.shape == (1, 16, 4, 4) and bool(torch.isfinite(latent).all())
    kinds = [kind for kind in events_of(events) if kind != "phase"]
    steps = ["step", "saved", "step", "validation", "saved", "sample"]
    assert kinds == ["started", *steps, *steps, "saved", "finished"]
    assert str(tmp_path) not in (Path(config.run_dir) / "resolved.json").read_text()


def test_training_lowers_the_loss(settings):
    """On fixed noise, which is what the validation loss is."""
    config = settings(steps=30, learning_rate=1e-2, validate_every=1, init="random", batch_size=2)
    losses = [e.data["loss"] for e in run_events(config) if e.kind == "validation"]
    assert losses[-1] < losses[0] - 0.01


def run_events(config):
    path = Path(config.run_dir).parent / "events.jsonl"
    fit(config, EventWriter.open(str(path)))
    return read_events(path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "qr", "learning_rate": 1e-4},
        {"optimizer": "prodigy", "learning_rate": 1.0},
        {"scheduler": "cosine", "warmup_steps": 1, "init": "random"},
        {"precision": "bf16", "base_storage": "fp8", "gradient_checkpointing": True},
        {"batch_size": 2, "timestep_sampling": "logit_normal", "caption_dropout": 0.3, "shift": "resolution"},
    ],
    ids=["adamw", "qr", "prodigy", "cosine", "fp8", "sampling"],
)
def test_interrupted_anywhere_ends_bit_equal(settings, elsewhere, changes):
    whole = settings(steps=3, **changes)
    fit(whole)
    broken = elsewhere(whole)
    # while loading, in the middle of step 1, in the middle of step 2, between steps 2 and 3
    for looks, done in ((3, 0), (LOADING + 1, 0), (LOADING + 4, 1), (LOADING + 3, 2)):
        with pytest.raises(Stopped):
            fit(broken, watch=StopAt(looks))
        kept = checkpoint.newest_checkpoint(Path(broken.run_dir))
        assert (kept.step if kept else 0) == done
    fit(broken)
    same(tensors(whole), tensors(broken))


def test_stopping_in_the_middle_of_a_step_leaves_no_trace(settings, elsewhere, tmp_path):
    whole, broken = settings(gradient_accumulation=4), None
    fit(whole)
    broken = elsewhere(whole)
    watch, looks = StopWatch(), iter(range(1000))
    real = fit_module.denoising_loss

    def loss(*args):
        if next(looks) == 6:  # the third of four passes of the second step
            watch.ask()
        return real(*args)

    fit_module.denoising_loss = loss
    try:
        with pytest.raises(Stopped):
            fit(broken, EventWriter.open(str(tmp_path / "e.jsonl")), watch)
    finally:
        fit_module.denoising_loss = real
    last = read_events(tmp_path / "e.jsonl")[-1]
    assert last.kind == "stopped" and last.data == {"step": 1, "checkpoint": "checkpoints/step-00000001.safetensors"}
    fit(broken)
    same(tensors(whole), tensors(broken))


NO_MEMORY = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "python": MemoryError,
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
}


@pytest.mark.parametrize("kind", NO_MEMORY)
@pytest.mark.parametrize("where", ["forward", "backward", "update", "sample"])
def test_memory_that_runs_out_in_mid_step(settings, elsewhere, tmp_path, monkeypatch, kind, where):
    """Step 2 of 4 fails: step 1 is in a checkpoint unless a parameter may have changed, and the run ends bit-equal."""
    config = settings(gradient_accumulation=4, sample_every=1, checkpoint_every=0)
    broken = elsewhere(config)
    looks = iter(range(1000))

    def fails(real, at):
        def act(*args, **kwargs):
            if next(looks) == at:
                raise NO_MEMORY[kind]()
            return real(*args, **kwargs)

        return act

    def failing_backward(*args):
        loss = fit_module_loss(*args)
        loss.register_hook(fails(lambda gradient: gradient, 6))
        return loss

    fit_module_loss = fit_module.denoising_loss
    with monkeypatch.context() as patch:
        if where == "forward":
            patch.setattr(fit_module, "denoising_loss", fails(fit_module.denoising_loss, 6))
        elif where == "backward":
            patch.setattr(fit_module, "denoising_loss", failing_backward)
        elif where == "update":
            patch.setattr(torch.nn.utils, "clip_grad_norm_", fails(torch.nn.utils.clip_grad_norm_, 1))
        else:
            patch.setattr(fit_module, "sample_latents", fails(fit_module.sample_latents, 0))
        line, events = command(broken)
        assert main([str(part) for part in line[3:]]) == 1
    last = read_events(events)[-1]
    assert last.kind == "failed" and last.data["reason"] == "memory"
    assert "memory ran out at rank 8" in last.data["message"] and "offload" in last.data["message"]
    kept = checkpoint.newest_checkpoint(Path(broken.run_dir))
    assert (kept.step if kept else 0) == (0 if where == "update" else 1)
    fit(broken)
    fit(config)
    same(tensors(config), tensors(broken))


@pytest.mark.parametrize("scheduler", ["constant", "linear"])
def test_more_steps_continue_a_finished_run(settings, elsewhere, scheduler):
    short = settings(steps=2, scheduler=scheduler)
    fit(short)
    first = load_file(Path(short.run_dir) / "adapter.safetensors")
    longer = replace(short, steps=4)
    fit(longer)
    assert any(not torch.equal(value, first[key]) for key, value in tensors(longer).items() if key in first)
    if scheduler == "constant":
        whole = elsewhere(longer)
        fit(whole)
        same(tensors(whole), tensors(longer))


def test_a_finished_run_is_not_trained_again(settings):
    config = settings()
    fit(config)
    before = tensors(config)
    assert "step" not in [event.kind for event in run_events(config)]
    same(before, tensors(config))
    with pytest.raises(TrainError, match="has 4 steps already"):
        fit(replace(config, steps=3))


def test_auto_keeps_what_an_earlier_start_chose(settings, monkeypatch):
    """Memory that is tight today does not make it another run: how the base is held decides the trajectory."""
    config = settings(base_storage="auto", gradient_checkpointing="auto", precision="bf16", steps=1)
    fit(config)
    resolved = json.loads((Path(config.run_dir) / "resolved.json").read_text())
    assert resolved["base_storage"] == "bf16" and resolved["gradient_checkpointing"] is False
    monkeypatch.setattr("train.run.estimate._storages", lambda config, source: ("fp8",))
    started = next(e for e in run_events(replace(config, steps=2)) if e.kind == "started")
    assert started.data["first_step"] == 1 and started.data["memory"].startswith("base_storage bf16")
    assert started.data["scaling"] == 1.0


def test_the_trigger_of_the_cache_gets_into_the_adapter(settings, tmp_path):
    data = small_cache(tmp_path / "data.safetensors", metadata={"qrlora.trigger": "<c>", "qrlora.prompt": "a <c> dog"})
    metadata = open_adapter(fit(settings(data=str(data), steps=1))).metadata
    assert metadata["qrlora.trigger"] == metadata["modelspec.trigger_phrase"] == "<c>"
    assert metadata["qrlora.prompt"] == "a <c> dog"


def test_a_second_start_decomposes_nothing(settings, elsewhere, monkeypatch):
    fit(settings())
    monkeypatch.setattr("train.model.basis.decompose", lambda *a, **k: pytest.fail("decomposed again"))
    fit(elsewhere(settings()))


def command(config, *more):
    path = Path(config.run_dir).with_suffix(".json")
    path.write_text(json.dumps(as_table(config)))
    events = Path(config.run_dir).with_suffix(".jsonl")
    return [sys.executable, "-m", "train", "fit", "--settings", path, "--events", events, *more], events


def wait_for(events, wanted, process, seconds=240):
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if events.exists():
            found = [e for e in read_events(events) if wanted(e)]
            if found:
                return found[-1]
        time.sleep(0.02)
    pytest.fail(f"did not happen within {seconds} s; exit code {process.poll()}")


@pytest.fixture
def start():
    """Starts `fit` in a process; one that a failed test leaves behind is ended."""
    started = []

    def start(config, *more, **options):
        line, events = command(config, *more)
        started.append(subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, **options))
        return started[-1], events

    yield start
    for process in started:
        process.kill()
        process.wait(60)


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM; the stop file is tested everywhere")
def test_sigterm_then_kill_then_resume_is_bit_equal(settings, elsewhere, start):
    whole = settings(steps=40, checkpoint_every=3)
    fit(whole)
    broken = elsewhere(whole)
    process, events = start(broken)
    wait_for(events, lambda e: e.kind == "step" and e.data["step"] >= 4, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 3
    stopped = read_events(events)[-1]
    assert stopped.kind == "stopped" and (Path(broken.run_dir) / stopped.data["checkpoint"]).is_file()
    process, events = start(broken)
    wait_for(events, lambda e: e.kind == "step" and e.data["step"] >= stopped.data["step"] + 5, process)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert not (Path(broken.run_dir) / "adapter.safetensors").exists()
    fit(broken)
    same(tensors(whole), tensors(broken))


@pytest.mark.process
def test_lifeline(settings, start):
    process, events = start(settings(steps=100_000), "--lifeline", stdin=subprocess.PIPE)
    wait_for(events, lambda e: e.kind == "step", process)
    process.stdin.close()  # what the system does when the parent dies
    began = time.monotonic()
    # promised within 5 s; a machine that is busy with other work may take longer to get round to it
    assert process.wait(60) in (3, 4) and time.monotonic() - began < 20


@pytest.mark.process
def test_two_processes_equal_one(settings, elsewhere):
    """Gloo on this machine: two processes of one pass each see the batches that one process of two passes sees."""
    one = settings(gradient_accumulation=2, steps=3)
    fit(one)
    # where there is no GPU, "auto" has to find that out in both processes, and then does what "cpu" does
    device = "cpu" if torch.cuda.is_available() else "auto"
    two = elsewhere(one, gradient_accumulation=1, device=device, strengths="on", sample_steps=1)
    line, events = command(two)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run([*launch, *line[1:]], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert events_of(events).count("started") == events_of(events).count("finished") == 1
    assert events_of(events).count("strengths") == 1, "one process looks at strengths, the other waits"
    ours, theirs = (load_file(Path(config.run_dir) / "adapter.safetensors") for config in (one, two))
    for key, value in ours.items():
        assert torch.allclose(value, theirs[key], rtol=1e-5, atol=1e-7), key


def test_processes_wait_long_for_one_that_works_alone(settings):
    """NCCL's own ten minutes would end a training whose first process still looks at strengths."""
    assert make_accelerator(settings()).init_handler.timeout.total_seconds() >= 3600


def test_processes_that_do_not_find_each_other_are_refused(settings, monkeypatch):
    """Each would train by itself and write the same files."""
    make_accelerator(settings())  # accelerate looks at the launcher's variables once per process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainError, match="started 2 processes, but accelerate joined 1"):
        fit(settings(steps=1))


def test_prior_preservation(settings, tmp_path, monkeypatch):
    """loss + prior_weight * loss of the class pictures, as published."""
    data = small_cache(tmp_path / "with_class.safetensors", class_pictures=2)
    losses = {}
    for weight in (0.0, 1.0, 0.5):
        config = settings(data=str(data), prior_weight=weight, steps=1, run_dir=str(tmp_path / f"run{weight}"))
        losses[weight] = run_events_of(config, tmp_path / f"e{weight}.jsonl")
    assert losses[0.5] == pytest.approx((losses[0.0] + losses[1.0]) / 2, rel=1e-5)
    assert losses[1.0] > losses[0.0] + 0.1


def run_events_of(config, path):
    fit(config, EventWriter.open(str(path)))
    return next(event.data["loss"] for event in read_events(path) if event.kind == "step")


def test_what_a_resumed_run_must_share(settings, tmp_path):
    config = settings(steps=2)
    fit(config)
    base = load_file(GOLDEN / "base_bfl.safetensors")
    base["img_in.weight"] += 1e-3
    save_file(base, tmp_path / "other_base.safetensors")
    small_cache(tmp_path / "other.safetensors", seed=1)
    for changes, message in (
        ({"model": str(tmp_path / "other_base.safetensors")}, "another base model"),
        ({"data": str(tmp_path / "other.safetensors")}, "other pictures or captions"),
        ({"learning_rate": 1e-4}, "learning_rate 0.001 -> 0.0001"),
        ({"resume": "never"}, "holds checkpoints"),
    ):
        before = tensors(config)
        # the adapter is of the run it was; a run that is not the same may not write over it
        with pytest.raises(TrainError, match=f"{message}|not of this run"):
            fit(replace(config, **{"steps": 4, **changes}))
        same(before, tensors(config))
    with pytest.raises(TrainError, match="no checkpoint"):
        fit(replace(config, run_dir=str(tmp_path / "empty"), resume="require"))


def rewritten(path, change=lambda tensors: None, state=None, metadata=None):
    """A checkpoint written again without its checksum, as by hand, or by an earlier version of the pack."""
    with safe_open(path, "pt") as file:
        table = json.loads(file.metadata()["qrlora.checkpoint"])
    tensors = load_file(path)
    change(tensors)
    text = state(table) if state else json.dumps(table)
    save_file(tensors, path, metadata={"qrlora.checkpoint": text} if metadata is None else metadata)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 4
    path.write_bytes(content)


def without(prefix):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(prefix)]


def spoilt(prefix, make):
    """The first tensor of such a name becomes what `make` makes of it."""

    def change(tensors):
        key = min(key for key in tensors if key.startswith(prefix))
        tensors[key] = make(tensors[key].clone()).contiguous()

    return change


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "one bit": flipped,
    "no metadata": lambda path: rewritten(path, metadata={}),
    "a list": lambda path: rewritten(path, state=lambda table: "[]"),
    "infinity": lambda path: rewritten(path, state=lambda t: json.dumps(t | {"smoothed_loss": float("inf")})),
    "deep": lambda path: rewritten(path, state=lambda t: "[" * 100_000),
    "no identity": lambda path: rewritten(path, state=lambda t: json.dumps(t | {"identity": None})),
    "no groups": lambda path: rewritten(
        path, state=lambda t: json.dumps(t | {"optimizer": {"state": {}, "groups": []}})
    ),
    "another step": lambda path: rewritten(path, state=lambda t: json.dumps(t | {"step": 77})),
    "no optimizer": lambda path: rewritten(path, without("optimizer.")),
    "part of the optimizer": lambda path: rewritten(path, without("optimizer.3.exp_avg")),
    "a parameter less": lambda path: rewritten(path, without("param.single")),
    "another shape": lambda path: rewritten(path, spoilt("param.", lambda t: t[:, :-1])),
    "another shape of the optimizer": lambda path: rewritten(path, spoilt("optimizer.0.exp_avg", lambda t: t[:, :-1])),
    "NaN": lambda path: rewritten(path, spoilt("param.", lambda t: t.fill_(float("nan")))),
    "NaN in the optimizer": lambda path: rewritten(path, spoilt("optimizer.", lambda t: t.fill_(float("nan")))),
}


@pytest.fixture(scope="module")
def stopped_at_two(shared, tmp_path_factory):
    """Two checkpoints of a run of three steps, and what the whole run ends in."""
    folder = tmp_path_factory.mktemp("two")
    config = make_config(FitConfig, base_settings(shared, folder / "whole"), {"checkpoint_every": 1, "steps": 3})
    fit(config)
    broken = replace(config, run_dir=str(folder / "broken"))
    with pytest.raises(Stopped):
        fit(broken, watch=StopAt(LOADING + 6))
    return broken, tensors(config)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(stopped_at_two, tmp_path, caplog, damage):
    config, whole = stopped_at_two
    shutil.copytree(config.run_dir, tmp_path / "run")
    config = replace(config, run_dir=str(tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoints"
    newest = sorted(folder.iterdir())[-1]
    assert len(list(folder.iterdir())) == 2
    DAMAGES[damage](newest)
    (folder / ".qrlora-dead.tmp").write_bytes(b"x")
    fit(config)
    assert f"{newest.name} is damaged" in caplog.text and "learning_rate" not in caplog.text
    assert not list(folder.glob("*.tmp"))
    assert newest.with_suffix(".damaged").is_file()
    same(whole, tensors(config))


def test_an_old_checkpoint_without_a_checksum_is_gone_on_from(stopped_at_two, tmp_path):
    config, whole = stopped_at_two
    shutil.copytree(config.run_dir, tmp_path / "run")
    rewritten(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1], without("basis."))
    events = run_events(replace(config, run_dir=str(tmp_path / "run")))
    assert next(event.data["first_step"] for event in events if event.kind == "started") == 2
    same(whole, tensors(replace(config, run_dir=str(tmp_path / "run"))))


def test_a_run_without_a_whole_checkpoint_begins_anew(stopped_at_two, tmp_path):
    config, whole = stopped_at_two
    shutil.copytree(config.run_dir, tmp_path / "run")
    config = replace(config, run_dir=str(tmp_path / "run"))
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(TrainError, match="no checkpoint"):
        fit(replace(config, resume="require"))
    fit(config)
    same(whole, tensors(config))


def test_another_basis_is_no_way_to_go_on(stopped_at_two, tmp_path):
    config, _ = stopped_at_two
    shutil.copytree(config.run_dir, tmp_path / "run")
    (path,) = Path(config.basis_cache).glob("*-r8-*")
    layers = load_file(path)
    layers = {key: value.flip(0).contiguous() if value.shape[1] == 8 else value for key, value in layers.items()}
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != writing.CHECKSUM}
    (tmp_path / "bases").mkdir()
    save_file(layers, tmp_path / "bases" / path.name, metadata=metadata)
    with pytest.raises(TrainError, match="began on another basis of transformer_blocks.0.attn.to_q"):
        fit(replace(config, run_dir=str(tmp_path / "run"), basis_cache=str(tmp_path / "bases")))


@pytest.mark.parametrize("damage", ["zeros", "nan", "bit", "cut"])
def test_a_damaged_basis_is_computed_anew(stopped_at_two, tmp_path, damage, caplog):
    config, whole = stopped_at_two
    (path,) = Path(config.basis_cache).glob("*-r8-*")
    (tmp_path / "bases").mkdir()
    copy = tmp_path / "bases" / path.name
    layers = load_file(path)
    if damage in ("zeros", "nan"):
        for value in layers.values():
            value.fill_(0.0 if damage == "zeros" else float("nan"))
        save_file(layers, copy, metadata={"qrlora.format": "basis", "qrlora.rank": "8"})
    else:
        copy.write_bytes(path.read_bytes()[: -8 if damage == "cut" else None])
        if damage == "bit":
            flipped(copy)
    config = replace(config, run_dir=str(tmp_path / "run"), basis_cache=str(tmp_path / "bases"))
    fit(config)
    assert "is computed again" in caplog.text
    same(whole, tensors(config))


def test_two_trainings_in_one_folder(settings):
    config = settings()
    with held_run_folder(Path(config.run_dir)), pytest.raises(TrainError, match="another training runs in run"):
        fit(config)
    fit(config)


def test_a_drive_without_locks_is_told(settings, monkeypatch, caplog):
    def unsupported(descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", unsupported)
    fit(settings(steps=1))
    assert "drive without locks" in caplog.text


def test_encoding_again_is_the_same_data(settings, tmp_path):
    """A cache that was deleted and encoded anew has other last bits, and is no reason for another run."""
    first, second, other = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "other"))
    small_cache(first, source_key="a" * 16)
    small_cache(second, source_key="a" * 16, seed=1)
    small_cache(other, source_key="b" * 16)
    config = settings(data=str(first), steps=1)
    fit(config)
    fit(replace(config, data=str(second), steps=2))
    with pytest.raises(TrainError, match="other pictures or captions"):
        fit(replace(config, data=str(other), steps=3))


def test_a_version_of_the_pack_does_not_abandon_a_run(settings, monkeypatch):
    config = settings(steps=1)
    fit(config)
    monkeypatch.setattr(fit_module, "__version__", "99.0")
    fit(replace(config, steps=2))
    monkeypatch.setattr("train.run.prepare.TRAJECTORY_VERSION", 99)
    with pytest.raises(TrainError, match="version 1 -> 99"):
        fit(replace(config, steps=3))


def test_a_loss_that_is_not_finite_stops(settings, monkeypatch):
    config = settings(steps=6, checkpoint_every=2)
    real, calls = fit_module.denoising_loss, iter(range(1000))
    monkeypatch.setattr(fit_module, "denoising_loss", lambda *a: real(*a) * (float("nan") if next(calls) >= 7 else 1))
    with pytest.raises(TrainError, match="loss of step 4 is nan.*step-00000002.safetensors is kept") as caught:
        fit(config)
    assert caught.value.reason == "loss"
    kept = checkpoint.newest_checkpoint(Path(config.run_dir))
    assert kept.step == 2 and all(bool(torch.isfinite(t).all()) for t in kept.tensors("").values())


def test_a_full_disk_keeps_what_is_there(settings, monkeypatch, tmp_path):
    config = settings(steps=4, checkpoint_every=1)
    real = writing._write_stream

    def full(file, specs, *more):
        if b'\\"step\\": 3' in Path(file.name).read_bytes():
            raise OSError(28, "No space left on device")
        return real(file, specs, *more)

    monkeypatch.setattr(writing, "_write_stream", full)
    with pytest.raises(TrainError, match="cannot be written.*No space left") as caught:
        fit(config)
    assert caught.value.reason == "disk"
    assert sorted(p.name for p in (Path(config.run_dir) / "checkpoints").iterdir()) == [
        "step-00000001.safetensors",
        "step-00000002.safetensors",
    ]


@pytest.mark.parametrize("path", ["run_dir", "output"])
def test_an_adapter_of_another_run_is_not_written_over(settings, tmp_path, path):
    config = settings()
    target = tmp_path / "mine.safetensors" if path == "output" else Path(config.run_dir) / "adapter.safetensors"
    target.parent.mkdir(exist_ok=True, parents=True)
    target.write_bytes((GOLDEN / "official_style.safetensors").read_bytes())
    before = target.read_bytes()
    with pytest.raises(TrainError, match="is not of this run"):
        fit(replace(config, output=str(target) if path == "output" else ""))
    assert target.read_bytes() == before


def test_published_format_and_half_precision(settings, elsewhere):
    config = settings(output_format="published", save_dtype="bf16")
    keys = load_file(fit(config))
    assert {key.split(".lora.")[1] for key in keys} == {"q.weight", "delta_r.weight", "base_r.weight"}
    assert {tensor.dtype for tensor in keys.values()} == {torch.bfloat16}
    assert open_adapter(Path(config.run_dir) / "adapter.safetensors").has_initial
    portable = open_adapter(fit(elsewhere(config, output_format="portable", save_dtype="fp32")))
    name = next(iter(portable.layers))
    published = open_adapter(Path(config.run_dir) / "adapter.safetensors").layer(name)
    assert torch.allclose(portable.layer(name).down, published.down.float(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    "changes,kind,message",
    [
        ({"model": "nowhere.safetensors"}, TrainError, "does not exist; nothing is downloaded"),
        (
            {"model": str(GOLDEN / "official_style.safetensors")},
            TrainError,
            "is not a FLUX.1, FLUX.2, Qwen-Image, Z-Image, Krea 2, SD3.5 or SDXL transformer",
        ),
        ({"data": "nowhere.safetensors"}, TrainError, "does not exist; `python -m train encode`"),
        ({"data": str(GOLDEN / "tensors.safetensors")}, TrainError, "is not a training cache"),
        ({"rank": 200}, WeightError, "rank 200 does not fit"),
        ({"targets": ["attn.to_qq"]}, Exception, "did you mean"),
        ({"base_storage": "nf4"}, TrainError, "bitsandbytes|cannot be used here"),
        ({"optimizer": "adamw8bit"}, TrainError, "pip install bitsandbytes"),
        ({"device": "cuda:7"}, TrainError, "cannot be used"),
    ],
)
def test_what_is_refused(settings, changes, kind, message):
    config = settings(**changes)
    with pytest.raises(kind, match=message):
        fit(config)
    assert not (Path(config.run_dir) / "adapter.safetensors").exists()


def test_texts_of_another_width_are_refused(settings, tmp_path):
    """Those of a CLIP that belongs to another model."""
    data = small_cache(tmp_path / "wide.safetensors", width=768)
    with pytest.raises(TrainError, match=r"the texts have widths \(768, 768\), FLUX.1 takes \(64, 64\)"):
        fit(settings(data=str(data)))


def test_memory_is_estimated_first(settings, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 10_000_000})())
    with pytest.raises(TrainError, match="close other programs.*gradient_checkpointing and offload auto") as caught:
        fit(settings())
    assert caught.value.reason == "memory"
    fit(settings(memory_check=False))


def test_exit_codes_and_the_failed_event(settings, tmp_path, capsys, monkeypatch):
    config = settings(steps=1)
    line, events = command(config)
    assert main([str(part) for part in line[3:]]) == 0
    assert main(["fit", "--settings", str(line[5]), "--rank", "0"]) == 2
    bad = [str(part) for part in line[3:]] + ["--model", "nowhere", "--run-dir", str(tmp_path / "new")]
    assert main(bad) == 1
    last = parse(events.read_text().splitlines()[-1])
    assert last.kind == "failed" and last.data["reason"] == "model"

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fit_module, "denoising_loss", out_of_memory)
    assert main([*[str(part) for part in line[3:]], "--run-dir", str(tmp_path / "oom")]) == 1
    last = parse(events.read_text().splitlines()[-1])
    assert last.data["reason"] == "memory" and "offload" in last.data["message"]
    assert isinstance(PathError("x"), Exception)
