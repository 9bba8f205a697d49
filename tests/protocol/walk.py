"""Random walks of several coordinators over one small world, driven by a seed.

The world is a register, a few resources and messages in flight. Everything may be late, may be done
twice because its answer was lost, and may arrive in any order; coordinators die and others recover;
the horizon moves whenever it likes. Whatever a resource does is reported to the naive twin
(`TCommit`), and the rest of the invariants is checked after each step. The engine is not involved:
this is the core alone, under every answer that its ports may give.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from coordinator.errors import ProtocolError
from coordinator.events import (
    AbortRequested,
    Action,
    Commit,
    CommitOnePhase,
    CommitRequested,
    Decide,
    Enlisted,
    Event,
    Finished,
    Prepare,
    Published,
    Rollback,
)
from coordinator.model import (
    BranchId,
    Decision,
    Outcome,
    Verdict,
    VoteKind,
)
from coordinator.protocol import Phase, Transaction
from tests.protocol.tcommit import Violation
from tests.protocol.values import ID, describe, tell
from tests.protocol.world import CLAIM, LAST, STRAY, Options, World


@dataclass
class Driver:
    """One coordinator: its transaction, what it still has to do, what it has not yet heard."""

    name: str
    transaction: Transaction
    to_do: list[Action] = field(default_factory=list)
    inbox: list[Event] = field(default_factory=list)
    outcome: Outcome | None = None
    released: set[BranchId] = field(default_factory=set)

    @property
    def busy(self) -> bool:
        over = self.transaction.phase in (Phase.ENDED, Phase.UNKNOWN)
        return not over or bool(self.to_do) or bool(self.inbox)


class Walk:
    """`run` takes `steps` random steps, then lets the world heal."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.options = Options.draw(self.dice)
        self.trace: list[str] = [f"seed {seed}: {self.options}"]
        self.told: set[Outcome] = set()  # also by coordinators that have died since
        self.world = World(self.dice, self.options)
        self.drivers: list[Driver] = []
        self._begin()

    def _begin(self) -> None:
        claims = (CLAIM,) if self.options.claims else ()
        names = ["original"]
        if self.options.handed:
            # Two daemons are handed the same branches, which have all voted already.
            names = ["first", "second"]
            for found in self.world.branches.values():
                self.world.prepare(found)
        for name in names:
            transaction = Transaction(ID, claims=claims, handed=self.options.handed)
            self._enlist(Driver(name, transaction))

    def _enlist(self, driver: Driver) -> None:
        self.drivers.append(driver)
        if self.options.published:
            self._step(driver, Published())
        for found in self.world.branches.values():
            last = found == LAST
            one_phase = self.options.one_phase and not last and not self.options.handed
            vote = self.world.votes[found.id] if self.options.handed else None
            self._step(driver, Enlisted(found, vote, one_phase, last))
        if self.options.stray and not driver.transaction.private:
            self.world.prepared.add(STRAY.id)

    # The walk.

    def run(self, steps: int) -> str | None:
        """What went wrong, told from the beginning; None if nothing did."""
        try:
            for _ in range(steps):
                self._random_step()
            self._heal()
        except (Violation, ProtocolError, KeyError) as error:
            return "\n".join([*self.trace, f"{type(error).__name__}: {error}"])
        return None

    def _random_step(self) -> None:
        alive = [each for each in self.drivers if each.busy]
        driver = self.dice.choice(alive) if alive else None
        moves = [self._recover, self._move_horizon, self._forget]
        weights = [0.05, self.options.horizon, self.options.horizon]
        if driver is not None:
            moves += [lambda: self._die(driver), lambda: self._ask_for_end(driver)]
            weights += [0.03, 0.5 if driver.transaction.phase is Phase.ACTIVE else 0.08]
            if driver.to_do:
                moves.append(lambda: self._perform(driver, lost=self.options.lost))
                weights.append(1.0)
            if driver.inbox:
                moves.append(lambda: self._deliver(driver))
                weights.append(1.0)
        self.dice.choices(moves, weights)[0]()

    def _ask_for_end(self, driver: Driver) -> None:
        if driver.transaction.phase is Phase.ACTIVE and self.dice.random() < 0.85:
            self._step(driver, CommitRequested())
        elif self.dice.random() < 0.8 or driver.transaction.phase is Phase.ONE_PHASE:
            self._step(driver, AbortRequested("wanted"))
        elif driver.transaction.phase is not Phase.IN_DOUBT:
            self._step(driver, Published())

    def _recover(self) -> None:
        seen = self.world.seen
        if not seen or sum(each.busy for each in self.drivers) > 2:
            return
        driver = Driver(f"recovery {len(self.trace)}", Transaction.in_doubt(ID, seen))
        self.drivers.append(driver)
        self._step(driver, AbortRequested("found in doubt"))

    def _die(self, driver: Driver) -> None:
        self.trace.append(f"{driver.name} dies")
        self.drivers.remove(driver)
        for found in self.world.branches.values():
            # A session that dies unprepared takes its work with it; so does an open last resource
            # once its broker loses patience.
            own = driver.name == "original"
            if own and found.id not in self.world.prepared and found.id not in self.world.ended:
                self.world.abort(found)

    def _move_horizon(self) -> None:
        self.world.below_horizon = True
        self.trace.append("the horizon passes")

    def _forget(self) -> None:
        if self.world.forget():
            self.trace.append("the record is forgotten")

    def _heal(self) -> None:
        """Faults stop: all answers arrive, recovery runs, and nothing may be left behind."""
        self.trace.append("-- the world heals")
        for _ in range(200):
            busy = [each for each in self.drivers if each.to_do or each.inbox]
            if busy:
                driver = self.dice.choice(busy)
                if driver.to_do:
                    self._perform(driver, lost=0.0)
                else:
                    self._deliver(driver)
                continue
            for driver in self.drivers:
                if driver.transaction.phase in (Phase.ACTIVE, Phase.PREPARING):
                    self._step(driver, AbortRequested("the deadline"))
            if not any(driver.to_do for driver in self.drivers):
                known = len(self.drivers)
                self.drivers = [d for d in self.drivers if d.transaction.phase is not Phase.UNKNOWN]
                if self.world.forgotten:
                    break  # what is still prepared is quarantined and shown
                self._recover()
                if known == len(self.drivers):
                    break
        self._check_nothing_left()

    def _check_nothing_left(self) -> None:
        for driver in self.drivers:
            if driver.transaction.phase not in (Phase.ENDED, Phase.UNKNOWN):
                raise Violation(f"{driver.name} never ends: {driver.transaction!r}")
        left = [each.participant for each in self.world.seen]
        if left and not self.world.forgotten:
            raise Violation(f"left behind: {left}")

    # One step of a coordinator, and what must hold of it.

    def _step(self, driver: Driver, event: Event) -> None:
        transaction = driver.transaction
        phase, private = transaction.phase, transaction.private
        actions = transaction.step(event)
        shown = ", ".join(describe(action, {}) for action in actions)
        self.trace.append(f"{driver.name}: {tell(event)} -> {transaction.phase} [{shown}]")
        self._check_step(driver, event, actions, private=private)
        driver.to_do += actions
        if transaction.phase is Phase.UNKNOWN and phase is not Phase.UNKNOWN:
            driver.released |= {each.branch.id for each in actions if isinstance(each, Rollback)}
        self._check_state(driver)

    def _check_step(
        self, driver: Driver, event: Event, actions: list[Action], *, private: bool
    ) -> None:
        for action in actions:
            match action:
                case Commit(target):
                    unrecorded = private and self.world.votes[target.id].kind is VoteKind.READ_ONLY
                    if not self.world.commit_stood and not unrecorded:
                        raise Violation(f"I5: commit of {target.participant} before the decision")
                case Rollback(target) if driver.transaction.phase is Phase.COMMIT_PROPOSED:
                    raise Violation(f"rollback of {target.participant} with a commit proposed")
                case Decide(decision) if decision.verdict is not Verdict.ABORT:
                    self._check_proposal(decision)
                case CommitOnePhase() if not private or self.options.published:
                    raise Violation("one phase although the id is known elsewhere")

    def _check_proposal(self, decision: Decision) -> None:
        """I2, and a commit names exactly the branches that promised."""
        votes = {each.id: self.world.votes.get(each.id) for each in self.world.branches.values()}
        if any(vote is None or vote.kind is VoteKind.ABORTED for vote in votes.values()):
            raise Violation("I2: commit proposed without every vote")
        promised = {b for b, vote in votes.items() if vote and vote.kind is VoteKind.PREPARED}
        covered = {each.id for each in decision.branches}
        if decision.last_resource is not None:
            covered.add(decision.last_resource.id)
        if covered != promised:
            raise Violation(f"the record names {covered}, promised have {promised}")

    def _check_state(self, driver: Driver) -> None:
        transaction = driver.transaction
        decided = (Outcome.COMMITTED, Outcome.ABORTED)
        if driver.outcome in decided and transaction.outcome is not driver.outcome:
            raise Violation(f"I3: {driver.name} changed its mind")
        driver.outcome = transaction.outcome
        if transaction.outcome in decided:
            self.told.add(transaction.outcome)
        if len(self.told) > 1:
            raise Violation(f"I1: coordinators disagree: {self.told}")
        left = self._endings_left(driver)
        if (transaction.phase is Phase.ENDED) != (transaction.decided and not left):
            raise Violation(f"{driver.name} is {transaction.phase}, and left to end: {left}")

    def _endings_left(self, driver: Driver) -> list[str]:
        """Commits and rollbacks that were asked for and whose answer has not been heard."""
        if driver.transaction.phase is Phase.ONE_PHASE:
            return ["one phase"]
        asked = [each.branch.id for each in driver.to_do if isinstance(each, Commit | Rollback)]
        unheard = [each.branch for each in driver.inbox if isinstance(each, Finished)]
        return [each for each in (*asked, *unheard) if each not in driver.released]

    def _deliver(self, driver: Driver) -> None:
        event = driver.inbox.pop(self.dice.randrange(len(driver.inbox)))
        self._step(driver, event)

    def _perform(self, driver: Driver, *, lost: float) -> None:
        place = self.dice.randrange(len(driver.to_do))
        action = driver.to_do[place]
        answer = self.world.perform(action, stranger=driver.name.startswith("recovery"))
        if self.dice.random() < lost and not isinstance(action, Prepare | CommitOnePhase):
            self.trace.append(f"{driver.name}: the answer to {describe(action, {})} is lost")
            return
        del driver.to_do[place]
        if answer is not None:
            driver.inbox.append(answer)
