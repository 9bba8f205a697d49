"""A PostgreSQL database as a participant: leased connections and PREPARE TRANSACTION.

No table is needed in the database, and no superuser. A vote PREPARED survives `kill -9` of the
server; what a stranger needs to end the branch is in its token. `docs/design.md` section 5 and
PostgreSQL's documentation of PREPARE TRANSACTION are the sources.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg

from coordinator.config import Settings
from coordinator.context import required
from coordinator.errors import ConfigurationError, ProtocolError
from coordinator.model import (
    FINISHED,
    Branch,
    Ending,
    LogId,
    Verdict,
    Vote,
    VoteKind,
    Xid,
)
from coordinator.participant import Binding, Finding, Send, Waiter
from participants.postgres.blocking import BlockingPostgreSQL
from participants.postgres.checks import connect_checked
from participants.postgres.connection import Configure
from participants.postgres.enlisting import Enlisting
from participants.postgres.guest import driver_of, refused
from participants.postgres.inspection import inspect, role_sql
from participants.postgres.location import check_name
from participants.postgres.opened import Opened
from participants.postgres.sources import source_of
from participants.postgres.statements import Begin
from participants.postgres.waiting import who_waits

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

POOL_SIZE_MAX = 1000

_of_parents: list[Opened] = []
"""What was open when this process was forked. It is never touched again, nor deleted: its sockets
are the parent's."""


