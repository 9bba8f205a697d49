"""What both kinds of lease have in common: how long they live, and what they refuse.

A lease is a new object for each transaction over a session that is used again and again, so that an
old one, and every cursor made from it, can be refused when its transaction is over. Everything
psycopg sends or reads passes through `wait`, which is where a dead lease refuses.

A lease is ended on the event loop, while its user may be in the middle of a statement, in another
thread even: `_guard` makes each of these steps happen at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import psycopg
from psycopg import BaseConnection, generators, waiting
from psycopg.abc import PQGen, PQGenConn
from psycopg.pq import ConnStatus, PipelineStatus, TransactionStatus
from psycopg.pq.abc import PGcancelConn
from psycopg.rows import Row

from coordinator.errors import TransactionError
from coordinator.gate import Token
from coordinator.logs import kind_of, say_of
from coordinator.model import Xid
from participants.postgres import psycopg_private
from participants.postgres.connection import ServerConnection
from participants.postgres.replies import IN_FAILED_TRANSACTION, is_retryable
from participants.postgres.statements import has_written

logger = logging.getLogger("syncpoint.postgres")

CANCEL_SECONDS_MAX = 5.0
LATE = "the transaction's deadline has passed"
NOT_CANCELLED = "the running statement on %s was not cancelled: %s"
_background: set[asyncio.Task[None]] = set()


@dataclass(frozen=True, slots=True)
class Terms:
    """What a lease is given under; times in seconds of the clock of `loop`.

    `waits_end` is until when to wait for what others hold.
    """

    participant: str
    xid: Xid
    deadline: float
    waits_end: float
    loop: asyncio.AbstractEventLoop
    token: Token | None = None

    @property
    def seconds_left(self) -> float:
        return self.deadline - self.loop.time()

    def say(self, what: str, message: str, **fields: Any) -> None:
        """Log a record about the branch, from any thread; `fields` also fill in the message."""
        say_of(logger, logging.DEBUG, self.participant, self.xid, what, message, **fields)


class Leased(BaseConnection[Row]):
    """The part of a lease that is the same with `await` and without; see `Lease`."""

    lock: Any
    """psycopg's own, which lets statements of one connection take turns."""

    def __init__(self, session: ServerConnection, terms: Terms) -> None:
        super().__init__(session.pgconn)
        psycopg_private.share_session_state(session.raw, self)
        self.terms = terms
        self.failure = ""
        """The last error of a statement, for whoever has to say why the branch cannot commit."""
        self.failure_is_retryable = False
        self.condemned = ""
        """Why the branch must not commit although the server would; see `condemn`."""
        self.has_written = False
        """It certainly has a transaction number; False says nothing."""
        self._latest: weakref.ref[Any] | None = None
        self._session = session
        self._process = os.getpid()
        self._guard = threading.Lock()
        self._over = ""
        self._lost = False
        self._waiting = 0

    @property
    def is_busy(self) -> bool:
        """A statement, a COPY, a stream or a pipeline has not come to its end."""
        return (
            self._waiting > 0
            or self.lock.locked()
            or psycopg_private.in_pipeline(self)
            or self.pgconn.pipeline_status != PipelineStatus.OFF
            or self.pgconn.transaction_status == TransactionStatus.ACTIVE
        )

    @property
    def is_lost(self) -> bool:
        return self._lost or self.pgconn.status != ConnStatus.OK

    @property
    def is_usable(self) -> bool:
        """Whether a statement would be let through just now."""
        return (
            not self._over
            and not self.is_lost
            and self.terms.seconds_left > 0
            and self._process == os.getpid()
        )

    @property
    def closed(self) -> bool:
        """True once the transaction is over, though the session may serve others."""
        return bool(self._over) or super().closed

    def condemn(self, why: str) -> None:
        """Have the branch vote no, whatever the server would do; the first reason stands."""
        self.condemned = self.condemned or why

    def _watch(self, cursor: Any) -> Any:
        """Its answers are what tells whether the branch has written."""
        self._latest = weakref.ref(cursor)
        return cursor

    def _note_what_was_answered(self) -> None:
        cursor = None if self.has_written or self._latest is None else self._latest()
        if cursor is not None and (tag := cursor.statusmessage):
            self.has_written = has_written(tag)

    def end(self, why: str) -> bool:
        """From now on every use is refused; the session itself is not touched.

        True if it was at rest: nothing runs on it, nothing can begin, and it is still connected.
        """
        with self._guard:
            at_rest = not self.is_busy and not self.is_lost
            if not self._over:
                self._over = why
                self._ended()
        return at_rest

    def lose(self, why: str) -> None:
        """End the lease and its session, whatever is running on it, without waiting.

        Who waits for an answer is woken and gets `TransactionError`; the running statement is
        cancelled on the server behind our back, since nobody can wait for that here.
        """
        with self._guard:
            if self._lost:
                return
            self._over = why
            self._lost = True
            request = _cancel_request(self)
            if self._waiting:
                # libpq's object must live until the waiter has let go of it, also when its
                # connection has broken by itself; the end of the stream wakes him at once.
                self._session.closes_itself = True
                with suppress(OSError, psycopg.OperationalError):
                    self._shut_down()
            else:
                self._session.finish()
            self._ended()
        self.terms.say("connection-lost", "the connection to %s is closed: %s", reason=why)
        if request is not None:
            _send_in_background(request, self.terms)

    def __del__(self, *_: object) -> None:
        """The session outlives its leases: there is nothing to close and nothing to warn of."""

    def cancel(self) -> None:
        """Cancel the running statement; on a dead lease it would hit somebody else's."""
        self._refuse_if_over()
        super().cancel()

    def _shut_down(self) -> None:
        """End the stream to the server without closing the descriptor that a waiter uses."""
        with socket.socket(fileno=os.dup(self.pgconn.socket)) as stream:
            stream.shutdown(socket.SHUT_RDWR)

    def _ended(self) -> None:
        """The session will be somebody else's: nothing of its notices is for this lease."""
        self.pgconn.notice_handler = None
        self.pgconn.notify_handler = None

    # Around each exchange.

    def _enter(self, gen: PQGen[Any]) -> None:
        """An exchange begins, or is refused. Followed by `_leave` unless it raises."""
        with self._guard:
            usable = self.is_usable
            if usable:
                self._waiting += 1
        if not usable:
            gen.close()
            self._refuse_if_over()
        if self.terms.token is not None:
            self.terms.token.busy()

    def _leave(self) -> None:
        if self.terms.token is not None:
            self.terms.token.idle()
        with self._guard:
            self._waiting -= 1
            if self._lost and not self._waiting:
                self._session.finish()

    def _failed(self, error: psycopg.Error) -> None:
        """Note what a statement raised. Raises the refusal if the lease was ended meanwhile."""
        if self._over:
            raise self._refusal() from error
        if self.failure and error.sqlstate == IN_FAILED_TRANSACTION:
            return  # it only says that there was an error before
        self.terms.say("statement-failed", "a statement on %s failed: %s", error=kind_of(error))
        self.failure = str(error)
        lost = isinstance(error, psycopg.OperationalError) and error.sqlstate is None
        self.failure_is_retryable = lost or is_retryable(error.sqlstate or "")

    def _was_cancelled(self) -> None:
        self.failure, self.failure_is_retryable = "a statement was cancelled", True

    def _refuse_if_over(self) -> None:
        if self.is_usable:
            return
        if self._process != os.getpid():
            raise TransactionError(
                "this connection belongs to the process that forked this one: open a coordinator "
                "here, and begin a transaction of its own"
            )
        if not self._over and self.terms.seconds_left <= 0:
            self.lose(LATE)
        if self._over:
            raise self._refusal()
        # The connection broke: psycopg's own words tell the user more than ours.
        self.failure = self.failure or "the connection was lost"
        self.failure_is_retryable = True
        raise psycopg.OperationalError(f"the connection to {self.terms.participant} is lost")

    def _refusal(self) -> TransactionError:
        return TransactionError(
            f"this connection to {self.terms.participant} cannot be used any more: {self._over}. "
            "Ask for a new one, with `participant.connection()`, inside a running transaction"
        )


