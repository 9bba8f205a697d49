"""Two transactions that take the same two rows in opposite order, in two resources.

Neither resource can see that they wait for each other: only a deadline ends it.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from coordinator.model import Outcome
from coordinator.protocol import Phase
from tests.simulation.checkers import PREPARED, WORKING
from tests.simulation.clients import Client, Plan
from tests.simulation.resources import Resource, Slot

if TYPE_CHECKING:
    from tests.simulation.world import World

PAIRS = 2
LOOKS_AGAIN = 0.04


def pairs(world: World, draw: Random) -> list[Client]:
    """The clients of a world with deadlocks, numbered after all others."""
    clients: list[Client] = []
    first = world.options.transactions
    for pair in range(PAIRS):
        rows: dict[str, Slot] = {}
        start = world.options.safety * 0.7 * draw.random()
        both: list[CrossedClient] = []
        for order in (0, 1):
            plan = Plan(first + 2 * pair + order, draw, world.options)
            plan.shape, plan.error, plan.meddle_at = "crossed", False, -1.0
            plan.start, plan.seconds = start + 0.02 * order, 0.6 + 0.5 * draw.random()
            plan.branches = [(order, True, False), (1 - order, True, False)]
            both.append(CrossedClient(world, plan, rows, both))
        clients += both
    return clients


class CrossedClient(Client):
    """Locks a row in one resource, works for a while, and then wants the row in the other."""

    def __init__(
        self, world: World, plan: Plan, rows: dict[str, Slot], both: list[CrossedClient]
    ) -> None:
        super().__init__(world, plan)
        self.rows = rows
        self.both = both
        self.waits = self.deadlocked = False

    def work(self) -> None:
        self.process.later(self.plan.seconds, self.teller.deadline)
        self.lock(0)

    def lock(self, place: int) -> None:
        resource, writes, refuses = self.plan.branches[place]
        target = self.world.resources[resource]
        if not self.enlist(target, writes, refuses, self.plan.deltas[place]):
            self.teller.roll_back("a resource could not be reached")
            return
        self.wait(place, target, self.truth.slots[-1])

    def wait(self, place: int, target: Resource, slot: Slot) -> None:
        """Until nobody holds the row, or until the transaction is over."""
        if self.driver.core.phase is not Phase.ACTIVE:
            if self.deadlocked and self.driver.outcome is Outcome.ABORTED:
                self.world.count("S34 a deadlock across two resources is ended by a deadline")
            return
        holder = self.rows.get(target.name)
        if holder is not None and holder.state in (WORKING, PREPARED):
            self.waits = True
            self.deadlocked = self.deadlocked or all(each.waits for each in self.both)
            self.process.later(LOOKS_AGAIN, self.wait, place, target, slot)
            return
        self.waits = False
        self.rows[target.name] = slot
        if place == 0:
            self.process.later(0.05, self.lock, 1)
            return
        if any(each.deadlocked and each is not self for each in self.both):
            self.world.count("S34 of two in a deadlock one goes on")
        self.process.later(0.01, self.finish)
