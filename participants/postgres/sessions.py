"""SQLAlchemy sessions over the connection of a running transaction.

A session does here what it does elsewhere, except that it neither begins nor ends: its flush comes
before the vote, and its `after_commit` or `after_rollback` after the outcome. Needs the extra
`sqlalchemy`, so that this module is imported only where a session is asked for.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, NoReturn, cast

from psycopg import BaseConnection
from sqlalchemy import Connection, Engine, NullPool, create_engine, event
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    create_async_engine,
)
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import greenlet_spawn

from coordinator.errors import ConfigurationError, TransactionError
from coordinator.model import Outcome
from coordinator.transactional import GlobalTransaction
from participants.postgres.blocking_lease import BlockingLease
from participants.postgres.connection import ServerConnection
from participants.postgres.lease import Lease
from participants.postgres.session_views import (
    AnyLease,
    AsyncView,
    BlockingView,
    LeasedConnection,
    Proxied,
    ProxiedLease,
    adapted,
    refusal_of,
)

URL = "postgresql+psycopg://"


def engine_problem(engine: object) -> str:
    """Why an engine cannot be used, with the way out; empty if it can be.

    Only its dialect and its options are used, never its pool, so that any pool will do.
    """
    if isinstance(engine, AsyncEngine):
        return dialect_problem(engine.sync_engine)
    if not isinstance(engine, Engine):
        return (
            f"{type(engine).__name__} is no engine: give an Engine of create_engine() or an "
            "AsyncEngine of create_async_engine()"
        )
    if engine.dialect.is_async:
        return "it is the inner engine of an AsyncEngine: give the AsyncEngine itself"
    return dialect_problem(engine)


def dialect_problem(engine: Engine) -> str:
    """As `engine_problem`, for the engine that is at the bottom of either kind."""
    found = f"{engine.dialect.name}+{engine.dialect.driver}"
    if found != "postgresql+psycopg":
        return (
            f"its engine is on {found}, and only psycopg can take part: make it with a url that "
            f"begins with {URL}"
        )
    levels = (
        getattr(engine.dialect, "_on_connect_isolation_level", None),
        engine.get_execution_options().get("isolation_level"),
    )
    if "AUTOCOMMIT" in levels:
        return (
            "its engine has isolation level AUTOCOMMIT, so that nothing could be rolled back: take "
            "the level away, or set it only where it is needed"
        )
    return ""


class BranchSession(Session):
    """A Session inside a global transaction.

    `commit`, `rollback`, `close`, `begin` and the like raise `TransactionError`, which says what to
    do instead; `begin_nested()` is a savepoint. Leaving a `with` block changes nothing.
    """

    def __init__(self, bind: LeasedConnection, proxied: ProxiedLease, **options: Any) -> None:
        super().__init__(bind, expire_on_commit=False, close_resets_only=False, **options)
        self._leased = bind
        self._proxied = proxied
        self._is_over = False

    def prepare_commit(self) -> None:
        """Flush, after which the session sends nothing more; raises what the flush raises."""
        prepare(self)

    def end(self, outcome: Outcome) -> None:
        """Let events and objects see the outcome, and close the session for good."""
        self._proxied.end()
        try:
            if outcome is Outcome.COMMITTED:
                super().commit()
            else:
                super().rollback()
        finally:
            super().close()
            self._leased.close_for_good()
            self._is_over = True

    def begin(self, nested: bool = False) -> SessionTransaction:
        if not nested:
            raise self._refusal("begin()")
        return super().begin(nested=True)

    def commit(self) -> NoReturn:
        raise self._refusal("commit()")

    def rollback(self) -> NoReturn:
        raise self._refusal("rollback()")

    def reset(self) -> NoReturn:
        raise self._refusal("reset()")

    def invalidate(self) -> NoReturn:
        raise self._refusal("invalidate()")

    def close(self) -> None:
        """Refused while the transaction runs; afterwards the session is closed already."""
        if not self._is_over:
            raise self._refusal("close()")

    def __exit__(
        self,
        type_: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leaving the block changes nothing: the transaction is not over."""

    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:
        if self._is_over:
            raise TransactionError(
                "this session cannot be used any more: its transaction is over. Ask for a new one "
                "inside a running transaction"
            )
        return super()._autobegin_t(begin)

    def _refusal(self, verb: str) -> TransactionError:
        if self._is_over:
            return TransactionError(f"{verb} comes too late: the session's transaction is over")
        return refusal_of(verb)


class BranchAsyncSession(AsyncSession):
    """An AsyncSession inside a global transaction; see `BranchSession`.

    As every AsyncSession it is for one task: tasks that work at the same time share `connection()`.
    """

    sync_session_class = BranchSession

    async def __aexit__(self, type_: Any, value: Any, traceback: Any) -> None:
        """Leaving the block changes nothing: the transaction is not over."""


@event.listens_for(BranchSession, "after_begin")
def _refuse_other_connections(
    session: Session, transaction: SessionTransaction, connection: Connection
) -> None:
    if connection is not session.bind:
        raise other_database(connection.engine)


