"""The device that a command computes on."""

import torch

from ..errors import TrainError


def chosen_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        TrainError: no such device.
    """
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(kind)
    try:
        return torch.zeros(1, device=torch.device(name)).device
    except (RuntimeError, AssertionError) as error:
        raise TrainError("settings", f"device {name!r} cannot be used: {error}") from error
