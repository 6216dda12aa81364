"""A LoRA beside the model while it trains: in the loss and its gradient, not in samples, not in the result."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.small_flux import GOLDEN
from qrlora_core import TrainingCache, decompose, open_adapter
from tests.train.test_fit import StopAt, same, tensors
from train.check import check
from train.data.batches import Sampler
from train.errors import TrainError
from train.model.layer import inject, trained_parameters
from train.model.source import BaseModel
from train.model.training_adapter import TrainingAdapter
from train.model.transformer import load_transformer
from train.run.denoise import denoising_loss
from train.run.fit import fit
from train.run.stop import Stopped

CPU = torch.device("cpu")
# one layer that is trained as well, one that is not
LAYERS = {"transformer_blocks.0.attn.to_q": (128, 128), "single_transformer_blocks.0.proj_mlp": (512, 128)}


def write_lora(path, layers=LAYERS, seed=0, size=0.05):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, (out, width) in layers.items():
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(4, width, generator=generator) * size
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(out, 4, generator=generator) * size
        state[f"transformer.{name}.alpha"] = torch.tensor(2.0)
    save_file(state, path)
    return path


def change(path, name):
    state = load_file(path)
    return state[f"transformer.{name}.lora_B.weight"] @ state[f"transformer.{name}.lora_A.weight"] * (2.0 / 4)


def loss_and_gradients(source, config, batch, prepare):
    """Of the model with trained layers on the base's own bases, after `prepare(model)`."""
    model = load_transformer(source, "fp32", "fp32")
    targets = source.targets()
    layers = inject(model, targets, lambda name: decompose(source.weight(name), 4), "delta_r", 1.0)
    prepare(model, layers)
    loss = denoising_loss(model.train(), source.backbone, batch, config, CPU, torch.float32)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in trained_parameters(layers).items()}


def test_it_counts_as_if_it_were_in_the_weights(settings, tmp_path):
    path, config = write_lora(tmp_path / "lora.safetensors", size=0.3), settings()
    source = BaseModel(GOLDEN / "base_bfl.safetensors")
    batch = Sampler(TrainingCache(config.data), config).batch(0)
    adapter = TrainingAdapter(path, source)

    def merged(model, layers):
        for name in LAYERS:
            layer = layers[name].base if name in layers else model.get_submodule(name)
            with torch.no_grad():
                layer.weight += change(path, name)

    plain, _ = loss_and_gradients(source, config, batch, lambda *_: None)
    beside = loss_and_gradients(source, config, batch, lambda model, _: adapter.attach(model, CPU, torch.float32))
    inside = loss_and_gradients(source, config, batch, merged)
    assert abs(float(beside[0] - plain)) > 1e-4
    torch.testing.assert_close(beside[0], inside[0], rtol=1e-5, atol=0)
    for name, gradient in inside[1].items():
        torch.testing.assert_close(beside[1][name], gradient, rtol=1e-4, atol=1e-7)
    with adapter.off():
        off = loss_and_gradients(source, config, batch, lambda model, _: adapter.attach(model, CPU, torch.float32))
    assert torch.equal(off[0], plain)


def test_it_changes_what_is_learnt_and_is_not_in_the_result_nor_in_samples(settings, tmp_path):
    path = write_lora(tmp_path / "lora.safetensors", size=0.3)
    # a learning rate so small that the samples are those of the base
    plain = settings(run_dir=str(tmp_path / "plain"), sample_every=4, learning_rate=1e-9, optimizer="adamw")
    beside = replace(plain, run_dir=str(tmp_path / "beside"), training_adapter=str(path))
    fit(plain)
    adapter = open_adapter(fit(beside))
    assert set(adapter.layers) == {target.name for target in BaseModel(GOLDEN / "base_bfl.safetensors").targets()}
    torch.testing.assert_close(last_sample(plain), last_sample(beside), rtol=0, atol=1e-5)
    assert max(float(adapter.layer(name).down.abs().max()) for name in adapter.layers) < 1e-7
    trained = [
        replace(run, run_dir=f"{run.run_dir} more", learning_rate=1e-2, sample_every=0) for run in (plain, beside)
    ]
    one, other = (open_adapter(fit(run)) for run in trained)
    name = next(iter(one.layers))
    assert not torch.allclose(one.layer(name).down, other.layer(name).down)


def last_sample(config):
    return load_file(max((Path(config.run_dir) / "samples").iterdir()))["latent"]


def test_a_run_goes_on_with_the_same_one_only(settings, tmp_path):
    path, other = write_lora(tmp_path / "one.safetensors"), write_lora(tmp_path / "other.safetensors", seed=1)
    whole = settings(run_dir=str(tmp_path / "whole"), training_adapter=str(path))
    fit(whole)
    broken = replace(whole, run_dir=str(tmp_path / "broken"))
    with pytest.raises(Stopped):
        fit(broken, watch=StopAt(len(BaseModel(GOLDEN / "base_bfl.safetensors").specs) + 6))
    assert list((tmp_path / "broken" / "checkpoints").iterdir()), "stopped before the first step"
    for changed in (str(other), ""):
        with pytest.raises(TrainError, match="this run began with other settings: training_adapter") as caught:
            fit(replace(broken, training_adapter=changed))
        assert caught.value.reason == "resume"
    moved = path.rename(tmp_path / "moved.safetensors")
    fit(replace(broken, training_adapter=str(moved)))
    same(tensors(whole), tensors(broken))


@pytest.mark.parametrize(
    "layers, message",
    [
        ({"transformer_blocks.7.attn.to_q": (128, 128)}, "is of another model: .* not there"),
        (
            {"transformer_blocks.0.attn.to_q": (64, 128)},
            r"is of another model: its .* is \(64, 128\), in .* \(128, 128\)",
        ),
    ],
)
def test_one_of_another_model_is_refused(settings, tmp_path, layers, message):
    config = settings(training_adapter=str(write_lora(tmp_path / "lora.safetensors", layers)))
    with pytest.raises(TrainError, match=message) as caught:
        fit(config)
    assert caught.value.reason == "model"
    (problem,) = check(config)["problems"]
    assert "is of another model" in problem["what"]


def test_what_is_no_lora_is_refused(settings, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for wrong in ("missing.safetensors", tmp_path / "broken.safetensors", GOLDEN / "base_bfl.safetensors"):
        with pytest.raises(TrainError, match="the training adapter cannot be used"):
            fit(settings(training_adapter=str(wrong)))


def test_the_estimate_counts_it(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("train.run.estimate._own_memory", lambda: 0)  # it grows from one check to the next
    path = write_lora(tmp_path / "lora.safetensors")
    less, more = (check(settings(training_adapter=name))["estimate"]["vram"] for name in ("", str(path)))
    assert more - less == path.stat().st_size
