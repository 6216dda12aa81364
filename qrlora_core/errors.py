"""The one family of exceptions: each message says what was found, what was expected and what to do."""

_LONGEST = 6000  # characters of a message: a hostile file has names of megabytes


class QRLoRAError(Exception):
    """Base of every error this pack raises on purpose."""

    def __init__(self, message: str = "") -> None:
        if len(message) > _LONGEST:
            half = _LONGEST // 2
            message = f"{message[:half]} [... {len(message) - 2 * half} characters ...] {message[-half:]}"
        super().__init__(message)


class WeightError(QRLoRAError):
    """A tensor cannot be used: wrong number of dimensions, not finite, or too small for the rank."""


class FileFormatError(QRLoRAError):
    """A file is not what it should be: truncated, hostile, of another kind, or with tensors that do not fit."""


class TargetError(QRLoRAError):
    """A layer name matches nothing, or a layer is missing from a model or an adapter."""


class BasisMismatchError(QRLoRAError):
    """Q, R, a residual and a weight that do not belong together were about to be combined."""


class PathError(QRLoRAError):
    """A name leaves its folder, is not a plain file, or cannot be written."""


class NameTakenError(PathError):
    """A file of this name exists, and it is not ours to replace."""


class SettingError(QRLoRAError):
    """A text or number that a person wrote cannot be used; the message shows the part at fault."""
