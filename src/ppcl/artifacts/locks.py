"""Locks that one process at a time holds, also across machines that share a disk. Importing this loads no torch."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ppcl.errors import UsageError


@contextmanager
def locked(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Hold the lock file `path` within the context. The system releases it when a process dies.

    Raises `UsageError` if another process holds it: the sentence begins with `what`, says which process that is, and
    ends with `remedy`. On file systems without locks nothing is refused.
    """
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UsageError(f"{what} by {holder}: {remedy}.") from None
        except OSError:
            break
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except FileNotFoundError:  # its last holder has deleted it since it was opened
            pass
        file.close()
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        if is_new:
            with suppress(OSError):  # something has been written there
                path.parent.rmdir()