INSTEAD = {
    "commit": "returning from the transactional function commits",
    "rollback": "raise an exception, or use `with connection.transaction()` for a savepoint",
    "close": "it is given back when the transaction ends",
    "set_autocommit": "use a connection of your own for work outside the transaction",
    "tpc_begin": "two-phase commit is what this transaction does by itself",
    "tpc_prepare": "two-phase commit is what this transaction does by itself",
    "tpc_commit": "two-phase commit is what this transaction does by itself",
    "tpc_rollback": "two-phase commit is what this transaction does by itself",
}
"""The verbs that a connection in a global transaction refuses, and what to do instead."""


def refuse(verb: str) -> NoReturn:
    """Raise `TransactionError` for a verb that would end the transaction or the session."""
    raise TransactionError(
        f"{verb}() on a connection of a global transaction is not possible: {INSTEAD[verb]}"
    )


def _cancel_request(lease: Leased[Any]) -> PGcancelConn | None:
    """What asks the server to stop the running statement; None if none runs or none can."""
    if lease.pgconn.transaction_status != TransactionStatus.ACTIVE:
        return None
    try:
        request = lease.pgconn.cancel_conn()
        request.start()
    except (psycopg.Error, AttributeError) as error:
        lease.terms.say("not-cancelled", NOT_CANCELLED, error=str(error))
        return None
    return request


def _send_in_background(request: PGcancelConn, terms: Terms) -> None:
    """Send it on the loop, for a few seconds at most; from any thread."""
    loop = terms.loop

    async def send() -> None:
        gen: PQGenConn[None] = generators.cancel(request)
        try:
            await waiting.wait_conn_async(gen, interval=1.0, timeout=CANCEL_SECONDS_MAX)
        except psycopg.Error as error:
            terms.say("not-cancelled", NOT_CANCELLED, error=str(error))

    def begin() -> None:
        task = loop.create_task(send())
        _background.add(task)
        task.add_done_callback(_background.discard)

    if asyncio._get_running_loop() is loop:
        begin()
        return
    with suppress(RuntimeError):  # the loop is closed: nobody is left who could send it
        loop.call_soon_threadsafe(begin)
