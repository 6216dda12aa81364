"""How the trainer fails: one exception whose reason a host can act on and whose message says what to do."""

import torch

from qrlora_core import QRLoRAError

# torch.OutOfMemoryError came with 2.5; before, and for what raises the old one, there is CUDA's own
OUT_OF_MEMORY: tuple[type[Exception], ...] = tuple(
    dict.fromkeys((getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError), torch.cuda.OutOfMemoryError))
)


class TrainError(QRLoRAError):
    """The run cannot start or go on.

    Attributes:
        reason: one of `train.events.REASONS`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the system had no memory left."""
    if isinstance(error, (MemoryError, *OUT_OF_MEMORY)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
