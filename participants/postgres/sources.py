"""Where a participant's connections come from: a connection string, or a SQLAlchemy engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import psycopg
from psycopg import AsyncConnection, BaseConnection, Connection
from psycopg.pq import TransactionStatus

from coordinator.errors import ConfigurationError, one_line
from participants.postgres.connection import Configure, ServerConnection
from participants.postgres.guest import comes_from_sqlalchemy
from participants.postgres.location import Location
from participants.postgres.replies import DatabaseUnavailable

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine


class Source(Protocol):
    """How connections are made."""

    location: Location
    engine: Engine | AsyncEngine | None

    async def connect(self) -> ServerConnection:
        """A new one, in autocommit mode and outside any pool.

        Raises nothing but what `ServerConnection.open` raises.
        """


class UrlSource:
    """A libpq connection string; `configure` is awaited with each new connection."""

    def __init__(self, name: str, url: str, configure: Configure | None) -> None:
        self.location = Location(name, url)
        self.engine: Engine | AsyncEngine | None = None
        self._configure = configure

    async def connect(self) -> ServerConnection:
        return await ServerConnection.open(self.location.conninfo, self._configure)


class EngineSource:
    """A SQLAlchemy engine on psycopg.

    Connections are made by a pool of its own, with the engine's creator, arguments and events: in
    the engine's own pool they would wait for users who may be waiting for them.
    """

    def __init__(self, name: str, engine: Engine | AsyncEngine) -> None:
        from sqlalchemy.ext.asyncio import AsyncEngine

        self.engine: Engine | AsyncEngine | None = engine
        self._is_async = isinstance(engine, AsyncEngine)
        synchronous: Any = getattr(engine, "sync_engine", engine)
        _, parameters = synchronous.dialect.create_connect_args(synchronous.url)
        self.location = Location.of_parameters(name, parameters)
        self._pool = synchronous.pool.recreate()

    async def connect(self) -> ServerConnection:
        from sqlalchemy.exc import DBAPIError

        try:
            raw = await (self._connect_async() if self._is_async else self._connect_in_thread())
        except DBAPIError as error:
            if isinstance(error.orig, psycopg.Error):
                raise error.orig from error
            raise DatabaseUnavailable(self._said(error)) from error
        except psycopg.Error:
            raise
        except Exception as error:  # of the engine's creators and listeners, which may be anything
            raise DatabaseUnavailable(self._said(error)) from error
        return await ServerConnection.over(raw)

    def _said(self, error: Exception) -> str:
        text = self.location.for_people(one_line(error))
        return f"the engine made no connection: {type(error).__name__}: {text}"

    async def _connect_async(self) -> BaseConnection[Any]:
        from sqlalchemy.util import greenlet_spawn

        raw = await greenlet_spawn(self._check_out)
        assert isinstance(raw, AsyncConnection)
        try:
            if raw.info.transaction_status != TransactionStatus.IDLE:
                await raw.commit()  # what a listener began, as the engine's first user would
            await raw.set_autocommit(True)
        except BaseException:
            raw.pgconn.finish()
            raise
        return raw

    async def _connect_in_thread(self) -> BaseConnection[Any]:
        def connect() -> BaseConnection[Any]:
            raw = self._check_out()
            assert isinstance(raw, Connection)
            try:
                if raw.info.transaction_status != TransactionStatus.IDLE:
                    raw.commit()
                raw.set_autocommit(True)
            except BaseException:
                raw.pgconn.finish()
                raise
            return raw

        return await _in_thread(connect)

    def _check_out(self) -> BaseConnection[Any]:
        proxied = self._pool.connect()
        raw: BaseConnection[Any] = proxied.driver_connection
        proxied.detach()
        return raw


async def _in_thread(connect: Callable[[], BaseConnection[Any]]) -> BaseConnection[Any]:
    """A thread cannot be cancelled: a connection that comes too late is closed."""
    task = asyncio.ensure_future(asyncio.to_thread(connect))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_close_late)
        raise


def _close_late(task: asyncio.Future[BaseConnection[Any]]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().pgconn.finish()


def source_of(name: str, where: Any, configure: Configure | None) -> Source:
    """The source for what a user passed; raises `ConfigurationError` for anything else."""
    if not comes_from_sqlalchemy(where):
        return UrlSource(name, where, configure)
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from participants.postgres.sessions import engine_problem

    if not isinstance(where, Engine | AsyncEngine):
        raise ConfigurationError(
            f"participant {name!r}: expected a url or a SQLAlchemy engine, not a "
            f"{type(where).__name__}; a session or connection takes part by `enlist`"
        )
    if problem := engine_problem(where):
        raise ConfigurationError(f"participant {name!r}: {problem}")
    if configure is not None:
        raise ConfigurationError(
            f"participant {name!r}: configure goes with a url; with an engine, listen to its event "
            "'connect'"
        )
    return EngineSource(name, where)
