"""The file of an SQLite log: its checks, its upgrade, and the one border for SQLite's errors.

`open_file` either returns a connection to a file that is certainly ours, sound and durable, or
raises `ConfigurationError` naming the file, what is wrong and how to mend it; a file that is not
ours is never written to. It has to be called under the lock that every writer of the file holds.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from pathlib import Path

import apsw

from coordinator.codec import pack_transaction, unpack_transaction
from coordinator.errors import ConfigurationError, one_line
from coordinator.log.base import LogIdentity
from coordinator.log.sqlite import schema
from coordinator.log.sqlite.mounts import network_file_system
from coordinator.model import LogId, id_floor

BUSY_TIMEOUT_MS = 5_000

QUICK_CHECK_BYTES_MAX = 16 * 1024 * 1024
"""A file up to this size is checked whole when it is opened, which takes a tenth of a second. A
larger one would keep other processes waiting; its damage shows when a page is read."""

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LOST_AFTER_FSYNC = frozenset({apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_DIR_FSYNC})


def check_place(path: Path) -> None:
    """Refuse a place where no log can be kept, before anything is created there."""
    directory = path.parent
    if not directory.is_dir():
        raise refuse(path, f"there is no directory {directory}", "create it, or mend the path")
    if path.is_dir():
        raise refuse(path, "it is a directory", "add the name of a file to the path")
    kind = network_file_system(path)
    if kind is not None:
        raise refuse(
            path,
            f"it is on a network file system ({kind}), where neither locks nor fsync can be relied "
            "on",
            "put it on a local disk, or use a log that is meant for several machines",
        )


def open_file(path: Path) -> tuple[apsw.Connection, LogIdentity]:
    """Open the log, creating it if there is none. To be called under the file's lock."""
    created = _create(path)
    connection: apsw.Connection | None = None
    try:
        connection = apsw.Connection(os.fspath(path), flags=apsw.SQLITE_OPEN_READWRITE)
        identity = _prepare(connection, path)
    except BaseException as error:
        number = 0
        if connection is not None:
            number = connection.system_errno
            close_without_checkpoint(connection)
        if isinstance(error, apsw.Error):
            raise explained(error, number, path) from error
        raise
    if created:
        make_durable(path.parent)
    return connection, identity


def close_without_checkpoint(connection: apsw.Connection) -> None:
    """Close a connection that must not write to the file any more. Never raises."""
    try:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.close(True)
    except apsw.Error:
        pass  # it wrote nothing, and its descriptors go with the process


def is_disk_full(error: apsw.Error, system_errno: int) -> bool:
    """Whether there was no space: then nothing was written, and later there may be space.

    A failed fsync never counts: what it lost cannot be known, whatever the reason was.
    """
    if isinstance(error, apsw.FullError):
        return True
    return (
        isinstance(error, apsw.IOError)
        and getattr(error, "extendedresult", 0) not in _LOST_AFTER_FSYNC
        and system_errno in _DISK_FULL
    )


def is_fatal(error: apsw.Error, system_errno: int) -> bool:
    """Whether nothing that this process reads from the file can be believed any more."""
    if isinstance(error, apsw.CorruptError | apsw.NotADBError):
        return True
    return isinstance(error, apsw.IOError) and not is_disk_full(error, system_errno)


