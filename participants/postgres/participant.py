"""A PostgreSQL database as a participant: leased connections and PREPARE TRANSACTION.

No table is needed in the database, and no superuser. A vote PREPARED survives `kill -9` of the
server; what a stranger needs to end the branch is in its token. `docs/design.md` section 5 and
PostgreSQL's documentation of PREPARE TRANSACTION are the sources.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Generator
from contextlib import suppress
from types import TracebackType
from typing import Any

import psycopg

from coordinator.errors import (
    ConfigurationError,
    ProtocolError,
    TransactionAborted,
    TransactionError,
)
from coordinator.model import (
    FINISHED,
    Branch,
    BranchId,
    Ending,
    Verdict,
    Vote,
    VoteKind,
    Xid,
)
from coordinator.participant import Binding
from coordinator.transactional import GlobalTransaction, current
from participants.postgres.checks import connect_checked
from participants.postgres.connection import Configure, ServerConnection
from participants.postgres.finishing import Finisher
from participants.postgres.lease import Lease
from participants.postgres.location import Location, check_name
from participants.postgres.pool import Pool
from participants.postgres.replies import DatabaseUnavailable
from participants.postgres.statements import Begin, Greeting
from participants.postgres.work import Work

logger = logging.getLogger("syncpoint.postgres")

FINISHING_CONNECTIONS = 4
POOL_SIZE_MAX = 1000
IN_DOUBT_MAX = 10_000


class PostgreSQL:
    """The database at `url`, a libpq connection string, under a name for people and records.

    `pool_size` bounds the transactions that work here at a time; four more connections are used to
    end branches. `lock_timeout` and `statement_timeout` bound each statement of a transaction, in
    seconds. `configure` is awaited once with each new `psycopg.AsyncConnection`: adapters and row
    factories set on it are those of every lease. Raises `ConfigurationError` for wrong arguments;
    nothing is connected before a coordinator opens it.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        pool_size: int = 10,
        lock_timeout: float | None = None,
        statement_timeout: float | None = None,
        configure: Configure | None = None,
    ) -> None:
        self._name = check_name(name)
        self._location = Location(name, url)
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
        self._configure = configure
        self._open: _Open | None = None

    @property
    def name(self) -> str:
        return self._name

    def connection(self) -> Enlisting:
        """The running transaction's connection here: `await` it, or use it with `async with`.

        The first call enlists this database and sends BEGIN; later ones, and other tasks of the
        transaction, get the same connection. Leaving the block changes nothing. Raises
        `TransactionError` outside a transaction, `TransactionAborted` (retryable) when no
        connection can be had before the deadline.
        """
        return Enlisting(self)

    async def open(self, binding: Binding) -> str:
        """Connect, check the server's settings, and return its identity."""
        if self._open is not None and self._open.loop.is_closed():
            with suppress(RuntimeError):  # its loop ended without closing the coordinator
                await self.close()
        if self._open is not None:
            raise ConfigurationError(
                f"participant {self._name!r} is open already, for cluster "
                f"{self._open.binding.cluster!r}: give each coordinator a participant of its own"
            )
        first = await connect_checked(self._name, self._location, self._configure)
        greeting = first.greeting
        self._open = _Open(self, binding, greeting)
        self._open.pool.adopt(first)
        return f"postgresql:{greeting.system_identifier}:{greeting.database}"

    async def close(self) -> None:
        """Close every connection; open work is rolled back, prepared branches stay prepared."""
        opened, self._open = self._open, None
        if opened is not None:
            opened.close()

    async def prepare(self, xid: Xid) -> Vote:
        """See `Participant.prepare`. The vote's reason is for the caller, with the SQLSTATE."""
        opened = self._opened()
        work = opened.by_branch.get(xid.branch)
        if work is None:
            reason = f"nothing is open in {self._name} under branch {xid}"
            return Vote(VoteKind.ABORTED, reason=reason)
        async with work.lock:
            try:
                vote = await work.prepare()
            except BaseException:
                opened.drop(work)
                raise
            if vote.kind is not VoteKind.READ_ONLY:
                opened.drop(work)
            return vote

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
        opened.in_doubt.pop(branch.id, None)
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
                if opened.by_branch.get(branch.id) is work:
                    try:
                        await work.roll_back()
                        return FINISHED
                    finally:
                        opened.drop(work)
        ending = await opened.finisher.roll_back(branch, opened.in_doubt.get(branch.id))
        opened.in_doubt.pop(branch.id, None)
        return ending

    async def recover(self) -> Collection[Branch]:
        """The prepared branches of our log in this database, without their tokens."""
        opened = self._opened()
        return await opened.finisher.recover(opened.binding.log)

    def __repr__(self) -> str:
        state = "open" if self._open is not None else "closed"
        return f"<PostgreSQL {self._name!r} {self._location} {state}>"

    def _opened(self) -> _Open:
        if self._open is None:
            raise ConfigurationError(
                f"participant {self._name!r} is not open: name it in Coordinator(participants="
                "[...]), and work inside `async with coordinator`"
            )
        return self._open


class Enlisting:
    """What `connection()` returns: awaitable, and an asynchronous context manager."""

    __slots__ = ("_participant",)

    def __init__(self, participant: PostgreSQL) -> None:
        self._participant = participant

    def __await__(self) -> Generator[Any, Any, psycopg.AsyncConnection[Any]]:
        return self._lease().__await__()

    async def __aenter__(self) -> psycopg.AsyncConnection[Any]:
        return await self._lease()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """The transaction goes on."""

    async def _lease(self) -> psycopg.AsyncConnection[Any]:
        transaction = current()
        if transaction is None:
            raise TransactionError(
                f"{self._participant.name}.connection() was called outside a transaction: call it "
                "in a function decorated with @coordinator.transactional, or inside `async with "
                "coordinator.transaction()`"
            )
        return await self._participant._opened().lease(transaction)


