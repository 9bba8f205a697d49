"""`syncpoint log backup`: a consistent copy of a log's file, beside the processes that use it.

All pages are read in one read transaction, which holds up no writer. While it lasts the write-ahead
log cannot be emptied, and a process that opens the log waits for it, up to SQLite's timeout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw

from coordinator.errors import ConfigurationError, LogUnavailable
from coordinator.log.sqlite.copying import (
    BESIDE,
    Contents,
    Progress,
    contents,
    copy,
    damage,
    locked,
    temporary_beside,
    told,
)
from coordinator.log.sqlite.file import (
    BUSY_TIMEOUT_MS,
    close_without_checkpoint,
    damaged,
    explained,
    make_durable,
)


def back_up(path: Path, target: Path, *, force: bool, progress: Progress) -> Contents:
    """Copy the log at `path` to `target`, which appears whole and synced, or not at all.

    An existing file is replaced only with `force`. Raises `ConfigurationError` naming the file and
    the fix, and `LogUnavailable`; then, as after any exception of `progress`, nothing is left.
    """
    if not path.exists():
        raise ConfigurationError(f"there is no decision log at {path}: there is nothing to back up")
    _check_target(path, target, force)
    with temporary_beside(target) as temporary:
        with _reading(path) as source, told(str(target)):
            copy(source, temporary, progress)
        found = _checked(temporary, path)
        with told(str(target)):
            make_durable(temporary)
            if force:
                os.replace(temporary, target)
            else:
                os.link(temporary, target)  # unlike a rename it never replaces a file
            make_durable(target.parent)
    return found


def _check_target(path: Path, target: Path, force: bool) -> None:
    if not target.parent.is_dir():
        raise ConfigurationError(f"{target}: there is no directory {target.parent}; create it")
    if target.is_dir():
        raise ConfigurationError(f"{target} is a directory: add a file's name to it")
    own = {f"{path}{end}" for end in ("", ".lock", ".members", *BESIDE)}
    if os.path.realpath(target) in own:
        raise ConfigurationError(f"{target} belongs to the log itself: name another file")
    if target.exists() and not force:
        raise ConfigurationError(f"{target} exists: name another file, or replace it with --force")


@contextmanager
def _reading(path: Path) -> Iterator[apsw.Connection]:
    """The log as it stands at this moment, whatever is written meanwhile."""
    connection: apsw.Connection | None = None
    try:
        # The first and the last to have a file open write to it: they need the lock for that.
        with locked(path):
            connection = apsw.Connection(os.fspath(path), flags=apsw.SQLITE_OPEN_READWRITE)
            connection.set_busy_timeout(BUSY_TIMEOUT_MS)
            connection.execute("BEGIN")
            contents(connection, path)
        yield connection
    except apsw.Error as error:
        number = 0 if connection is None else connection.system_errno
        raise explained(error, number, path) from error
    finally:
        if connection is not None:
            _close(connection, path)


def _close(connection: apsw.Connection, path: Path) -> None:
    try:
        with locked(path):
            connection.close()
    except (LogUnavailable, apsw.Error):
        close_without_checkpoint(connection)


def _checked(copied: Path, path: Path) -> Contents:
    connection = apsw.Connection(os.fspath(copied), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        found = damage(connection)
        if found:
            raise damaged(path, found)
        return contents(connection, path)
    finally:
        connection.close(True)
