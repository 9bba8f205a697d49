"""One session with a server, and the statements of the protocol sent over it.

`ask` sends text without a cursor and returns a `Reply` whatever happens: errors and lost
connections are answers here, read by `replies`. This is the border where psycopg's exceptions end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg import AsyncConnection, BaseConnection, generators
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

from coordinator.errors import one_line
from participants.postgres import psycopg_private, statements
from participants.postgres.channel import Channel
from participants.postgres.replies import DatabaseUnavailable, Reply, is_replication_warning
from participants.postgres.statements import Greeting

_T = TypeVar("_T")

ANSWER_SECONDS_MAX = 15.0
_FAILED = (ExecStatus.FATAL_ERROR, ExecStatus.BAD_RESPONSE)

Configure = Callable[[AsyncConnection[Any]], Awaitable[None]]


class ServerConnection:
    """An autocommit session. `raw` is the psycopg object that it was opened with."""

    __slots__ = (
        "_interrupted",
        "channel",
        "closes_itself",
        "found_dead",
        "greeting",
        "pgconn",
        "raw",
    )

    def __init__(self, raw: BaseConnection[Any], greeting: Greeting, channel: Channel) -> None:
        self.raw = raw
        self.pgconn: PGconn = raw.pgconn
        self.greeting = greeting
        self.channel = channel
        self.found_dead = False
        self.closes_itself = False
        """Given up while somebody waits on it, who closes it when he is awake."""
        self._interrupted = False

    @classmethod
    async def open(cls, conninfo: str, configure: Configure | None = None) -> ServerConnection:
        """Connect and learn who the server is.

        Raises `psycopg.OperationalError` when the server cannot be reached or refuses, and
        `DatabaseUnavailable` when it answers no question.
        """
        raw = await AsyncConnection.connect(conninfo, autocommit=True)
        session = await cls.over(raw)
        if configure is not None:
            try:
                await configure(raw)
            except BaseException:
                session.close()
                raise
        return session

    @classmethod
    async def over(cls, raw: BaseConnection[Any]) -> ServerConnection:
        """Take over a new connection that is in autocommit mode; it is closed if this fails."""
        channel = Channel(raw.pgconn)
        try:
            greeting = await greet(channel)
            if greeting.synchronous_commit not in statements.REPLICATED:
                await _ask_now(channel, statements.REPLICATE_SESSION)
        except BaseException:
            channel.detach()
            raw.pgconn.finish()
            raise
        channel.detach()  # the user's `configure` may use it in psycopg's own way
        session = cls(raw, greeting, channel)
        if session.is_pooled:
            raw.prepare_threshold = None
        return session

    async def ask(self, statement: bytes, seconds: float = ANSWER_SECONDS_MAX) -> Reply:
        """Send a statement of the protocol and wait for its answer, so many seconds at most.

        Too late an answer, or a cancellation in the middle, costs the connection.
        """
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.send(statement, _settling(answer), seconds)
        return await answer

    def send(self, statement: bytes, answered: Callable[[Reply], None], seconds: float) -> None:
        """The same without waiting: `answered` is called once, and later."""
        self._interrupted = True

        def done(reply: Reply, in_time: bool) -> None:
            self._interrupted = not in_time
            self.found_dead = in_time and not reply.connected
            answered(reply)

        _send(self.channel, statement, done, seconds)

    @property
    def is_pooled(self) -> bool:
        """A pooler such as pgbouncer sits between: the session of the server changes under us at
        every transaction, and with it the statements prepared in it."""
        return self.greeting.process_id != self.pgconn.backend_pid

    @property
    def is_connected(self) -> bool:
        """As far as is known here, and with no answer outstanding."""
        return (
            not self._interrupted and not self.closes_itself and self.pgconn.status == ConnStatus.OK
        )

    @property
    def is_clean(self) -> bool:
        """Connected, and outside any transaction: another may use it."""
        return self.is_connected and self.pgconn.transaction_status == TransactionStatus.IDLE

    def close(self) -> None:
        """End the session at once; the server rolls back whatever was not prepared."""
        if not self.closes_itself:
            self.finish()

    def finish(self) -> None:
        """Close the socket, whoever was to do it."""
        self.channel.detach()
        self.pgconn.finish()


async def greet(channel: Channel) -> Greeting:
    """Ask the server at the other end who it is; raises `DatabaseUnavailable` if it does not say.

    The session is outside any transaction, and stays so.
    """
    reply = await _ask_now(channel, statements.GREET)
    if not reply.succeeded or not reply.rows:
        raise DatabaseUnavailable(f"the server does not say who it is: {reply}")
    return Greeting.read(reply)


async def _ask_now(channel: Channel, statement: bytes) -> Reply:
    answer: asyncio.Future[tuple[Reply, bool]] = asyncio.get_running_loop().create_future()
    settle = _settling(answer)
    _send(channel, statement, lambda *told: settle(told), ANSWER_SECONDS_MAX)
    reply, in_time = await answer
    if not in_time:
        raise DatabaseUnavailable("the server accepts connections but does not answer")
    return reply


def _settling(answer: asyncio.Future[_T]) -> Callable[[_T], None]:
    """Gives it what it is called with, unless who waits for it has gone."""

    def settle(value: _T) -> None:
        if not answer.done():
            answer.set_result(value)

    return settle


def _send(
    channel: Channel, statement: bytes, done: Callable[[Reply, bool], None], seconds: float
) -> None:
    """Send, and have `done` called later with the answer, and whether there was one in time."""
    pgconn = channel.pgconn
    unconfirmed = False

    def on_notice(notice: PGresult) -> None:
        nonlocal unconfirmed
        if is_replication_warning(
            _field(notice, DiagnosticField.SQLSTATE),
            _field(notice, DiagnosticField.SOURCE_FUNCTION),
        ):
            unconfirmed = True

    def ended(results: list[PGresult] | None, error: BaseException | None) -> None:
        pgconn.notice_handler = None
        if error is None:
            done(_read(pgconn, results or [], unconfirmed), True)
        elif isinstance(error, psycopg_private.WaitTimeout):
            done(Reply(message=f"no answer within {seconds:.3g} s", connected=False), False)
        else:
            done(Reply(message=one_line(error), connected=False), True)

    pgconn.notice_handler = on_notice
    try:
        pgconn.send_query(statement)
    except psycopg.Error as error:
        asyncio.get_running_loop().call_soon(ended, None, error)
        return
    channel.send(generators.execute(pgconn), ended, seconds)


def _read(pgconn: PGconn, results: Sequence[PGresult], unconfirmed: bool) -> Reply:
    connected = pgconn.status == ConnStatus.OK
    rows: tuple[tuple[str | None, ...], ...] = ()
    tag = None
    for result in results:
        if result.status in _FAILED:
            return _failure(result, connected)
        if result.ntuples:
            rows = rows or _rows(result)
        tag = result.command_status
    if not results:
        return Reply(message="the server sent an empty answer", connected=False)
    return Reply(
        tag=(tag or b"").decode(),
        rows=rows,
        connected=connected,
        replication_unconfirmed=unconfirmed,
    )


def _failure(result: PGresult, connected: bool) -> Reply:
    message = _field(result, DiagnosticField.MESSAGE_PRIMARY)
    for field in (DiagnosticField.MESSAGE_DETAIL, DiagnosticField.MESSAGE_HINT):
        if more := _field(result, field):
            message += f"; {more}"
    if not message:
        message = result.get_error_message().strip()
    sqlstate = _field(result, DiagnosticField.SQLSTATE)
    if not sqlstate:
        # libpq made this answer up itself, as it does when the connection breaks.
        connected = False
    return Reply(sqlstate=sqlstate, message=message, connected=connected)


def _field(result: PGresult, field: DiagnosticField) -> str:
    return (result.error_field(field) or b"").decode("utf-8", "replace")


def _rows(result: PGresult) -> tuple[tuple[str | None, ...], ...]:
    def value(row: int, column: int) -> str | None:
        data = result.get_value(row, column)
        return None if data is None else bytes(data).decode("utf-8", "replace")

    return tuple(
        tuple(value(row, column) for column in range(result.nfields))
        for row in range(result.ntuples)
    )
