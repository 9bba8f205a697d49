"""The private names of psycopg that leases rest on, all of them, kept in one place.

`tests/integration/test_postgres_leases.py` checks each against the installed psycopg, so that a
release that changes one fails a test and not a transaction.
"""

from __future__ import annotations

from typing import Any

from psycopg import AsyncConnection, errors
from psycopg.adapt import AdaptersMap

WaitTimeout = errors._WaitTimeout
"""What `psycopg.waiting` raises when an exchange takes longer than it was given."""


def share_session_state(source: AsyncConnection[Any], lease: AsyncConnection[Any]) -> None:
    """Give a lease what belongs to the server's session rather than to the Python object.

    The manager of prepared statements must be the session's own: statement names live on the
    server. Adapters are copied, so that what a user registers on a lease ends with it.
    """
    lease._prepared = source._prepared
    lease._autocommit = True  # BEGIN is ours: psycopg must never send one
    if source._adapters is not None:
        lease._adapters = AdaptersMap(source._adapters)
    lease.row_factory = source.row_factory
    lease.cursor_factory = source.cursor_factory
    lease.server_cursor_factory = source.server_cursor_factory


def forget_prepared_statements(connection: AsyncConnection[Any]) -> None:
    """After a rollback: what was prepared may rest on objects that were never created."""
    connection._prepared.clear()


def in_pipeline(connection: AsyncConnection[Any]) -> bool:
    return connection._pipeline is not None
