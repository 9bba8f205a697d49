"""`syncpoint check` for an SQLite log: its place, rights, disk, and what is unfinished.

The file is read over a connection that cannot write it, beside the processes that use it. Nothing
is created: neither a log that is not there yet, nor the files that SQLite keeps beside one in use.
"""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import apsw
import msgspec

from coordinator.codec import unpack_transaction
from coordinator.config import Settings
from coordinator.log.sqlite import schema
from coordinator.log.sqlite.file import BUSY_TIMEOUT_MS, close_without_checkpoint
from coordinator.log.sqlite.mounts import file_system_of, network_file_system
from coordinator.model import LogId, id_time_ms
from coordinator.participant import Finding, Level, LogCheck

MEGABYTE = 1024 * 1024
FREE_MEGABYTES_MIN = 64
FREE_MEGABYTES_GOOD = 1024

_HEADER_OF_WRITE_AHEAD = b"\2\2"
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_ANOTHER_PATH = "name another path in the log's url"


def inspect(path: Path, settings: Settings) -> LogCheck:
    """What can be seen of the log at an absolute path without opening it as a log. Blocks."""
    directory = path.parent
    if not directory.is_dir():
        message = f"there is no directory {directory}"
        return LogCheck(None, [_must("place", message, f"create it, or {_ANOTHER_PATH}")])
    if path.is_dir():
        return LogCheck(None, [_must("place", f"{path} is a directory", "add a file's name to it")])
    findings = [_place(path), _rights(path), _space(directory)]
    if not path.exists():
        message = f"{path} is not there yet: the first process that opens it creates it"
        return LogCheck(None, [*findings, Finding("file", Level.OK, message)])
    log, inside = _inside(path, settings)
    return LogCheck(log, findings + inside)


def _place(path: Path) -> Finding:
    kind = network_file_system(path)
    if kind is not None:
        return _must(
            "place",
            f"{path} is on a network file system ({kind}), where neither locks nor fsync can be "
            "relied on",
            "put it on a local disk of the one machine whose processes use it",
        )
    with suppress(OSError):
        kind = file_system_of(os.path.realpath(path), Path("/proc/self/mountinfo").read_text())
    if kind in _IN_MEMORY:
        return Finding(
            "place",
            Level.NOTE,
            f"{path} is in memory ({kind}): its decisions do not survive a restart of the machine",
            "put it on a disk",
        )
    return Finding("place", Level.OK, f"{path}, on this machine" + (f" ({kind})" if kind else ""))


def _rights(path: Path) -> Finding:
    """Those of who runs the check; the service may run as somebody else."""
    user = _user_name(os.geteuid())
    beside = [path.with_name(path.name + end) for end in ("-wal", "-shm", ".lock", ".members")]
    closed = [each for each in (path, *beside) if each.exists() and not _may_write(each)]
    if not _may_write(path.parent):
        closed.append(path.parent)
    if closed:
        shown = ", ".join(str(each) for each in closed)
        return _must(
            "rights",
            f"user {user} may not write {shown}",
            "run the check as the service's user; if it is that one, give it the right to write "
            "the file, those beside it and their directory",
        )
    told = f"user {user} may write the file and its directory"
    if path.exists() and (owner := path.stat().st_uid) != os.geteuid():
        told += f"; the file belongs to {_user_name(owner)}"
    return Finding("rights", Level.OK, told)


def _space(directory: Path) -> Finding:
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize // MEGABYTE
    told = f"{free} MB are free on its disk"
    if free < FREE_MEGABYTES_MIN:
        return _must("space", f"{told}: without space nothing can commit", "make space")
    if free < FREE_MEGABYTES_GOOD:
        return Finding("space", Level.NOTE, told, "make space before it is used up")
    return Finding("space", Level.OK, told)


def _inside(path: Path, settings: Settings) -> tuple[LogId | None, list[Finding]]:
    try:
        before = _state(path)
        if not before.in_use:
            # An ordinary reader would leave a write-ahead log behind. Without one, the file is all.
            found = _look(path, settings, immutable=True)
            if _state(path) == before:
                return found
        return _look(path, settings, immutable=False)
    except apsw.NotADBError:
        return None, [_must("file", f"{path} is not an SQLite database", _ANOTHER_PATH)]
    except apsw.Error as error:
        message = f"{path} cannot be read: {error}"
        fix = "give this user the right to read and write it; else restore it from a backup"
        return None, [_must("file", message, fix)]


class _State(msgspec.Struct, frozen=True):
    """Changes whenever somebody opens the log, and when somebody wrote it."""

    in_use: bool
    size: int
    written_ns: int


