"""Idempotency keys: several callers under one key, each at a coordinator of its own choice.

A key names its current attempt, written before that attempt prepares. The next attempt starts only
when the former's abort stands recorded, by compare-and-set on the name; the claim that a commit
takes in the register outlives its record.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coordinator.log.base import Answer, Attempt, BelowHorizon, ClaimHeld, KeyState, Proposal
from coordinator.model import ABORT, Claim, Outcome, TransactionId, Verdict
from coordinator.protocol import Phase
from tests.simulation.clients import Client, Plan
from tests.simulation.drivers import Driver
from tests.simulation.processes import Process

if TYPE_CHECKING:
    from tests.simulation.world import World


class KeyedClient(Client):
    """The callers of one key: the first at the plan's start, the others later."""

    def start(self) -> None:
        key = f"key {self.plan.number}"
        for number, (place, after) in enumerate(self.plan.calls):
            caller = self.world.parts.caller(self.world, self.plan, key, place, number)
            self.world.at(after if number else 0.0, caller.start)
            ends = self.world.now + after + 3 * self.plan.seconds
            self.world.quiet_at = max(self.world.quiet_at, ends)


class Caller(Client):
    """One call under a key."""

    def __init__(self, world: World, plan: Plan, key: str, place: int, number: int) -> None:
        super().__init__(world, plan)
        self.key = key
        self.claim = Claim("key", key)
        self.place = place
        self.number = number
        self.expected: TransactionId | None = None
        self.waited = False

    def start(self) -> None:
        process = self.world.key_process(self.plan.place, self.place)
        if process is None:
            return
        self.process = process
        self.read_name()

    def ask(
        self, operation: Callable[[Any], Any], request: Any, done: Callable[[Any, Any], None]
    ) -> None:
        """A message to the log, repeated until it is answered."""
        self.world.network.call(
            self.process,
            self.process.log,
            operation,
            request,
            self._answered,
            (operation, request, done),
        )

    def _answered(self, context: tuple[Any, Any, Any], answer: Any) -> None:
        operation, request, done = context
        if answer is None:
            self.process.later(0.1, self.ask, operation, request, done)
            return
        done(None, answer)

    # Who holds the key?

    def read_name(self) -> None:
        self.ask(self.process.log.read_key, self.claim, self._name_read)

    def _name_read(self, _: None, state: KeyState) -> None:
        if state.attempt is None:
            self.attempt(None)
            return
        self.world.count("S44 a key is called again")
        if not self.waited:
            self.waited = True  # within the owner's deadline a second caller waits
            self.process.later(self.plan.seconds * self.world.random(), self.read_name)
            return
        self.settle(state.attempt.transaction)

    def settle(self, former: TransactionId) -> None:
        """Have the former attempt's end recorded, and obey what stands."""
        self.expected = former
        self.ask(self.process.log.propose, Proposal(former, ABORT), self._settled)

    def _settled(self, _: None, answer: Answer) -> None:
        if isinstance(answer, BelowHorizon):
            self.world.count("a key's former attempt is below the horizon")
            self.ask(self.process.log.read_key, self.claim, self._claim_read)
            return
        assert not isinstance(answer, ClaimHeld)
        if answer.record.decision.verdict is Verdict.ABORT:
            self.world.count("a key's next attempt begins after a recorded abort")
            self.attempt(self.expected)
        else:
            self.already_committed(answer.record.transaction)

    def _claim_read(self, _: None, state: KeyState) -> None:
        if state.holder is None:
            self.attempt(self.expected)
        else:
            self.already_committed(state.holder)

    def already_committed(self, holder: TransactionId) -> None:
        self.world.count("a caller learns that its key has committed")
        truth = self.world.checker.truths[holder]
        self.world.checker.told(truth, Outcome.COMMITTED)

    # This caller's own attempt.

    def attempt(self, former: TransactionId | None) -> None:
        driver = self.begin(self.process)
        if driver is None:
            return
        self.driver = driver
        self.truth = self.world.checker.truths[driver.core.id]
        self.teller = self.world.parts.teller(driver, self.truth)
        self.world.started(self.truth, self.plan)
        self.process.later(self.plan.seconds, self.teller.deadline)
        self.name = Attempt(driver.core.id, int(self.plan.seconds * 1000), self.process.member)
        self.ask(self.process.log.name_attempt, (self.claim, self.name, former), self._named)

    def begin(self, process: Process) -> Driver | None:
        return process.begin(self.plan.seconds, (self.claim,))

    def _named(self, _: None, state: KeyState) -> None:
        if self.driver.core.phase is not Phase.ACTIVE:
            return
        if state.holder is not None or state.attempt != self.name:
            self.world.count("two callers race for a key")
            self.teller.roll_back("another attempt holds the key")
            return
        self.world.checker.attempt_begins(self.key, self.truth)
        if self.enlist_all():
            self.process.later(self.plan.work, self.finish)
        else:
            self.teller.roll_back("a resource could not be reached")
