"""`syncpoint log restore`: a backup becomes the log, with its horizon raised to the present.

What was decided after the backup is unknown to it. A branch of such a transaction that is still
prepared would be rolled back as undecided, so nothing may ever be recorded for it: the horizon is
raised in a file of another name, before that file becomes the log. Whenever the restore is killed
there is the former log, or the restored one with its new horizon, or none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import apsw
import msgspec

from coordinator.codec import pack_transaction
from coordinator.errors import ConfigurationError, one_line
from coordinator.log.sqlite.copying import (
    BESIDE,
    Contents,
    Progress,
    contents,
    copy,
    damage,
    is_foreign,
    locked,
    remove,
    temporary_beside,
    told,
)
from coordinator.log.sqlite.file import (
    check_place,
    close_without_checkpoint,
    explained,
    is_fatal,
    make_durable,
    refuse,
    upgrade,
)
from coordinator.model import LogId, id_floor


class Restored(msgspec.Struct, frozen=True):
    """What is the log now, and under which name the former one is kept, if there was one."""

    contents: Contents
    kept: Path | None


class _Former(msgspec.Struct, frozen=True):
    """The log that is replaced. `log` is None if it cannot be read.

    `is_whole` tells that all of it is in its main file, and nothing in those beside it.
    """

    log: LogId | None = None
    newest_ms: int = 0
    is_whole: bool = False


def restore(path: Path, source: Path, *, force: bool, progress: Progress) -> Restored:
    """Make the backup `source` the log at `path`; a log that is there is replaced with `force`.

    Nobody may have the log open. Raises `ConfigurationError` naming the file and the fix, and
    `LogUnavailable`; then, as after any exception of `progress`, the former log is untouched.
    """
    check_place(path)
    _check_source(path, source)
    if path.exists() and not force:
        raise refuse(
            path,
            "a log is there, which knows more than its backups",
            "if it is lost all the same, replace it with --force: it is kept under another name",
        )
    with locked(path):
        former = _close_former(path) if path.exists() else _Former()
        with temporary_beside(path) as temporary:
            with _reading(source) as backup, told(str(path)):
                copy(backup, temporary, progress)
            found = _prepared(temporary, source, former)
            with told(str(path)):
                if path.exists():
                    _give_to_owner_of(path, temporary)
                make_durable(temporary)
                kept = _replace(path, temporary, former)
    return Restored(found, kept)


def _check_source(path: Path, source: Path) -> None:
    if not source.is_file():
        what = "is a directory" if source.is_dir() else "does not exist"
        raise ConfigurationError(f"the backup {source} {what}: name a backup's file")
    if path.exists() and os.path.samefile(path, source):
        raise ConfigurationError(f"{source} is the log itself: name a backup of it")


def _close_former(path: Path) -> _Former:
    """Bring all of the former log into its main file; raises if anybody has it open."""
    connection: apsw.Connection | None = None
    try:
        connection = apsw.Connection(os.fspath(path), flags=apsw.SQLITE_OPEN_READWRITE)
        if is_foreign(connection):
            raise refuse(
                path, "it is the SQLite database of another application", "choose another path"
            )
        # Only who is alone with a file may end its use of a write-ahead log.
        mode = connection.pragma("journal_mode", "delete")
        is_whole = mode == "delete"
        try:
            found = contents(connection, path)
        except (apsw.Error, ConfigurationError):  # damaged, or of a later version
            return _Former(is_whole=is_whole)
        return _Former(found.log, found.newest_ms, is_whole)
    except (apsw.BusyError, apsw.LockedError) as error:
        raise refuse(
            path, "another process has it open", "end all that use it, and try again"
        ) from error
    except apsw.Error as error:
        number = 0 if connection is None else connection.system_errno
        if not is_fatal(error, number):
            raise explained(error, number, path) from error
        return _Former()
    finally:
        if connection is not None:
            close_without_checkpoint(connection)


@contextmanager
def _reading(source: Path) -> Iterator[apsw.Connection]:
    """A backup, or a file that a former restore has kept, with what is beside it."""
    beside = [source.with_name(source.name + end) for end in ("-wal", "-journal")]
    is_alone = not any(each.exists() for each in beside)
    connection: apsw.Connection | None = None
    try:
        # Nothing is written beside a file that is alone, so that it may lie in a read-only place.
        url = f"file:{quote(os.fspath(source.absolute()))}" + ("?immutable=1" if is_alone else "")
        flags = apsw.SQLITE_OPEN_READONLY if is_alone else apsw.SQLITE_OPEN_READWRITE
        connection = apsw.Connection(url, flags=flags | apsw.SQLITE_OPEN_URI)
        contents(connection, source)
        yield connection
    except apsw.Error as error:
        raise ConfigurationError(
            f"the backup {source} cannot be read: {error}; use another one"
        ) from error
    finally:
        if connection is not None:
            close_without_checkpoint(connection)


def _prepared(copied: Path, source: Path, former: _Former) -> Contents:
    """Check the copy, bring it to the present version, and raise its horizon."""
    connection = apsw.Connection(os.fspath(copied), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        how = damage(connection)
        if how:
            raise ConfigurationError(
                f"the backup {source} is damaged: {one_line(how)}; use another one"
            )
        upgrade(connection, source)
        found = contents(connection, source)
        if former.log not in (None, found.log):
            raise ConfigurationError(
                f"the backup {source} is of the log {found.log}, and the one to be replaced is "
                f"{former.log}: name a backup of that one, or move its file away first"
            )
        # Ids of this very millisecond may be taken.
        present_ms = time.time_ns() // 1_000_000 + 1
        newest_ms = max(found.newest_ms, former.newest_ms)
        if newest_ms >= present_ms:
            raise ConfigurationError(
                f"this machine's clock is behind the log, which knows of {_shown(newest_ms)}: "
                "set the clock right, then restore"
            )
        connection.execute(
            "UPDATE log SET horizon = ?, created_ms = ?",
            (pack_transaction(id_floor(present_ms)), present_ms),
        )
        connection.pragma("journal_mode", "wal")
        return found
    except apsw.Error as error:
        raise ConfigurationError(
            f"the backup {source} cannot be made a log: {error}; check the disk, or use another one"
        ) from error
    finally:
        connection.close(True)


def _give_to_owner_of(path: Path, temporary: Path) -> None:
    """Else the services could not open what an administrator has restored."""
    before, now = path.stat(), temporary.stat()
    if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
        os.chown(temporary, before.st_uid, before.st_gid)
    os.chmod(temporary, before.st_mode & 0o777)


def _replace(path: Path, temporary: Path, former: _Former) -> Path | None:
    """Keep the former log under another name and put the new one in its place."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    kept = path.with_name(f"{path.name}.replaced-{stamp}")
    for end in ("", "-wal", "-journal"):
        present = path.with_name(path.name + end)
        if present.exists():
            os.link(present, kept.with_name(kept.name + end))
    make_durable(path.parent)
    if not former.is_whole:
        # Without the files beside it, it could be taken for a sound log that knows less.
        path.unlink(missing_ok=True)
        make_durable(path.parent)
    # Those of the former log would be applied to the new one.
    remove(path, *BESIDE)
    make_durable(path.parent)
    os.rename(temporary, path)
    make_durable(path.parent)
    return kept if kept.exists() else None


def _shown(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
