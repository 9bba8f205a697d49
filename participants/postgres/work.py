"""One open branch: the session it runs on, the lease its user holds, and how it is ended.

The order is: `begin` once, then either `prepare` and perhaps `commit` or `roll_back`, or
`commit_one_phase`, or `roll_back`. The first of them ends the lease for good. Whatever happens the
session goes back to its pool clean, or is closed.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from psycopg.pq import TransactionStatus

from coordinator.errors import ProtocolError, TransactionAborted, TransactionError
from coordinator.model import FINISHED, Ending, EndingKind, Verdict, Vote, VoteKind, Xid
from participants.postgres import psycopg_private, statements
from participants.postgres.blocking_lease import BlockingLease
from participants.postgres.connection import ANSWER_SECONDS_MAX, ServerConnection
from participants.postgres.finishing import Finisher
from participants.postgres.lease import Lease
from participants.postgres.leased import Terms
from participants.postgres.replies import (
    DatabaseUnavailable,
    Fate,
    Meaning,
    Reply,
    is_retryable,
    read_commit,
    read_prepare,
)
from participants.postgres.slots import Slots
from participants.postgres.statements import Examination, Greeting, Token

RAW_COMMIT = (
    "a COMMIT or ROLLBACK was sent as text to {name}, so that part of the work is no longer in "
    "the transaction: leave the end to the transactional function, and use "
    "`async with connection.transaction()` for a savepoint"
)
OVER = "its transaction is over"
# A read-only branch idles until the decision, which may come after the deadline.
IDLE_GRACE_SECONDS = 60.0
ROLLBACK_SECONDS_MAX = 1.0


class Refused(Exception):
    """The branch is rolled back; `vote` is its definite no. Never leaves this package."""

    def __init__(self, reason: str, *, retryable: bool = False) -> None:
        super().__init__(reason)
        self.vote = Vote(VoteKind.ABORTED, reason=reason, retryable=retryable)


AnyLease = Lease[Any] | BlockingLease[Any]


class Home(Protocol):
    """Where a session belongs: a pool, or the user who has enlisted it."""

    login_role: bytes
    """The statement that makes the session's login role the current one again."""

    def release(self, session: ServerConnection, /) -> None:
        """Take it back, in whatever state it is."""

    async def replace(self, session: ServerConnection, /) -> ServerConnection:
        """A new one for one that was found dead, or raise; the dead one is then to be released."""


