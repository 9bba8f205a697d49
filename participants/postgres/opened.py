"""What a participant has while a coordinator is open: its pools, and what is open in each branch.

Everything here lives on one event loop. Threads of synchronous transactions only read what is
there already, and have everything else done on the loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import psycopg

from coordinator.errors import ConfigurationError, TransactionAborted, TransactionError
from coordinator.logs import say
from coordinator.model import BranchId
from coordinator.participant import Binding
from coordinator.transactional import GlobalTransaction
from participants.postgres import psycopg_private, votes
from participants.postgres.blocking_lease import BlockingLease
from participants.postgres.connection import ServerConnection
from participants.postgres.finishing import Finisher
from participants.postgres.guest import Driver, Guest, kind_of
from participants.postgres.lease import Lease
from participants.postgres.leased import Terms
from participants.postgres.pool import Pool
from participants.postgres.replies import DatabaseUnavailable
from participants.postgres.slots import Slots
from participants.postgres.sources import Source
from participants.postgres.statements import Begin, InDoubt
from participants.postgres.work import AnyLease, Home, Work

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

    from participants.postgres.participant import PostgreSQL
    from participants.postgres.sessions import Sessions

logger = logging.getLogger("syncpoint.postgres")

FINISHING_CONNECTIONS = 4
IN_DOUBT_MAX = 10_000


class _Entry:
    """What a running transaction has here; `lock` lets one task open it while others wait."""

    __slots__ = ("lock", "session", "thread_lock", "work")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.thread_lock = threading.Lock()
        self.work: Work | None = None
        self.session: Any = None
        """The session of SQLAlchemy over the lease, if one was asked for."""

    @property
    def lease(self) -> AnyLease | None:
        return self.work.lease if self.work is not None else None


class Opened:
    """Everything that lives from `open` to `close`, on one event loop.

    `first` is the connection over which the server was looked at, `begin` how branches begin.
    """

    def __init__(
        self,
        participant: PostgreSQL,
        binding: Binding,
        source: Source,
        begin: Begin,
        first: ServerConnection,
    ) -> None:
        self.binding = binding
        self.loop = asyncio.get_running_loop()
        self.process = os.getpid()
        self.by_branch: dict[BranchId, Work] = {}
        self.in_doubt: dict[BranchId, InDoubt] = {}
        self.pool = Pool(self.connect, participant.pool_size)
        self.pool.adopt(first)
        self.finisher = Finisher(
            participant.name,
            self.pool,
            Pool(self.connect, FINISHING_CONNECTIONS),
            first.greeting.system_identifier,
        )
        self.slots = Slots(first.greeting.max_prepared_transactions, binding.sharers)
        self._participant = participant
        self._name = participant.name
        self._source = source
        self._begin_statement = begin
        self._greeting = first.greeting
        self._user = first.pgconn.user
        # Keyed by the object: asking a transaction for its id makes its commit a recorded one.
        self._entries: dict[GlobalTransaction, _Entry] = {}
        self._transactions: dict[BranchId, GlobalTransaction] = {}
        self._made_sessions: Sessions | None = None
        self._sessions_lock = threading.Lock()

    def entry_of(self, transaction: GlobalTransaction) -> _Entry | None:
        """What the transaction has here, if its branch is open; from any thread."""
        entry = self._entries.get(transaction)
        return entry if entry is not None and entry.lease is not None else None

    async def lease(self, transaction: GlobalTransaction) -> AnyLease:
        """The transaction's lease, opened at its first use here."""

        async def open_branch(entry: _Entry) -> None:
            session = await self._acquire(transaction)
            kind: type[AnyLease] = BlockingLease if transaction.blocking else Lease
            await self._begin(transaction, entry, session, self.pool, kind)

        entry = self.entry_of(transaction)
        if entry is None:
            entry = await self._in_turn(transaction, open_branch)
        assert entry.lease is not None
        return entry.lease

    def blocking_lease(self, transaction: GlobalTransaction) -> BlockingLease[Any]:
        """The same for a synchronous transaction; called in one of its threads."""
        entry = self.entry_of(transaction)
        lease = entry.lease if entry is not None else transaction.run(self.lease(transaction))
        assert isinstance(lease, BlockingLease)
        return lease

    def is_enlisted(self, transaction: GlobalTransaction, raw: psycopg.BaseConnection[Any]) -> bool:
        """Whether the transaction's branch runs on this connection already; from any thread.

        Raises `TransactionError` if it runs on another one.
        """
        entry = self.entry_of(transaction)
        if entry is None or entry.work is None:
            return False
        home = entry.work.home
        if not isinstance(home, Guest) or home.raw is not raw:
            raise TransactionError(
                f"{self._name} has a connection in this transaction already, and can have only "
                f"one: use {self._name}.connection() or session(), or enlist before the first use"
            )
        return True

    async def enlist(self, transaction: GlobalTransaction, raw: Driver, owner: str) -> None:
        """Take part with a connection that was made elsewhere; the caller holds its lock.

        Raises `TransactionError` and `ConfigurationError` saying why it cannot.
        """
        kind = kind_of(raw, blocking=transaction.blocking)

        async def open_branch(entry: _Entry) -> None:
            guest = Guest(raw, owner)
            session = await guest.greet(self._name, self._greeting, self._user)
            guest.lend(await self._begin(transaction, entry, session, guest, kind))

        await self._in_turn(transaction, open_branch)
        self.is_enlisted(transaction, raw)

    # Sessions of SQLAlchemy.

    async def session(self, transaction: GlobalTransaction) -> AsyncSession:
        """The transaction's session, over its lease; the same one for all of its tasks."""
        sessions = self._sessions()
        lease = await self.lease(transaction)
        entry = self._entry(transaction)
        async with entry.lock:
            if entry.session is None:
                assert isinstance(lease, Lease)
                entry.session = await sessions.open_session(
                    lease, transaction, lambda: self._spare(psycopg.AsyncConnection)
                )
        session: AsyncSession = entry.session
        return session

    def blocking_session(self, transaction: GlobalTransaction) -> Session:
        """The same for a synchronous transaction; called in its thread."""
        sessions = self._sessions()
        lease = self.blocking_lease(transaction)
        entry = self._entry(transaction)
        with entry.thread_lock:
            if entry.session is None:
                entry.session = sessions.open_blocking_session(
                    lease, transaction, lambda: transaction.run(self._spare(psycopg.Connection))
                )
        session: Session = entry.session
        return session

    def _entry(self, transaction: GlobalTransaction) -> _Entry:
        entry = self._entries.get(transaction)
        if entry is None:
            raise TransactionError(f"{self._name}: the transaction is over")
        return entry

    def _sessions(self) -> Sessions:
        with self._sessions_lock:
            if self._made_sessions is None:
                self._made_sessions = self._make_sessions()
            return self._made_sessions

    def _make_sessions(self) -> Sessions:
        try:
            from participants.postgres.sessions import Sessions
        except ImportError as error:
            raise ConfigurationError(
                f"{self._name}: sessions need SQLAlchemy: pip install 'syncpoint[sqlalchemy]' "
                f"({error})"
            ) from error
        return Sessions(self._name, self._source.engine)

    async def _spare(self, face: type[psycopg.BaseConnection[Any]]) -> ServerConnection:
        """A connection beside the pool, for a dialect's first look; its user closes it."""
        session = await self.connect()
        session.raw = psycopg_private.with_face(session.raw, face)
        return session

    # Opening a branch.

    async def _in_turn(
        self,
        transaction: GlobalTransaction,
        open_branch: Callable[[_Entry], Awaitable[None]],
    ) -> _Entry:
        """The transaction's entry, once its branch is open, by whichever task came first."""
        if transaction.log_id != self.binding.log:
            raise ConfigurationError(
                f"{self._name} was opened by another coordinator than the one whose transaction "
                "runs here: one coordinator must have both"
            )
        entry = self._entries.setdefault(transaction, _Entry())
        async with entry.lock:
            if entry.lease is not None:
                return entry
            try:
                await transaction.admit()
                await open_branch(entry)
            except (psycopg.Error, DatabaseUnavailable) as error:
                where = self._source.location
                reason = f"cannot be reached at {where}: {where.for_people(str(error))}"
                self._say(transaction, "unreachable", reason)
                raise TransactionAborted(f"{self._name} {reason}", retryable=True) from error
            finally:
                if entry.work is None:
                    self._entries.pop(transaction, None)
            return entry

    async def _begin(
        self,
        transaction: GlobalTransaction,
        entry: _Entry,
        session: ServerConnection,
        home: Home,
        kind: type[AnyLease],
    ) -> AnyLease:
        """Enlist and send BEGIN; takes the session over, whatever is raised."""
        if entry.work is None:
            try:
                xid = await transaction.enlist(self._participant, one_phase=True)
                if transaction.is_over:
                    raise TransactionError(f"{self._name}: the transaction of {xid} is over")
            except BaseException:
                home.release(session)
                raise
            terms = Terms(
                self._name,
                xid,
                transaction.deadline,
                transaction.waits_end,
                transaction.loop,
                transaction.token,
            )
            entry.work = Work(home, xid, terms, kind)
            self.by_branch[xid.branch] = entry.work
            self._transactions[xid.branch] = transaction
        entry.work.home = home  # an earlier attempt to begin may have failed elsewhere
        try:
            return await entry.work.begin(session, self._begin_statement)
        except TransactionAborted as error:
            votes.refused(self._name, entry.work.xid, str(error))
            raise

    async def _acquire(self, transaction: GlobalTransaction) -> ServerConnection:
        nested = transaction.outer is not None
        try:
            return await self.pool.acquire(transaction.waits_end, nested=nested)
        except TimeoutError as error:
            reason = (
                f"no connection to {self._name} came free before the deadline; all "
                f"{self.pool.size} are held by {self._holders()}: make those transactions shorter, "
                "or raise pool_size"
            )
            self._say(transaction, "no-connection", reason)
            raise TransactionAborted(reason, retryable=True) from error

    def _say(self, transaction: GlobalTransaction, what: str, reason: str) -> None:
        if isinstance(transaction, GlobalTransaction):  # a trial's is none
            fields = {"participant": self._name, "reason": reason}
            name, message = transaction.id_in_logs, "%s: %s"
            say(logger, logging.DEBUG, name, what, message, *fields.values(), **fields)

    # Ending.

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

    def forget(self, branch: BranchId) -> None:
        """The branch has ended on the server."""
        self.in_doubt.pop(branch, None)
        self.slots.give(branch)

    def close(self) -> None:
        for work in list(self.by_branch.values()):
            work.lose(f"{self._name} was closed")
            self.drop(work)
        self.pool.close()
        self.finisher.close()

    async def connect(self) -> ServerConnection:
        """A connection to the server that was opened, and to no other one.

        Raises `psycopg.Error`, `DatabaseUnavailable` and `ConfigurationError`.
        """
        session = await self._source.connect()
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
