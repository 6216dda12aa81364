"""Checkpoints: everything a run needs to go on exactly, in one safetensors file that appears whole or not at all.

| key | |
|---|---|
| `param.<name>` | trained tensors |
| `optimizer.<number>.<name>` | the optimizer's tensors |

The header's `qrlora.checkpoint` is JSON: version, step, the settings that decide the trajectory, fingerprints of base
model and data, the optimizer's plain values, the loss scale, the smoothed loss. There is no state of random numbers to
keep: every draw is a function of the seed and of its number.
"""

import errno
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import TrainError

log = logging.getLogger(__name__)

CHECKPOINT_VERSION = 1
NO_ROOM = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quota error of its own
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_TEMPORARY = ".qrlora-{}.tmp"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """State of a run after `step` steps; `state` is the JSON part, tensors are read when asked for."""

    path: Path
    step: int
    state: Mapping[str, Any]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose keys begin with `prefix`, without it."""
        with safe_open(str(self.path), framework="pt", device="cpu") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 - not a mapping
            return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}


def save_checkpoint(
    run_dir: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int
) -> Path:
    """Write a checkpoint, flushed to disk, and then remove all but the newest `keep`.

    Raises:
        TrainError: reason "disk" when there is no room; older checkpoints are untouched.
        OSError: the disk fails in another way.
    """
    folder = Path(run_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08}.safetensors"
    temporary = folder / _TEMPORARY.format(uuid.uuid4().hex)
    header = json.dumps({"version": CHECKPOINT_VERSION, "step": step, **state})
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    try:
        free = shutil.disk_usage(folder).free
        if free < size:
            raise TrainError("disk", f"a checkpoint needs {size / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free")
        held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(held, temporary, metadata={"qrlora.format": "checkpoint", "qrlora.checkpoint": header})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        _read(temporary)
        temporary.replace(path)
    except (SafetensorError, OSError) as error:
        if isinstance(error, SafetensorError) or error.errno in NO_ROOM:
            raise TrainError("disk", f"the checkpoint cannot be written: {error}. Free some room and resume") from error
        raise
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    for _, old in _found(folder)[:-keep]:
        old.unlink()
    return path


def newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read; damaged ones are passed over with a warning."""
    folder = Path(run_dir) / FOLDER
    for _, path in reversed(_found(folder)):
        try:
            return _read(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            log.warning("%s cannot be read (%s); an older checkpoint is used", path.name, error)
    return None


def remove_leftovers(run_dir: Path) -> None:
    """Delete what a killed process left half-written in a run folder."""
    for folder in (Path(run_dir), Path(run_dir) / FOLDER):
        for path in folder.glob(_TEMPORARY.format("*")):
            path.unlink(missing_ok=True)


def _read(path: Path) -> Checkpoint:
    with safe_open(str(path), framework="pt", device="cpu") as file:  # also checks that the file has its full length
        state = json.loads(file.metadata()["qrlora.checkpoint"])
    if state["version"] != CHECKPOINT_VERSION:
        raise ValueError(f"version {state['version']}, expected {CHECKPOINT_VERSION}")
    return Checkpoint(path, int(state["step"]), state)


def _found(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint, oldest first."""
    matches = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("step-*.safetensors"))
    return sorted((int(match[1]), path) for path, match in matches if match)
