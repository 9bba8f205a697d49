"""Copies of a log's file: made page by page, checked, and whole under their name or not there.

Only SQLite reads a log, also to copy it. A copy by other means misses what is in the write-ahead
log, and when it closes the file the process loses SQLite's locks on it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import msgspec

from coordinator.codec import unpack_transaction
from coordinator.errors import ConfigurationError
from coordinator.log.sqlite import schema
from coordinator.log.sqlite.file import identity_of, is_disk_full, version_of
from coordinator.log.sqlite.lock import FileLock
from coordinator.model import LogId, id_time_ms

LOCK_TIMEOUT_SECONDS = 5.0
PAGES_AT_ONCE = 1_000

Progress = Callable[[int, int], None]
"""Told how many pages of how many are copied."""

BESIDE = ("-wal", "-journal", "-shm")
"""How the names of the files end that SQLite keeps beside a file in use."""


class Contents(msgspec.Struct, frozen=True):
    """What is in a log's file.

    `unfinished` counts the records whose branches have not all ended, `newest_ms` is the time in
    the latest id that it knows of.
    """

    log: LogId
    version: int
    records: int
    unfinished: int
    newest_ms: int


def contents(connection: apsw.Connection, path: Path) -> Contents:
    """Raises `ConfigurationError`, naming `path`, for what is no log that this program reads."""
    version = version_of(connection, path)
    if version == 0:
        raise ConfigurationError(f"{path} is empty and holds no decision log: name another file")
    identity = identity_of(connection, path)
    records, unfinished, newest = connection.execute(
        "SELECT count(*), ifnull(sum(unfinished), 0), max(ifnull(max(id), x''), "
        "(SELECT horizon FROM log)) FROM record"
    ).get
    newest_ms = max(identity.created_ms, id_time_ms(unpack_transaction(newest)))
    return Contents(identity.id, version, records, unfinished, newest_ms)


def is_foreign(connection: apsw.Connection) -> bool:
    """Whether the file is a database of another program."""
    if connection.pragma("application_id") == schema.APPLICATION_ID:
        return False
    return bool(connection.execute("SELECT count(*) FROM sqlite_schema").get)


@contextmanager
def locked(path: Path) -> Iterator[FileLock]:
    """The lock of the log at `path`, which keeps every process of ours from opening or writing it.

    Raises `LogUnavailable` when another process keeps it for too long.
    """
    with told(f"the lock {path}.lock"):
        lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(LOCK_TIMEOUT_SECONDS)
        yield lock
    finally:
        lock.close()


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A new file for its owner alone, to be renamed to `path`; gone at the end if it was not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with told(str(path)):
        os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        yield temporary
    finally:
        remove(temporary, "", *BESIDE)


def copy(source: apsw.Connection, target: Path, progress: Progress) -> None:
    """Copy all pages as one read of `source` sees them. The copy is one file, without a journal.

    Raises `apsw.Error` for what is wrong with the source, `OSError` for a disk that is full. An
    exception of `progress` ends it.
    """
    connection = apsw.Connection(os.fspath(target), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        # Whoever made the file removes it after any error, and syncs it at the end.
        for setting in ("journal_mode = OFF", "synchronous = OFF"):
            connection.execute(f"PRAGMA {setting}")
        with connection.backup("main", source, "main") as backup:
            while not backup.step(PAGES_AT_ONCE):
                progress(backup.page_count - backup.remaining, backup.page_count)
        connection.pragma("journal_mode", "delete")
    except apsw.Error as error:
        if is_disk_full(error, connection.system_errno):
            raise OSError(0, "its disk is full") from error
        raise
    finally:
        connection.close(True)


def damage(connection: apsw.Connection) -> str:
    """How pages, tables and indexes contradict each other; empty if they do not."""
    found = connection.pragma("integrity_check", 1)
    return "" if found == "ok" else str(found)


def remove(path: Path, *ends: str) -> None:
    """Remove the files whose names are that of `path` and one of the ends, as far as there are."""
    for end in ends:
        path.with_name(path.name + end).unlink(missing_ok=True)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn an `OSError` into a `ConfigurationError` about `what`."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"{what} cannot be written: {error.strerror or error}; mend that, or choose another "
            "place"
        ) from error