def other_database(engine: Engine) -> TransactionError:
    return TransactionError(
        f"the session was led to {engine.url.render_as_string()}, which is not the "
        "database of its branch: ask the participant of that database for a session"
    )


def prepare(session: Session) -> None:
    """SQLAlchemy's own half of a commit before the wire: `before_commit`, savepoints, flush.

    What a later statement would do could no longer be in the branch: SQLAlchemy refuses it. A
    session that has rolled back has condemned its branch, whose vote will say why.
    """
    transaction = session.get_transaction() or Session.begin(session)
    if session.is_active:
        transaction._prepare_impl()


class Sessions:
    """Makes sessions over leases for one opened participant.

    `engine` gives its dialect and its options, events and execution options included; the face that
    it is not made for, as the synchronous one with an AsyncEngine, has its JSON functions and
    execution options in a dialect of its own. A dialect is set up on a connection of its own, since
    it asks questions that would fix a transaction's snapshot, and then rolls back.
    """

    def __init__(self, participant: str, engine: Engine | AsyncEngine | None) -> None:
        self._participant = participant
        self._given = engine
        self._async_engine: AsyncEngine | None = None
        self._engine: Engine | None = None
        self._async_lock = asyncio.Lock()
        self._lock = threading.Lock()

    async def open_session(
        self,
        lease: Lease[Any],
        transaction: GlobalTransaction,
        connect: Callable[[], Awaitable[ServerConnection]],
    ) -> AsyncSession:
        """A session on the lease, which flushes before the commit and ends with the transaction.

        `connect` opens an asynchronous connection for the setting up; what it raises is raised.
        """
        async with self._async_lock:
            if self._async_engine is None:
                self._async_engine = await self._set_up(connect)
        engine = self._async_engine
        session = await greenlet_spawn(_async_session, engine, lease)

        async def flush() -> None:
            await session.run_sync(cast(Any, BranchSession.prepare_commit))

        async def end(outcome: Outcome) -> None:
            await session.run_sync(cast(Any, BranchSession.end), outcome)

        transaction.before_commit(flush)
        transaction.after_end(end)
        return session

    def open_blocking_session(
        self,
        lease: BlockingLease[Any],
        transaction: GlobalTransaction,
        connect: Callable[[], ServerConnection],
    ) -> Session:
        """As `open_session`; `connect` opens a synchronous connection."""
        with self._lock:
            if self._engine is None:
                engine: Engine = self._suitable(create_engine, is_async=False)
                if _is_new(engine):
                    spare = connect()
                    try:
                        _initialise(engine, spare.raw)
                    finally:
                        spare.close()
                self._engine = engine
        session = _session(self._engine, BlockingView(lease, self._engine.dialect), lease)
        transaction.before_commit(session.prepare_commit)
        transaction.after_end(session.end)
        return session

    async def _set_up(self, connect: Callable[[], Awaitable[ServerConnection]]) -> AsyncEngine:
        engine: AsyncEngine = self._suitable(create_async_engine, is_async=True)
        if _is_new(engine.sync_engine):
            spare = await connect()
            try:
                await greenlet_spawn(_initialise, engine.sync_engine, spare.raw)
            finally:
                spare.close()
        return engine

    def _suitable(self, create: Callable[..., Any], *, is_async: bool) -> Any:
        """The given engine, or one made from its options where it is of the other face."""
        given = self._given
        if given is None:
            return create(URL, poolclass=NullPool)
        if problem := engine_problem(given):
            raise ConfigurationError(f"participant {self._participant!r}: {problem}")
        if isinstance(given, AsyncEngine) == is_async:
            return given
        dialect = cast(Any, given.dialect)
        return create(
            given.url,
            poolclass=NullPool,
            json_serializer=dialect._json_serializer,
            json_deserializer=dialect._json_deserializer,
            execution_options=given.get_execution_options(),
        )


def _is_new(engine: Engine) -> bool:
    """Whether it has never connected, so that its dialect does not know the server yet."""
    return getattr(engine.dialect, "server_version_info", None) is None


def _initialise(engine: Engine, raw: BaseConnection[Any]) -> None:
    """What an engine does on its first connection."""
    connection = Connection(
        engine,
        Proxied(adapted(engine, raw), raw),
        _has_events=False,
        _allow_revalidate=False,
        _allow_autobegin=False,
    )
    engine.dialect.initialize(connection)


def _session(engine: Engine, view: object, lease: AnyLease) -> BranchSession:
    proxied = ProxiedLease(adapted(engine, view), lease)
    return BranchSession(LeasedConnection(engine, proxied), proxied=proxied)


def _async_session(engine: AsyncEngine, lease: AnyLease) -> BranchAsyncSession:
    synchronous = engine.sync_engine
    proxied = ProxiedLease(adapted(synchronous, AsyncView(lease, synchronous.dialect)), lease)
    connection = AsyncConnection(engine, LeasedConnection(synchronous, proxied))
    return BranchAsyncSession(connection, proxied=proxied)
