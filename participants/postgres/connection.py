"""One session with a server, and the statements of the protocol sent over it.

`ask` sends text without a cursor and returns a `Reply` whatever happens: errors and lost
connections are answers here, read by `replies`. This is the border where psycopg's exceptions end.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
from psycopg import AsyncConnection, BaseConnection, generators, waiting
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

from coordinator.errors import one_line
from participants.postgres import psycopg_private, statements
from participants.postgres.replies import DatabaseUnavailable, Reply, is_replication_warning
from participants.postgres.statements import Greeting

ANSWER_SECONDS_MAX = 15.0
_WAKE_SECONDS = 1.0
_FAILED = (ExecStatus.FATAL_ERROR, ExecStatus.BAD_RESPONSE)

Configure = Callable[[AsyncConnection[Any]], Awaitable[None]]


class ServerConnection:
    """An autocommit session. `raw` is the psycopg object that it was opened with."""

    __slots__ = ("_interrupted", "closes_itself", "found_dead", "greeting", "pgconn", "raw")

    def __init__(self, raw: BaseConnection[Any], greeting: Greeting) -> None:
        self.raw = raw
        self.pgconn: PGconn = raw.pgconn
        self.greeting = greeting
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
        try:
            greeting = await greet(raw.pgconn)
            if greeting.process_id != raw.pgconn.backend_pid:
                # A pooler such as pgbouncer sits between: the session changes under us at every
                # transaction, and with it the statements prepared in it.
                raw.prepare_threshold = None
            if greeting.synchronous_commit not in statements.REPLICATED:
                await _ask_now(raw.pgconn, statements.REPLICATE_SESSION)
        except BaseException:
            raw.pgconn.finish()
            raise
        return cls(raw, greeting)

    async def ask(self, statement: bytes, seconds: float = ANSWER_SECONDS_MAX) -> Reply:
        """Send a statement of the protocol and wait for its answer, so many seconds at most.

        Too late an answer, or a cancellation in the middle, costs the connection.
        """
        self._interrupted = True
        try:
            reply = await _ask(self.pgconn, statement, seconds)
        except psycopg_private.WaitTimeout:
            return Reply(message=f"no answer within {seconds:.3g} s", connected=False)
        self._interrupted = False
        self.found_dead = not reply.connected
        return reply

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
            self.pgconn.finish()


async def greet(pgconn: PGconn) -> Greeting:
    """Ask the server at the other end who it is; raises `DatabaseUnavailable` if it does not say.

    The session is outside any transaction, and stays so.
    """
    reply = await _ask_now(pgconn, statements.GREET)
    if not reply.succeeded or not reply.rows:
        raise DatabaseUnavailable(f"the server does not say who it is: {reply}")
    return Greeting.read(reply)


async def _ask_now(pgconn: PGconn, statement: bytes) -> Reply:
    try:
        return await _ask(pgconn, statement, ANSWER_SECONDS_MAX)
    except psycopg_private.WaitTimeout as error:
        raise DatabaseUnavailable("the server accepts connections but does not answer") from error


async def _ask(pgconn: PGconn, statement: bytes, seconds: float) -> Reply:
    unconfirmed = False

    def on_notice(notice: PGresult) -> None:
        nonlocal unconfirmed
        if is_replication_warning(
            _field(notice, DiagnosticField.SQLSTATE),
            _field(notice, DiagnosticField.SOURCE_FUNCTION),
        ):
            unconfirmed = True

    pgconn.notice_handler = on_notice
    try:
        pgconn.send_query(statement)
        results = await waiting.wait_async(
            generators.execute(pgconn), pgconn.socket, interval=_WAKE_SECONDS, timeout=seconds
        )
    except psycopg_private.WaitTimeout:
        raise
    except psycopg.Error as error:
        return Reply(message=one_line(error), connected=False)
    finally:
        pgconn.notice_handler = None
    connected = pgconn.status == ConnStatus.OK
    for result in results:
        if result.status in _FAILED:
            return _failure(result, connected)
    if not results:
        return Reply(message="the server sent an empty answer", connected=False)
    last = results[-1]
    return Reply(
        tag=(last.command_status or b"").decode(),
        rows=_rows(last),
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
