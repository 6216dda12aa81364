"""Can this machine train, and with how much memory: problems with their fix, an estimate that follows the model."""

import json
import math
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import FluxTransformer2DModel

from demo.small_flux import GOLDEN
from qrlora_core import Basis, EncodedText, flux_targets
from tests.train.tiny import sparse_flux
from train import check as module
from train.check import check, dry_run, readable
from train.config import FitConfig
from train.errors import TrainError
from train.model.backbones.flux import FLUX
from train.model.layer import inject
from train.model.source import BaseModel
from train.run.denoise import prediction
from train.run.estimate import (
    Available,
    MemoryPlan,
    choose_memory,
    out_of_memory,
    require_memory,
)
from train.settings import make_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.process
def test_an_interpreter_without_packages(tmp_path):
    """The commands name that very interpreter, and nothing but the standard library is needed to say so."""
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}

    def call(*arguments):
        return subprocess.run(
            [python, "-m", "train", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )

    done = call("check", "--json", "--model", str(GOLDEN / "base_bfl.safetensors"))
    assert done.returncode == 1 and not done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] is None and found["device"] is None and found["disk_free"] > 0
    torch_problem, pip_problem = found["problems"]
    assert "torch is not installed" in torch_problem["what"] and "pytorch.org" in torch_problem["fix"]
    assert "diffusers is not installed" in pip_problem["what"]
    assert pip_problem["fix"].startswith(f'"{python}" -m pip install "safetensors>=')
    assert '"accelerate>=1.0"' in pip_problem["fix"] and '"transformers>=' in pip_problem["fix"]
    assert "torch>=" not in pip_problem["fix"]
    # a command that needs them says so in one line
    done = call("fit", "--model", "m", "--data", "d", "--run-dir", str(tmp_path / "run"), "--events", "-")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "a package cannot be imported" in done.stderr and "train check says what to install" in done.stderr
    assert json.loads(done.stdout)["reason"] == "library"


def test_a_good_machine(settings):
    found = check(settings(method="delta_r"))
    assert found["problems"] == []
    assert found["device"] == "cpu" and found["ram_free"] > 0
    assert found["model"]["blocks"] == "1+1" and found["model"]["dtype"] == "float32"
    assert found["estimate"].keys() == {"vram", "ram", "disk"}
    json.dumps(found)
    text = readable(found)
    assert text.endswith("ready to train") and "PROBLEM" not in text
    assert "scaling    1" in text
    assert found["model"]["channels"] == 16 and found["model"]["text"] == {"embeds": 64, "pooled": 64}
    assert "channels 16, text embeds 64 and pooled 64" in text
    assert "memory     base_storage fp32, gradient_checkpointing off, offload 0: about " in text
    own, estimate = psutil.Process().memory_info().rss, found["estimate"]["vram"]
    assert 0.9 * own < estimate < own + 250e6, "Python and its libraries, and a model of a few MB"


@pytest.mark.parametrize(
    "changes, message, fix",
    [
        ({"model": "missing.safetensors"}, "missing.safetensors' does not exist", "a model of FLUX.1, FLUX.2"),
        (
            {"model": str(GOLDEN / "official_style.safetensors")},
            "not a FLUX.1, FLUX.2, Qwen-Image, Z-Image, Krea 2, SD3.5 or SDXL transformer",
            "a model of FLUX.1, FLUX.2",
        ),
        ({"targets": ["attn.to_w"]}, "matches no layer", "targets"),
        ({"data": "missing.cache"}, "missing.cache", "train encode"),
        ({"device": "cuda:7"}, "cuda:7", "device"),
    ],
)
def test_problems_with_their_fix(settings, monkeypatch, changes, message, fix):
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
    found = check(settings(**changes))
    (problem,) = found["problems"]
    assert message in problem["what"] and fix in problem["fix"]
    text = readable(found)
    assert f"PROBLEM    {problem['what']}" in text and "ready to train" not in text


def test_data_that_do_not_exist_yet(settings):
    assert check(settings(data="missing.cache"), data=False)["problems"] == []


