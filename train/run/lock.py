"""One training at a time in a run folder."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import TrainError

log = logging.getLogger(__name__)

LOCK = "train.lock"
# what a system says when its file system knows no locks: network drives, mostly
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def held_run_folder(run_dir: Path) -> Iterator[None]:
    """Keep every other training out of a run folder; the system lets go of it when this process ends, however.

    Raises:
        TrainError: reason "settings": another process trains there.
        OSError: the folder cannot be made or written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise TrainError(
                    "settings", f"another training runs in {run_dir.name}; wait for it, or choose another run_dir"
                ) from error
            log.warning("%s lies on a drive without locks: start no second training there", run_dir.name)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
