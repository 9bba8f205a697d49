"""One open branch: the session it runs on, the lease its user holds, and how it is ended.

The order is: `begin` once, then either `prepare` and perhaps `commit` or `roll_back`, or
`commit_one_phase`, or `roll_back`. The first of them ends the lease for good. Whatever happens the
session goes back to its pool clean, or is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from psycopg.pq import TransactionStatus

from coordinator.errors import ProtocolError, TransactionAborted, TransactionError
from coordinator.model import FINISHED, Ending, EndingKind, Verdict, Vote, VoteKind, Xid
from coordinator.participant import Send
from participants.postgres import psycopg_private, statements, votes
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
from participants.postgres.statements import Examination, Greeting, InDoubt, Token

OVER = "its transaction is over"
# A read-only branch idles until the decision, which may come after the deadline.
IDLE_GRACE_SECONDS = 60.0
ROLLBACK_SECONDS_MAX = 1.0


AnyLease = Lease[Any] | BlockingLease[Any]
Voted = Callable[[Vote | Exception], None]


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
        self.in_doubt: InDoubt | None = None
        """What may prepare the branch from here on: PREPARE was sent, and no answer has come."""
        self.home = home
        self._name = terms.participant
        self._terms = terms
        self._kind = kind
        self._session: ServerConnection | None = None
        self._begin_failed = ""
        self._ended = False
        self._leaving: asyncio.Task[None] | None = None

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
        if isinstance(self.lease, BlockingLease):
            self._session.channel.detach()  # from here on its user waits for it, in a thread
        return self.lease

    def _refuse_if_ended(self) -> None:
        if self._ended:
            self._give_back()
            raise TransactionError(f"{self._name}: {OVER}")

    async def prepare(self, slots: Slots) -> Vote:
        """PREPARE TRANSACTION, or READ_ONLY with the branch still open.

        A slot is taken for it; who ends the branch gives it back. Raises `DatabaseUnavailable` when
        the answer was lost; `in_doubt` then tells what may yet prepare the branch.
        """
        try:
            session = await self._take_sound()
            found = await self._examine(session)
        except votes.Refused as refused:
            votes.refused(self._name, self.xid, refused.logged)
            return refused.vote
        if found.xid8 is None:
            self.is_read_only = True
            return Vote(VoteKind.READ_ONLY, votes.token(0, session.greeting))
        try:
            await slots.take(self.xid.branch, self._terms.waits_end)
        except TimeoutError as error:
            await self._leave(session)
            votes.refused(self._name, self.xid, str(error))
            return Vote(VoteKind.ABORTED, reason=f"{self._name}: {error}", retryable=True)
        except BaseException:
            await self._leave(session)
            raise
        self.in_doubt = found.xid8
        try:
            reply = await session.ask(statements.prepare(self.xid), self._patience)
        finally:
            await self._leave(session)
        return self._read_vote(reply, found, session.greeting)

    def prepare_at_once(self, slots: Slots) -> Send | None:
        """The same in one exchange, for a branch that is at rest and has certainly written.

        None where that is not so or no slot is free, and only the lease is over then. Whether part
        of the work was committed by text is seen when the branch is prepared: it votes no all the
        same, and its rollback ends what is prepared.
        """
        session, lease = self._session, self.lease
        if (
            session is None
            or lease is None
            or self.lock.locked()
            or not lease.has_written
            or lease.condemned
            or session.is_pooled
            or not session.greeting.process_began_us
            or session.pgconn.transaction_status != TransactionStatus.INTRANS
            or not lease.end(OVER)
            or not slots.try_take(self.xid.branch)
        ):
            return None
        self._ended = True
        return partial(self._send_prepare, session)

    def _send_prepare(self, session: ServerConnection, voted: Voted) -> None:
        self.in_doubt = session.greeting
        statement = statements.examine_and_prepare(self.xid, self.home.login_role)
        session.send(statement, partial(self._prepared, session, voted), self._patience)

    def _prepared(self, session: ServerConnection, voted: Voted, reply: Reply) -> None:
        answer: Vote | Exception
        try:
            answer = self._read_vote(reply, None, session.greeting)
        except TransactionError as error:
            answer = error
        if isinstance(self.in_doubt, Greeting):
            session.close()  # the rollback will end it on the server, so nobody else may have it
        if session.is_clean or not session.is_connected:
            self._give_back()
            voted(answer)
            return

        async def leave() -> None:
            try:
                await self._leave(session)
            finally:
                voted(answer)

        self._leaving = asyncio.get_running_loop().create_task(leave())

    def _read_vote(self, reply: Reply, found: Examination | None, greeting: Greeting) -> Vote:
        meaning = read_prepare(reply)
        if meaning is Meaning.NO:
            if not reply.replication_unconfirmed:
                self.in_doubt = None
            elif found is None:
                self.in_doubt = Examination.read_writer(reply).xid8
            return votes.no(self._name, self.xid, reply)
        if meaning is Meaning.BUG:
            raise ProtocolError(f"{self._name} answered PREPARE of {self.xid}: {reply}")
        if meaning is not Meaning.DONE:
            raise DatabaseUnavailable(
                f"{self._name} was lost while it prepared branch {self.xid}: {reply}"
            )
        self.in_doubt = None
        found = found or Examination.read_writer(reply)
        if found.marker != str(self.xid):  # the rollback of a branch that votes no ends it
            votes.refused(self._name, self.xid, votes.RAW_COMMIT)
            return Vote(VoteKind.ABORTED, reason=votes.raw_commit(self._name))
        return Vote(VoteKind.PREPARED, votes.token(found.xid8 or 0, greeting))

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
            session = await self._take_sound()
            found = await self._examine(session)
        except votes.Refused as refused:
            votes.refused(self._name, self.xid, refused.logged)
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
        vote = votes.no(self._name, self.xid, reply)
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

    async def _take_sound(self) -> ServerConnection:
        """End the lease and take its session.

        Raises `Refused`, with everything rolled back, if its branch cannot commit.
        """
        lease = self.lease
        session = self._take()
        if session is None or lease is None:
            failure = lease.failure if lease is not None else self._begin_failed
            raise votes.Refused(
                failure or f"the connection to {self._name} was lost",
                retryable=not failure or lease is None or lease.failure_is_retryable,
            )
        status = session.pgconn.transaction_status
        refused = None
        if lease.condemned:
            refused = votes.Refused(lease.condemned, retryable=lease.failure_is_retryable)
        elif status == TransactionStatus.INERROR:
            refused = votes.Refused(
                f"a statement on {self._name} failed and the error was swallowed: {lease.failure}",
                retryable=lease.failure_is_retryable,
            )
        elif status == TransactionStatus.IDLE:
            refused = votes.Refused(votes.raw_commit(self._name), votes.RAW_COMMIT)
        if refused is not None:
            await self._leave(session)
            raise refused
        return session

    async def _examine(self, session: ServerConnection) -> Examination:
        """See whether the branch can be committed at all, and make it ready.

        Raises `Refused`, with everything rolled back. Nothing that could commit was sent yet, so
        every failure here is definite.
        """
        try:
            reply = await session.ask(statements.EXAMINE, max(self._terms.seconds_left, 1.0))
            if not reply.succeeded:
                raise votes.Refused(
                    f"{self._name} was lost before it prepared: {reply}",
                    retryable=not reply.connected or is_retryable(reply.sqlstate),
                )
            found = Examination.read(reply)
            if found.marker != str(self.xid):
                raise votes.Refused(votes.raw_commit(self._name), votes.RAW_COMMIT)
            if not found.login_role:
                reply = await session.ask(statements.SETTLE + self.home.login_role, self._patience)
                if not reply.succeeded:
                    raise votes.Refused(
                        f"{self._name}: {reply}",
                        retryable=not reply.connected or is_retryable(reply.sqlstate),
                    )
            if not found.replicated:
                await session.ask(statements.REPLICATE)
            self._session = session
        except BaseException:
            await self._leave(session)
            raise
        return found

    async def _learn(
        self, finisher: Finisher, reply: Reply, found: Examination, greeting: Greeting
    ) -> tuple[Verdict, str, bool]:
        lost = f"{self._name} was lost at the commit ({reply})"
        if found.xid8 is None:
            return Verdict.ABORT, f"{lost}; nothing had been written", True
        fate = await finisher.learn_fate(
            Token(found.xid8, greeting.system_identifier, greeting.timeline), self.xid
        )
        if fate is Fate.COMMITTED:
            return Verdict.COMMIT, "", False
        if fate is Fate.ABORTED:
            return Verdict.ABORT, f"{lost} and rolled back", True
        raise DatabaseUnavailable(
            f"{lost}, and the server no longer knows how transaction {found.xid8} ended"
        )

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
