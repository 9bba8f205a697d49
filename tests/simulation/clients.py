"""Clients: what a service's code does with a coordinator, and what it is told in the end.

The rules of waiting and telling are those of `coordinator.transactional`: wait until every branch
has ended, at the deadline ask for an abort, wait a little more, and then say what is known.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from coordinator.events import AbortRequested, CommitRequested, Enlisted, Published
from coordinator.log.base import Answer, Proposal
from coordinator.model import ABORT, Branch, BranchId, Outcome, Xid
from coordinator.protocol import Phase
from tests.simulation.checkers import Truth
from tests.simulation.drivers import Driver
from tests.simulation.faults import DEADLINE, GRACE, SHAPES, Options
from tests.simulation.processes import Process
from tests.simulation.resources import Resource, Slot

if TYPE_CHECKING:
    from tests.simulation.world import World


class Plan:
    """One client transaction, drawn before the world begins, so that dropping one moves no other.

    `branches` are (resource, writes, refuses); `deltas` what each writing one moves.
    """

    __slots__ = (
        "branches",
        "calls",
        "error",
        "meddle_at",
        "number",
        "place",
        "polls",
        "seconds",
        "shape",
        "start",
        "work",
    )

    def __init__(self, number: int, draw: Random, options: Options) -> None:
        self.number = number
        self.shape = options.shape_at(draw.random())
        self.start = options.safety * 0.85 * draw.random()
        self.place = int(draw.random() * options.processes)
        self.seconds = DEADLINE
        short, seconds = draw.random(), draw.random()
        if short < 0.3 and options.on("short-deadline"):
            self.seconds = 0.03 + 0.2 * seconds
        self.work = 0.1 * draw.random() + (DEADLINE if draw.random() < 0.02 else 0.0)
        self.error = draw.random() < 0.06
        meddle, at = draw.random(), draw.random()
        self.meddle_at = 0.3 * at if meddle < 0.08 else -1.0
        self.polls = [draw.random() * 3.0, draw.random() * 12.0]
        no = options.rate("vote-no", 0.02, 0.2)
        size = (1, 2, 2, 2, 3)[int(draw.random() * 5)]
        if self.shape == "one-phase":
            size = 1
        first = int(draw.random() * options.resources)
        self.branches = []
        for offset in range(min(size, options.resources)):
            resource = (first + offset) % options.resources
            read, refuse = draw.random(), draw.random()
            writes = read >= (0.85 if self.shape == "read-only" else 0.12)
            self.branches.append((resource, writes, refuse < no))
        self.calls = [
            (int(draw.random() * options.processes), 0.6 * DEADLINE * draw.random() * (2 + call))
            for call in range(1 + int(draw.random() * 3))
        ]

    def __repr__(self) -> str:
        return f"transaction {self.number} ({self.shape} at {self.start:.2f} s)"

    @property
    def deltas(self) -> list[int]:
        """Amounts that sum to nothing over the writing branches."""
        writers = [index for index, (_, writes, _) in enumerate(self.branches) if writes]
        deltas = [0] * len(self.branches)
        if len(writers) > 1:
            for index in writers:
                deltas[index] = self.number + 1
            deltas[writers[0]] = -(self.number + 1) * (len(writers) - 1)
        return deltas


class Teller:
    """Waits for one driver as a caller of `commit()` does, and tells the client the outcome."""

    __slots__ = ("driver", "late", "told", "truth", "world")

    def __init__(self, driver: Driver, truth: Truth) -> None:
        self.driver = driver
        self.truth = truth
        self.world: World = driver.process.world
        self.late = False
        self.told = False
        driver.watcher = self.look

    def commit(self) -> None:
        if self.driver.core.phase is Phase.ACTIVE:
            self.driver.post(CommitRequested())

    def roll_back(self, reason: str) -> None:
        self.late = True
        self.driver.post(AbortRequested(reason))

    def look(self) -> None:
        """Something changed: tell the client once it is over, or once late and decided."""
        if self.told:
            return
        driver = self.driver
        if driver.over or (self.late and driver.core.decided):
            self.tell()

    def deadline(self) -> None:
        if self.told:
            return
        driver = self.driver
        self.late = True
        if driver.core.decided:
            self.tell()
            return
        driver.post(AbortRequested("the deadline passed", True))
        if not self.told:
            driver.process.later(GRACE, self.give_up)

    def give_up(self) -> None:
        if not self.told:
            self.tell()

    def tell(self) -> None:
        self.told = True
        driver = self.driver
        driver.watcher = None
        self.world.tell(self.truth, driver.outcome, bool(driver.core.heuristic))


class Client:
    """A transaction whose branches are all local: plain, one phase, read only, last resource."""

    def __init__(self, world: World, plan: Plan) -> None:
        self.world = world
        self.plan = plan
        self.process: Process
        self.driver: Driver
        self.teller: Teller
        self.truth: Truth

    def start(self) -> None:
        process = self.world.some_process(self.plan.place)
        if process is None:
            self.world.count("no coordinator to begin at")
            return
        self.process = process
        driver = self.begin(process)
        if driver is None:
            return
        self.driver = driver
        self.truth = self.world.checker.truths[driver.core.id]
        self.teller = self.world.parts.teller(driver, self.truth)
        self.world.started(self.truth, self.plan)
        self.work()

    def begin(self, process: Process) -> Driver | None:
        return process.begin(self.plan.seconds)

    def work(self) -> None:
        self.process.later(self.plan.seconds, self.teller.deadline)
        if self.plan.meddle_at >= 0.0:
            self.meddle_soon()
        if self.enlist_all():
            self.process.later(self.plan.work, self.finish)
        else:
            self.teller.roll_back("a resource could not be reached")

    def finish(self) -> None:
        if self.teller.told or self.driver.core.phase is not Phase.ACTIVE:
            return
        if self.plan.error:
            self.teller.roll_back("the body raised")
        else:
            self.teller.commit()

    def enlist_all(self) -> bool:
        for (resource, writes, refuses), delta in zip(
            self.plan.branches, self.plan.deltas, strict=True
        ):
            if not self.enlist(self.world.resources[resource], writes, refuses, delta):
                return False
        if self.plan.shape == "last-resource":
            return self.enlist(self.world.last_resource, True, False, 0, last=True)
        return True

    def enlist(
        self, resource: Resource, writes: bool, refuses: bool, delta: int, last: bool = False
    ) -> bool:
        """BEGIN and the work of one branch; False when the resource cannot be reached."""
        lacking = not self.process.has(resource)
        if resource.down or lacking or self.driver.core.phase is not Phase.ACTIVE:
            return False
        slot = open_slot(self.process, resource, self.truth)
        slot.writes, slot.refuses, slot.delta, slot.last = writes, refuses, delta, last
        self.world.checker.enlisted(slot)
        self.driver.post(Enlisted(slot.branch, None, not last, last))
        return True

    # Somebody else, who learnt the id, asks for an abort: `coordinator.abort(id)`.

    def meddle_soon(self) -> None:
        self.driver.post(Published())
        self.world.at(self.plan.meddle_at, self.meddle)

    def meddle(self) -> None:
        process = self.world.some_process(self.plan.place + 1)
        if process is None or process.log is not self.process.log:
            return
        proposal = Proposal(self.truth.id, ABORT)
        self.world.count("somebody asks for an abort by id")
        self.world.network.call(
            process, process.log, process.log.propose, proposal, self._meddled, None
        )

    def _meddled(self, _: None, answer: Answer | None) -> None:
        """`coordinator.abort` tells the status that stands; the poll checks it."""
        self.world.poll(self.truth)


def open_slot(process: Process, resource: Resource, truth: Truth) -> Slot:
    """A new branch of a transaction at a resource, named by the process that will prepare it."""
    world = process.world
    branch_id = BranchId(f"{world.number():016x}")
    xid = Xid(process.log.id, process.member, truth.id, branch_id)
    slot = Slot(Branch(xid, resource.name), resource, process, truth, world.now)
    resource.begin(slot)
    world.slots[branch_id] = slot
    truth.slots.append(slot)
    process.slots.append(slot)
    return slot


def make(world: World, plan: Plan) -> Client:
    """The client of a plan's shape."""
    from tests.simulation.keys import KeyedClient
    from tests.simulation.services import HandedClient

    kinds = {"remote": world.parts.remote, "handed": HandedClient, "keyed": KeyedClient}
    assert plan.shape in SHAPES
    return kinds.get(plan.shape, Client)(world, plan)


__all__ = ["Client", "Outcome", "Plan", "Teller", "make", "open_slot"]