class PostgreSQL:
    """A database under a name for people and records.

    `url` is a libpq connection string, or a SQLAlchemy engine on psycopg, whose arguments, events
    and dialect are then used, though not its pool.
    `pool_size` bounds the transactions that work here at a time; four more connections are used to
    end branches. `lock_timeout` and `statement_timeout` bound each statement of a transaction, in
    seconds. `configure` is awaited once with each new `psycopg.AsyncConnection`: adapters and row
    factories set on it are those of every lease. Raises `ConfigurationError` for wrong arguments;
    nothing is connected before a coordinator opens it.
    """

    def __init__(
        self,
        name: str,
        url: str | Engine | AsyncEngine,
        *,
        pool_size: int = 10,
        lock_timeout: float | None = None,
        statement_timeout: float | None = None,
        configure: Configure | None = None,
    ) -> None:
        self._name = check_name(name)
        self._source = source_of(name, url, configure)
        self._location = self._source.location
        if not isinstance(pool_size, int) or not 1 <= pool_size <= POOL_SIZE_MAX:
            raise ConfigurationError(
                f"participant {name!r}: pool_size is 1 to {POOL_SIZE_MAX} connections, "
                f"not {pool_size!r}"
            )
        self._pool_size = pool_size
        self._begin = Begin(
            _milliseconds(name, "lock_timeout", lock_timeout),
            _milliseconds(name, "statement_timeout", statement_timeout),
        )
        self._open: Opened | None = None
        self.blocking = BlockingPostgreSQL(self)
        """The same verbs for synchronous callers."""

    @property
    def name(self) -> str:
        return self._name

    @property
    def pool_size(self) -> int:
        """How many connections there are at most for transactions."""
        return self._pool_size

    @property
    def at_once(self) -> int:
        """See `Bounded`: every transaction needs a connection here, and then a prepared slot."""
        opened = self._open
        return self._pool_size if opened is None else min(self._pool_size, opened.slots.share)

    def connection(self) -> Enlisting[psycopg.AsyncConnection[Any]]:
        """The running transaction's connection here: `await` it, or use it with `async with`.

        The first call enlists this database and sends BEGIN; later ones, and other tasks of the
        transaction, get the same connection. Leaving the block changes nothing. Raises
        `TransactionError` outside a transaction, `TransactionAborted` (retryable) when no
        connection can be had before the deadline.
        """
        return Enlisting(self._connection)

    def session(self) -> Enlisting[AsyncSession]:
        """The same as a SQLAlchemy session, over the same connection: one for the transaction.

        It is flushed before the commit. Raises as `connection` does, and `ConfigurationError`
        without SQLAlchemy.
        """
        return Enlisting(self._session)

    async def enlist(self, made_elsewhere: Any) -> None:
        """Take part with a connection or session that was made elsewhere and is at rest.

        It may be an asynchronous one of psycopg or of SQLAlchemy. It is the running transaction's
        only connection here, and its owner's again at the end. Repeating it changes nothing. Raises
        `TransactionError` and `ConfigurationError` saying why it cannot take part, and the fix.
        """
        transaction = required(f"{self._name}.enlist()", blocking=False)
        opened = self._opened()
        async with driver_of(made_elsewhere, transaction) as (raw, owner):
            if opened.is_enlisted(transaction, raw):
                return
            if raw.lock.locked():
                raise refused(self._name, "a statement is running on it", "Wait for its end first")
            async with raw.lock:
                await opened.enlist(transaction, raw, owner)

    async def open(self, binding: Binding) -> str:
        """Connect, check the server's settings, and return its identity."""
        opened = self._open
        if opened is not None and opened.process != os.getpid():
            await self.close()
        elif opened is not None and opened.loop.is_closed():
            with suppress(RuntimeError):  # its loop ended without closing the coordinator
                await self.close()
        if self._open is not None:
            raise ConfigurationError(
                f"participant {self._name!r} is open already, for cluster "
                f"{self._open.binding.cluster!r}: give each coordinator a participant of its own"
            )
        first = await connect_checked(self._name, self._location, self._source.connect)
        self._open = Opened(self, binding, self._source, self._begin, first)
        return f"postgresql:{first.greeting.system_identifier}:{first.greeting.database}"

    async def close(self) -> None:
        """Close every connection; open work is rolled back, prepared branches stay prepared."""
        opened, self._open = self._open, None
        if opened is None:
            return
        if opened.process == os.getpid():
            opened.close()
        else:
            _of_parents.append(opened)

    async def prepare(self, xid: Xid) -> Vote:
        """See `Participant.prepare`. The vote's reason is for the caller, with the SQLSTATE."""
        opened = self._opened()
        work = opened.by_branch.get(xid.branch)
        if work is None:
            reason = f"nothing is open in {self._name} under branch {xid}"
            return Vote(VoteKind.ABORTED, reason=reason)
        async with work.lock:
            try:
                vote = await work.prepare(opened.slots)
            except BaseException:
                opened.drop(work)
                raise
            if vote.kind is not VoteKind.READ_ONLY:
                opened.drop(work)
            if vote.kind is VoteKind.ABORTED:
                opened.slots.give(xid.branch)
            return vote

    def prepare_at_once(self, xid: Xid) -> Send | None:
        """See `Prompt.prepare_at_once`."""
        opened = self._opened()
        work = opened.by_branch.get(xid.branch)
        send = None if work is None else work.prepare_at_once(opened.slots)
        if work is None or send is None:
            return None

        def prepare(voted: Callable[[Vote | Exception], None]) -> None:
            def answered(answer: Vote | Exception) -> None:
                opened.drop(work)
                if isinstance(answer, Vote) and answer.kind is VoteKind.ABORTED:
                    opened.slots.give(xid.branch)
                voted(answer)

            send(answered)

        return prepare

    def commit_at_once(self, branch: Branch) -> Send | None:
        """See `Prompt.commit_at_once`."""
        opened = self._opened()
        send = opened.finisher.commit_at_once(branch)
        if send is None:
            return None

        def commit(ended: Callable[[Ending | None], None]) -> None:
            def answered(ending: Ending | None) -> None:
                if ending is not None:
                    opened.forget(branch.id)
                ended(ending)

            send(answered)

        return commit

    async def commit(self, branch: Branch) -> Ending:
        """See `Participant.commit`. Raises `DatabaseUnavailable` when it may be repeated soon."""
        opened = self._opened()
        work = opened.by_branch.get(branch.id)
        if work is not None:
            async with work.lock:
                if opened.by_branch.get(branch.id) is work:
                    if not work.is_read_only:
                        raise ProtocolError(f"branch {branch.xid} was not asked for its vote")
                    try:
                        return await work.commit()
                    finally:
                        opened.drop(work)
        ending = await opened.finisher.commit(branch)
        opened.forget(branch.id)
        return ending

    async def commit_one_phase(self, branch: Branch) -> tuple[Verdict, str, bool]:
        """See `OnePhase`. PostgreSQL tells by `pg_xact_status` how a lost COMMIT ended."""
        opened = self._opened()
        work = opened.by_branch.get(branch.id)
        if work is None:
            return Verdict.ABORT, f"nothing is open in {self._name} under branch {branch.xid}", True
        async with work.lock:
            try:
                return await work.commit_one_phase(opened.finisher)
            finally:
                opened.drop(work)

    async def rollback(self, branch: Branch) -> Ending:
        """See `Participant.rollback`. Raises `DatabaseUnavailable` while a PREPARE may yet land."""
        opened = self._opened()
        work = opened.by_branch.get(branch.id)
        if work is not None:
            async with work.lock:
                if work.in_doubt is not None:
                    work.lose("its PREPARE was given up")
                    opened.drop(work)
                elif opened.by_branch.get(branch.id) is work:
                    try:
                        await work.roll_back()
                        return FINISHED
                    finally:
                        opened.drop(work)
        ending = await opened.finisher.roll_back(branch, opened.in_doubt.get(branch.id))
        opened.forget(branch.id)
        return ending

    async def recover(self) -> Collection[Branch]:
        """The prepared branches of our log in this database, without their tokens."""
        opened = self._opened()
        return await opened.finisher.recover(opened.binding.log)

    def __repr__(self) -> str:
        state = "open" if self._open is not None else "closed"
        return f"<PostgreSQL {self._name!r} {self._location} {state}>"

    async def check(self, log: LogId | None, settings: Settings) -> Sequence[Finding]:
        """See `Checkable.check`."""
        return await inspect(self._location, self._pool_size, self._begin, log, settings)

    async def waiting(self, branches: Collection[Branch]) -> Sequence[Waiter]:
        """See `ShowsWaiters.waiting`."""
        return await who_waits(self._name, self._location, branches)

    def role_sql(self) -> str:
        """See `Checkable.role_sql`."""
        return role_sql(self._name, self._location)

    async def _connection(self) -> psycopg.AsyncConnection[Any]:
        transaction = required(f"{self._name}.connection()", blocking=False)
        lease = await self._opened().lease(transaction)
        assert isinstance(lease, psycopg.AsyncConnection)
        return lease

    async def _session(self) -> AsyncSession:
        transaction = required(f"{self._name}.session()", blocking=False)
        return await self._opened().session(transaction)

    def _opened(self) -> Opened:
        if self._open is None:
            raise ConfigurationError(
                f"participant {self._name!r} is not open: name it in Coordinator(participants="
                "[...]), and work inside `async with coordinator`"
            )
        if self._open.process != os.getpid():
            raise ConfigurationError(
                f"participant {self._name!r} was opened before a fork: the child process must open "
                "a coordinator of its own"
            )
        return self._open


def _milliseconds(name: str, what: str, seconds: float | None) -> int | None:
    if seconds is None:
        return None
    if not isinstance(seconds, int | float) or not 0 < seconds <= 86_400:
        raise ConfigurationError(
            f"participant {name!r}: {what} is a number of seconds up to a day, not {seconds!r}"
        )
    return max(1, round(seconds * 1000))
