"""Performs the actions of one transaction and feeds the answers back to the protocol core.

The loop is the one that `coordinator.protocol` prints: an answer is an event, an event yields
actions, actions run in parallel. A driver belongs to no caller: when the caller is cancelled, or
its deadline passes, the driver goes on in tasks of its own until every branch has ended.

Nothing is decided here. What fails is tried again with backoff and jitter, for ever, unless the
driver was given `Patience.ONCE` (the sweep, which comes again).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from enum import Enum
from functools import partial
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
from coordinator.model import Branch, BranchId, Claim, Ending, Outcome, Vote, VoteKind
from coordinator.participant import LastResource, OnePhase, Participant, Prompt, Send
from coordinator.protocol import Phase, Transaction
from coordinator.story import THE_LOG, FullStory, Story

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
    prompt: Mapping[str, Prompt]
    retry_first: float
    retry_most: float

    def mark(self, mark: Mark) -> None:
        """Write a finished mark some time soon."""

    def ended(self, driver: Driver) -> None:
        """The driver has nothing left to do."""


class Driver:
    """Drives one transaction; all its methods are called on the engine's event loop."""

    full_story: FullStory | None = None

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
        self._step = core.step
        self._around = surroundings
        self._patience = patience
        self._tasks: set[asyncio.Task[None]] = set()
        self._sent = 0
        self._abandoned = False
        self._preparing: dict[BranchId, asyncio.Future[None]] = {}
        self._decided_waiters: list[asyncio.Future[bool]] = []
        self._ended_waiters: list[asyncio.Future[bool]] = []
        self._broken: BaseException | None = None

    @property
    def over(self) -> bool:
        """Nothing will happen any more, here: ended, unknown, given up or broken."""
        phase = self.core.phase
        if phase is Phase.ENDED or phase is Phase.UNKNOWN or self._broken is not None:
            return True
        return bool(self.left) and not self._is_working

    @property
    def _is_working(self) -> bool:
        return bool(self._tasks) or self._sent > 0

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

    @property
    def story(self) -> Story:
        return self.full_story or Story(self.core)

    def post(self, event: Event) -> None:
        """Feed an event and start what it calls for. Raises `ProtocolError` if it is illegal."""
        for action in self._step(event):
            self._start(action)
        self._wake()

    def tell_in_full(self, seconds: float = 0.0, claims: tuple[Claim, ...] = ()) -> None:
        """Log every step from now on, to the end that is to come within `seconds`."""
        self.full_story = FullStory(self.core, seconds, claims)
        self._step = self.full_story.step

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
            if not self._is_working:
                self._around.ended(self)

    def abandon(self) -> None:
        """Stop working at once; what is left is for recovery."""
        self._abandoned = True
        for task in self._tasks:
            task.cancel()

    # Performing actions.

    def _start(self, action: Action) -> None:
        if isinstance(action, Forget):
            self._around.mark(Mark(self.core.id, action.branch))
            return
        if isinstance(action, Prepare):
            if self._prepare_at_once(action.branch):
                return
        elif isinstance(action, Commit) and self._commit_at_once(action.branch):
            return
        task = self._start_task(action)
        if isinstance(action, Prepare):
            self._preparing[action.branch.id] = task

    def _start_task(self, action: Action) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._run(action))
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._break(error)
        self._wake()

    def _break(self, error: BaseException) -> None:
        """A bug, ours or a participant's: nothing more is done here."""
        if self._abandoned:
            return
        self._broken = self._broken or error
        self.story.broken(error)

    async def _run(self, action: Action) -> None:
        """Perform an action, then start what its answer calls for."""
        event = await self._perform(action)
        if event is not None:
            self.post(event)

    async def _perform(self, action: Action) -> Event | None:
        effect, perform = _EFFECTS[type(action)]
        failpoint.reach(f"{effect}:before", self)
        try:
            event = await perform(self, action)
        except _GivenUp as given_up:
            self.left.append(str(given_up))
            return None
        failpoint.reach(f"{effect}:after", self)
        return event

    # Without a task, where a participant can: tasks are most of what a commit costs here.

    def _prepare_at_once(self, branch: Branch) -> bool:
        participant = self._around.prompt.get(branch.participant)
        send = None if participant is None else participant.prepare_at_once(branch.xid)
        if send is not None:
            self._preparing[branch.id] = asyncio.get_running_loop().create_future()
            self._send("prepare", send, partial(self._voted, branch))
        return send is not None

    def _voted(self, branch: Branch, answer: Vote | Exception) -> None:
        preparing = self._preparing.pop(branch.id)
        if not preparing.done():  # by a rollback that waited for it in vain
            preparing.set_result(None)
        vote = answer if isinstance(answer, Vote) else self._no_answer(branch, answer)
        self.post(Voted(branch.id, vote))

    def _commit_at_once(self, branch: Branch) -> bool:
        participant = self._around.prompt.get(branch.participant)
        send = None if participant is None else participant.commit_at_once(branch)
        if send is not None:
            self._send("commit", send, partial(self._committed, branch))
        return send is not None

    def _committed(self, branch: Branch, answer: Ending | None) -> None:
        if answer is None:
            self._start_task(Commit(branch))
        else:
            self.post(Finished(branch.id, answer))

    def _send(self, effect: str, send: Send, take: Callable[[Any], None]) -> None:
        def answered(answer: Any) -> None:
            self._sent -= 1
            if self._abandoned:
                return
            try:
                failpoint.reach(f"{effect}:after", self)
                take(answer)
            except BaseException as error:
                self._break(error)
                self._wake()

        failpoint.reach(f"{effect}:before", self)
        self._sent += 1
        send(answered)

    async def _prepare(self, action: Prepare) -> Event:
        branch = action.branch
        try:
            vote = await self._participant(branch).prepare(branch.xid)
        except Exception as error:
            vote = self._no_answer(branch, error)
        finally:
            self._preparing.pop(branch.id, None)
        return Voted(branch.id, vote)

    def _no_answer(self, branch: Branch, error: Exception) -> Vote:
        """Unknown counts as no; the rollback that follows, or the sweep, ends what may stand."""
        self.story.no_answer(branch, error)
        reason = f"{branch.participant} did not answer prepare: {error}"
        return Vote(VoteKind.ABORTED, reason=reason, retryable=True)

    async def _decide(self, action: Decide) -> Event:
        proposal = Proposal(self.core.id, action.decision, action.claims, action.attachment)
        answer = await self._retry(THE_LOG, lambda: self._around.log.propose(proposal))
        if isinstance(answer, BelowHorizon):
            return Refused()
        if isinstance(answer, ClaimHeld):
            return ClaimStands(answer.claim, answer.holder)
        if self.full_story is not None:
            self.full_story.ours |= answer.ours
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
            THE_LOG, lambda: self._around.log.record_answer(self.core.id, action.verdict)
        )
        return Refused() if answer is None else Resolved(answer)

    async def _commit(self, action: Commit) -> Event:
        branch = action.branch
        return await self._end(branch, lambda: self._participant(branch).commit(branch))

    async def _roll_back(self, action: Rollback) -> Event:
        branch = action.branch
        preparing = self._preparing.get(branch.id)
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
        self.story.heuristic(branch, ending)
        gid, noticed_ms = str(branch.xid), int(time.time() * 1000)
        incident = Incident(gid, branch.participant, ending.kind, ending.evidence, noticed_ms)
        await self._retry(THE_LOG, lambda: self._around.log.report(incident))
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
                self.story.failed(what, failures, error)
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
