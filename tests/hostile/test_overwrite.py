"""Files that change while they are open: overwritten in place, shorter or of equal size, replaced, removed.

In a process of its own: what used to happen was a bus error, which ends the process.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("adapter", "residual", "basis", "training cache", "checkpoint", "base model")
CHANGES = ("shorter", "equal size", "renamed over", "removed")


def main(folder):
    """Every kind through every change; prints what came of each as a line of JSON."""
    from tests.hostile import readers

    samples = {reader.name: reader.samples[0] for reader in readers.readers(folder)}
    for kind in KINDS:
        for change in CHANGES:
            print(json.dumps([kind, change, one(kind, change, samples[kind], folder / kind / change)]), flush=True)


def one(kind, change, content, folder):
    """What reading says after a change: "refused" by an error that names the file, or "read"."""
    import qrlora_core as core
    from train.errors import TrainError

    folder.mkdir(parents=True)
    path = folder / ("checkpoints/step-00000004.safetensors" if kind == "checkpoint" else "open.safetensors")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    old = time.time() - 100
    os.utime(path, (old, old))
    names, read = opened(kind, path)
    before = read(names[0])
    changed(path, change, len(content))
    try:
        read(names[1])
    except (core.QRLoRAError, TrainError) as error:
        assert path.name in str(error), error
        if kind == "adapter":
            assert read(names[0]) is before, "what was read is kept"
        return "refused"
    return "read"


def opened(kind, path):
    """Two things that a file holds, and what reads them."""
    import qrlora_core as core
    from qrlora_core.basis import open_basis
    from train.model.source import BaseModel
    from train.run import checkpoint

    if kind == "adapter":
        found = core.open_adapter(path)
        return list(found.layers), found.layer
    if kind == "residual":
        found = core.Residual(path)
        return list(found.layers), found.weight
    if kind == "basis":
        found, _ = open_basis(path)
        return list(found), lambda name: found[name]()
    if kind == "training cache":
        return [0, 1], core.TrainingCache(path).latent
    if kind == "checkpoint":
        return ["param.", "optimizer."], checkpoint.newest_checkpoint(path.parents[1]).tensors
    found = BaseModel(path)
    return [target.name for target in found.targets()], found.weight


def changed(path, change, size):
    if change == "shorter":
        with path.open("r+b") as file:  # as `cp` does
            file.truncate(size // 4)
    elif change == "equal size":
        with path.open("r+b") as file:
            file.seek(size // 2)
            file.write(bytes(size - size // 2))
    elif change == "renamed over":
        other = path.with_name("other")
        other.write_bytes(bytes(size))
        other.replace(path)
    else:
        path.unlink()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(kind, change) -> what came of it, as far as the process got."""
    command = [sys.executable, "-m", "tests.hostile.test_overwrite", str(tmp_path_factory.mktemp("open"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    found = {(kind, change): outcome for kind, change, outcome in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, f"after {list(found)[-1:]} the process ended: {done.returncode}\n{done.stderr[-2000:]}"
    return found


@pytest.mark.process
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_changes_while_it_is_open_is_told_and_ends_nothing(outcomes, kind, change):
    assert outcomes[kind, change] == "refused"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
