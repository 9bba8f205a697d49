"""Transactions across processes: called services with unasked votes, and votes handed on.

A called service prepares by itself and its vote rides back on the answer. A request without an
answer is given up: the service is asked to roll back what it prepared, and a further request is
made under another branch. In the handed shape the preparer keeps no driver: it hands the votes to
one coordinator, and after a silence to a second one, which may then both drive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coordinator.events import AbortRequested, CommitRequested, Enlisted, Published
from coordinator.model import Outcome, TransactionId, Vote, VoteKind
from coordinator.protocol import Phase
from tests.simulation.clients import Client, Plan, Teller, open_slot
from tests.simulation.processes import Process
from tests.simulation.resources import STRANGER, Slot

if TYPE_CHECKING:
    from tests.simulation.world import World

ANSWER_WITHIN = 0.25
REQUESTS_MOST = 3


class Wire:
    """What lies between two processes; it is never down, though messages on it get lost."""

    down = False


WIRE = Wire()


def _nothing(_: Any, __: Any) -> None:
    """Nobody waits for this answer."""


class RemoteClient(Client):
    """All branches but the first are prepared by called services."""

    def __init__(self, world: World, plan: Plan) -> None:
        super().__init__(world, plan)
        self.request = 0
        self.wanted = 0
        self.service: Process | None = None
        self.prepared: list[tuple[Process, int, Slot]] = []

    def work(self) -> None:
        self.process.later(self.plan.seconds, self.teller.deadline)
        self.driver.post(Published())  # before the header leaves
        resource, writes, refuses = self.plan.branches[0]
        if not self.enlist(self.world.resources[resource], writes, refuses, self.plan.deltas[0]):
            self.teller.roll_back("a resource could not be reached")
            return
        self.call_next()

    def call_next(self) -> None:
        self.wanted += 1
        if self.wanted >= len(self.plan.branches):
            self.process.later(self.plan.work, self.finish)
            return
        self.send(1)

    def send(self, repeat: int) -> None:
        """The `repeat`-th request for one piece of remote work."""
        self.request += 1
        self.service = self.world.other_process(self.process)
        if self.service is None or repeat > REQUESTS_MOST:
            self.teller.roll_back("the service does not answer")
            return
        request = (self.service, self.request, self.wanted)
        self.world.network.call(self.process, WIRE, self.arrives, request, _nothing, None)
        self.process.later(ANSWER_WITHIN, self.no_answer, self.request, repeat)

    def no_answer(self, request: int, repeat: int) -> None:
        if request != self.request or self.driver.core.phase is not Phase.ACTIVE:
            return
        self.world.count("a request without an answer is repeated under another branch")
        assert self.service is not None
        self.world.network.call(
            self.process, WIRE, self.undo_arrives, (self.service, request), _nothing, None
        )
        self.process.later(0.05, self.send_again, self.give_up(), repeat + 1)

    def give_up(self) -> int:
        """From here on an answer that still comes is dropped."""
        self.request += 1
        return self.request

    def send_again(self, request: int, repeat: int) -> None:
        if request == self.request and self.driver.core.phase is Phase.ACTIVE:
            self.send(repeat)

    def vote_arrives(self, answer: tuple[int, Slot, Vote]) -> bool:
        self.process.run(self.take_vote, answer)
        return True

    def take_vote(self, request: int, slot: Slot, vote: Vote) -> None:
        """Enlist exactly one answer of a request; answers to what was given up are dropped."""
        if request != self.request or self.driver.core.phase is not Phase.ACTIVE:
            self.world.count("S48 an answer comes too late to be enlisted")
            return
        self.request += 1
        self.world.checker.enlisted(slot)
        self.driver.post(Enlisted(slot.branch, vote))
        self.call_next()

    # In the service's process.

    def arrives(self, request: tuple[Process, int, int]) -> bool:
        service, number, wanted = request
        service.run(self.serve, (service, number, wanted))
        return True

    def serve(self, service: Process, number: int, wanted: int) -> None:
        """Join, work, and prepare when the request ends."""
        resource, writes, refuses = self.plan.branches[wanted]
        target = self.world.resources[resource]
        if target.down or not service.ready or not service.has(target):
            return
        slot = open_slot(service, target, self.truth)
        slot.refuses, slot.delta = refuses, self.plan.deltas[wanted]
        slot.writes = writes
        self.prepared.append((service, number, slot))
        slot.session_due = self.world.network.call(
            service,
            target,
            target.prepare,
            slot,
            self.prepared_there,
            (service, number, slot),
            True,
        )

    def prepared_there(self, context: tuple[Process, int, Slot], vote: Vote | None) -> None:
        service, number, slot = context
        if vote is None:
            service.disconnect(slot)
            return
        if vote.kind is VoteKind.READ_ONLY:
            # The session would have to wait for a decision that nobody brings: end it with the
            # request, as a service does whose branch only read.
            service.disconnect(slot)
        self.world.network.call(
            service, WIRE, self.vote_arrives, (number, slot, vote), _nothing, None
        )

    def undo_arrives(self, request: tuple[Process, int]) -> bool:
        service, number = request
        service.run(self.undo, (service, number))
        return True

    def undo(self, service: Process, number: int) -> None:
        for owner, served, slot in self.prepared:
            if owner is service and served == number and not slot.accepted:
                self.world.network.call(
                    service,
                    slot.resource,
                    slot.resource.rollback,
                    (slot.branch, service.log, STRANGER),
                    _nothing,
                    None,
                )


class HandedClient(Client):
    """The preparer hands its votes to one coordinator, and maybe to another."""

    def __init__(self, world: World, plan: Plan) -> None:
        super().__init__(world, plan)
        self.votes: dict[str, tuple[Slot, Vote]] = {}
        self.waiting = 0
        self.handed = 0
        self.answered = False

    def start(self) -> None:
        process = self.world.some_process(self.plan.place)
        if process is None:
            return
        self.process = process
        transaction = self.world.draw_id(process)
        if process._is_near_horizon(transaction):
            return
        process.newest = max(process.newest, transaction)
        self.world.begun(transaction, process)
        self.truth = self.world.checker.truths[transaction]
        self.world.started(self.truth, self.plan)
        for (resource, writes, refuses), delta in zip(
            self.plan.branches, self.plan.deltas, strict=True
        ):
            self.prepare(resource, writes, refuses, delta)

    def prepare(self, resource: int, writes: bool, refuses: bool, delta: int) -> None:
        if not self.process.alive:
            return
        target = self.world.resources[resource]
        slot = open_slot(self.process, target, self.truth)
        slot.writes, slot.refuses, slot.delta = writes, refuses, delta
        self.world.checker.enlisted(slot)
        self.waiting += 1
        slot.session_due = self.world.network.call(
            self.process, target, target.prepare, slot, self.voted, slot, True
        )

    def voted(self, slot: Slot, vote: Vote | None) -> None:
        self.waiting -= 1
        if vote is None or vote.kind is VoteKind.READ_ONLY:
            self.process.disconnect(slot)
        if vote is not None:
            self.votes[slot.id] = (slot, vote)
        if self.waiting:
            return
        kinds = [vote.kind for _, vote in self.votes.values()]
        if len(kinds) < len(self.plan.branches) or VoteKind.ABORTED in kinds:
            # Never handed on and never proposed: it cannot commit. The sweep ends what stands.
            self.world.tell(self.truth, Outcome.ABORTED, False)
            return
        self.hand(CommitRequested())

    def hand(self, wish: CommitRequested | AbortRequested) -> None:
        self.handed += 1
        to = self.world.other_process(self.process)
        if to is None:
            return
        self.world.network.call(self.process, WIRE, self.hand_arrives, (to, wish), _nothing, None)
        self.process.later(0.3 + 0.5 * self.world.random(), self.hand_again)

    def hand_again(self) -> None:
        if self.answered or self.handed >= REQUESTS_MOST:
            return
        self.world.count("votes are handed to a second coordinator")
        give_up = self.world.random() < 0.3
        self.hand(AbortRequested("the client gave up") if give_up else CommitRequested())

    def answer_arrives(self, _: None) -> bool:
        self.answered = True
        return True

    # In the process that was handed the votes.

    def hand_arrives(self, request: tuple[Process, CommitRequested | AbortRequested]) -> bool:
        to, wish = request
        to.run(self.take, (to, wish))
        return True

    def take(self, to: Process, wish: CommitRequested | AbortRequested) -> None:
        transaction: TransactionId = self.truth.id
        if not to.ready or transaction in to.drivers:
            return
        driver = to.drive(transaction, self.plan.seconds, (), handed=True)
        teller = HandedTeller(driver, self.truth, lambda: self.tell_back(to))
        for slot, vote in self.votes.values():
            driver.post(Enlisted(slot.branch, vote))
        to.later(self.plan.seconds, teller.deadline)
        driver.post(wish)

    def tell_back(self, to: Process) -> None:
        self.world.network.call(to, WIRE, self.answer_arrives, None, _nothing, None)


class HandedTeller(Teller):
    """Tells the preparer as well, so that it need not ask another coordinator."""

    __slots__ = ("tell_back",)

    def __init__(self, driver: Any, truth: Any, tell_back: Callable[[], None]) -> None:
        super().__init__(driver, truth)
        self.tell_back = tell_back

    def tell(self) -> None:
        super().tell()
        if self.driver.outcome is not Outcome.UNKNOWN:
            self.tell_back()
