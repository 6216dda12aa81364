"""Names that come from somebody else's workflow, inside the folders where they belong."""

from pathlib import Path

from .errors import PathError

# Windows also takes the superscripts 1, 2 and 3 for port numbers
_PORTS = [f"{port}{n}" for port in ("COM", "LPT") for n in (*"123456789", "\u00b9", "\u00b2", "\u00b3")]
_WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *_PORTS}
_LONGEST_PART = 200  # file systems take 255 bytes; the ending, a number and a temporary name have to fit too


def free_name(folder: Path, name: str, ending: str = ".safetensors") -> Path:
    """`folder/name.safetensors`, or with `_00002`, `_00003`, ... before the ending where that is taken.

    Args:
        folder: an existing or future folder.
        name: may hold sub-folders ("styles/ink"); the ending is optional.
        ending: of the file.

    Raises:
        PathError: the name is empty, absolute, or leaves the folder.
    """
    return numbered_names(folder, name, ending)[-1]


def numbered_names(folder: Path, name: str, ending: str = ".safetensors") -> list[Path]:
    """The paths of a name that are taken, first the one without a number, and last the one that is free.

    Args, Raises: see `free_name`.
    """
    path = contained_path(folder, name.strip().removesuffix(ending) + ending)
    paths = [path]
    while paths[-1].exists() or paths[-1].is_symlink():  # a link that leads nowhere takes its name, too
        paths.append(path.with_name(f"{path.stem}_{len(paths) + 1:05}{ending}"))
    return paths


def contained_path(folder: Path, name: str) -> Path:
    """`folder/name`, where `name` comes from somebody else's workflow and must stay inside.

    Links are followed: one that leads out of the folder is refused. The folder itself may be a link.

    Raises:
        PathError: with the reason.
    """
    parts = name.replace("\\", "/").split("/")
    reason = ""
    if not name.strip() or parts[-1] in ("", ".safetensors", ".json"):
        reason = "it is empty"
    elif any(ord(char) < 32 or char in '<>:"|?*' for char in name):
        reason = 'it holds a control character or one of < > : " | ? *'
    elif parts[0] == "" or Path(name).is_absolute():
        reason = "it is absolute"
    elif any(part in ("..", ".", "") or part != part.rstrip(" .") for part in parts):
        reason = "a part of it is '..', '.', empty, or ends in a dot or a space"
    elif any(part.split(".")[0].rstrip().upper() in _WINDOWS_DEVICES for part in parts):
        reason = "a part of it is a device name on Windows"
    elif any(0xD800 <= ord(char) < 0xE000 for char in name):
        reason = "it is not valid Unicode"
    elif max(len(part.encode()) for part in parts) > _LONGEST_PART or len(name.encode()) > 4 * _LONGEST_PART:
        reason = f"it is too long (a part may have {_LONGEST_PART} bytes, the whole {4 * _LONGEST_PART})"
    else:
        root = Path(folder).resolve()
        path = root.joinpath(*parts)
        try:
            inside = path.resolve().is_relative_to(root)
        except (RuntimeError, OSError) as error:  # Python before 3.13 raises RuntimeError for links in a circle
            raise PathError(f"the file name {name!r} is refused: {error}") from error
        if not inside:
            reason = "a link leads out of the folder"
    if reason:
        raise PathError(f"the file name {name!r} is refused: {reason}. Use a name inside {Path(folder).name}/")
    return path
