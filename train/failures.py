"""What a failure is called: a reason for a host to act on, and a message that says what to do."""

from pathlib import Path

from qrlora_core import FileFormatError, PathError, QRLoRAError, TargetError, WeightError

from .config import FitConfig
from .errors import TrainError, is_out_of_memory
from .run.checkpoint import NO_ROOM
from .run.estimate import out_of_memory

_REASONS = ((TargetError, "settings"), (WeightError, "model"), (FileFormatError, "model"), (PathError, "disk"))


def explained(error: Exception, config: FitConfig | None) -> tuple[str, str, bool]:
    """(reason, message, whether it is one of the foreseen) of anything that ended a run."""
    if isinstance(error, TrainError):
        return error.reason, str(error), True
    if is_out_of_memory(error):
        return ("memory", str(out_of_memory(config)) if config else f"memory ran out: {error}", True)
    if isinstance(error, QRLoRAError):
        reason = next((reason for kind, reason in _REASONS if isinstance(error, kind)), "data")
        return reason, str(error), True
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return (
            "disk",
            f"the disk is full ({error}). Free some room; the newest checkpoint is kept, resume from it",
            True,
        )
    if isinstance(error, OSError) and error.filename is not None:
        return "disk", f"{Path(str(error.filename)).name} cannot be read or written: {error.strerror or error}", True
    if isinstance(error, ImportError):
        return "library", f"a package cannot be imported: {error}", True
    return "internal", f"{type(error).__name__}: {error}", False
