"""What a synchronous function holds: the counterpart of `Lease` for threads without a loop.

Its transaction is ended by the event loop of another thread. Until then that thread leaves the
session alone; when it must take it away it shuts the stream down, which wakes the user's thread.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import psycopg
from psycopg import Connection, Transaction, waiting
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from psycopg.rows import Row

from participants.postgres import psycopg_private
from participants.postgres.connection import ServerConnection
from participants.postgres.leased import CANCEL_SECONDS_MAX, LATE, Leased, Terms, refuse

_T = TypeVar("_T")
_WAKE_SECONDS = 0.1
"""How often a waiting thread looks whether a signal has come."""


class BlockingLease(Leased[Row], Connection[Row]):
    """A `psycopg.Connection` inside one transaction, which begins and ends without its help.

    Statements of several threads take turns. `transaction()` is a savepoint. Raises
    `TransactionError` for the verbs that end a transaction, for any use after the transaction is
    over, and after its deadline, which also ends a statement that runs.
    """

    def __init__(self, session: ServerConnection, terms: Terms) -> None:
        super().__init__(session, terms)
        # A descriptor of our own: libpq may close its one, in the other thread, at the very moment
        # when it is to be shut down, and its number may name another connection by then.
        self._stream = os.dup(self.pgconn.socket)

    def wait(
        self, gen: PQGen[_T], interval: float = _WAKE_SECONDS, timeout: float | None = None
    ) -> _T:
        """Run one exchange with the server; everything psycopg does comes through here."""
        self._enter(gen)
        try:
            result = waiting.wait(gen, self.pgconn.socket, interval=interval, timeout=timeout)
            self._note_what_was_answered()
            return result
        except psycopg.Error as error:
            self._failed(error)
            raise
        except BaseException:  # Ctrl-C, or whatever else a handler of signals raises
            self._interrupt(gen)
            raise
        finally:
            self._leave()

    @contextmanager
    def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> Iterator[Transaction]:
        """A savepoint, rolled back to when the block raises; the transaction itself goes on."""
        savepoint = _Savepoint(self, savepoint_name, force_rollback)
        if psycopg_private.in_pipeline(self):
            with self.pipeline(), savepoint, self.pipeline():
                yield savepoint
        else:
            with savepoint:
                yield savepoint

    def cursor(self, *args: Any, **options: Any) -> Any:
        """As psycopg's; refused as any other use is."""
        self._refuse_if_over()
        return self._watch(super().cursor(*args, **options))

    def __enter__(self) -> BlockingLease[Row]:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Leaving the block changes nothing: the transaction is not over."""

    def commit(self) -> NoReturn:
        refuse("commit")

    def rollback(self) -> NoReturn:
        refuse("rollback")

    def close(self) -> NoReturn:
        refuse("close")

    def set_autocommit(self, value: bool) -> NoReturn:
        refuse("set_autocommit")

    def tpc_begin(self, xid: object) -> NoReturn:
        refuse("tpc_begin")

    def tpc_prepare(self) -> NoReturn:
        refuse("tpc_prepare")

    def tpc_commit(self, xid: object = None) -> NoReturn:
        refuse("tpc_commit")

    def tpc_rollback(self, xid: object = None) -> NoReturn:
        refuse("tpc_rollback")

    def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """As `cancel`, in a way that is safer. `timeout` in seconds."""
        self._refuse_if_over()
        super().cancel_safe(timeout=timeout)

    def _shut_down(self) -> None:
        with socket.socket(fileno=os.dup(self._stream)) as stream:
            stream.shutdown(socket.SHUT_RDWR)

    def _ended(self) -> None:
        super()._ended()
        if self._stream >= 0:
            os.close(self._stream)
            self._stream = -1

    def _interrupt(self, gen: PQGen[Any]) -> None:
        """The thread was interrupted in a statement: stop it politely while there is time."""
        if self.pgconn.transaction_status != TransactionStatus.ACTIVE or self._lost:
            return
        patience = min(self.terms.seconds_left, CANCEL_SECONDS_MAX)
        if patience <= 0:
            self.lose(LATE)
            return
        try:
            self.cancel_safe(timeout=patience)
            waiting.wait(gen, self.pgconn.socket, interval=_WAKE_SECONDS, timeout=patience)
        except psycopg.errors.QueryCanceled:
            self._was_cancelled()
        except BaseException as error:
            self.lose("a statement was interrupted and did not end in time")
            if not isinstance(error, Exception):
                raise


class _Savepoint(Transaction):
    """On a connection that is no longer usable it leaves the user's exception alone."""

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool:
        lease = self._conn
        if exc_val is not None and isinstance(lease, BlockingLease) and not lease.is_usable:
            self.status = self.Status.FAILED
            return False
        return super().__exit__(exc_type, exc_val, exc_tb)
