"""Files that change while they are open: overwritten in place, shorter or of equal size, replaced, removed.

In a process of its own: what used to happen was a bus error, which ends the process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys, time
from pathlib import Path
import qrlora_core as core
from qrlora_core.basis import open_basis
from tests.hostile import readers
from train.errors import TrainError
from train.model.source import BaseModel
from train.run import checkpoint

kind, change, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
good = {reader.name: reader for reader in readers.readers(folder)}
path = folder / "open.safetensors"
content = good[kind].samples[0]
path.write_bytes(content)
old = time.time() - 100
os.utime(path, (old, old))

if kind == "adapter":
    opened = core.open_adapter(path)
    names, read = list(opened.layers), opened.layer
elif kind == "residual":
    opened = core.Residual(path)
    names, read = list(opened.layers), opened.weight
elif kind == "basis":
    opened, _ = open_basis(path)
    names, read = list(opened), lambda name: opened[name]()
elif kind == "training cache":
    opened = core.TrainingCache(path)
    names, read = [0, 1], opened.latent
elif kind == "checkpoint":
    run = folder / "cp"
    place = run / "checkpoints" / "step-00000004.safetensors"
    place.parent.mkdir(parents=True)
    path.replace(place)
    path = place
    opened = checkpoint.newest_checkpoint(run)
    names, read = ["param.", "optimizer."], opened.tensors
else:
    opened = BaseModel(path)
    names, read = [target.name for target in opened.targets()], opened.weight

before = read(names[0])
if change == "shorter":
    with path.open("r+b") as file:  # as `cp` does
        file.truncate(len(content) // 4)
elif change == "equal size":
    with path.open("r+b") as file:
        file.seek(len(content) // 2)
        file.write(bytes(len(content) - len(content) // 2))
elif change == "renamed over":
    other = folder / "other"
    other.write_bytes(bytes(len(content)))
    other.replace(path)
else:
    path.unlink()
try:
    read(names[1])
    outcome = "read"
except (core.QRLoRAError, TrainError) as error:
    assert path.name in str(error), error
    outcome = "refused"
if kind == "adapter":
    again = read(names[0])
    assert again is before, "what was read is kept"
print(outcome)
"""
KINDS = ("adapter", "residual", "basis", "training cache", "checkpoint", "base model")
CHANGES = ("shorter", "equal size", "renamed over", "removed")


@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_changes_while_it_is_open_is_told_and_ends_nothing(tmp_path, kind):
    processes = {}
    for change in CHANGES:
        folder = tmp_path / change
        folder.mkdir()
        command = [sys.executable, "-c", PROGRAM, kind, change, str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment}
        processes[change] = subprocess.Popen(command, **options)
    for change, process in processes.items():
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, f"{change}: ended with {process.returncode}\n{errors[-2000:]}"
        assert output.strip() == "refused", change
