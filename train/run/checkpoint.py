"""Checkpoints: everything a run needs to go on exactly, in one safetensors file that appears whole or not at all.

| key | |
|---|---|
| `param.<name>` | trained tensors |
| `optimizer.<number>.<name>` | the optimizer's tensors |
| `basis.<layer>` | a sketch of the Q that was trained on, see `basis_sketch` |

The header's `qrlora.checkpoint` is JSON: version, step, the settings that decide the trajectory, fingerprints of base
model and data, the optimizer's plain values, the loss scale, the smoothed loss. There is no state of random numbers to
keep: every draw is a function of the seed and of its number. A checksum in the header covers the whole file.
"""

import errno
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrlora_core import FileFormatError, PathError, TensorFile
from qrlora_core.storage import TensorSpec
from qrlora_core.whole import TEMPORARY
from qrlora_core.writing import verify_checksum, write_tensors

from ..errors import TrainError

log = logging.getLogger(__name__)

CHECKPOINT_VERSION = 1
NO_ROOM = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quota error of its own
FOLDER = "checkpoints"
PARAMETER, OPTIMIZER, BASIS = "param.", "optimizer.", "basis."
_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_DAMAGED = ".damaged"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """State of a run after `step` steps; `state` is the JSON part, tensors are read when asked for."""

    path: Path
    step: int
    state: Mapping[str, Any]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose keys begin with `prefix`, without it."""
        file = TensorFile(self.path, skip_other=True)  # 8-bit optimizers keep integers
        keys = [key for key in (*file.specs, *file.other) if key.startswith(prefix)]
        return {key.removeprefix(prefix): file.tensor(key) for key in keys}


def save_checkpoint(
    run_dir: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int
) -> Path:
    """Write a checkpoint, flushed to disk, and then remove all but the newest `keep`.

    Raises:
        TrainError: reason "disk": no room, or the folder cannot be written; older checkpoints are untouched.
    """
    folder = Path(run_dir) / FOLDER
    path = folder / f"step-{step:08}.safetensors"
    header = json.dumps({"version": CHECKPOINT_VERSION, "step": step, **state})
    specs = {key: TensorSpec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    metadata = {"qrlora.format": "checkpoint", "qrlora.checkpoint": header}
    try:
        write_tensors(path, specs, tensors.items(), metadata, overwrite=True, checksum=True)
    except PathError as error:
        raise TrainError("disk", f"the checkpoint cannot be written: {error}. Free some room and resume") from error
    for _, old in _numbered(folder)[:-keep]:
        old.unlink()
    return path


def newest_checkpoint(run_dir: Path, parameters: Mapping[str, tuple[int, ...]] | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are passed over with a warning.

    Args:
        run_dir: of the run.
        parameters: name -> shape of what is trained; with it every tensor is looked at, too.
    """
    for step, path in reversed(_numbered(Path(run_dir) / FOLDER)):
        try:
            checkpoint = _opened(path, step)
            if parameters is not None:
                _require_tensors(checkpoint, parameters)
            return checkpoint
        except (FileFormatError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("%s is damaged (%s); an older checkpoint is used, if there is one", path.name, error)
    return None


def set_damaged_aside(run_dir: Path, newest: Checkpoint | None) -> None:
    """Rename checkpoints that are newer than the one that is gone on from: they are damaged, and count no more."""
    for step, path in _numbered(Path(run_dir) / FOLDER):
        if newest is None or step > newest.step:
            path.replace(path.with_suffix(_DAMAGED))


def remove_leftovers(run_dir: Path) -> None:
    """Delete what a killed process left half-written in a run folder."""
    for folder in (Path(run_dir), Path(run_dir) / FOLDER):
        for path in folder.glob(TEMPORARY.format("*")):
            path.unlink(missing_ok=True)


def basis_sketch(q: Tensor) -> Tensor:
    """(rank,) numbers that tell one Q (out, rank) from another: a fixed random combination of its rows.

    Unlike a hash they stay nearly the same when a basis is computed again on another machine to other last bits.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (q.shape[0],), generator=generator).float() * 2 - 1
    return signs.to(q.device) @ q.float()


def _opened(path: Path, step: int) -> Checkpoint:
    """A checkpoint whose checksum and JSON part are right.

    Raises:
        FileFormatError, ValueError, KeyError, TypeError, RecursionError: they are not.
    """
    verify_checksum(path)
    text = TensorFile(path, skip_other=True).metadata["qrlora.checkpoint"]
    state = json.loads(text, parse_constant=_infinity)
    if state["version"] != CHECKPOINT_VERSION:
        raise ValueError(f"version {state['version']}, expected {CHECKPOINT_VERSION}")
    if state["step"] != step:
        raise ValueError(f"it says that it is of step {state['step']}")
    for key in ("identity", "optimizer", "scaler"):
        if not isinstance(state[key], dict):
            raise TypeError(f"{key} is no table")
    groups = state["optimizer"]["groups"]
    if not isinstance(state["optimizer"]["state"], dict) or not groups or not all(isinstance(g, dict) for g in groups):
        raise TypeError("the optimizer's values are no tables")
    smoothed = state["smoothed_loss"]
    if smoothed is not None and not (isinstance(smoothed, int | float) and math.isfinite(smoothed)):
        raise TypeError(f"smoothed_loss is {smoothed!r}")
    return Checkpoint(path, step, state)


def _require_tensors(checkpoint: Checkpoint, parameters: Mapping[str, tuple[int, ...]]) -> None:
    """Whether every trained tensor and the optimizer's state of it are there, in shape and finite."""
    held = checkpoint.tensors("")
    for key, tensor in held.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise ValueError(f"{key} holds NaN or Inf")
    stored = {key.removeprefix(PARAMETER): tuple(t.shape) for key, t in held.items() if key.startswith(PARAMETER)}
    if stored != dict(parameters):
        different = sorted(
            name for name in stored.keys() | parameters.keys() if stored.get(name) != parameters.get(name)
        )
        raise ValueError(f"{different[0]} is {stored.get(different[0])}, expected {parameters.get(different[0])}")
    entries: dict[str, set[str]] = {str(number): set() for number in range(len(parameters))}
    for key, tensor in held.items():
        if key.startswith(OPTIMIZER) and not key.startswith(f"{OPTIMIZER}group"):
            number, _, name = key.removeprefix(OPTIMIZER).partition(".")
            entries[number].add(name)
            shape = list(parameters.values())[int(number)]
            if name in ("exp_avg", "exp_avg_sq") and tuple(tensor.shape) != shape:
                raise ValueError(f"{key} is {tuple(tensor.shape)}, expected {shape}")
    least = min((names for names in entries.values()), key=len)
    most = max((names for names in entries.values()), key=len)
    if not least or least != most:
        raise ValueError("tensors of the optimizer are missing")


def _infinity(name: str) -> float:
    """Prodigy's limit of growth is infinite; no value that is kept is NaN."""
    if name == "NaN":
        raise ValueError("a number is NaN")
    return float(name)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint, oldest first."""
    matches = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("step-*.safetensors"))
    return sorted((int(match[1]), path) for path, match in matches if match)
