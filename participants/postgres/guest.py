"""A connection that was made elsewhere and takes part: a framework's, or one of a user's own pool.

It is the user's before and after. In between its end is ours: the verbs that would end the
transaction or the session are shadowed on the object, and everything that it sends or reads passes
through the lease, which is made over the same session.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from psycopg import AsyncConnection, Connection
from psycopg.pq import PipelineStatus, TransactionStatus

from coordinator.errors import ConfigurationError, TransactionAborted, TransactionError
from coordinator.transactional import GlobalTransaction
from participants.postgres.blocking_lease import BlockingLease
from participants.postgres.channel import Channel
from participants.postgres.connection import ServerConnection, greet
from participants.postgres.lease import Lease
from participants.postgres.leased import INSTEAD, Leased, refuse
from participants.postgres.statements import Greeting
from participants.postgres.work import AnyLease

Driver = AsyncConnection[Any] | Connection[Any]


class Guest:
    """The home of a session that its user has lent.

    `owner` names who would roll back by itself while errors are handled, such as a session of
    SQLAlchemy: its rollback then only condemns the branch, and what went wrong reaches the user.
    """

    login_role = b"SET LOCAL ROLE NONE"  # the role that it came with is its own again afterwards

    def __init__(self, raw: Driver, owner: str = "") -> None:
        self.raw = raw
        self._owner = owner
        self._handlers = (raw.pgconn.notice_handler, raw.pgconn.notify_handler)

    async def greet(self, participant: str, expected: Greeting, user: bytes) -> ServerConnection:
        """The session, if it can take part. Nothing of the user's may be running on it.

        Raises `TransactionError` for its state and `ConfigurationError` for where it leads: to the
        database of `expected`, and as `user`, or nobody could end its branch later.
        """
        self._refuse_unless_at_rest(participant)
        channel = Channel(self.raw.pgconn)
        try:
            found = await greet(channel)
        except BaseException:
            channel.detach()
            self.raw.pgconn.finish()  # an answer may still be on the way, which nobody must read
            raise
        channel.detach()  # it may be refused below, and then is its user's again
        self._listen()
        there = f"{found.database!r} of the cluster {found.system_identifier}"
        here = f"{expected.database!r} of the cluster {expected.system_identifier}"
        if there != here:
            raise ConfigurationError(
                f"the connection leads to database {there}, and participant {participant!r} is "
                f"database {here}: enlist it with the participant of its own database"
            )
        if found.in_recovery:
            raise ConfigurationError(
                f"the connection leads to a standby of {participant!r}, where nothing can be "
                "prepared: connect it to the primary"
            )
        if self.raw.pgconn.user != user:
            raise ConfigurationError(
                f"the connection belongs to the role {self.raw.pgconn.user.decode()!r}, and "
                f"participant {participant!r} is {user.decode()!r}, who could not end its branch "
                "after a crash: connect both as one role"
            )
        return ServerConnection(self.raw, found, channel)

    def _refuse_unless_at_rest(self, participant: str) -> None:
        pgconn = self.raw.pgconn
        problem, fix = "", ""
        if "wait" in vars(self.raw):
            problem = "it takes part in a transaction already"
            fix = "Give each transaction one of its own"
        elif self.raw.closed:
            problem, fix = "it is closed or broken", "Open a new one"
        elif pgconn.pipeline_status != PipelineStatus.OFF:
            problem, fix = "it is in pipeline mode", "Leave the pipeline first"
        elif pgconn.transaction_status == TransactionStatus.ACTIVE:
            problem, fix = "a statement is running on it", "Wait for its end first"
        elif pgconn.transaction_status != TransactionStatus.IDLE:
            problem = "it is a session with an open transaction, whose work would be left out"
            fix = "Commit it, or enlist it before its first statement"
        if problem:
            raise refused(participant, problem, fix)

    def lend(self, lease: AnyLease) -> None:
        """From now on the connection is the lease's other face."""
        lease.lock = self.raw.lock
        shadows: dict[str, Any] = {verb: self._refusing(verb) for verb in INSTEAD}
        if self._owner:
            shadows["rollback"] = self._condemning(lease)
        shadows["wait"] = lease.wait
        vars(self.raw).update(shadows)
        self._listen()

    def release(self, session: ServerConnection) -> None:
        """Give it back as it was; it is closed if nobody can say what state it is in."""
        for name in (*INSTEAD, "wait"):
            with suppress(KeyError):
                del vars(self.raw)[name]
        if not session.closes_itself:
            session.channel.detach()
        self._listen()
        if not session.is_clean:
            session.close()

    async def replace(self, session: ServerConnection) -> ServerConnection:
        raise TransactionAborted(
            "the enlisted connection was found dead when its branch began", retryable=True
        )

    def _listen(self) -> None:
        """Its own handlers of notices are heard, also while it takes part."""
        self.raw.pgconn.notice_handler, self.raw.pgconn.notify_handler = self._handlers

    def _refusing(self, verb: str) -> Callable[..., Any]:
        if isinstance(self.raw, Connection):
            return lambda *_, **__: refuse(verb)

        async def refusing(*_: object, **__: object) -> None:
            refuse(verb)

        return refusing

    def _condemning(self, lease: Leased[Any]) -> Callable[..., Any]:
        def condemn() -> None:
            why = f"{lease.terms.participant} was rolled back by {self._owner}"
            lease.condemn(f"{why}: {lease.failure}" if lease.failure else why)

        if isinstance(self.raw, Connection):
            return condemn

        async def condemning() -> None:
            condemn()

        return condemning


