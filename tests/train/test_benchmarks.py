"""The programs that measure training run through on small models, so that what they print can be made again."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import train_step

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.process


def run(module, *arguments):
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip


def test_a_step_of_two_families(monkeypatch, capsys):
    """In this process, which has imported what it needs."""
    command = "train_step --families qwen_image sdxl --heads 2 --pixels 64 --rounds 1 --rank 8"
    monkeypatch.setattr(sys, "argv", command.split())
    gc.freeze()  # what this process holds is none of the benchmark's garbage, and long to look through
    try:
        train_step.main()
    finally:
        gc.unfreeze()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ratio ours / peft")]
    assert len(lines) == 2
    for line in lines:
        words = line.split()
        # half of a LoRA's numbers; SDXL's layers that read the text and the gated ones are not square
        assert 0.3 < float(words[words.index("trained") + 1]) < 0.7
        assert 0 < float(words[words.index("time") + 1]) < 5


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of another process is read as Linux has it")
def test_memory_of_a_family():
    done = run("memory", "z_image", "--heads", "1", "--pixels", "128", "--checkpointing", "true")
    assert done.returncode in (0, 1), done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("z_image")]
    assert 0.5 < float(line.split()[-1]) < 2
