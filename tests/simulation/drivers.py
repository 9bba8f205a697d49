"""Performs the actions of one real `Transaction`, as `coordinator.driver` does, by messages.

The loop is the one that `coordinator.protocol` prints: an answer is an event, an event yields
actions. Every action goes out through `Network.call` and comes back through `Process.deliver`,
which are the points where a process may crash or be paused: before and after each effect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coordinator.errors import ProtocolError
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
from coordinator.log.base import Answer, BelowHorizon, ClaimHeld, Incident, Mark, Proposal
from coordinator.model import BranchId, Ending, Outcome, Verdict, Vote, VoteKind
from coordinator.protocol import Phase, Transaction
from tests.simulation.checkers import Violation
from tests.simulation.network import NEVER
from tests.simulation.resources import DOUBT, SESSION, STRANGER, Slot

if TYPE_CHECKING:
    from tests.simulation.processes import Process

NO_ANSWER = Vote(VoteKind.ABORTED, reason="did not answer prepare", retryable=True)
_RESTING = (Phase.ENDED, Phase.UNKNOWN)


class Driver:
    """Drives one transaction in one process. `once`: the sweep's, which gives up and comes again.

    `watcher` is called whenever something changed; the client or the sweeper behind it looks then.
    """

    __slots__ = (
        "born",
        "core",
        "deadline",
        "gave_up",
        "once",
        "out",
        "pause",
        "preparing",
        "process",
        "proposed_at",
        "refused_at",
        "watcher",
    )

    def __init__(
        self, process: Process, core: Transaction, deadline: float, once: bool = False
    ) -> None:
        self.process = process
        self.core = core
        self.deadline = deadline
        self.born = process.monotonic()
        self.once = once
        self.gave_up = False
        self.out = 0
        self.pause = 0.05
        self.preparing: dict[BranchId, Slot] = {}
        self.refused_at = NEVER
        self.proposed_at = NEVER
        self.watcher: Callable[[], None] | None = None

    @property
    def over(self) -> bool:
        return self.core.phase in _RESTING or (self.gave_up and self.out == 0)

    @property
    def outcome(self) -> Outcome:
        return self.core.outcome or Outcome.UNKNOWN

    def post(self, event: Event) -> None:
        """Feed an event and start what it calls for."""
        if not self.process.alive:
            return
        world = self.process.world
        try:
            actions = self.core.step(event)
        except ProtocolError as error:
            raise Violation("table", str(error)) from error
        if world.trace is not None:
            asked = ", ".join(type(action).__name__ for action in actions) or "nothing"
            world.note(f"{self.process} {self.core!r} took {type(event).__name__}: {asked}")
        for action in actions:
            _START[type(action)](self, action)
        self.wake()

    def wake(self) -> None:
        if self.watcher is not None:
            self.watcher()
        if self.out == 0 and self.over:
            self.process.ended(self)

    # Performing actions. `out` counts those that wait for an answer.

    def ask(
        self,
        server: Any,
        operation: Callable[[Any], Any],
        request: Any,
        done: Callable[[Any, Any], None],
        context: Any,
    ) -> None:
        self.out += 1
        self.process.world.network.call(self.process, server, operation, request, done, context)

    def _again(self, retry: Callable[[Any], None], action: Any) -> None:
        """No answer: give up where the sweep comes again, else repeat after a growing pause."""
        self.out -= 1
        if self.once:
            self.gave_up = True
            self.wake()
            return
        world = self.process.world
        self.out += 1
        pause = self.pause * (0.5 + 0.5 * world.random())
        self.pause = min(self.pause * 2, 1.0)
        self.process.later(pause, self._retry, retry, action)

    def _retry(self, retry: Callable[[Any], None], action: Any) -> None:
        self.out -= 1
        retry(action)

    def prepare(self, action: Prepare) -> None:
        world = self.process.world
        slot = world.slots[action.branch.xid.branch]
        self.preparing[slot.id] = slot
        slot.driven = True
        self.out += 1
        extra = 0.0
        if world.late_prepare and world.random() < world.late_prepare:
            extra = world.late_prepare_most * world.random() ** 2
            world.quiet_at = max(world.quiet_at, world.now + extra)
        slot.session_due = world.network.call(
            self.process,
            slot.resource,
            slot.resource.prepare,
            slot,
            self._prepared,
            slot,
            True,
            extra,
        )

    def _prepared(self, slot: Slot, vote: Vote | None) -> None:
        self.out -= 1
        if self.preparing.pop(slot.id, None) is None:
            self.wake()  # its rollback cancelled the prepare, whose answer nobody waits for
            return
        if vote is None:
            slot.doubt = True
            self.process.disconnect(slot)
            vote = NO_ANSWER
        else:
            slot.doubt = False
        self.post(Voted(slot.id, vote))

    def decide(self, action: Decide) -> None:
        process = self.process
        world = process.world
        if not self.once and action.decision.verdict is not Verdict.ABORT:
            self.proposed_at = world.now
            if world.crash_at_decision and world.random() < world.crash_at_decision:
                process.crash()
                return
            if world.pause_at_decision and world.random() < world.pause_at_decision:
                process.pause(world.pause_most * (0.3 + 0.7 * world.random()))
        proposal = Proposal(self.core.id, action.decision, action.claims, action.attachment)
        self.ask(process.log, process.log.propose, proposal, self._decided, action)

    def _decided(self, action: Decide, answer: Answer | None) -> None:
        if answer is None:
            self._again(self.decide, action)
            return
        self.out -= 1
        self.post(self.read_answer(answer))
        if not self.once and action.decision.verdict is not Verdict.ABORT:
            self._count_sleep()

    def _count_sleep(self) -> None:
        """It may have slept between its proposal and the answer."""
        if self.process.resumed_at < self.proposed_at:
            return
        world, phase = self.process.world, self.core.phase
        if phase is Phase.ROLLING_BACK:
            world.count("S07 who slept with all votes in hand finds an abort")
        elif phase is Phase.UNKNOWN:
            world.count("S07 who slept with all votes in hand is refused below the horizon")

    def read_answer(self, answer: Answer) -> Event:
        if isinstance(answer, BelowHorizon):
            self.refused_at = self.process.world.now
            return Refused()
        if isinstance(answer, ClaimHeld):
            return ClaimStands(answer.claim, answer.holder)
        record = answer.record
        return Decided(record.decision, record.ended, record.answer)

    def commit_one_phase(self, action: CommitOnePhase) -> None:
        slot = self.process.world.slots[action.branch.xid.branch]
        self.out += 1
        slot.session_due = self.process.world.network.call(
            self.process,
            slot.resource,
            slot.resource.commit_one_phase,
            slot,
            self._one_phase,
            action,
            True,
        )

    def _one_phase(self, action: CommitOnePhase, verdict: Verdict | None) -> None:
        """A lost reply is resolved by asking the resource, once the old session cannot act."""
        if verdict is None:
            slot = self.process.world.slots[action.branch.xid.branch]
            self.process.disconnect(slot)
            self._again(self._ask_what_became, action)
            return
        self.out -= 1
        if verdict is Verdict.DELEGATED:
            self.process.world.count("a one-phase commit's fate is lost with its server")
            self.gave_up = True
            self.wake()
            return
        self.post(Answered(verdict, "the resource said so"))

    def _ask_what_became(self, action: CommitOnePhase) -> None:
        slot = self.process.world.slots[action.branch.xid.branch]
        self.process.world.count("a one-phase commit is resolved by the resource's own status")
        self.ask(slot.resource, slot.resource.what_became, slot, self._one_phase, action)

    def ask_last_resource(self, action: AskLastResource) -> None:
        slot = self.process.world.slots[action.branch.xid.branch]
        self.ask(
            slot.resource, slot.resource.ask, (action.branch, action.commit), self._asked, action
        )

    def _asked(self, action: AskLastResource, verdict: Verdict | None) -> None:
        if verdict is None:
            self._again(self.ask_last_resource, action)
            return
        self.out -= 1
        self.post(Answered(verdict))

    def record_answer(self, action: RecordAnswer) -> None:
        log = self.process.log
        self.ask(
            log, log.record_answer, (self.core.id, action.verdict), self._answer_recorded, action
        )

    def _answer_recorded(self, action: RecordAnswer, answer: tuple[Verdict | None] | None) -> None:
        if answer is None:
            self._again(self.record_answer, action)
            return
        self.out -= 1
        self.post(Refused() if answer[0] is None else Resolved(answer[0]))

    def commit(self, action: Commit) -> None:
        branch = action.branch
        resource = self.process.world.slots[branch.xid.branch].resource
        request = (branch, self.process.log, STRANGER)
        self.ask(resource, resource.commit, request, self._committed, action)

    def _committed(self, action: Commit, ending: Ending | None) -> None:
        if ending is None:
            self._again(self.commit, action)
            return
        self.out -= 1
        self.post(Finished(action.branch.xid.branch, ending))

    def roll_back(self, action: Rollback) -> None:
        branch = action.branch
        process = self.process
        slot = process.world.slots[branch.xid.branch]
        manner = STRANGER
        if slot.process is process and not self.once:
            manner = self._manner(slot)
        request = (branch, process.log, manner)
        self.ask(slot.resource, slot.resource.rollback, request, self._rolled_back, action)

    def _manner(self, slot: Slot) -> str:
        """How its own process ends a branch: on the session, or by name if PREPARE may be out."""
        if slot.id in self.preparing:
            slot.doubt = True
            if self.process.world.options.cancel_prepare:
                del self.preparing[slot.id]
                self.process.disconnect(slot)
        return DOUBT if slot.doubt else SESSION

    def _rolled_back(self, action: Rollback, ending: Ending | None) -> None:
        if ending is None:
            self._again(self.roll_back, action)
            return
        self.out -= 1
        self.post(Finished(action.branch.xid.branch, ending))

    def forget(self, action: Forget) -> None:
        self.process.mark(Mark(self.core.id, action.branch))

    def report(self, action: Report) -> None:
        slot = self.process.world.slots[action.branch.xid.branch]
        incident = Incident(
            str(action.branch.xid),
            action.branch.participant,
            action.ending.kind,
            action.ending.evidence,
            self.process.wall_ms(),
        )
        log = self.process.log
        self.ask(log, log.report, (incident, slot, NEVER), self._reported, action)

    def _reported(self, action: Report, answer: bool | None) -> None:
        if answer is None:
            self._again(self.report, action)
            return
        self.out -= 1
        self.wake()


_START: dict[type, Callable[[Any, Action], None]] = {
    Prepare: lambda driver, action: driver.prepare(action),
    Decide: lambda driver, action: driver.decide(action),
    CommitOnePhase: lambda driver, action: driver.commit_one_phase(action),
    AskLastResource: lambda driver, action: driver.ask_last_resource(action),
    RecordAnswer: lambda driver, action: driver.record_answer(action),
    Commit: lambda driver, action: driver.commit(action),
    Rollback: lambda driver, action: driver.roll_back(action),
    Forget: lambda driver, action: driver.forget(action),
    Report: lambda driver, action: driver.report(action),
}