def refused(participant: str, problem: str, fix: str) -> TransactionError:
    return TransactionError(
        f"{participant} cannot take part with this connection: {problem}. {fix}"
    )


def kind_of(raw: object, *, blocking: bool) -> type[AnyLease]:
    """On which face it is lent; raises `ConfigurationError` for what cannot be enlisted there."""
    if isinstance(raw, Leased):
        raise TransactionError(
            "this connection was given out by a participant and takes part already: just use it"
        )
    if isinstance(raw, Connection if blocking else AsyncConnection):
        return BlockingLease if blocking else Lease
    if isinstance(raw, AsyncConnection):
        raise ConfigurationError(
            "the connection is asynchronous: enlist it with `await participant.enlist(...)` in an "
            "asynchronous function"
        )
    if isinstance(raw, Connection):
        raise ConfigurationError(
            "the connection is synchronous: enlist it with `participant.blocking.enlist(...)` in a "
            "synchronous function"
        )
    raise ConfigurationError(
        "what can be enlisted is a connection of psycopg, or a connection or session of SQLAlchemy "
        f"on psycopg, not a {type(raw).__module__}.{type(raw).__qualname__}"
    )


def comes_from_sqlalchemy(something: object) -> bool:
    """Whether it is of a class of SQLAlchemy, or derived from one; imports nothing."""
    return any(each.__module__.startswith("sqlalchemy.") for each in type(something).__mro__)


@asynccontextmanager
async def driver_of(
    made_elsewhere: Any, transaction: GlobalTransaction
) -> AsyncIterator[tuple[AsyncConnection[Any], str]]:
    """The psycopg connection under it, and who would roll it back by itself, if anybody.

    The block begins the branch; an exception that leaves it undoes everything.
    """
    if comes_from_sqlalchemy(made_elsewhere):
        from participants.postgres.session_joining import OWNER, joining

        async with joining(made_elsewhere, transaction) as driver:
            yield driver, OWNER
        return
    kind_of(made_elsewhere, blocking=False)
    yield made_elsewhere, ""


@contextmanager
def blocking_driver_of(
    made_elsewhere: Any, transaction: GlobalTransaction
) -> Iterator[tuple[Connection[Any], str]]:
    """The same for what belongs to synchronous functions."""
    if comes_from_sqlalchemy(made_elsewhere):
        from participants.postgres.session_joining import OWNER, joining_blocking

        with joining_blocking(made_elsewhere, transaction) as driver:
            yield driver, OWNER
        return
    kind_of(made_elsewhere, blocking=True)
    yield made_elsewhere, ""
