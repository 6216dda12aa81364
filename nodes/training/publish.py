"""A finished adapter under its name: checksums, and files that never take the place of another."""

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

from ...qrlora_core import NameTakenError, free_name, whole_file

_BLOCK = 1 << 20
_KEPT_CHECKSUMS = 256

# (disk, number on the disk, size, time) -> SHA-256: a file and its hard links are read once
_checksums: dict[tuple[int, int, int, int], str] = {}


def checksum(path: Path) -> str:
    """The file's SHA-256 in hex, computed once for each version of the file."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if version not in _checksums:
            digest = hashlib.sha256()
            while block := file.read(_BLOCK):
                digest.update(block)
            while len(_checksums) >= _KEPT_CHECKSUMS:
                del _checksums[next(iter(_checksums))]
            _checksums[version] = digest.hexdigest()
    return _checksums[version]


def publish(source: Path, folder: Path, name: str) -> Path:
    """Give a finished adapter its name in `folder`; a name that is taken gets a number, nothing is overwritten.

    A hard link where the disk has them: no second copy.

    Raises:
        PathError: the name is refused, or the folder cannot be written.
    """
    while True:
        target = free_name(folder, name)
        with suppress(NameTakenError):  # another ComfyUI was faster
            _link_or_copy(source, target)
            return target


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
    except FileExistsError as error:
        raise NameTakenError(f"{target.name} exists already") from error
    except OSError:  # no hard links here
        with whole_file(target) as copy, source.open("rb") as file:
            shutil.copyfileobj(file, copy, _BLOCK)