def _state(path: Path) -> _State:
    found = path.stat()
    in_use = path.with_name(path.name + "-wal").exists()
    return _State(in_use, found.st_size, found.st_mtime_ns)


def _look(path: Path, settings: Settings, *, immutable: bool) -> tuple[LogId | None, list[Finding]]:
    url = f"file:{quote(os.fspath(path))}" + ("?immutable=1" if immutable else "")
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    connection = apsw.Connection(url, flags=flags)
    try:
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        connection.execute("BEGIN")  # so that all of it is read at one moment
        return _read(connection, path, settings)
    finally:
        close_without_checkpoint(connection)


def _read(
    connection: apsw.Connection, path: Path, settings: Settings
) -> tuple[LogId | None, list[Finding]]:
    application = connection.pragma("application_id")
    version = connection.pragma("user_version")
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").get
    if application == version == tables == 0:
        message = "it is empty: the first process that opens it makes its tables"
        return None, [Finding("file", Level.OK, message)]
    if application != schema.APPLICATION_ID:
        message = f"{path} is the SQLite database of another application"
        return None, [_must("file", message, _ANOTHER_PATH)]
    if not 1 <= version <= schema.VERSION:
        message = (
            f"its tables have version {version}, and this program reads up to version "
            f"{schema.VERSION}"
        )
        return None, [_must("file", message, "run the version of Syncpoint that wrote it")]
    identity = connection.execute("SELECT id FROM log").get
    if identity is None:
        message = "it is damaged: the row that holds the log's id is missing"
        return None, [_must("file", message, "restore it from a backup")]
    findings = [
        Finding("file", Level.OK, _version(identity, version)),
        _durability(connection),
        *_clock(connection),
        *_unfinished(connection, settings),
    ]
    return LogId(identity), findings


def _version(identity: str, version: int) -> str:
    told = f"decision log {identity}, version {version} of its tables"
    if version < schema.VERSION:
        told += f"; the next process that opens it brings it to version {schema.VERSION}"
    return told


def _durability(connection: apsw.Connection) -> Finding:
    # The pragma tells something else of a file that is opened as immutable.
    _, header = connection.read("main", 0, 0, 100)
    if header[18:20] != _HEADER_OF_WRITE_AHEAD:
        return Finding(
            "durability",
            Level.NOTE,
            "its journal is no write-ahead log: another program has changed that",
            "keep other programs away from the file; Syncpoint sets it back when it opens the log",
        )
    told = "write-ahead log; every process sets synchronous = FULL when it opens the file"
    return Finding("durability", Level.OK, told)


def _clock(connection: apsw.Connection) -> Iterator[Finding]:
    """Ids are drawn by the clock, and none may be drawn below the horizon."""
    horizon = id_time_ms(unpack_transaction(connection.execute("SELECT horizon FROM log").get))
    ahead = horizon / 1000 - time.time()
    if ahead >= 0:
        yield _must(
            "clock",
            f"this machine's clock is {_age(ahead)} behind the log's horizon: nothing can begin",
            "set the clock right, and let it follow a time server (NTP)",
        )


def _unfinished(connection: apsw.Connection, settings: Settings) -> Iterator[Finding]:
    count, oldest = connection.execute(
        "SELECT count(*), min(id) FROM record WHERE unfinished = 1"
    ).get
    told = f"{count} decisions are recorded whose branches have not all ended"
    age = 0.0
    if oldest is not None:
        age = max(time.time() - id_time_ms(unpack_transaction(oldest)) / 1000, 0)
        told += f", the oldest is {_age(age)} old"
    if age > settings.timeout_max:
        fix = "run `syncpoint recover`, which says what each of them waits for"
        yield Finding("unfinished", Level.NOTE, told, fix)
    else:
        yield Finding("unfinished", Level.OK, told)
    incidents = connection.execute("SELECT count(*) FROM incident").get
    if incidents:
        yield Finding(
            "incidents",
            Level.NOTE,
            f"{incidents} branches ended against their decision or are quarantined",
            "compare the databases and mend them by hand; `syncpoint recover` counts what is left",
        )


def _may_write(path: Path) -> bool:
    rights = os.R_OK | os.W_OK | (os.X_OK if path.is_dir() else 0)
    return os.access(path, rights, effective_ids=os.access in os.supports_effective_ids)


def _user_name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _age(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _must(subject: str, message: str, fix: str) -> Finding:
    return Finding(subject, Level.MUST_CHANGE, message, fix)
