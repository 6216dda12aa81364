"""Block strengths that people saved: small JSON files in `blocks/` of the folders of adapters."""

from pathlib import Path

import folder_paths

from ...qrlora_core import LARGEST_FILE, FileFormatError, PathError, contained_path, free_name, whole_file
from . import folders

FOLDER = "blocks"
ENDING = ".json"
_MOST_SHOWN = 500


def block_names() -> list[str]:
    """Names for a drop-down, without the ending."""
    names = []
    for root in _roots():
        for path in sorted(root.rglob(f"*{ENDING}"))[:_MOST_SHOWN] if root.is_dir() else ():
            names.append(path.relative_to(root).as_posix().removesuffix(ENDING))
    return list(dict.fromkeys(names))


def block_path(name: str) -> Path:
    """The file that a workflow names.

    Raises:
        PathError: the name leaves the folder, or no such file is there.
    """
    for root in _roots():
        path = contained_path(root, name + ENDING)
        if path.is_file():
            return path
    raise PathError(f"{name!r} is not in models/{folders.FOLDER}/{FOLDER}; save it there and refresh (R)")


def read_blocks(name: str) -> str:
    """The text of such a file.

    Raises:
        PathError: see `block_path`.
        FileFormatError: it is no text, or far too large.
    """
    path = block_path(name)
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise FileFormatError(f"{path.name} is larger than block strengths are ({LARGEST_FILE} bytes)")
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path.name} is not a text") from error
    except OSError as error:
        raise PathError(f"{path.name} cannot be read: {error.strerror or error}") from error


def write_blocks(name: str, text: str) -> tuple[str, bool]:
    """Save a text under a name; the name that it got, and whether it is new there.

    A name that is taken gets a number, unless the very same text is there.

    Raises:
        PathError: the name is refused, or the folder cannot be written.
    """
    root = _roots()[0]
    name = name.strip().replace("\\", "/").removesuffix(ENDING)
    path = contained_path(root, name + ENDING)
    if path.is_file() and read_blocks(name) == text:
        return name, False
    path = free_name(root, name, ENDING)
    with whole_file(path) as file:
        file.write(text.encode())
    return path.relative_to(root.resolve()).as_posix().removesuffix(ENDING), True


def _roots() -> list[Path]:
    return [Path(folder) / FOLDER for folder in folder_paths.get_folder_paths(folders.FOLDER)]
