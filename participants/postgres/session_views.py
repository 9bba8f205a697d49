"""A lease as SQLAlchemy wants to see it: a psycopg connection that came out of a pool.

SQLAlchemy commits, rolls back and closes connections by itself, when a flush fails for instance.
Here none of that reaches the server: a commit is refused, a rollback condemns the branch, a close
changes nothing. Statements go to the lease, so that they take turns with the user's own.
"""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn, cast

from psycopg import BaseConnection, IsolationLevel
from psycopg.rows import tuple_row
from psycopg.types.hstore import register_hstore
from sqlalchemy import Connection, Engine
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import PoolProxiedConnection

from coordinator.errors import TransactionError, one_line
from participants.postgres.blocking_lease import BlockingLease
from participants.postgres.lease import Lease

AnyLease = Lease[Any] | BlockingLease[Any]

INSTEAD = {
    "commit()": "returning from the transactional function commits",
    "rollback()": "raise an exception, or use begin_nested() for a savepoint",
    "close()": "it is closed when the transaction ends",
    "reset()": "it is closed when the transaction ends; expunge_all() forgets its objects",
    "invalidate()": "raise an exception, which aborts the transaction",
    "begin()": "it has begun already, and returning from the transactional function commits; use "
    "begin_nested() for a savepoint",
}


def refusal_of(verb: str, what: str = "session") -> TransactionError:
    return TransactionError(
        f"{verb} on a {what} of a global transaction is not possible: {INSTEAD[verb]}"
    )


class Proxied(PoolProxiedConnection):
    """A psycopg connection without a pool. `driver` is what user code finds at the bottom."""

    def __init__(self, adapted: DBAPIConnection, driver: BaseConnection[Any]) -> None:
        self.dbapi_connection = adapted
        self._driver = driver
        self._is_valid = True
        # The dialect leaves here what is to be undone before another borrows the connection, and
        # looks how old it is when it finds it broken.
        self._connection_record = SimpleNamespace(finalize_callback=[], starttime=0.0)

    @property
    def driver_connection(self) -> Any:  # type: ignore[override]  # as in SQLAlchemy itself
        return self._driver

    @property
    def is_valid(self) -> bool:
        return self._is_valid

    @property
    def is_detached(self) -> bool:
        return False

    def cursor(self, *args: Any, **options: Any) -> DBAPICursor:
        return self._adapted.cursor(*args, **options)

    def invalidate(self, e: BaseException | None = None, soft: bool = False) -> None:
        self._is_valid = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapted, name)

    @property
    def _adapted(self) -> DBAPIConnection:
        return cast(DBAPIConnection, self.dbapi_connection)


class ProxiedLease(Proxied):
    """The lease of a running transaction, until `end` is called."""

    def __init__(self, adapted: DBAPIConnection, lease: AnyLease) -> None:
        super().__init__(adapted, lease)
        self._lease = lease
        self._is_over = False

    def end(self) -> None:
        """The outcome is known: what SQLAlchemy says now is for its own books."""
        self._is_over = True

    def commit(self) -> None:
        if not self._is_over:
            raise refusal_of("commit()", "connection")

    def rollback(self) -> None:
        self._condemn("rolled back its work")

    def close(self) -> None:
        """It goes back when its transaction ends."""

    def detach(self) -> NoReturn:
        raise refusal_of("close()", "connection")

    def invalidate(self, e: BaseException | None = None, soft: bool = False) -> None:
        super().invalidate(e, soft)
        self._condemn("gave its connection up")

    def _condemn(self, what: str) -> None:
        if self._is_over:
            return
        error = sys.exc_info()[1]
        cause = error.orig if isinstance(error, DBAPIError) else error
        why = "" if cause is None else f" after {type(cause).__name__}: {one_line(cause)}"
        self._lease.condemn(f"SQLAlchemy {what} on {self._lease.terms.participant}{why}")


class LeasedConnection(Connection):
    """What `session.connection()` gives: a Connection whose end is not the user's to decide."""

    def __init__(self, engine: Engine, proxied: Proxied) -> None:
        # Without revalidation it can never fetch another connection from the engine's pool.
        super().__init__(engine, proxied, _allow_revalidate=False)

    def commit(self) -> NoReturn:
        raise refusal_of("commit()", "connection")

    def rollback(self) -> NoReturn:
        raise refusal_of("rollback()", "connection")

    def close(self) -> NoReturn:
        raise refusal_of("close()", "connection")

    def invalidate(self, exception: BaseException | None = None) -> None:
        if exception is None:
            raise refusal_of("invalidate()", "connection")
        super().invalidate(exception)

    def __exit__(self, *_: object) -> None:
        """Leaving the block changes nothing: the transaction is not over."""

    def close_for_good(self) -> None:
        super().close()


class _View:
    """What the dialect uses of a psycopg connection, on a lease."""

    autocommit = False  # the lease's own flag only keeps psycopg from sending a BEGIN

    def __init__(self, lease: AnyLease, dialect: Any) -> None:
        self._lease = lease
        self._hstore = dialect._psycopg_adapters_map.types.get("hstore")

    def cursor(self, name: str = "") -> Any:
        cursor = self._lease.cursor(name, row_factory=tuple_row)
        if self._hstore is not None:  # the dialect relies on what it found when it was set up
            register_hstore(self._hstore, cursor)
        return cursor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lease, name)


class AsyncView(_View):
    """For the asynchronous dialect, which awaits the setters."""

    async def set_autocommit(self, value: bool) -> None:
        _refuse_autocommit(value)

    async def set_isolation_level(self, value: IsolationLevel | None) -> None:
        await self._set(_isolation(value))

    async def set_read_only(self, value: bool | None) -> None:
        await self._set("READ ONLY" if value else "READ WRITE")

    async def set_deferrable(self, value: bool | None) -> None:
        await self._set("DEFERRABLE" if value else "NOT DEFERRABLE")

    async def _set(self, mode: str) -> None:
        await cast(Lease[Any], self._lease).execute(f"SET TRANSACTION {mode}".encode())


class BlockingView(_View):
    """For the synchronous dialect, which assigns to attributes."""

    def __setattr__(self, name: str, value: Any) -> None:
        match name:
            case "autocommit":
                _refuse_autocommit(value)
            case "isolation_level":
                self._set(_isolation(value))
            case "read_only":
                self._set("READ ONLY" if value else "READ WRITE")
            case "deferrable":
                self._set("DEFERRABLE" if value else "NOT DEFERRABLE")
            case _:
                super().__setattr__(name, value)

    def _set(self, mode: str) -> None:
        cast(BlockingLease[Any], self._lease).execute(f"SET TRANSACTION {mode}".encode())


def _isolation(level: IsolationLevel | None) -> str:
    name = "READ COMMITTED" if level is None else level.name.replace("_", " ")
    return f"ISOLATION LEVEL {name}"


def _refuse_autocommit(value: bool) -> None:
    if value:
        raise TransactionError(
            "isolation level AUTOCOMMIT is not possible in a global transaction: use an engine of "
            "your own for work outside of it"
        )


async def give(connection: Any) -> Any:
    return connection


def adapted(engine: Engine, connection: Any) -> DBAPIConnection:
    """What the engine's dialect calls a DBAPI connection. Runs in a greenlet if it is async."""
    dialect = engine.dialect
    if dialect.is_async:
        return dialect.connect(async_creator_fn=partial(give, connection))
    return cast(DBAPIConnection, connection)
