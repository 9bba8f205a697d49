"""Planted bugs around the core: in drivers, sweeps, resources, callers and services."""

from __future__ import annotations

from typing import Any

from coordinator.events import Answered, Decide, Decided, Enlisted, Refused
from coordinator.log.base import Answer, Attempt, KeyState
from coordinator.log.register import Register
from coordinator.model import (
    ABORT,
    FINISHED,
    Branch,
    Claim,
    Outcome,
    TransactionId,
    Verdict,
    Vote,
)
from coordinator.protocol import Phase
from coordinator.sweep import Case, Watch
from tests.simulation.checkers import WORKING
from tests.simulation.clients import Teller
from tests.simulation.drivers import Driver
from tests.simulation.faults import RETENTION
from tests.simulation.keys import Caller
from tests.simulation.logserver import LogServer
from tests.simulation.resources import DOUBT, Resource, Slot
from tests.simulation.services import RemoteClient
from tests.simulation.sweeper import Sweeper


class ErrorIsAbort(Driver):
    __slots__ = ()

    def _decided(self, action: Decide, answer: Answer | None) -> None:
        if answer is not None:
            super()._decided(action, answer)
            return
        self.out -= 1
        self.post(Decided(ABORT))


class ComparesBefore(Driver):
    """Compares the horizon that it read some time ago, and writes without comparing."""

    __slots__ = ()

    def decide(self, action: Decide) -> None:
        stands = self.process.log.register.read(self.core.id).record
        if stands is None and self.core.id < self.process.horizon:
            self.refused_at = self.process.world.now
            self.post(Refused())
            return
        super().decide(action)


class AbsentIsAbort(Sweeper):
    def _drive(self, case: Case) -> None:
        if case.record is not None or case.transaction in self.process.drivers:
            super()._drive(case)
            return
        driver = self.process.recover(case)
        driver.core.phase = Phase.ABORT_PROPOSED
        driver.watcher = lambda: self._look(driver, case)
        driver.post(Decided(ABORT))


class PresumesAbort(AbsentIsAbort):
    def _drive(self, case: Case) -> None:
        super()._drive(Case(case.transaction, case.branches, None) if case.branches else case)

    def _judge(self) -> None:
        self.watch = EverythingIsDue(0.0)
        super()._judge()


class EverythingIsDue(Watch):
    def _is_due(self, *_: Any) -> bool:
        return True


class BeatingIsLive(Watch):
    def _is_live(self, *_: Any) -> bool:
        return True


class NeverSweeps(Sweeper):
    def start(self) -> None:
        """There is none."""


class QuarantinesUnseen(Sweeper):
    def _seen_again(self, context: Any, found: list[Branch] | None) -> None:
        super()._seen_again(context, [context[1][0]])


class IgnoresRefusal(Sweeper):
    def _look_again(self, driver: Driver, branches: list[Branch]) -> None:
        self._case_done()


class ParksWholly(Sweeper):
    def _in_sight(self, seen: list[Branch]) -> set[TransactionId]:
        return set()


class CountsQuarantined(Sweeper):
    def _unquarantined(self, branches: list[Branch]) -> list[Branch]:
        return branches


class ListsAllLogs(Resource):
    def recover(self, log: LogServer) -> list[Branch]:
        return [slot.full for slot in self.prepared.values()]


class UnknownIsDone(Resource):
    def rollback(self, request: tuple[Branch, LogServer, str]) -> Any:
        slot = self.slots[request[0].xid.branch]
        if slot.state == WORKING and request[2] is DOUBT:
            return FINISHED
        return super().rollback(request)


class TellsEarly(Teller):
    __slots__ = ()

    def look(self) -> None:
        core = self.driver.core
        if not self.told and core.phase is Phase.COMMIT_PROPOSED:
            self.told = True
            self.world.tell(self.truth, Outcome.COMMITTED, False)
            return
        super().look()


class TellsUnknownAsAborted(Teller):
    __slots__ = ()

    def tell(self) -> None:
        outcome = self.driver.outcome
        self.told = True
        self.driver.watcher = None
        told = Outcome.ABORTED if outcome is Outcome.UNKNOWN else outcome
        self.world.tell(self.truth, told, bool(self.driver.core.heuristic))


class MovesByLease(Caller):
    def settle(self, former: TransactionId) -> None:
        self.expected = former
        self.attempt(former)


class CallsLate(Caller):
    """Its further callers come after the record is gone; nothing wrong by itself."""

    def start(self) -> None:
        if self.number and self.plan.number % 2 and not self.waited:
            self.waited = True
            self.world.quiet_at = max(self.world.quiet_at, self.world.now + 4.0 * RETENTION)
            self.world.at(2.5 * RETENTION, super().start)
            return
        super().start()


class RunsAgainWhenRefused(CallsLate):
    def _claim_read(self, _: None, state: KeyState) -> None:
        self.attempt(self.expected)


class NamesUnderHeldKeys(Register):
    def name_attempt(
        self, claim: Claim, attempt: Attempt, expected: TransactionId | None
    ) -> KeyState:
        stands = self._attempts.get(claim)
        if stands is not None and stands.transaction == expected:
            self._attempts[claim] = attempt
        return KeyState(attempt=self._attempts.setdefault(claim, attempt))


class NamesBlindly(Register):
    def name_attempt(
        self, claim: Claim, attempt: Attempt, expected: TransactionId | None
    ) -> KeyState:
        if claim not in self._claims:
            self._attempts[claim] = attempt
        return self.read_key(claim)


class EnlistsBoth(RemoteClient):
    def take_vote(self, request: int, slot: Slot, vote: Vote) -> None:
        if self.driver.core.phase is not Phase.ACTIVE or slot.accepted:
            return
        self.world.checker.enlisted(slot)
        self.driver.post(Enlisted(slot.branch, vote))
        if request == self.request:
            self.request += 1
            self.call_next()


class EnlistsGivenUp(RemoteClient):
    """Goes on waiting for the answer that it has already had undone."""

    def give_up(self) -> int:
        return self.request


__all__ = ["Answered", "Verdict"]
