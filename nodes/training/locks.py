"""A lock on an open file that the system lets go of when its holder dies."""

import errno
import os
from typing import Literal

_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}


def try_lock(descriptor: int) -> Literal["held", "busy", "unsupported"]:
    """Take an exclusive lock without waiting.

    Returns:
        "held"; "busy" when another process has it; "unsupported" where the disk has no locks (ENOLCK, EOPNOTSUPP,
        ENOSYS: some network drives and folders shared with a virtual machine).
    """
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return "busy" if error.errno in _TAKEN else "unsupported"
    return "held"
