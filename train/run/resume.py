"""Going on where an earlier start of a run ended: which checkpoint, whether it belongs to this run, and its state."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qrlora_core import LayerTarget

from ..config import FitConfig, Storage
from ..errors import TrainError
from ..model.basis import BasisOf
from ..model.transformer import BITS
from ..settings import AUTO
from .checkpoint import BASIS, OPTIMIZER, PARAMETER, Checkpoint, basis_sketch, newest_checkpoint
from .optim import restore_optimizer

# A basis that is computed again differs by rounding; another one by as much as its own length
SAME_SKETCH = 1e-2


def storage_begun_with(run_dir: Path, config: FitConfig) -> Storage | None:
    """How an earlier start of this run held the base, where that is left to the trainer: it decides the trajectory."""
    newest = newest_checkpoint(run_dir) if config.base_storage == AUTO and config.resume != "never" else None
    held = newest.state["identity"].get("base_storage") if newest is not None else None
    return held if held in BITS else None


def checkpoint_to_resume(
    config: FitConfig, identity: dict[str, Any], parameters: Mapping[str, tuple[int, ...]]
) -> Checkpoint | None:
    """The checkpoint to go on from, once it is sure that it belongs to these settings, model and data."""
    run_dir = Path(config.run_dir)
    # of other settings every tensor has other shapes; that is a mistake of the user and no damage
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is not None and not _different(checkpoint, identity):
        checkpoint = newest_checkpoint(run_dir, parameters)
    if checkpoint is None:
        if config.resume == "require":
            raise TrainError("resume", "there is no checkpoint in run_dir to resume from")
        return None
    if config.resume == "never":
        raise TrainError("resume", "run_dir holds checkpoints of an earlier run; resume it, or choose another folder")
    then, different = checkpoint.state["identity"], _different(checkpoint, identity)
    if "base" in different:
        raise TrainError("resume", f"this run began with another base model ({then['base']}, now {identity['base']})")
    if "data" in different:
        raise TrainError("resume", "this run began with other pictures or captions; use another run_dir")
    if different:
        changes = ", ".join(f"{key} {then.get(key)!r} -> {identity.get(key)!r}" for key in different)
        raise TrainError("resume", f"this run began with other settings: {changes}. Use another run_dir")
    if checkpoint.step > config.steps:
        raise TrainError("resume", f"the run has {checkpoint.step} steps already; steps is {config.steps}")
    return checkpoint


def require_same_basis(checkpoint: Checkpoint | None, targets: Sequence[LayerTarget], basis_of: BasisOf) -> None:
    """Whether the basis is the one that a checkpoint's tensors were trained on.

    Raises:
        TrainError: reason "resume": a dR means nothing on another Q.
    """
    sketches = checkpoint.tensors(BASIS) if checkpoint is not None else {}
    for target in targets if sketches else ():
        then, now = sketches.get(target.name), basis_sketch(basis_of(target.name).q)
        if then is None or float((then - now).norm()) > SAME_SKETCH * float(now.norm()):
            raise TrainError(
                "resume",
                f"this run began on another basis of {target.name}: put the file back into the folder of bases, or use "
                "another run_dir",
            )


def restore_checkpoint(
    checkpoint: Checkpoint | None, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> int:
    """Put a checkpoint's tensors in place; how many steps it has."""
    if checkpoint is None:
        return 0
    held = checkpoint.tensors(PARAMETER)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(held[name])
    restore_optimizer(optimizer, checkpoint.tensors(OPTIMIZER), checkpoint.state["optimizer"])
    return checkpoint.step


def _different(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> list[str]:
    """In what a checkpoint's run differs from this one."""
    then = checkpoint.state["identity"]
    keys = dict.fromkeys([*identity, *then])
    return [key for key in keys if json.dumps(then.get(key)) != json.dumps(identity.get(key))]