class _Entry:
    """What a running transaction has here; `lock` lets one task open it while others wait."""

    __slots__ = ("lock", "work")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.work: Work | None = None


class _Open:
    """Everything that lives from `open` to `close`, on one event loop."""

    def __init__(self, participant: PostgreSQL, binding: Binding, greeting: Greeting) -> None:
        self.binding = binding
        self.loop = asyncio.get_running_loop()
        self.by_branch: dict[BranchId, Work] = {}
        self.in_doubt: dict[BranchId, int] = {}
        self.pool = Pool(self._connect, participant._pool_size)
        self.finisher = Finisher(
            participant.name, self.pool, Pool(self._connect, FINISHING_CONNECTIONS)
        )
        self._participant = participant
        self._name = participant.name
        self._greeting = greeting
        # Keyed by the object: asking a transaction for its id makes its commit a recorded one.
        self._entries: dict[GlobalTransaction, _Entry] = {}
        self._transactions: dict[BranchId, GlobalTransaction] = {}

    async def lease(self, transaction: GlobalTransaction) -> Lease[Any]:
        """The transaction's lease, opened at its first use here."""
        entry = self._entries.get(transaction)
        if entry is not None and entry.work is not None and entry.work.lease is not None:
            return entry.work.lease
        if transaction.log_id != self.binding.log:
            raise ConfigurationError(
                f"{self._name} was opened by another coordinator than the one whose transaction "
                "runs here: one coordinator must have both"
            )
        if entry is None:
            entry = self._entries[transaction] = _Entry()
        async with entry.lock:
            if entry.work is not None and entry.work.lease is not None:
                return entry.work.lease
            try:
                return await self._begin(transaction, entry)
            finally:
                if entry.work is None:
                    self._entries.pop(transaction, None)

    async def _begin(self, transaction: GlobalTransaction, entry: _Entry) -> Lease[Any]:
        try:
            session = await self._acquire(transaction)
            if entry.work is None:
                entry.work = await self._enlist(transaction, session)
            return await entry.work.begin(session, self._participant._begin)
        except (psycopg.Error, DatabaseUnavailable) as error:
            where = self._participant._location
            raise TransactionAborted(
                f"{self._name} cannot be reached at {where}: {where.for_people(str(error))}",
                retryable=True,
            ) from error

    async def _acquire(self, transaction: GlobalTransaction) -> ServerConnection:
        try:
            return await self.pool.acquire(transaction.deadline)
        except TimeoutError as error:
            raise TransactionAborted(
                f"no connection to {self._name} came free before the deadline; all "
                f"{self.pool.size} are held by {self._holders()}: make those transactions shorter, "
                "or raise pool_size",
                retryable=True,
            ) from error

    async def _enlist(self, transaction: GlobalTransaction, session: ServerConnection) -> Work:
        try:
            xid = await transaction.enlist(self._participant, one_phase=True)
            if transaction.is_over:
                raise TransactionError(f"{self._name}: the transaction of {xid} is over")
        except BaseException:
            self.pool.release(session)
            raise
        work = Work(self._name, self.pool, xid, transaction.deadline)
        self.by_branch[xid.branch] = work
        self._transactions[xid.branch] = transaction
        return work

    def drop(self, work: Work) -> None:
        """The branch is no longer open here; what may be prepared all the same is remembered."""
        branch = work.xid.branch
        self.by_branch.pop(branch, None)
        transaction = self._transactions.pop(branch, None)
        if transaction is not None:
            self._entries.pop(transaction, None)
        if work.in_doubt is not None:
            self.in_doubt[branch] = work.in_doubt
            if len(self.in_doubt) > IN_DOUBT_MAX:
                del self.in_doubt[next(iter(self.in_doubt))]

    def close(self) -> None:
        for work in list(self.by_branch.values()):
            work.lose(f"{self._name} was closed")
            self.drop(work)
        self.pool.close()
        self.finisher.close()

    async def _connect(self) -> ServerConnection:
        """A connection to the server that was opened, and to no other one.

        Raises `psycopg.Error`, `DatabaseUnavailable` and `ConfigurationError`.
        """
        session = await ServerConnection.open(
            self._participant._location.conninfo, self._participant._configure
        )
        found = session.greeting
        if found.system_identifier != self._greeting.system_identifier:
            session.close()
            raise ConfigurationError(
                f"{self._name} leads to another PostgreSQL cluster than when it was opened (system "
                f"identifier {found.system_identifier}, not {self._greeting.system_identifier}): "
                "point its url back, or restart"
            )
        if found.in_recovery:
            session.close()
            raise DatabaseUnavailable(f"{self._name} is a standby just now: waiting for a primary")
        return session

    def _holders(self) -> str:
        ids = [work.xid.transaction for work in self.by_branch.values() if work.lease is not None]
        shown = ", ".join(ids[:3])
        return f"{shown} and {len(ids) - 3} more" if len(ids) > 3 else shown or "others"


def _milliseconds(name: str, what: str, seconds: float | None) -> int | None:
    if seconds is None:
        return None
    if not isinstance(seconds, int | float) or not 0 < seconds <= 86_400:
        raise ConfigurationError(
            f"participant {name!r}: {what} is a number of seconds up to a day, not {seconds!r}"
        )
    return max(1, round(seconds * 1000))
