"""After a training: what the adapter does at several strengths, measured, drawn, written, and never in the way."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from qrlora_core import EncodedText, PathError, PlainText, TrainingCache, open_adapter, save_cache
from tests.train.conftest import small_cache
from train.events import EventWriter, read_events
from train.run import strengths
from train.run.denoise import sample_latents
from train.run.fit import fit
from train.run.prepare import prepare
from train.run.stop import Stopped, StopWatch
from train.run.strengths import CURVE, DRAWN


@pytest.fixture
def with_plain(tmp_path):
    """The small cache, with its caption without a trigger."""
    text = EncodedText(torch.randn(5, 64, generator=torch.Generator().manual_seed(7)), torch.ones(64))
    return str(small_cache(tmp_path / "plain.safetensors", plain=PlainText("<c>", "a thing", text)))


@pytest.fixture
def run(settings, with_plain):
    """A run that looks at strengths; its events."""

    def go(watch=None, **changes):
        config = settings(**{"data": with_plain, "trigger": "<c>", "strengths": "on", "sample_steps": 2, **changes})
        path = Path(config.run_dir).parent / "events.jsonl"
        fit(config, EventWriter.open(str(path)), watch)
        return config, read_events(path)

    return go


def told(config, step=4):
    return json.loads((Path(config.run_dir) / "strengths" / f"step-{step:08}.json").read_text())


@pytest.mark.parametrize("method", ["delta_r_triangular", "qr"])
def test_a_run_that_looks(run, settings, method, tmp_path):
    config, events = run(method=method, learning_rate=1e-2 if method != "qr" else 1e-3)
    found = told(config)
    assert found["strengths"] == list(CURVE) and len(found["noise_levels"]) == 3
    at = dict(zip(found["strengths"], found["shown"]))
    assert at[1.0] == pytest.approx(1.0) and 0 < at[0.2] < at[0.6] < at[1.0] < at[1.2]
    assert all(0 < one < other for one, other in zip(found["drift"], found["drift"][1:]))
    assert all(0 < moved < 1 for moved in found["moved"])
    assert found["prompts"] == {"with_trigger": "a caption", "without": "a thing"}
    kinds = [event.kind for event in events if event.kind != "phase"]
    assert kinds[-3:] == ["saved", "strengths", "finished"]
    (event,) = (event for event in events if event.kind == "strengths")
    assert event.data["shown"] == found["shown"] and event.data["file"] == "strengths/step-00000004.json"
    phases = [event.data for event in events if event.kind == "phase" and event.data["phase"] == "strengths"]
    assert phases[-1]["done"] == phases[-1]["total"] == strengths.evaluations(config)
    latents = load_file(Path(config.run_dir) / "strengths" / found["pictures"]["file"])["latent"]
    assert latents.shape == (2 * len(DRAWN), 16, 4, 4) and found["pictures"]["strengths"] == list(DRAWN)
    assert len({float(one.sum()) for one in latents}) == len(latents), "no two alike"


def test_pictures_are_those_of_the_model_and_of_the_adapter(run, tmp_path):
    """Strength 0 is the base's own picture, strength 1 the sample that training takes; nothing is left changed."""
    config, _ = run(sample_every=4, sample_guidance=1.0)
    folder = Path(config.run_dir)
    latents = load_file(folder / "strengths" / "step-00000004.safetensors")["latent"]
    sample = load_file(folder / "samples" / "step-00000004.safetensors")["latent"]
    assert torch.equal(latents[DRAWN.index(1.0)], sample[0])
    from train.run.processes import make_accelerator
    from train.run.reporter import Reporter

    fresh = config.__class__(**{**as_fields(config), "run_dir": str(tmp_path / "fresh")})
    accelerator = make_accelerator(fresh)
    state = prepare(fresh, accelerator, Reporter(EventWriter(None), accelerator.device), StopWatch())
    noise = strengths._Show(state, *strengths._captions(state)).noise
    text = state.sampler.cache.text(1).map(lambda tensor: tensor[None])
    untrained = sample_latents(state.model.eval(), state.backbone, noise, text, 2, 1.0, state.device, state.dtype)
    assert torch.equal(latents[0], untrained[0])
    accelerator.end_training()


def as_fields(config):
    from dataclasses import fields

    return {one.name: getattr(config, one.name) for one in fields(config)}


def test_looking_changes_nothing_of_the_adapter(run, settings, tmp_path, with_plain):
    config, _ = run()
    plain = settings(data=with_plain, trigger="<c>", strengths="off", run_dir=str(tmp_path / "off"))
    fit(plain)
    assert not (tmp_path / "off" / "strengths").exists()
    one, other = (load_file(Path(c.run_dir) / "adapter.safetensors") for c in (config, plain))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"steps": 1000}, True),
        ({"steps": 1000, "gradient_accumulation": 1, "sample_steps": 100}, False),
        ({"steps": 10}, False),
        ({"steps": 10, "strengths": "on"}, True),
        ({"steps": 10**6, "strengths": "off"}, False),
    ],
)
def test_auto_is_for_where_it_is_cheap(settings, changes, wanted):
    config = settings(**{"gradient_accumulation": 4, **changes})
    assert strengths._wanted(config) == wanted
    if config.strengths == "auto":
        share = strengths.evaluations(config) / (3 * config.steps * config.gradient_accumulation)
        assert (share <= 0.1) == wanted


