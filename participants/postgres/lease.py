"""What an asynchronous function holds: a psycopg connection that lives as long as its transaction.

See `leased` for what both kinds of lease have in common.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import psycopg
from psycopg import AsyncConnection, AsyncTransaction
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from psycopg.rows import Row

from participants.postgres import psycopg_private
from participants.postgres.leased import CANCEL_SECONDS_MAX, LATE, Leased, refuse

_T = TypeVar("_T")


class Lease(Leased[Row], AsyncConnection[Row]):
    """A `psycopg.AsyncConnection` inside one transaction, which begins and ends without its help.

    Statements of concurrent tasks take turns. `transaction()` is a savepoint. Raises
    `TransactionError` for the verbs that end a transaction, for any use after the transaction is
    over, and after its deadline.
    """

    async def wait(self, gen: PQGen[_T], interval: float = 1.0, timeout: float | None = None) -> _T:
        """Run one exchange with the server; everything psycopg does comes through here."""
        self._enter(gen)
        try:
            result = await self._session.channel.run(gen, timeout)
            self._note_what_was_answered()
            return result
        except asyncio.CancelledError:
            await self._interrupt(gen)
            raise
        except psycopg.Error as error:
            self._failed(error)
            raise
        finally:
            self._leave()

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
        self._refuse_if_over()
        return self._watch(super().cursor(*args, **options))

    async def __aenter__(self) -> Lease[Row]:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Leaving the block changes nothing: the transaction is not over."""

    async def commit(self) -> NoReturn:
        refuse("commit")

    async def rollback(self) -> NoReturn:
        refuse("rollback")

    async def close(self) -> NoReturn:
        refuse("close")

    async def set_autocommit(self, value: bool) -> NoReturn:
        refuse("set_autocommit")

    async def tpc_begin(self, xid: object) -> NoReturn:
        refuse("tpc_begin")

    async def tpc_prepare(self) -> NoReturn:
        refuse("tpc_prepare")

    async def tpc_commit(self, xid: object = None) -> NoReturn:
        refuse("tpc_commit")

    async def tpc_rollback(self, xid: object = None) -> NoReturn:
        refuse("tpc_rollback")

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """As `cancel`, without blocking. `timeout` in seconds."""
        self._refuse_if_over()
        await super().cancel_safe(timeout=timeout)

    async def _interrupt(self, gen: PQGen[Any]) -> None:
        """The task was cancelled in a statement: stop it politely while there is time.

        After the deadline nobody waits for a server that may never answer.
        """
        if self.pgconn.transaction_status != TransactionStatus.ACTIVE or self._lost:
            return
        left = self.terms.seconds_left
        if left <= 0:
            self.lose(LATE)
            return
        try:
            async with asyncio.timeout(min(left, CANCEL_SECONDS_MAX)):
                await self.cancel_safe(timeout=CANCEL_SECONDS_MAX)
                await self._session.channel.run(gen)
        except psycopg.errors.QueryCanceled:
            self._was_cancelled()
        except (Exception, asyncio.CancelledError):
            self.lose("a statement was cancelled and did not end in time")


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
