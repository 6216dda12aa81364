"""A finished adapter under its name: checksums, and files that never take the place of another."""

import hashlib
import os
import shutil
import uuid
from pathlib import Path

from ...qrlora_core import PathError, free_name

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

    A hard link where the disk has them: no second copy. Otherwise a copy under a temporary name first.

    Raises:
        PathError: the name is refused, or the folder cannot be written.
    """
    temporary = None
    try:
        while True:
            target = free_name(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
                return target
            except FileExistsError:
                continue  # another ComfyUI was faster
            except OSError:  # no hard links here
                pass
            if temporary is None:
                temporary = folder / f".qrlora-{uuid.uuid4().hex}.tmp"
                shutil.copyfile(source, temporary)
            try:
                with target.open("xb"):  # takes the name; empty for a moment
                    pass
            except FileExistsError:
                continue
            temporary.replace(target)
            return target
    except OSError as error:
        raise PathError(f"{name} cannot be written in {folder.name}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
