"""What user code holds: a psycopg connection that lives as long as its transaction.

A `Lease` is a new object for each transaction over a session that is used again and again, so that
an old one, and every cursor made from it, can be refused when its transaction is over. Everything
psycopg sends or reads passes through `wait`, which is where a dead lease refuses.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import psycopg
from psycopg import AsyncConnection, AsyncTransaction, generators, waiting
from psycopg.abc import PQGen, PQGenConn
from psycopg.pq import ConnStatus, PipelineStatus, TransactionStatus
from psycopg.rows import Row

from coordinator.errors import TransactionError
from participants.postgres import psycopg_private
from participants.postgres.connection import ServerConnection
from participants.postgres.replies import is_retryable

logger = logging.getLogger("syncpoint.postgres")

CANCEL_SECONDS_MAX = 5.0
_T = TypeVar("_T")
_background: set[asyncio.Task[None]] = set()


class Lease(AsyncConnection[Row]):
    """A `psycopg.AsyncConnection` inside one transaction, which begins and ends without its help.

    Statements of concurrent tasks take turns. `transaction()` is a savepoint. Raises
    `TransactionError` for the verbs that end a transaction, for any use after the transaction is
    over, and after its deadline.
    """

    def __init__(self, session: ServerConnection, participant: str, deadline: float) -> None:
        super().__init__(session.pgconn)
        psycopg_private.share_session_state(session.raw, self)
        self._session = session
        self.participant = participant
        self.deadline = deadline
        self.failure = ""
        self.failure_is_retryable = False
        self._over = ""
        self._lost = False
        self._waiting = 0

    async def wait(self, gen: PQGen[_T], interval: float = 1.0, timeout: float | None = None) -> _T:
        """Run one exchange with the server; everything psycopg does comes through here."""
        self._refuse_if_over(gen)
        self._waiting += 1
        try:
            return await waiting.wait_async(
                gen, self.pgconn.socket, interval=interval, timeout=timeout
            )
        except asyncio.CancelledError:
            await self._interrupt(gen)
            raise
        except psycopg.Error as error:
            if self._over:
                raise self._refusal() from error
            self.failure = str(error)
            lost = isinstance(error, psycopg.OperationalError) and error.sqlstate is None
            self.failure_is_retryable = lost or is_retryable(error.sqlstate or "")
            raise
        finally:
            self._waiting -= 1
            if self._lost and not self._waiting:
                self.pgconn.finish()

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
        return not self._over and not self.is_lost and not self._is_late

    def end(self, why: str) -> None:
        """From now on every use is refused; the session itself is not touched."""
        if not self._over:
            self._over = why
            self.pgconn.notice_handler = None
            self.pgconn.notify_handler = None

    def lose(self, why: str) -> None:
        """End the lease and its session, whatever is running on it, without waiting.

        Who waits for an answer is woken and gets `TransactionError`; the running statement is
        cancelled on the server behind our back, since nobody can wait for that here.
        """
        self.end(why)
        if self._lost or self.pgconn.status != ConnStatus.OK:
            return
        self._lost = True
        if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
            _cancel_in_background(self)
        if self._waiting:
            # The descriptor must stay open until the waiter has let go of it; the end of the
            # stream wakes it at once.
            self._session.closes_itself = True
            with suppress(OSError), socket.socket(fileno=os.dup(self.pgconn.socket)) as stream:
                stream.shutdown(socket.SHUT_RDWR)
        else:
            self.pgconn.finish()

    @property
    def closed(self) -> bool:
        """True once the transaction is over, though the session may serve others."""
        return bool(self._over) or super().closed

    @asynccontextmanager
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncIterator[AsyncTransaction]:
        """A savepoint, rolled back to when the block raises; the transaction itself goes on."""
        savepoint = _Savepoint(self, savepoint_name, force_rollback)
        if psycopg_private.in_pipeline(self):
            async with self.pipeline(), savepoint, self.pipeline():
                yield savepoint
        else:
            async with savepoint:
                yield savepoint

    def cursor(self, *args: Any, **options: Any) -> Any:
        """As psycopg's; refused as any other use is."""
        self._refuse_if_over(None)
        return super().cursor(*args, **options)

    async def __aenter__(self) -> Lease[Row]:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Leaving the block changes nothing: the transaction is not over."""

    def __del__(self, *_: object) -> None:
        """The session outlives its leases: there is nothing to close and nothing to warn of."""

    async def commit(self) -> NoReturn:
        raise self._refusal_of("commit()", "returning from the transactional function commits")

    async def rollback(self) -> NoReturn:
        raise self._refusal_of(
            "rollback()", "raise an exception, or use `async with connection.transaction()`"
        )

    async def close(self) -> NoReturn:
        raise self._refusal_of("close()", "it is given back when the transaction ends")

    async def set_autocommit(self, value: bool) -> NoReturn:
        raise self._refusal_of(
            "set_autocommit()", "use a connection of your own for work outside the transaction"
        )

    async def tpc_begin(self, xid: object) -> NoReturn:
        raise self._refusal_of_tpc("tpc_begin()")

    async def tpc_prepare(self) -> NoReturn:
        raise self._refusal_of_tpc("tpc_prepare()")

    async def tpc_commit(self, xid: object = None) -> NoReturn:
        raise self._refusal_of_tpc("tpc_commit()")

    async def tpc_rollback(self, xid: object = None) -> NoReturn:
        raise self._refusal_of_tpc("tpc_rollback()")

    def cancel(self) -> None:
        """Cancel the running statement; on a dead lease it would hit somebody else's."""
        self._refuse_if_over(None)
        super().cancel()

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """As `cancel`, without blocking. `timeout` in seconds."""
        self._refuse_if_over(None)
        await super().cancel_safe(timeout=timeout)

    @property
    def _is_late(self) -> bool:
        return asyncio.get_running_loop().time() >= self.deadline

    async def _interrupt(self, gen: PQGen[Any]) -> None:
        """The task was cancelled in a statement: stop it politely while there is time.

        After the deadline nobody waits for a server that may never answer.
        """
        if self.pgconn.transaction_status != TransactionStatus.ACTIVE or self._lost:
            return
        left = self.deadline - asyncio.get_running_loop().time()
        if left <= 0:
            self.lose("the transaction's deadline has passed")
            return
        try:
            async with asyncio.timeout(min(left, CANCEL_SECONDS_MAX)):
                await self.cancel_safe(timeout=CANCEL_SECONDS_MAX)
                await waiting.wait_async(gen, self.pgconn.socket, interval=1.0)
        except psycopg.errors.QueryCanceled:
            self.failure, self.failure_is_retryable = "a statement was cancelled", True
        except (Exception, asyncio.CancelledError):
            self.lose("a statement was cancelled and did not end in time")

    def _refuse_if_over(self, gen: PQGen[Any] | None) -> None:
        if self.is_usable:
            return
        if gen is not None:
            gen.close()
        if not self._over and self._is_late:
            self.lose("the transaction's deadline has passed")
        if self._over:
            raise self._refusal()
        # The connection broke: psycopg's own words tell the user more than ours.
        self.failure = self.failure or "the connection was lost"
        self.failure_is_retryable = True
        raise psycopg.OperationalError(f"the connection to {self.participant} is lost")

    def _refusal(self) -> TransactionError:
        return TransactionError(
            f"this connection to {self.participant} cannot be used any more: {self._over}. Ask for "
            "a new one, with `await participant.connection()`, inside a running transaction"
        )

    def _refusal_of(self, verb: str, instead: str) -> TransactionError:
        return TransactionError(
            f"{verb} on a connection of a global transaction is not possible: {instead}"
        )

    def _refusal_of_tpc(self, verb: str) -> TransactionError:
        return self._refusal_of(verb, "two-phase commit is what this transaction does by itself")


class _Savepoint(AsyncTransaction):
    """On a connection that is no longer usable it leaves the user's exception alone."""

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool:
        lease = self._conn
        if exc_val is not None and isinstance(lease, Lease) and not lease.is_usable:
            self.status = self.Status.FAILED
            return False
        return await super().__aexit__(exc_type, exc_val, exc_tb)


def _cancel_in_background(lease: Lease[Any]) -> None:
    """Ask the server to stop the running statement, for a few seconds at most."""
    try:
        request = lease.pgconn.cancel_conn()
        request.start()
    except (psycopg.Error, AttributeError) as error:
        logger.debug("no cancel request could be made: %s", error)
        return

    async def cancel() -> None:
        gen: PQGenConn[None] = generators.cancel(request)
        try:
            await waiting.wait_conn_async(gen, interval=1.0, timeout=CANCEL_SECONDS_MAX)
        except psycopg.Error as error:
            logger.debug("the running statement was not cancelled: %s", error)

    task = asyncio.get_running_loop().create_task(cancel())
    _background.add(task)
    task.add_done_callback(_background.discard)
