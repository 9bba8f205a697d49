"""The running transaction, and how a body of code becomes one.

`GlobalTransaction` is what user code holds and what participants enlist in. The rules of api.md
section 1 live here: returning commits, an exception aborts and is raised unchanged, a nested
function joins, the deadline cancels the body, a cancelled caller never cancels a second phase.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Coroutine
from logging import DEBUG, INFO
from typing import TYPE_CHECKING, Any, TypeVar

from coordinator.bridge import run_on
from coordinator.errors import (
    ConfigurationError,
    HeuristicOutcome,
    OutcomeUnknown,
    TransactionAborted,
    TransactionError,
)
from coordinator.events import AbortRequested, CommitRequested, Enlisted, Published
from coordinator.gate import Token
from coordinator.hooks import AfterEnd, BeforeCommit, Hooks
from coordinator.logs import kind_of
from coordinator.model import Branch, BranchId, LogId, Outcome, TransactionId, Xid
from coordinator.protocol import Phase

if TYPE_CHECKING:
    from coordinator.driver import Driver
    from coordinator.engine import Engine
    from coordinator.participant import Participant

_T = TypeVar("_T")

GRACE_SECONDS = 1.0
"""How long a caller whose time is up still waits to hear an outcome that is already on its way."""


class GlobalTransaction:
    """A running transaction. Made by a coordinator, never by hand."""

    def __init__(
        self,
        engine: Engine,
        driver: Driver,
        timeout: float,
        *,
        blocking: bool = False,
        outer: GlobalTransaction | None = None,
    ) -> None:
        self.timeout = timeout
        self.blocking = blocking
        self.outer = outer
        """The transaction that waits for the end of this one, which was begun inside it."""
        self.loop = asyncio.get_running_loop()
        self._process = os.getpid()
        self.token: Token | None = None
        """Its place among those that may work in databases; see `coordinator.gate`."""
        self.expired = False
        """Its deadline passed before the body returned."""
        self.is_left = False
        """Its body has returned: what still runs in it is a stray."""
        self._engine = engine
        self._driver = driver
        self._doom: TransactionAborted | None = None
        self._admission = asyncio.Lock()
        self._admitted = False
        self._attachment = b""
        self._alarm: asyncio.TimerHandle | None = None
        self.hooks = Hooks()

    @property
    def id(self) -> TransactionId:
        """Names the transaction to `coordinator.status`, to logs and to people.

        Whoever knows the id may ask for an abort; so reading it makes the commit a recorded one.
        """
        if self._driver.core.private:
            if self.blocking and asyncio._get_running_loop() is not self.loop:
                self.run(self._publish())
            else:
                self._post_published()
        return self._driver.core.id

    @property
    def id_in_logs(self) -> TransactionId:
        """The id for records of logs alone: it is not made public by reading it here."""
        return self._driver.core.id

    async def _publish(self) -> None:
        self._post_published()

    def _post_published(self) -> None:
        core = self._driver.core
        if core.private and core.phase in (Phase.ACTIVE, Phase.PREPARING):
            self._driver.post(Published())

    @property
    def deadline(self) -> float:
        """When the transaction's time is up, on the clock of its event loop, in seconds."""
        return self._driver.deadline

    @property
    def waits_end(self) -> float:
        """Until when to wait for what others hold: a little before the deadline, on its clock.

        Who waited in vain can then say for what, before the deadline ends the body.
        """
        return self.deadline - min(0.05, self.timeout / 10)

    @property
    def log_id(self) -> LogId:
        return self._engine.identity.id

    @property
    def is_over(self) -> bool:
        """True once the commit or the rollback began: nothing can be enlisted any more."""
        return self._driver.core.phase is not Phase.ACTIVE

    @property
    def outcome(self) -> Outcome:
        """What is known of the outcome just now."""
        return self._driver.outcome

    @property
    def is_doomed(self) -> bool:
        """It will abort, whatever the body still does."""
        return self._doom is not None or self.expired

    @property
    def has_ended(self) -> bool:
        """Every branch has ended: nothing of it is left."""
        return self._driver.core.phase is Phase.ENDED

    def belongs_to(self, engine: Engine) -> bool:
        return self._engine is engine

    def __repr__(self) -> str:
        return repr(self._driver.core)

    def refuse_unless_of(self, verb: str, *, blocking: bool) -> None:
        """Raise `TransactionError` if the transaction was begun with the other face."""
        if blocking and not self.blocking:
            raise TransactionError(
                f"{verb} is synchronous, but the transaction that runs here was begun by an "
                "asynchronous function: use its asynchronous verbs on the event loop, or make the "
                "whole function synchronous"
            )
        if self.blocking and not blocking:
            raise TransactionError(
                f"{verb} is asynchronous, but the transaction that runs here was begun by a "
                "synchronous function: use the verbs of `blocking`"
            )

    def before_commit(self, call: BeforeCommit) -> None:
        """Have `call` run when the body has returned and before the commit begins.

        For work that is still to be sent, such as a session's flush. It runs in the task, or in a
        synchronous transaction the thread, of the body, in the order of registration. What it
        raises aborts the transaction and is raised to the caller unchanged.
        """
        self.hooks.before_commit.append(call)

    def after_end(self, call: AfterEnd) -> None:
        """Have `call` run with the outcome once the caller is to be told, where the body ran.

        The class and place of what it raises are logged, and it changes nothing.
        """
        self.hooks.transaction = self._driver.core.id
        self.hooks.after_end.append(call)

    def attach(self, attachment: bytes) -> None:
        """Have bytes recorded with the commit, and kept as long as the transaction's key."""
        self._attachment = attachment

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on the transaction's event loop from a thread that has none.

        Raises `TransactionError` in a forked child, where that loop does not run.
        """
        if self._process != os.getpid():
            coroutine.close()
            raise TransactionError(
                "the transaction was begun before a fork: only the parent process can go on with it"
            )
        return run_on(self.loop, coroutine)

    async def admit(self) -> None:
        """Wait until one more transaction may work in databases; at once when it was let in.

        Participants call it before they take their first connection. One that was begun inside
        another has the other's place. Raises `TransactionAborted` (retryable) at the deadline,
        naming who holds the places.
        """
        if self.token is not None:
            return
        if self.outer is not None and self.outer.token is not None:
            self.token = self.outer.token
            return
        async with self._admission:  # one place, also where two tasks come at the same time
            if self.token is None:
                self.token = await self._wait_for_admission()
                self._admitted = True

    async def _wait_for_admission(self) -> Token:
        name = self._driver.core.id
        try:
            token = await self._engine.gate.enter(name, self.waits_end)
        except TimeoutError as error:
            reason = str(error)
            self._driver.story.say(DEBUG, "not-admitted", "%s", reason, reason=reason)
            raise TransactionAborted(reason, transaction_id=name, retryable=True) from error
        if self.is_over:
            token.leave()
            raise TransactionError(f"transaction {name} is over: nothing can take part in it")
        return token

    async def enlist(
        self, participant: Participant, *, one_phase: bool = False, last_resource: bool = False
    ) -> Xid:
        """Make a participant part of the transaction; returns the name of its branch.

        Called by participants. Raises `TransactionError` once the commit began, for a participant
        that this coordinator does not have, and for a second last resource.
        """
        self._check_enlistment(participant, last_resource)
        branch = BranchId(secrets.token_hex(8))
        xid = Xid(self.log_id, self._engine.member, self._driver.core.id, branch)
        self._driver.post(
            Enlisted(
                Branch(xid, participant.name), one_phase=one_phase, last_resource=last_resource
            )
        )
        return xid

    def _check_enlistment(self, participant: Participant, last_resource: bool) -> None:
        if self._doom is not None:
            raise TransactionError(f"the transaction cannot commit any more: {self._doom}")
        if self.is_over:
            raise TransactionError(
                f"transaction {self._driver.core.id} is {self._driver.core.phase}: "
                f"{participant.name} can take no part after the commit or the rollback began"
            )
        if self._engine.participants.get(participant.name) is not participant:
            raise ConfigurationError(
                f"{participant.name} is not a participant of this coordinator: name it in "
                "Coordinator(participants=[...])"
            )
        if last_resource and self._driver.core.has_last_resource:
            raise ConfigurationError(
                f"{participant.name} cannot prepare, and the transaction has such a participant "
                "already: at most one can take part"
            )

    def abort(self, reason: str = "abort() was called") -> None:
        """Doom the transaction without an exception: the body may go on, the commit will abort."""
        self.doom(TransactionAborted(reason, transaction_id=self._driver.core.id))

    def doom(self, cause: TransactionAborted) -> None:
        """The transaction will abort with `cause`; the first cause stands."""
        self._doom = self._doom or cause

    # The end, called by the scope that began the transaction.

    def expire_at_the_deadline(self) -> None:
        """Abort by itself at the deadline, for a body that runs in a thread and cannot be told."""
        self._alarm = self.loop.call_at(self.deadline, self._expire)

    def _expire(self) -> None:
        if self._driver.core.phase is Phase.ACTIVE:
            self.expired = True
            self._abort(INFO, self._deadline_passed(), retryable=True)

    async def conclude(self, error: BaseException | None) -> None:
        """Commit, or roll back for what the body raised; returns if nothing else is to be raised.

        Raises how the commit ended unless it is done, and the deadline's `TransactionAborted`.
        """
        self.is_left = True
        if self._alarm is not None:
            self._alarm.cancel()
        if self.token is not None:
            self.token.busy()  # the place of one that ends is not lent
        try:
            if self.expired:
                reason = self._deadline_passed()
                await self._roll_back(reason)
                core = self._driver.core
                raise TransactionAborted(reason, transaction_id=core.id, retryable=True) from error
            if error is None:
                await self.commit()
            else:
                reason = f"{type(error).__name__}: {error}"
                await self._roll_back(reason, error)
                if isinstance(error, asyncio.CancelledError):
                    self.note_outcome(error)
        except BaseException as raised:
            self._driver.story.told(raised)
            raise
        else:
            if self._driver.full_story is not None:
                self._driver.full_story.told(error)
        finally:
            if self.token is not None:
                self.token.idle()
                if self._admitted:
                    self.token.leave()

    async def commit(self) -> None:
        """Commit and return, or raise how it ended otherwise; see `coordinator.errors`."""
        if self._doom is not None:
            await self._roll_back(str(self._doom), self._doom)
            raise self._doom
        try:
            if self._driver.core.phase is Phase.ACTIVE:
                self._driver.post(CommitRequested(self._attachment))
            await self._until_told()
        except asyncio.CancelledError as cancelled:
            await self._cancelled(cancelled)
            raise
        self._raise_unless_committed()

    def _abort(self, level: int, reason: str, *, retryable: bool = False) -> None:
        self._driver.story.abort_requested(level, reason)
        self._driver.post(AbortRequested(reason, retryable))

    async def _roll_back(self, reason: str, raised: BaseException | None = None) -> None:
        """Roll back, waiting a little for the branches; never raises for what they answer."""
        driver = self._driver
        if raised is None:  # only the deadline
            driver.story.abort_requested(INFO, reason)
        elif driver.full_story is not None:
            how = "it is doomed by" if raised is self._doom else "the body raised"
            driver.story.abort_requested(DEBUG, f"{how} {kind_of(raised)}")
        driver.post(AbortRequested(reason))
        left = driver.deadline - asyncio.get_running_loop().time()
        await driver.until_over(min(max(left, GRACE_SECONDS), 2 * GRACE_SECONDS))

    async def _until_told(self) -> None:
        driver = self._driver
        left = driver.deadline - asyncio.get_running_loop().time()
        if await driver.until_over(left) or driver.core.decided:
            return
        self._abort(INFO, self._deadline_passed(), retryable=True)
        await driver.until_decided(GRACE_SECONDS)

    async def _cancelled(self, cancelled: asyncio.CancelledError) -> None:
        driver = self._driver
        self._abort(DEBUG, "the caller was cancelled")
        try:
            await driver.until_decided(GRACE_SECONDS)
        finally:
            self.note_outcome(cancelled)

    def note_outcome(self, error: BaseException) -> None:
        """Tell who reads the exception what became of the transaction."""
        error.add_note(f"transaction {self._driver.core.id}: {self._driver.outcome}")

    def _deadline_passed(self) -> str:
        return f"the deadline of {self.timeout:g} s passed"

    def _raise_unless_committed(self) -> None:
        core = self._driver.core
        if core.heuristic:
            raise HeuristicOutcome(
                transaction_id=core.id, outcome=self._driver.outcome, endings=core.heuristic
            )
        if core.outcome is Outcome.COMMITTED:
            return
        if core.outcome is Outcome.ABORTED:
            reason = core.reason or "somebody else recorded an abort first"
            raise TransactionAborted(reason, transaction_id=core.id, retryable=core.retryable)
        recorded = core.phase is not Phase.ONE_PHASE
        silent = "the log" if recorded else core.branches[0].participant
        reason = core.reason or self._driver.broken
        reason = reason or f"{silent} did not answer the commit within {self.timeout:g} s"
        raise OutcomeUnknown(reason, transaction_id=core.id, recorded=recorded)


def doomed_by(error: BaseException, transaction: GlobalTransaction) -> TransactionAborted:
    """What dooms a transaction in which a joined body raised."""
    if isinstance(error, TransactionAborted):
        return error
    doom = TransactionAborted(
        f"a function that had joined raised {type(error).__name__}: {error}",
        transaction_id=transaction._driver.core.id,
    )
    doom.__cause__ = error
    return doom