class Work:
    """An open branch on one event loop. `lock` lets one end of it happen at a time.

    `kind` is the face on which the session is lent, under `terms`.
    """

    def __init__(self, home: Home, xid: Xid, terms: Terms, kind: type[AnyLease]) -> None:
        self.xid = xid
        self.lock = asyncio.Lock()
        self.lease: AnyLease | None = None
        self.is_read_only = False
        self.in_doubt: int | None = None
        self.home = home
        self._name = terms.participant
        self._terms = terms
        self._kind = kind
        self._session: ServerConnection | None = None
        self._begin_failed = ""
        self._ended = False

    async def begin(self, session: ServerConnection, begin: statements.Begin) -> AnyLease:
        """Send BEGIN and lend the session; a session found dead is replaced once.

        Takes the session over, whatever it raises: `TransactionAborted` with the server's answer,
        `TransactionError` when the branch was ended meanwhile, and what opening one raises.
        """
        async with self.lock:
            return await self._begin(session, begin)

    async def _begin(self, session: ServerConnection, begin: statements.Begin) -> AnyLease:
        self._session = session
        self._refuse_if_ended()
        reply = await self._ask_to_begin(session, begin)
        if not reply.connected:
            self._session = None
            try:
                fresh = await self.home.replace(session)
            except BaseException:
                self.home.release(session)
                raise
            self._session = fresh
            reply = await self._ask_to_begin(fresh, begin)
        if not reply.succeeded:
            self._give_back()
            self._begin_failed = f"{self._name} did not begin: {reply}"
            raise TransactionAborted(
                self._begin_failed,
                retryable=not reply.connected or is_retryable(reply.sqlstate),
            )
        self._refuse_if_ended()  # while it began
        self.lease = self._kind(self._session, self._terms)
        return self.lease

    def _refuse_if_ended(self) -> None:
        if self._ended:
            self._give_back()
            raise TransactionError(f"{self._name}: {OVER}")

    async def prepare(self, slots: Slots) -> Vote:
        """PREPARE TRANSACTION, or READ_ONLY with the branch still open.

        A slot is taken for it; who ends the branch gives it back. Raises `DatabaseUnavailable` when
        the answer was lost; `in_doubt` is then the branch's xid8.
        """
        try:
            session, found = await self._examine()
        except Refused as refused:
            return refused.vote
        token = _token(found, session.greeting)
        if found.xid8 is None:
            self.is_read_only = True
            return Vote(VoteKind.READ_ONLY, token)
        try:
            await slots.take(self.xid.branch, self._terms.waits_end)
        except TimeoutError as error:
            await self._leave(session)
            return Vote(VoteKind.ABORTED, reason=f"{self._name}: {error}", retryable=True)
        except BaseException:
            await self._leave(session)
            raise
        self.in_doubt = found.xid8
        try:
            reply = await session.ask(statements.prepare(self.xid), self._patience)
            meaning = read_prepare(reply)
            if meaning is Meaning.NO and not reply.replication_unconfirmed:
                self.in_doubt = None
        finally:
            await self._leave(session)
        if meaning is Meaning.DONE:
            self.in_doubt = None
            return Vote(VoteKind.PREPARED, token)
        if meaning is Meaning.NO:
            return self._no(reply)
        if meaning is Meaning.BUG:
            raise ProtocolError(f"{self._name} answered PREPARE of {self.xid}: {reply}")
        raise DatabaseUnavailable(
            f"{self._name} was lost while it prepared branch {self.xid}: {reply}"
        )

    async def commit(self) -> Ending:
        """COMMIT of a read-only branch, after the decision: its notifications leave now."""
        session = self._take()
        if session is None:
            return Ending(EndingKind.FINISHED, "the session was lost; nothing had been written")
        try:
            reply = await session.ask(statements.COMMIT)
        finally:
            await self._leave(session)
        if read_commit(reply) is Meaning.DONE:
            return FINISHED
        return Ending(EndingKind.FINISHED, f"nothing had been written; COMMIT: {reply}")

    async def commit_one_phase(self, finisher: Finisher) -> tuple[Verdict, str, bool]:
        """COMMIT as the decision. A lost answer is asked for until the server tells.

        Raises `DatabaseUnavailable` only if the server has lost track of the transaction.
        """
        try:
            session, found = await self._examine()
        except Refused as refused:
            return Verdict.ABORT, refused.vote.reason, refused.vote.retryable
        try:
            reply = await session.ask(statements.COMMIT, self._patience)
        finally:
            await self._leave(session)
        match read_commit(reply):
            case Meaning.DONE:
                return Verdict.COMMIT, "", False
            case Meaning.IN_DOUBT:
                return await self._learn(finisher, reply, found, session.greeting)
        vote = self._no(reply)
        return Verdict.ABORT, vote.reason, vote.retryable

    async def roll_back(self) -> None:
        """ROLLBACK if the session is idle, else close it, which rolls back as well."""
        session = self._take()
        if session is not None:
            await self._leave(session)

    def lose(self, why: str) -> None:
        """Close the session at once; what was not prepared is rolled back by the server."""
        self._ended = True
        if self.lease is not None:
            self.lease.lose(why)
        self._give_back()

    @property
    def _patience(self) -> float:
        """How long a commit or prepare may take, in seconds: the deadline ends it elsewhere."""
        return max(self._terms.seconds_left + 1.0, ANSWER_SECONDS_MAX)

    async def _ask_to_begin(self, session: ServerConnection, begin: statements.Begin) -> Reply:
        try:
            idle_limit_ms = int((max(self._terms.seconds_left, 0.0) + IDLE_GRACE_SECONDS) * 1000)
            with_modes = psycopg_private.begin_statement(session.raw)
            statement = begin.statement(with_modes, self.xid, session.greeting, idle_limit_ms)
            return await session.ask(statement)
        except BaseException:
            self._give_back()
            raise

    async def _examine(self) -> tuple[ServerConnection, Examination]:
        """End the lease and see whether its branch can be committed at all.

        Raises `Refused`, with everything rolled back. Nothing that could commit was sent yet, so
        every failure here is definite.
        """
        lease = self.lease
        session = self._take()
        if session is None or lease is None:
            failure = lease.failure if lease is not None else self._begin_failed
            raise Refused(
                failure or f"the connection to {self._name} was lost",
                retryable=not failure or lease is None or lease.failure_is_retryable,
            )
        try:
            status = session.pgconn.transaction_status
            if lease.condemned:
                raise Refused(lease.condemned, retryable=lease.failure_is_retryable)
            if status == TransactionStatus.INERROR:
                raise Refused(
                    f"a statement on {self._name} failed and the error was swallowed: "
                    f"{lease.failure}",
                    retryable=lease.failure_is_retryable,
                )
            if status == TransactionStatus.IDLE:
                raise Refused(RAW_COMMIT.format(name=self._name))
            reply = await session.ask(statements.EXAMINE, max(self._terms.seconds_left, 1.0))
            if not reply.succeeded:
                raise Refused(
                    f"{self._name} was lost before it prepared: {reply}",
                    retryable=not reply.connected or is_retryable(reply.sqlstate),
                )
            found = Examination.read(reply)
            if found.marker != str(self.xid):
                raise Refused(RAW_COMMIT.format(name=self._name))
            if not found.login_role:
                reply = await session.ask(statements.SETTLE + self.home.login_role, self._patience)
                if not reply.succeeded:
                    raise Refused(
                        f"{self._name}: {reply}",
                        retryable=not reply.connected or is_retryable(reply.sqlstate),
                    )
            if not found.replicated:
                await session.ask(statements.REPLICATE)
            self._session = session
        except BaseException:
            await self._leave(session)
            raise
        return session, found

    async def _learn(
        self, finisher: Finisher, reply: Reply, found: Examination, greeting: Greeting
    ) -> tuple[Verdict, str, bool]:
        lost = f"{self._name} was lost at the commit ({reply})"
        if found.xid8 is None:
            return Verdict.ABORT, f"{lost}; nothing had been written", True
        fate = await finisher.learn_fate(
            Token(found.xid8, greeting.system_identifier, greeting.timeline)
        )
        if fate is Fate.COMMITTED:
            return Verdict.COMMIT, "", False
        if fate is Fate.ABORTED:
            return Verdict.ABORT, f"{lost} and rolled back", True
        raise DatabaseUnavailable(
            f"{lost}, and the server no longer knows how transaction {found.xid8} ended"
        )

    def _no(self, reply: Reply) -> Vote:
        if reply.replication_unconfirmed:
            reason = f"no synchronous standby of {self._name} confirmed the branch"
            return Vote(VoteKind.ABORTED, reason=reason, retryable=True)
        if reply.tag == "ROLLBACK":
            reason = f"{self._name} had rolled the transaction back already"
        else:
            reason = f"{self._name}: {reply}"
        return Vote(VoteKind.ABORTED, reason=reason, retryable=is_retryable(reply.sqlstate))

    def _take(self) -> ServerConnection | None:
        """End the lease and take its session; None, and closed, if it is busy, lost or gone."""
        self._ended = True
        session, lease = self._session, self.lease
        if session is None or lease is None:
            return None
        if lease.end(OVER):
            return session
        if lease.is_lost:
            lease.lose("the connection was lost")
        else:
            lease.failure = (
                f"a statement was still running on {self._name} when its transaction ended: wait "
                "for every task and thread that uses the connection before the function returns"
            )
            lease.lose("a statement was still running on it when its transaction ended")
        self._give_back()
        return None

    async def _leave(self, session: ServerConnection) -> None:
        """Bring the session back to rest and give it back; it is closed if that fails."""
        self._session = session
        status = session.pgconn.transaction_status
        try:
            if session.is_connected and status != TransactionStatus.IDLE:
                psycopg_private.forget_prepared_statements(session.raw)
                await session.ask(statements.ROLLBACK, ROLLBACK_SECONDS_MAX)
        finally:
            self._give_back()

    def _give_back(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self.home.release(session)


def _token(found: Examination, greeting: Greeting) -> bytes:
    return Token(found.xid8 or 0, greeting.system_identifier, greeting.timeline).encode()
