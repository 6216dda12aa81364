"""How the trainer fails: one exception whose reason a host can act on and whose message says what to do."""

from qrlora_core import QRLoRAError


class TrainError(QRLoRAError):
    """The run cannot start or go on.

    Attributes:
        reason: one of `train.events.REASONS`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
