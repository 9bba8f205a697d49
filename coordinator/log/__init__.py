"""Opening a decision log by its URL, with the members that go with it.

    memory:                     in this process only; a fresh log each time
    memory:NAME                 one log of that name, shared inside this process
    sqlite:///log.db            a file, relative to the working directory
    sqlite:////var/lib/log.db   a file by its absolute path

Members of a file are found in the directory `<file>.members`, those of a memory log in the process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.errors import ConfigurationError

if TYPE_CHECKING:
    from coordinator.log.base import Log
    from coordinator.log.register import Register
    from coordinator.members.base import Beat, Members
    from coordinator.model import MemberId

_KINDS = "use memory:, memory:NAME, sqlite:///relative.db or sqlite:////absolute/path.db"
_NOT_BUILT = frozenset({"etcd", "zookeeper", "consul", "paxos", "http", "https"})

_named: dict[str, tuple[Register, dict[MemberId, Beat]]] = {}
"""The named logs in memory: they last as long as the process."""


def open_log(url: str) -> tuple[Log, Members]:
    """The log that a URL names and the members beside it, neither of them opened or joined yet.

    Touches no file. Raises `ConfigurationError` saying which part of the URL is wrong.
    """
    scheme, colon, rest = url.partition(":")
    if not colon:
        raise ConfigurationError(f"the log's URL {url!r} has no scheme before a colon: {_KINDS}")
    if scheme == "memory":
        return _memory(rest)
    if scheme == "sqlite":
        return _sqlite(rest)
    # Other URLs may hold a password, so only the scheme is shown.
    if scheme in _NOT_BUILT:
        raise ConfigurationError(
            f"a log of the kind {scheme}: is not built into this version: {_KINDS}"
        )
    raise ConfigurationError(f"there is no log of the kind {scheme}: {_KINDS}")


def _memory(name: str) -> tuple[Log, Members]:
    from coordinator.log.memory import MemoryLog, new_register
    from coordinator.members.local import LocalMembers

    if "/" in name or "?" in name:
        raise ConfigurationError(
            f"the log's URL memory:{name} has a path: write memory: or memory:NAME"
        )
    if not name:
        return MemoryLog(), LocalMembers()
    if name not in _named:
        _named[name] = new_register(), {}
    register, table = _named[name]
    return MemoryLog(register), LocalMembers(table)


def _sqlite(rest: str) -> tuple[Log, Members]:
    from coordinator.log.sqlite import SQLiteLog
    from coordinator.members.files import FileMembers

    path = _path(rest)
    log = SQLiteLog(path)
    return log, FileMembers(log.path.with_name(log.path.name + ".members"))


def _path(rest: str) -> str:
    url = f"sqlite:{rest}"
    for mark in "?#":
        if mark in rest:
            raise ConfigurationError(
                f"the log's URL {url} has {rest[rest.index(mark) :]!r} after its path: an SQLite "
                "log takes no options there"
            )
    if not rest.startswith("///"):
        slashes = len(rest) - len(rest.lstrip("/"))
        path = rest.lstrip("/")
        raise ConfigurationError(
            f"the log's URL {url} has {slashes} slashes after sqlite: and needs three before a "
            f"path: write sqlite:///{path} for a relative path, sqlite:////{path} for an "
            "absolute one"
        )
    path = rest[3:]
    if path == ":memory:":
        raise ConfigurationError(f"the log's URL {url} names no file: write memory: instead")
    if not path.strip("/"):
        raise ConfigurationError(f"the log's URL {url} has an empty path: {_KINDS}")
    if path.endswith("/"):
        raise ConfigurationError(f"the log's URL {url} names a directory: add a file's name to it")
    return path
