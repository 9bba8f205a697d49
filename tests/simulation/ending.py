"""After healing: a bounded number of rounds, and nothing may be left.

First all that was begun must end while its records are kept; then time passes, fresh transactions
must commit, and the log must have emptied itself below the horizon.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from coordinator.log.base import Record
from coordinator.model import TransactionId
from tests.simulation.checkers import COMMITTED, PREPARED, WORKING, Violation
from tests.simulation.clients import Client, Plan
from tests.simulation.faults import BEAT_INTERVAL, RETENTION, SWEEP_INTERVAL, TIMEOUT_MAX

if TYPE_CHECKING:
    from tests.simulation.world import World

SETTLE = TIMEOUT_MAX * 1.5 + 4 * SWEEP_INTERVAL + 2.0
FORGET = RETENTION + 4.0 + 5 * SWEEP_INTERVAL
"""How long everything may take to end, and to be forgotten: bounds, in seconds of the world."""


def require_an_end(world: World) -> None:
    world.last_resource.expire()
    if _parked(world):
        _run_while(world, _something_is_open, SETTLE)
        _nothing_is_left_open(world)
        world.count("S46 all others end beside a record that cannot be read")
        for log in world.logs:
            log.poisoned.clear()
    _run_while(world, _something_is_open, SETTLE)
    _nothing_is_left_open(world)
    for truth in world.checker.truths.values():
        world.poll(truth)
    old = max(world.checker.truths, default=None)
    _let_time_pass(world)
    probes = [_Probe(world, place) for place in range(world.options.processes)]
    world.run_until(world.now + BEAT_INTERVAL)
    for probe in probes:
        probe.begin_now()
    world.run_until(world.now + 0.8)
    for probe in probes:
        probe.require_commit()
    if old is not None:
        _run_while(world, lambda _: any(log.horizon <= old for log in world.logs), FORGET)
        _run_while(world, lambda _: _remains(world, old) is not None, FORGET)
        _the_log_is_empty(world, old)
    world.checker.at_the_end()
    for truth in world.checker.truths.values():
        world.poll(truth)


def _parked(world: World) -> set[TransactionId]:
    """Transactions whose record cannot be read: a person has to mend it first."""
    return set[TransactionId]().union(*(log.poisoned for log in world.logs))


def _run_while(world: World, unfinished: Callable[[World], bool], most: float) -> None:
    """Let the world go on in small steps until it has finished, or the bound is reached."""
    end = world.now + most
    while world.now < end and unfinished(world):
        world.run_until(world.now + 0.3)


def _something_is_open(world: World) -> bool:
    parked = _parked(world)
    if any(p.drivers.keys() - parked or not (p.alive and p.ready) for p in world.processes):
        return True
    for resource in world.resources:
        for slot in resource.slots.values():
            if slot.truth.id in parked:
                continue
            left = slot.shown or slot.log.lost
            if slot.state == WORKING or (slot.state == PREPARED and not left):
                return True
    return any(
        record.transaction not in parked
        for log in world.logs
        for record in log.register.scan(None, 1 + len(parked)).records
    )


def _nothing_is_left_open(world: World) -> None:
    parked = _parked(world)
    world.checker.at_the_end(parked)
    for log in world.logs:
        incidents = {incident.gid for incident in log.register.incidents()}
        for record in log.register.scan(None, 1000).records:
            assert isinstance(record, Record)
            waits = [b for b in record.decision.branches if b.id not in record.ended]
            if waits and all(str(branch.xid) in incidents for branch in waits):
                continue
            if record.transaction not in parked:
                raise Violation("I6", f"{record} is unfinished in {log}")
    for process in world.processes:
        for transaction, driver in process.drivers.items():
            if transaction not in parked:
                raise Violation("I6", f"{process} still drives {driver.core!r}")


def _let_time_pass(world: World) -> None:
    """Nothing but time goes by: clocks move on, no event is due earlier than it was."""
    world.epoch_ms += int(FORGET * 1000)


def _the_log_is_empty(world: World, newest: TransactionId) -> None:
    for log in world.logs:
        if log.horizon <= newest:
            raise Violation("I6", f"the horizon of {log} stays at {log.horizon}")
    remains = _remains(world, newest)
    if remains is not None:
        raise Violation("I6", f"{remains} is below the horizon and stays")


def _remains(world: World, newest: TransactionId) -> Record | None:
    """A record that should have been forgotten and waits for no person."""
    for log in world.logs:
        incidents = {incident.gid for incident in log.register.incidents()}
        for record in log.register.scan(None, 1000, unfinished_only=False).records:
            assert isinstance(record, Record)
            waits = [b for b in record.decision.branches if b.id not in record.ended]
            if record.transaction > newest or any(str(b.xid) in incidents for b in waits):
                continue
            return record
    return None


class _Probe:
    """A fresh transaction after healing, which nothing can hinder."""

    def __init__(self, world: World, place: int) -> None:
        self.world = world
        plan = Plan(1000 + place, Random(place), world.options)
        plan.shape, plan.place, plan.seconds, plan.work = "plain", place, 1.0, 0.01
        plan.error, plan.meddle_at, plan.polls = False, -1.0, []
        plan.branches = [(0, True, False), (1, True, False)]
        self.client = Client(world, plan)

    def begin_now(self) -> None:
        self.client.start()

    def require_commit(self) -> None:
        slots = self.client.truth.slots if hasattr(self.client, "truth") else []
        if not slots or any(slot.state != COMMITTED for slot in slots):
            raise Violation("I6", f"a fresh transaction did not commit after healing: {slots}")
