"""The programs that need a host run through on a small model, so that they are known to work where a card is."""

import os
import subprocess

import torch

from benchmarks.fusion.learn import RECIPES
from benchmarks.fusion.optimizer import Optimizer
from benchmarks.fusion.protocol import CHECK
from benchmarks.fusion.store import Study
from demo import server as instance
from tests.host.conftest import HOST

SMALL = ["--double", "1", "--single", "1", "--hidden", "128", "--rank", "4", "--latent", "8"]


def run(module, *arguments):
    environment = {**os.environ, "COMFYUI_PATH": str(HOST), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [instance.interpreter(HOST), "-m", f"benchmarks.{module}", *SMALL, *arguments],
        cwd=instance.PACK, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_card():
    printed = run("card", "--storages", "fp32", "--train-steps", "1")
    assert "FAILED" not in printed, printed
    rows = [line for line in printed.splitlines() if " s  " in line]
    assert len(rows) == 17 and "s a step, peak" in rows[-1]
    errors = [float(line.split("error ")[1]) for line in rows if "error" in line]
    assert len(errors) == 2 and max(errors) < 1e-4


def test_apply():
    printed = run("apply", "--rounds", "1")
    assert "nodes, live, after turning alpha" in printed and "step, live" in printed
    held = float(printed.split("their patches hold ")[1].split(" MB")[0])
    assert held < 50, "a sweep holds no copies"


def test_lora():
    """Both sides load a file of a few fused modules; at FLUX.1's size the exit code says how many are too slow."""
    environment = {**os.environ, "COMFYUI_PATH": str(HOST), "PYTHONDONTWRITEBYTECODE": "1"}
    small = ["--double", "1", "--single", "1", "--hidden", "256", "--ranks", "4,8", "--rounds", "1"]
    done = subprocess.run(
        [instance.interpreter(HOST), "-m", "benchmarks.lora", *small],
        cwd=instance.PACK, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("stock ") == done.stdout.count("all bases ") == 2


HALVES = """
import comfy.sd


class Halves:
    FUNCTION = "merge"

    def merge(self, model, lora_stack, output_strength, **settings):
        for one in lora_stack:
            model, _ = comfy.sd.load_lora_for_models(model, None, one["lora"], 0.5 * output_strength, 0.0)
        return model, None, "halved"


NODE_CLASS_MAPPINGS = {"LoRAOptimizer": Halves}
"""


def test_another_packs_merge_is_read_off_the_models_weights(tmp_path, monkeypatch):
    """A pack whose node adds half of each adapter: what comes back is half of their sum, in every layer."""
    monkeypatch.setenv("COMFYUI_PATH", str(HOST))
    monkeypatch.setenv("COMFYUI_PYTHON", str(instance.interpreter(HOST)))
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "lora_optimizer.py").touch()
    (pack / "__init__.py").write_text(HALVES)
    study, unit = Study(tmp_path / "study", pictures=1, adapter_steps=1), CHECK[0]
    study.joints["optimizer"] = Optimizer(pack, CHECK[:1])
    joined = study.joined("optimizer", unit, "style", RECIPES["qr"])
    assert study.joined_path("optimizer", unit, "texture", RECIPES["qr"]).is_file(), "all pairs in one process"
    content, style = (study.adapter(unit, side, RECIPES["qr"]).update for side in ("content", "style"))
    for name, pair in joined.items():
        wanted = sum(one[name].up @ one[name].down for one in (content, style)) / 2
        assert wanted.any()
        torch.testing.assert_close(pair.up @ pair.down, wanted, rtol=1e-3, atol=1e-6)
