"""The programs that need a host run through on a small model, so that they are known to work where a card is."""

import os
import subprocess

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
