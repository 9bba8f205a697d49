"""The lock beside the file of a log, which its processes take in turn.

SQLite's own locks are POSIX locks: they vanish when any code of the process opens and closes a
file of the database, and two processes could then both win. A `flock` belongs to its descriptor,
survives that, and is freed by the kernel when its process dies. It is held for one transaction.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from coordinator.errors import LogUnavailable

_FIRST_PAUSE_SECONDS = 0.0001
_LONGEST_PAUSE_SECONDS = 0.001


class FileLock:
    """An exclusive lock between processes, and between connections of one process."""

    def __init__(self, path: Path) -> None:
        """Opens the file, creating it if needed; it is never removed. Raises `OSError`."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def acquire(self, timeout_seconds: float) -> None:
        """Wait for the lock; raises `LogUnavailable` when another process keeps it for so long.

        The kernel's own wait has no limit, and a process that is stopped, not dead, would make all
        others wait for ever.
        """
        pause = _FIRST_PAUSE_SECONDS
        deadline = 0.0
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                now = time.monotonic()
                deadline = deadline or now + timeout_seconds
                if now >= deadline:
                    raise LogUnavailable(
                        f"another process has held {self.path} for {timeout_seconds} s: it may be "
                        "stopped or its disk may hang"
                    ) from None
                time.sleep(pause)
                pause = min(pause * 1.5, _LONGEST_PAUSE_SECONDS)
            except OSError as error:
                raise LogUnavailable(f"{self.path} cannot be locked: {error}") from error
            else:
                return

    def release(self) -> None:
        """Let the next one have it."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def is_in_place(self) -> bool:
        """Whether others that open the same path still get the same lock."""
        return same_file(self.path, os.fstat(self._descriptor))

    def close(self) -> None:
        """Close the descriptor, which frees the lock unless a forked process has it as well."""
        os.close(self._descriptor)


def same_file(path: Path, known: os.stat_result) -> bool:
    """Whether `path` still leads to the file that was looked at before."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (known.st_dev, known.st_ino)
