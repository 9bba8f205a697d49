"""`PostgreSQL.blocking`: the same verbs for synchronous callers, in the threads of their own.

What begins and ends a branch runs on the event loop of the coordinator; what the user does with the
connection in between runs in the user's thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg

from coordinator.context import required
from participants.postgres.guest import blocking_driver_of, refused

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from participants.postgres.participant import PostgreSQL


class BlockingPostgreSQL:
    """Made by `PostgreSQL`. Every thread of a synchronous transaction may use it at once.

    Each verb raises `TransactionError` in an asynchronous transaction, and on a thread whose event
    loop runs, which it would stop.
    """

    def __init__(self, participant: PostgreSQL) -> None:
        self._participant = participant

    def __repr__(self) -> str:
        return f"{self._participant!r}.blocking"

    def connection(self) -> psycopg.Connection[Any]:
        """The running transaction's connection here, as a value or with `with`.

        See `PostgreSQL.connection`. Leaving the block changes nothing.
        """
        transaction = required(f"{self._participant.name}.blocking.connection()", blocking=True)
        return self._participant._opened().blocking_lease(transaction)

    def session(self) -> Session:
        """The same as a SQLAlchemy session; see `PostgreSQL.session`."""
        transaction = required(f"{self._participant.name}.blocking.session()", blocking=True)
        return self._participant._opened().blocking_session(transaction)

    def enlist(self, made_elsewhere: Any) -> None:
        """Take part with a synchronous connection or session; see `PostgreSQL.enlist`."""
        transaction = required(f"{self._participant.name}.blocking.enlist()", blocking=True)
        opened = self._participant._opened()
        name = self._participant.name
        with blocking_driver_of(made_elsewhere, transaction) as (raw, owner):
            if opened.is_enlisted(transaction, raw):
                return
            if not raw.lock.acquire(blocking=False):
                raise refused(name, "a statement is running on it", "Wait for its end first")
            try:
                transaction.run(opened.enlist(transaction, raw, owner))
            finally:
                raw.lock.release()