def test_the_number_of_passes_is_what_is_told(run, monkeypatch):
    passes = []
    for name in ("prediction", "sample_latents"):
        real = getattr(strengths, name)

        def counted(*args, real=real, name=name):
            passes.append(1 if name == "prediction" else args[4])
            return real(*args)

        monkeypatch.setattr(strengths, name, counted)
    config, _ = run()
    assert sum(passes) == strengths.evaluations(config)


def test_curves_of_a_model_that_is_known(monkeypatch):
    """Effects that grow with the strength, half as large without the trigger and in another direction."""
    own, plain = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.5])
    layer = SimpleNamespace(scaling=2.0)
    process = SimpleNamespace(step=lambda latents, *_: latents)
    backbone = SimpleNamespace(shift=lambda _: 3.0, tokens=lambda *_: 1, process=process)
    reporter = SimpleNamespace(phase=lambda *_: None)
    sampler = SimpleNamespace(
        cache=SimpleNamespace(items=[SimpleNamespace(is_class=False)], latent_shape=lambda _: (1, 1, 2))
    )
    state = SimpleNamespace(
        layers={"l": layer}, backbone=backbone, reporter=reporter, watch=SimpleNamespace(check=lambda: None),
        config=SimpleNamespace(seed=0, sample_guidance=1.0, sample_steps=2), device="cpu", dtype=None, model=None,
        sampler=sampler, accelerator=SimpleNamespace(num_processes=1),
    )  # fmt: skip

    def predicted(model, backbone, latents, sigma, text, *_):
        direction = own if bool(text.embeds.any()) else plain
        return 10.0 + 0.5 * layer.scaling * direction

    monkeypatch.setattr(strengths, "prediction", predicted)
    captions = [strengths._Caption("", EncodedText(torch.full((1, 1), value), None)) for value in (1.0, 0.0)]
    found = strengths._Show(state, *captions)._measured()
    assert found["shown"] == pytest.approx(CURVE) and found["drift"] == pytest.approx([0.5 * s for s in CURVE])
    assert found["moved"] == pytest.approx([s * 1.5 / (10 * 2**0.5) for s in CURVE], rel=1e-5)
    assert found["noise_levels"] == [1.0, 0.8571, 0.6] and layer.scaling == 2.0
    own.zero_()
    assert strengths._Show(state, *captions)._measured()["shown"] == [None] * len(CURVE), "an adapter without effect"


def test_data_of_an_earlier_version(settings, tmp_path, caplog):
    """The empty caption serves where it was encoded; without it a line says what lacks, and the run is whole."""
    config = settings(strengths="on", sample_steps=1)
    fit(config)
    assert told(config)["prompts"] == {"with_trigger": "a caption", "without": ""}
    generator = torch.Generator().manual_seed(0)
    cache = TrainingCache(Path(config.data))
    pictures = [strengths_picture(cache, index) for index in range(len(cache.items))]
    texts = [EncodedText(torch.randn(5, 64, generator=generator), torch.ones(64)) for _ in range(2)]
    old = save_cache(tmp_path / "old.safetensors", cache.items, pictures, texts)
    with caplog.at_level(logging.INFO):
        path = fit(settings(strengths="on", data=str(old), run_dir=str(tmp_path / "old run")))
    assert "no caption without the trigger" in caplog.text and open_adapter(path).rank == 8
    assert not (tmp_path / "old run" / "strengths").exists()


def strengths_picture(cache, index):
    from qrlora_core import EncodedPicture

    return EncodedPicture(cache.latent(index))


def test_another_trigger_than_the_datas(run):
    config, _ = run(trigger="<s>")
    assert told(config)["prompts"]["without"] == "", "that of the cache was made for another one"


def test_a_disk_that_refuses_pictures_fails_no_training(run, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise PathError("step-00000004.safetensors needs 1 GB, the disk has 0 GB free")

    monkeypatch.setattr(strengths, "write_tensors", full)
    config, events = run()
    assert "they cannot be written (step-00000004.safetensors needs 1 GB" in caplog.text
    assert events[-1].kind == "finished" and open_adapter(Path(config.run_dir) / "adapter.safetensors").rank == 8


class StopLate(StopWatch):
    """Asks to stop when the adapter is written."""

    def __init__(self, adapter):
        super().__init__()
        self.adapter = adapter

    @property
    def asked(self):
        return self.adapter.exists()


def test_stopping_while_it_looks(run, tmp_path):
    """The adapter is there already; queued again, only the look is left."""
    with pytest.raises(Stopped):
        run(watch=StopLate(tmp_path / "run" / "adapter.safetensors"))
    before = load_file(tmp_path / "run" / "adapter.safetensors")
    config, events = run()
    assert [e.kind for e in events if e.kind in ("stopped", "step", "finished")][-2:] == ["stopped", "finished"]
    after = load_file(tmp_path / "run" / "adapter.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before) and told(config)["step"] == 4


def test_memory_that_ends_there_costs_no_adapter(run, monkeypatch, caplog):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(strengths, "sample_latents", full)
    config, events = run()
    assert "memory ended" in caplog.text and events[-1].kind == "finished"
    assert not (Path(config.run_dir) / "strengths").exists()


def test_other_errors_are_not_hidden(run, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(strengths, "sample_latents", broken)
    with pytest.raises(ZeroDivisionError):
        run()
