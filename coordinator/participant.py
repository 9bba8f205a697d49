"""PORT: what a resource does to take part in a transaction.

`Participant` is the whole of what recovery needs; what the normal path needs besides stands in the
small protocols `OnePhase` and `LastResource`, what `syncpoint check` asks in `Checkable`, and what
`syncpoint show` asks in `ShowsWaiters`.
Nobody has to inherit from them. Implementations run `participants.conformance` against themselves.

`Prompt` is for speed alone.

Who calls what: the engine calls `prepare` at most once for a branch, then `commit` or `rollback`,
which both may be repeated, by several processes at once, and long after the branch has ended.
Cancelling `prepare` leaves the branch in doubt; `rollback` follows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import msgspec

from coordinator.config import Settings
from coordinator.model import Branch, BranchId, Ending, LogId, MemberId, Verdict, Vote, Xid


class Binding(msgspec.Struct, frozen=True):
    """Whom a participant works for while a coordinator is open."""

    log: LogId
    member: MemberId
    cluster: str
    sharers: Callable[[], int] = lambda: 1
    """How many members of the cluster live, and share the participant's limits, as last seen."""


class Participant(Protocol):
    """A resource manager: a database, a topic, a service."""

    @property
    def name(self) -> str:
        """Names it in records, for people and for other processes; the same in all of them."""

    async def open(self, binding: Binding) -> str:
        """Connect, check every setting that the protocol rests on, and return the identity.

        The identity tells two names of one resource apart from two resources: it is the same from
        whichever process it is asked. Raises `ConfigurationError` with the fix. After `close` a
        participant may be opened again, on another event loop and for another coordinator.
        """

    async def close(self) -> None:
        """Release everything. Prepared branches stay prepared."""

    async def prepare(self, xid: Xid) -> Vote:
        """Make the branch durable and promise to commit it, or say that nothing was written.

        The vote PREPARED is given only after the resource's own durable answer. A definite no is
        the vote ABORTED. An exception means that nobody knows; the engine takes it for ABORTED.
        """

    async def commit(self, branch: Branch) -> Ending:
        """End the branch by commit: prepared, or read-only and still open in this process.

        Returns once it is durable. Repeatable by anyone. A branch that is gone is `FINISHED` only
        if the resource says that it committed; otherwise the ending is heuristic, with evidence.
        Any other failure raises, and is retried.
        """

    async def rollback(self, branch: Branch) -> Ending:
        """End the branch by rollback, whatever its state; an unknown branch is `FINISHED`."""

    async def recover(self) -> Collection[Branch]:
        """The branches that are prepared here and carry our log's id. Never anybody else's."""


@runtime_checkable
class Bounded(Protocol):
    """A participant that knows how many transactions can work there at the same time."""

    @property
    def at_once(self) -> int:
        """By its connections, its slots, whatever there is less of; asked again now and then."""


@runtime_checkable
class OnePhase(Protocol):
    """A participant whose own commit can be the decision, since it can say later how it ended."""

    async def commit_one_phase(self, branch: Branch) -> tuple[Verdict, str, bool]:
        """Commit without preparing: (COMMIT or ABORT, reason, retryable).

        A lost reply is resolved here, by asking the resource until it answers.
        """


@runtime_checkable
class LastResource(Protocol):
    """A participant that cannot prepare; a delegated decision makes its own commit the decision."""

    async def ask(self, branch: Branch, *, commit: bool) -> Verdict:
        """End the branch if it is still open, by commit or abort as asked; answer how it ended.

        Repeatable by anyone; once it has answered, every later answer is the same.
        """


class Waiter(msgspec.Struct, frozen=True):
    """A session that cannot go on before a prepared branch has ended.

    `session` is what the resource calls it, for PostgreSQL the process id. `seconds` is how long it
    has waited, None where the resource does not say. `behind` is the session before it in the
    queue, None for one that waits for the branch itself. `query` is what it runs, shortened; empty
    where it may not be seen, and then `note` says why.
    """

    branch: BranchId
    session: int
    seconds: float | None
    query: str
    behind: int | None = None
    note: str = ""


@runtime_checkable
class ShowsWaiters(Protocol):
    """A participant that can tell which sessions its prepared branches hold up."""

    async def waiting(self, branches: Collection[Branch]) -> Sequence[Waiter]:
        """Who waits for these branches, directly or behind another, the longest wait first.

        A session that several branches hold up is named for each. Raises when it cannot be told.
        """


Send = Callable[[Callable[[Any], None]], None]
"""Sends one request, and calls what it is given once with the answer, on the loop and later."""


@runtime_checkable
class Prompt(Protocol):
    """A participant that can send a request without a task of its own, when all is well.

    None means that it cannot just now, and the ordinary method is called instead. Otherwise the
    request leaves when the returned function is called, which the caller does at once. A class that
    overrides `prepare` or `commit` of one that is prompt must override these as well.
    """

    def prepare_at_once(self, xid: Xid) -> Send | None:
        """As `prepare`; the answer is a `Vote`, or the exception that `prepare` would raise."""

    def commit_at_once(self, branch: Branch) -> Send | None:
        """As `commit` of a prepared branch; the answer is an `Ending`, or None to call `commit`."""


class Level(StrEnum):
    """How much a finding matters. With what must change, transactions are unsafe or cannot run."""

    OK = "ok"
    NOTE = "note"
    MUST_CHANGE = "must-change"


class Finding(msgspec.Struct, frozen=True):
    """What a check saw. `fix` says what to do about it; empty when there is nothing to do."""

    subject: str
    level: Level
    message: str
    fix: str = ""


@runtime_checkable
class Checkable(Protocol):
    """A participant that can compare its resource's settings with what is needed.

    Both may be called whether it is open or not, beside services that run, and by who is no member.
    """

    async def check(self, log: LogId | None, settings: Settings) -> Sequence[Finding]:
        """Look at everything and change nothing; a resource that is down is a finding too.

        `log` tells our branches from others; None while the log has no id that can be read.
        """

    def role_sql(self) -> str:
        """What an administrator runs once, so that a service needs no further rights."""


class LogCheck(msgspec.Struct, frozen=True):
    """What the check of a decision log found, and the log's id if it has one already."""

    log: LogId | None
    findings: Sequence[Finding]


@runtime_checkable
class CheckableLog(Protocol):
    """A decision log that can be looked at without being opened or created."""

    async def check(self, settings: Settings) -> LogCheck:
        """Look at everything and change nothing."""