def test_a_disk_that_is_too_full(settings, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    (problem,) = check(settings())["problems"]
    assert "of disk" in problem["what"]


@pytest.mark.parametrize(
    "changes, package",
    [
        ({"optimizer": "adamw8bit"}, "bitsandbytes"),
        ({"optimizer": "prodigy", "learning_rate": 1.0}, "prodigyopt"),
        ({"base_storage": "nf4"}, "bitsandbytes"),
        ({"base_storage": "int8"}, "torchao"),
    ],
)
def test_packages_that_settings_need(settings, monkeypatch, changes, package):
    version = module._version
    monkeypatch.setattr(module, "_version", lambda name: None if name == package else version(name))
    (problem,) = check(settings(**changes))["problems"]
    assert package in problem["what"]
    assert problem["fix"] == f'"{sys.executable}" -m pip install {package}'


@pytest.mark.parametrize(
    "version, least, older",
    [
        (None, "1.0", True),
        ("0.9", "1.0", True),
        ("1.0", "1.0", False),
        ("2.13.0+cpu", "2.4", False),
        ("2.3.1+cu121", "2.4", True),
        ("0.36.0.dev0", "0.35", False),
        ("10.0", "9.9", False),
        ("1", "1.0", True),
    ],
)
def test_versions(version, least, older):
    assert module._older(version, least) == older


def test_a_package_that_is_installed_and_broken(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "train.run.plan", None)
    (problem,) = check(settings())["problems"]
    assert "a package is broken" in problem["what"] and "--force-reinstall" in problem["fix"]


def test_dry_run_prints_settings_that_can_be_read_back(settings):
    import tomllib

    config = settings(targets=["attn.to_q"], trigger="\u72ac \\ x")
    text = dry_run(config)
    assert text.isascii()
    table, plan = text.split("\n\n")
    assert make_config(FitConfig, tomllib.loads(table)) == config
    assert "2 layers" in plan and "transformer_blocks.0.attn.to_q 128x128" in plan
    assert "scaling    1 (alpha 8 / rank 8)" in plan
    assert "3 pictures, 0 class pictures, 2 buckets" in plan and "0.00 million" in plan


# how much memory


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return BaseModel(sparse_flux(tmp_path_factory.mktemp("flux") / "flux1-dev.safetensors"))


def estimated(flux, resolution=512, **changes):
    """The estimate of a plan: bf16, recomputed blocks, nothing waits in RAM, unless something else is asked for."""
    plan = {"base_storage": "bf16", "gradient_checkpointing": True, "offload": 0.0}
    config = make_config(FitConfig, {"model": "m", "data": "d", "run_dir": "r"}, plan, changes)
    side = resolution // 8
    targets, shapes = flux.targets(config.targets), [(16, side, side, 512, 4096)]
    return choose_memory(config, flux, targets, shapes, Available(10**15, 10**15))[1]


@pytest.mark.parametrize(
    "storage, low, high", [("bf16", 23, 24.5), ("fp8", 11.8, 12.8), ("int8", 11.8, 13), ("nf4", 6.5, 7.5)]
)
def test_weights_of_the_real_model(flux, storage, low, high):
    """11.9 thousand million numbers."""
    assert low < estimated(flux, base_storage=storage).weights / 1e9 < high


def test_trained_numbers_of_the_real_model(flux):
    """Rank 64 on 342 layers: 89 million numbers; AdamW holds each four times in fp32."""
    numbers = 64 * sum(target.shape[1] for target in flux.targets())
    assert numbers == pytest.approx(89e6, rel=0.02)
    assert estimated(flux).trained == 16 * numbers
    assert estimated(flux, optimizer="adamw8bit").trained < 0.7 * estimated(flux).trained


def test_the_whole_at_512_pixels_is_plausible(flux):
    whole = {storage: estimated(flux, base_storage=storage).vram / 1e9 for storage in ("bf16", "fp8", "nf4")}
    assert 26 < whole["bf16"] < 31 and 14 < whole["fp8"] < 19 and 9 < whole["nf4"] < 13


def test_more_takes_more(flux):
    def vram(**changes):
        return estimated(flux, **changes).vram

    assert vram(resolution=1024) > vram(resolution=768) > vram(resolution=512)
    assert vram(batch_size=4) > vram(batch_size=2) > vram()
    assert vram(rank=128) > vram(rank=64) > vram(rank=8)
    assert vram(gradient_checkpointing=False) > vram() + 6e9
    assert vram(method="qr") > vram()
    assert vram(targets=["attn.to_q"]) < vram()
    assert vram(offload=1.0) < vram(offload=0.5) < vram()
    assert estimated(flux, offload=1.0).ram - estimated(flux).ram == pytest.approx(23.4e9, rel=0.05)


def test_a_run_that_does_not_fit_names_what_to_switch_on(flux):
    with pytest.raises(TrainError, match=r"needs about 2\d\.\d GB of RAM, 10\.0 GB are free.*offload auto") as caught:
        require_memory(estimated(flux), Available(10_000_000_000, None))
    assert caught.value.reason == "memory"
    with pytest.raises(TrainError, match=r"needs about 2\d\.\d GB of GPU memory, 8\.0 GB are free"):
        require_memory(estimated(flux), Available(10**12, 8_000_000_000))
    config = make_config(FitConfig, {"model": "m", "data": "d", "run_dir": "r"})
    assert "rank 64, batch_size 1" in str(out_of_memory(config))


@pytest.fixture(scope="module")
def flux_fp8(tmp_path_factory):
    path = tmp_path_factory.mktemp("fp8") / "flux1-dev-fp8.safetensors"
    return BaseModel(sparse_flux(path, dtype=torch.float8_e4m3fn))


def chosen(source, vram, ram=64, resolution=512, storage=None, **changes):
    """What is chosen with so many GB free; and that it fits."""
    config = make_config(FitConfig, {"model": "m", "data": "d", "run_dir": "r"}, changes)
    side = resolution // 8
    available = Available(int(ram * 1e9), None if vram is None else int(vram * 1e9))
    shapes = [(16, side, side, 512, 4096)]
    plan, estimate = choose_memory(config, source, source.targets(), shapes, available, storage)
    require_memory(estimate, available)
    return plan


def test_what_is_chosen_for_every_card(flux, flux_fp8):
    """From an 8 GB card, of which a desktop takes some, to one with memory to spare."""
    small = chosen(flux_fp8, 7.2, ram=24)
    assert small.base_storage == "fp8" and small.gradient_checkpointing and 0.5 < small.offload <= 1.0
    assert chosen(flux, 7.2) == small
    twelve, sixteen = chosen(flux_fp8, 11.3), chosen(flux_fp8, 15.3)
    assert small.offload > twelve.offload > sixteen.offload >= 0.0
    assert chosen(flux_fp8, 23) == MemoryPlan("fp8", True, 0.0)
    assert chosen(flux, 47) == MemoryPlan("bf16", False, 0.0)
    assert chosen(flux, 31) == MemoryPlan("bf16", True, 0.0)
    assert chosen(flux_fp8, 79) == MemoryPlan("fp8", False, 0.0)
    assert chosen(flux, None, ram=24) == MemoryPlan("fp8", True, 0.0)


def test_what_the_user_or_an_earlier_start_says_is_kept(flux):
    assert chosen(flux, 79, base_storage="nf4").base_storage == "nf4"
    assert chosen(flux, 79, gradient_checkpointing=True) == MemoryPlan("bf16", True, 0.0)
    assert chosen(flux, 79, offload=0.5).offload == 0.5
    assert chosen(flux, 11.3, base_storage="nf4").offload == 0.0
    assert chosen(flux, 79, storage="fp8") == MemoryPlan("fp8", False, 0.0)
    assert chosen(flux, 15.3, base_storage="bf16").offload > 0.4


def test_too_little_for_anything_is_an_error_with_the_most_frugal_plan(flux):
    with pytest.raises(TrainError, match="GPU memory, 3.0 GB are free"):
        chosen(flux, 3.0)
    with pytest.raises(TrainError, match="of RAM, 4.0 GB are free"):
        chosen(flux, 7.2, ram=4)


def test_check_of_an_fp8_file_estimates_what_would_be_used(settings, flux_fp8, monkeypatch):
    """It used to count bf16 and call 27 GB a problem."""
    free = Available(24_000_000_000, None)
    monkeypatch.setattr("train.run.plan.free_memory", lambda device: free)
    config = settings(model=str(flux_fp8.path), data="none", base_storage="auto", gradient_checkpointing="auto",
                      rank=64, precision="bf16")  # fmt: skip
    found = check(config, data=False)
    assert not found["problems"] and found["chosen"]["base_storage"] == "fp8"
    assert found["memory"].startswith("base_storage fp8, gradient_checkpointing on, offload 0: about 1")


def kept_bytes(double, single, heads, tokens, text, dtype, checkpointing=False, rank=8):
    """What autograd holds between the forward and the backward pass of a small FLUX, without weights, in bytes."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=heads,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
    ).to(dtype)
    targets = flux_targets(double, single, 128 * heads)
    bases = {t.name: Basis(torch.linalg.qr(torch.randn(t.shape[0], rank)).Q, torch.zeros(rank, 1)) for t in targets}
    inject(model, targets, bases.__getitem__, "delta_r", 1.0, dtype=dtype)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that no address comes twice
        return tensor

    side = 2 * math.isqrt(tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        latents, encoded = torch.randn(1, 16, side, side), EncodedText(torch.randn(1, text, 64), torch.randn(1, 64))
        out = prediction(model, FLUX, latents, torch.tensor([0.5]), encoded, 1.0, torch.device("cpu"), dtype)
    assert out.requires_grad
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("heads, tokens, text, dtype", [(2, 64, 32, torch.float32), (2, 256, 64, torch.bfloat16)])
def test_activations_are_those_that_autograd_keeps(heads, tokens, text, dtype, checkpointing):
    def kept(double, single):
        return kept_bytes(double, single, heads, tokens, text, dtype, checkpointing)

    unit = (tokens + text) * 128 * heads * dtype.itemsize
    base = kept(1, 1)
    expected = (1.0, 1.0) if checkpointing else tuple(FLUX.activation_counts.values())
    assert (kept(2, 1) - base) / unit == pytest.approx(expected[0], rel=0.25)
    assert (kept(1, 2) - base) / unit == pytest.approx(expected[1], rel=0.25)
