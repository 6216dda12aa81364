"""Files that appear whole or not at all."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import NameTakenError, PathError

TEMPORARY = ".qrlora-{}.tmp"  # what a killed process may leave


@contextmanager
def whole_file(
    path: Path, *, overwrite: bool = False, check: Callable[[Path], None] | None = None
) -> Iterator[BinaryIO]:
    """A file to write into, which takes its name when the block has ended without an exception.

    Until then it lies under a temporary name in the same folder. Whatever ends the block early (an error, a cancel, a
    full disk) leaves nothing behind, and what stood there before stays.

    Args:
        path: final name; parent folders are made.
        overwrite: replace an existing file.
        check: called with the temporary file, flushed to disk, before it takes its name; what it raises ends the
            writing.

    Raises:
        NameTakenError: the name is taken and `overwrite` is False.
        PathError: the folder cannot be written, or the disk refuses (also for an OSError of the block's own).
    """
    path = Path(path)
    temporary = path.with_name(TEMPORARY.format(uuid.uuid4().hex))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_free_name(path, overwrite)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        _name(temporary, path, overwrite)
    except OSError as error:
        raise PathError(f"{path.name} cannot be written in {path.parent.name}: {error.strerror or error}") from error
    finally:  # cancelling may arrive as a BaseException
        with suppress(OSError):
            temporary.unlink()


def require_free_name(path: Path, overwrite: bool = False) -> None:
    """Whether `path` may be written.

    Raises:
        NameTakenError: it exists.
        PathError: it may be replaced, but is a folder.
    """
    if overwrite and path.is_dir():
        raise PathError(f"{path.name} cannot be written in {path.parent.name}: it is a folder")
    if path.exists() and not overwrite:
        raise NameTakenError(f"{path.name} exists already; choose another name")


def _name(temporary: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)  # unlike a rename, fails when somebody else took the name meanwhile
    except FileExistsError as error:  # also a link that leads nowhere, which `exists` does not see
        raise NameTakenError(f"{path.name} exists already; choose another name") from error
    except OSError:  # a file system without hard links: an empty file takes the name first
        try:
            path.open("xb").close()
        except FileExistsError as error:
            raise NameTakenError(f"{path.name} exists already; choose another name") from error
        try:
            temporary.replace(path)
        except OSError:
            path.unlink(missing_ok=True)
            raise