def _create(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return False
    except OSError as error:
        raise refuse(
            path, f"it cannot be created: {error.strerror}", "mend that, or choose another path"
        ) from error
    # No connection of this process has the new file open, so closing drops nobody's locks.
    os.close(descriptor)
    return True


def _prepare(connection: apsw.Connection, path: Path) -> LogIdentity:
    connection.set_busy_timeout(BUSY_TIMEOUT_MS)
    if connection.readonly("main"):
        raise refuse(path, "it can only be read", "give this user the right to write it")
    version = version_of(connection, path)
    if connection.pragma("journal_mode", "wal") != "wal":
        raise refuse(path, "its file system allows no write-ahead log", "put it on a local disk")
    # fullfsync is for macOS, whose fsync does not reach the disk.
    for setting in ("synchronous = FULL", "fullfsync = ON", "trusted_schema = OFF"):
        connection.execute(f"PRAGMA {setting}")
    # Checkpoints are made by the writer, which must see their errors: SQLite's own ignores them.
    connection.wal_autocheckpoint(0)
    if version == 0:
        upgrade(connection, path)
    _checkpoint_whole(connection, path)
    if path.stat().st_size <= QUICK_CHECK_BYTES_MAX:
        found = connection.pragma("quick_check", 1)
        if found != "ok":
            raise damaged(path, str(found))
    if 0 < version < schema.VERSION:
        upgrade(connection, path)
    return identity_of(connection, path)


def identity_of(connection: apsw.Connection, path: Path) -> LogIdentity:
    """Raises `ConfigurationError` when the one row that everything else rests on is damaged."""
    row = connection.execute("SELECT id, created_ms, horizon FROM log").get
    if row is None:
        raise damaged(path, "the row that holds the log's id is missing")
    identity, created_ms, horizon = row
    try:
        unpack_transaction(horizon)
    except (TypeError, ValueError) as error:
        raise damaged(path, f"its horizon cannot be read: {error}") from error
    return LogIdentity(LogId(identity), created_ms)


def version_of(connection: apsw.Connection, path: Path) -> int:
    """The version of the file's tables, 0 if it is empty; raises if it is no log that we can read.

    Nothing is written: what is not ours stays as it is.
    """
    application = connection.pragma("application_id")
    version: int = connection.pragma("user_version")
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").get
    if application == version == tables == 0:
        return 0
    if application != schema.APPLICATION_ID:
        raise refuse(
            path, "it is the SQLite database of another application", "choose another path"
        )
    if version > schema.VERSION:
        raise refuse(
            path,
            f"its tables have version {version}, made by a newer version of Syncpoint, and this "
            f"one reads up to version {schema.VERSION}",
            "upgrade Syncpoint here as well",
        )
    if version < 1:
        raise damaged(path, f"its tables have version {version}, which never existed")
    if not connection.table_exists("main", "attempt"):
        raise refuse(
            path, "it was made before the first release, with other tables", "choose another path"
        )
    return version


def upgrade(connection: apsw.Connection, path: Path) -> None:
    """Bring the tables to the present version, in one transaction: all of it or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = version_of(connection, path)
        for step in schema.STEPS[version:]:
            connection.execute(step)
        if version == 0:
            created_ms = time.time_ns() // 1_000_000
            connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
            connection.execute(
                "INSERT INTO log VALUES (1, ?, ?, ?)",
                (secrets.token_hex(8), created_ms, pack_transaction(id_floor(created_ms))),
            )
        connection.execute(f"PRAGMA user_version = {schema.VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _checkpoint_whole(connection: apsw.Connection, path: Path) -> None:
    """After a failed fsync a frame of the write-ahead log may be in memory only and still be read.

    So nothing is believed before all frames have been copied and fsynced into the main file. Other
    processes of ours keep out, as this runs under the file's lock. A stranger's open read makes
    SQLite answer busy: that is accepted if all frames were copied nevertheless, since the read then
    prevented only the truncation.
    """
    try:
        connection.wal_checkpoint("main", apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except apsw.BusyError as error:
        frames, copied = connection.wal_checkpoint("main", apsw.SQLITE_CHECKPOINT_PASSIVE)
        if frames != copied:
            raise refuse(
                path,
                "another program keeps a read of it open, so that it cannot be checked",
                "end that program (a shell, a backup) and try again",
            ) from error


def make_durable(path: Path) -> None:
    """What a file holds, or the names in a directory, survive a power cut from here on."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explained(error: apsw.Error, system_errno: int, path: Path) -> ConfigurationError:
    """What to tell when the file at `path` cannot be used because of an error of SQLite's."""
    if is_disk_full(error, system_errno):
        return refuse(path, "its disk is full", "make space")
    if isinstance(error, apsw.NotADBError):
        return refuse(
            path,
            "it is not an SQLite database",
            "choose another path, or restore a backup if this was one: `syncpoint log restore FILE "
            "--force`",
        )
    if isinstance(error, apsw.CorruptError):
        return damaged(path, str(error))
    if isinstance(error, apsw.ReadOnlyError | apsw.CantOpenError | apsw.PermissionsError):
        reason = f" ({os.strerror(system_errno)})" if system_errno else ""
        return refuse(
            path,
            f"it cannot be opened for writing{reason}",
            "give this user the right to write the file and its directory, where SQLite keeps "
            "two files beside it",
        )
    if isinstance(error, apsw.BusyError):
        return refuse(path, "another program holds a lock on it", "end that program and try again")
    return refuse(path, f"SQLite says: {error}", "check its disk, or restore it from a backup")


def damaged(path: Path, how: str) -> ConfigurationError:
    """What to tell of a log whose file contradicts itself, with the way out."""
    return refuse(
        path,
        f"it is damaged: {one_line(how)}",
        "end all its processes, and restore a backup: `syncpoint log restore FILE --force` keeps "
        "this file under another name",
    )


def refuse(path: Path, wrong: str, mend: str) -> ConfigurationError:
    """The one line of everything that this package refuses."""
    return ConfigurationError(f"the decision log {path} cannot be used: {wrong}; {mend}")
