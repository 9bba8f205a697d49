"""The private names of psycopg that leases rest on, all of them, kept in one place.

`tests/integration/test_postgres_leases.py` checks each against the installed psycopg, so that a
release that changes one fails a test and not a transaction.
"""

from __future__ import annotations

from operator import methodcaller
from typing import Any

import psycopg
from psycopg import AsyncConnection, BaseConnection, errors
from psycopg.adapt import AdaptersMap

WaitTimeout = errors._WaitTimeout
"""What `psycopg.waiting` raises when an exchange takes longer than it was given."""

_begin_statement = methodcaller("_get_tx_start_command")

_ASYNCHRONOUS_KINDS: dict[Any, Any] = {
    psycopg.Cursor: psycopg.AsyncCursor,
    psycopg.ClientCursor: psycopg.AsyncClientCursor,
    psycopg.RawCursor: psycopg.AsyncRawCursor,
    psycopg.ServerCursor: psycopg.AsyncServerCursor,
    psycopg.RawServerCursor: psycopg.AsyncRawServerCursor,
}
_SYNCHRONOUS_KINDS = {value: key for key, value in _ASYNCHRONOUS_KINDS.items()}


def share_session_state(source: BaseConnection[Any], lease: BaseConnection[Any]) -> None:
    """Give a lease what belongs to the server's session rather than to the Python object.

    The manager of prepared statements must be the session's own: statement names live on the
    server. Adapters are copied, so that what a user registers on a lease ends with it. A class of
    cursors of the other face is replaced by its counterpart, or by the ordinary one. Autocommit is
    off, so that what follows a COMMIT sent as text is in a transaction too, and is rolled back.
    """
    lease._prepared = source._prepared
    if source._adapters is not None:
        lease._adapters = AdaptersMap(source._adapters)
    given: Any = source
    taking: Any = lease
    taking.row_factory = given.row_factory
    same_face = isinstance(source, AsyncConnection) == isinstance(lease, AsyncConnection)
    other = _ASYNCHRONOUS_KINDS if isinstance(lease, AsyncConnection) else _SYNCHRONOUS_KINDS
    for name in ("cursor_factory", "server_cursor_factory"):
        factory = getattr(given, name)
        if not same_face:
            factory = other.get(factory, getattr(taking, name))
        setattr(taking, name, factory)


def with_face(
    connection: BaseConnection[Any], face: type[BaseConnection[Any]]
) -> BaseConnection[Any]:
    """The connection, or a synchronous or asynchronous one over the same session of the server."""
    if isinstance(connection, face):
        return connection
    other = face(connection.pgconn)
    share_session_state(connection, other)
    other._autocommit = connection._autocommit
    connection._pool = None  # psycopg would warn that it is forgotten without being closed
    return other


def begin_statement(connection: BaseConnection[Any]) -> str:
    """BEGIN, with the isolation level and the modes that were set on the connection."""
    statement: bytes = _begin_statement(connection)
    return statement.decode()


def forget_prepared_statements(connection: BaseConnection[Any]) -> None:
    """After a rollback: what was prepared may rest on objects that were never created."""
    connection._prepared.clear()


def in_pipeline(connection: BaseConnection[Any]) -> bool:
    return connection._pipeline is not None
