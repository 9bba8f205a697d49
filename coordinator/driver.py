"""Performs the actions of one transaction and feeds the answers back to the protocol core.

The loop is the one that `coordinator.protocol` prints: an answer is an event, an event yields
actions, actions run in parallel. A driver belongs to no caller: when the caller is cancelled, or
its deadline passes, the driver goes on in tasks of its own until every branch has ended.

Nothing is decided here. What fails is tried again with backoff and jitter, for ever, unless the
driver was given `Patience.ONCE` (the sweep, which comes again).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from enum import Enum
from typing import Any, Protocol, TypeVar

from coordinator import failpoint
from coordinator.errors import ConfigurationError, ProtocolError
from coordinator.events import (
    Action,
    Answered,
    AskLastResource,
    ClaimStands,
    Commit,
    CommitOnePhase,
    Decide,
    Decided,
    Event,
    Finished,
    Forget,
    Prepare,
    RecordAnswer,
    Refused,
    Report,
    Resolved,
    Rollback,
    Voted,
)
from coordinator.log.base import BelowHorizon, ClaimHeld, Incident, Log, Mark, Proposal
from coordinator.model import Branch, BranchId, Ending, Outcome, Vote, VoteKind
from coordinator.participant import LastResource, OnePhase, Participant
from coordinator.protocol import Phase, Transaction

logger = logging.getLogger("syncpoint.driver")

PREPARE_GRACE_SECONDS = 0.25

_T = TypeVar("_T")


class Patience(Enum):
    FOR_EVER = "for ever"
    ONCE = "once"


class _GivenUp(Exception):
    """An action failed, and whoever drives has the patience for one try only."""


class Surroundings(Protocol):
    """What a driver needs of the engine that owns it."""

    log: Log
    participants: Mapping[str, Participant]
    retry_first: float
    retry_most: float

    def mark(self, mark: Mark) -> None:
        """Write a finished mark some time soon."""

    def ended(self, driver: Driver) -> None:
        """The driver has nothing left to do."""


class Driver:
    """Drives one transaction; all its methods are called on the engine's event loop."""

    def __init__(
        self,
        surroundings: Surroundings,
        core: Transaction,
        *,
        deadline: float = 0.0,
        patience: Patience = Patience.FOR_EVER,
    ) -> None:
        self.core = core
        self.deadline = deadline
        self.born = asyncio.get_running_loop().time()
        self.left: list[str] = []
        """Why actions were given up, where patience is ONCE."""
        self._around = surroundings
        self._patience = patience
        self._tasks: set[asyncio.Task[None]] = set()
        self._preparing: dict[BranchId, asyncio.Task[None]] = {}
        self._decided_waiters: list[asyncio.Future[bool]] = []
        self._ended_waiters: list[asyncio.Future[bool]] = []
        self._broken: BaseException | None = None

    @property
    def over(self) -> bool:
        """Nothing will happen any more, here: ended, unknown, given up or broken."""
        resting = self.core.phase in (Phase.ENDED, Phase.UNKNOWN) or self._broken is not None
        return resting or (bool(self.left) and not self._tasks)

    @property
    def broken(self) -> str:
        """The bug that stopped this driver, if one did."""
        return "" if self._broken is None else f"{type(self._broken).__name__}: {self._broken}"

    @property
    def outcome(self) -> Outcome:
        return self.core.outcome or Outcome.UNKNOWN

    @property
    def decided(self) -> bool:
        return self.core.decided or self.over

    def post(self, event: Event) -> None:
        """Feed an event and start what it calls for. Raises `ProtocolError` if it is illegal."""
        for action in self.core.step(event):
            self._start(action)
        self._wake()

    async def until_decided(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until the outcome stands; False when it does not yet."""
        return self.decided or await self._wait(self._decided_waiters, timeout)

    async def until_over(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until every branch has ended; False when some has not."""
        return self.over or await self._wait(self._ended_waiters, timeout)

    async def _wait(self, waiters: list[asyncio.Future[bool]], timeout: float) -> bool:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        waiters.append(waiter)
        alarm = loop.call_later(max(timeout, 0.0), _release, [waiter], False)
        try:
            return await waiter
        finally:
            alarm.cancel()

    def _wake(self) -> None:
        if self._decided_waiters and self.decided:
            _release(self._decided_waiters, True)
        if self.over:
            _release(self._ended_waiters, True)
            if not self._tasks:
                self._around.ended(self)

    def abandon(self) -> None:
        """Stop working at once; what is left is for recovery."""
        for task in self._tasks:
            task.cancel()

    # Performing actions.

    def _start(self, action: Action) -> None:
        if isinstance(action, Forget):
            self._around.mark(Mark(self.core.id, action.branch))
            return
        task = asyncio.get_running_loop().create_task(self._run(action))
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        if isinstance(action, Prepare):
            self._preparing[action.branch.id] = task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._broken = self._broken or task.exception()
            logger.critical(
                "transaction %s cannot go on: %r; recovery will end it",
                self.core.id,
                task.exception(),
                exc_info=task.exception(),
            )
        self._wake()

    async def _run(self, action: Action) -> None:
        """Perform an action, then go on inline with the first action that its answer calls for."""
        current: Action | None = action
        while current is not None:
            event = await self._perform(current)
            if event is None:
                return
            following = self.core.step(event)
            current = None
            for each in following:
                if current is None and not isinstance(each, Forget | Prepare):
                    current = each
                else:
                    self._start(each)
            self._wake()

    async def _perform(self, action: Action) -> Event | None:
        effect, perform = _EFFECTS[type(action)]
        failpoint.reach(f"{effect}:before")
        try:
            event = await perform(self, action)
        except _GivenUp as given_up:
            self.left.append(str(given_up))
            return None
        failpoint.reach(f"{effect}:after")
        return event

    async def _prepare(self, action: Prepare) -> Event:
        branch = action.branch
        try:
            vote = await self._participant(branch).prepare(branch.xid)
        except Exception as error:
            # Unknown counts as no; the rollback that follows, or the sweep, ends what may stand.
            logger.warning(
                "%s did not answer prepare of %s: %s", branch.participant, branch.xid, error
            )
            reason = f"{branch.participant} did not answer prepare: {error}"
            vote = Vote(VoteKind.ABORTED, reason=reason, retryable=True)
        finally:
            self._preparing.pop(branch.id, None)
        return Voted(branch.id, vote)

    async def _decide(self, action: Decide) -> Event:
        proposal = Proposal(self.core.id, action.decision, action.claims, action.attachment)
        answer = await self._retry("the log", lambda: self._around.log.propose(proposal))
        if isinstance(answer, BelowHorizon):
            return Refused()
        if isinstance(answer, ClaimHeld):
            return ClaimStands(answer.claim, answer.holder)
        record = answer.record
        return Decided(record.decision, record.ended, record.answer)

    async def _commit_one_phase(self, action: CommitOnePhase) -> Event:
        participant = self._participant(action.branch)
        if not isinstance(participant, OnePhase):
            raise ProtocolError(f"{action.branch.participant} enlisted for one phase but has none")
        verdict, reason, retryable = await participant.commit_one_phase(action.branch)
        return Answered(verdict, reason, retryable)

    async def _ask_last_resource(self, action: AskLastResource) -> Event:
        participant = self._participant(action.branch)
        if not isinstance(participant, LastResource):
            raise ProtocolError(f"{action.branch.participant} is no last resource")
        answer = await self._retry(
            action.branch.participant,
            lambda: participant.ask(action.branch, commit=action.commit),
        )
        return Answered(answer)

    async def _record_answer(self, action: RecordAnswer) -> Event:
        answer = await self._retry(
            "the log", lambda: self._around.log.record_answer(self.core.id, action.verdict)
        )
        return Refused() if answer is None else Resolved(answer)

    async def _commit(self, action: Commit) -> Event:
        branch = action.branch
        return await self._end(branch, lambda: self._participant(branch).commit(branch))

    async def _roll_back(self, action: Rollback) -> Event:
        branch = action.branch
        preparing = self._preparing.pop(branch.id, None)
        if preparing is not None:
            # Its answer is mostly on its way; to stop it in the middle costs the connection.
            _, late = await asyncio.wait({preparing}, timeout=PREPARE_GRACE_SECONDS)
            if late:
                preparing.cancel()
                await asyncio.wait({preparing})
        return await self._end(branch, lambda: self._participant(branch).rollback(branch))

    async def _end(self, branch: Branch, end: Callable[[], Awaitable[Ending]]) -> Event:
        return Finished(branch.id, await self._retry(branch.participant, end))

    async def _report(self, action: Report) -> Event | None:
        branch, ending = action.branch, action.ending
        logger.error("branch %s of %s: %s", branch.xid, branch.participant, ending)
        now_ms = int(time.time() * 1000)
        incident = Incident(
            str(branch.xid), branch.participant, ending.kind, ending.evidence, now_ms
        )
        await self._retry("the log", lambda: self._around.log.report(incident))
        return None

    def _participant(self, branch: Branch) -> Participant:
        participant = self._around.participants.get(branch.participant)
        if participant is None:
            raise ConfigurationError(
                f"no participant {branch.participant!r} here: a process that has it must end "
                f"branch {branch.xid}"
            )
        return participant

    async def _retry(self, what: str, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """Try until it succeeds; raises `_GivenUp` at once where patience is ONCE."""
        pause = self._around.retry_first
        failures = 0
        while True:
            try:
                return await attempt()
            except ProtocolError:
                raise
            except Exception as error:
                failures += 1
                if self._patience is Patience.ONCE:
                    raise _GivenUp(f"{what}: {error}") from error
                level = logging.WARNING if failures in (1, 10, 100) else logging.DEBUG
                logger.log(
                    level, "%s, transaction %s, attempt %d: %s", what, self.core.id, failures, error
                )
            await asyncio.sleep(random.uniform(pause / 2, pause))
            pause = min(pause * 2, self._around.retry_most)


def _release(waiters: list[asyncio.Future[bool]], reached: bool) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(reached)
    waiters.clear()


_Perform = Callable[[Driver, Any], Awaitable[Event | None]]
_EFFECTS: dict[type, tuple[str, _Perform]] = {
    Prepare: ("prepare", Driver._prepare),
    Decide: ("decide", Driver._decide),
    CommitOnePhase: ("one-phase", Driver._commit_one_phase),
    AskLastResource: ("ask", Driver._ask_last_resource),
    RecordAnswer: ("record-answer", Driver._record_answer),
    Commit: ("commit", Driver._commit),
    Rollback: ("rollback", Driver._roll_back),
    Report: ("report", Driver._report),
}
