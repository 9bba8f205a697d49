"""A coordinator's process: its clocks, its running transactions, its beats; it crashes and pauses.

One `Process` is one incarnation: a restart makes another one with a fresh member id. It mirrors
`coordinator.engine`: what it publishes and when, how it marks, when it refuses to begin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coordinator.log.base import Mark, Reading
from coordinator.members.base import Beat, InFlight
from coordinator.model import Claim, MemberId, TransactionId, id_floor, id_time_ms
from coordinator.protocol import Phase, Published
from coordinator.sweep import Case
from tests.simulation import disasters
from tests.simulation.drivers import Driver
from tests.simulation.faults import (
    BEAT_INTERVAL,
    DEADLINE,
    MARKS_INTERVAL,
    PUBLISHED_AFTER,
    RETENTION,
)
from tests.simulation.network import NEVER

if TYPE_CHECKING:
    from tests.simulation.logserver import LogServer
    from tests.simulation.resources import Resource, Slot
    from tests.simulation.world import World


class Process:
    """One incarnation of a coordinator."""

    def __init__(self, world: World, place: int, log: LogServer) -> None:
        self.world = world
        self.place = place
        self.log = log
        self.member = MemberId(f"{world.number():016x}")
        self.alive = True
        self.paused = False
        self.disk_fails = False
        self.log_broken = False
        self.lacks = disasters.lacks(world, self)
        self.resumed_at = -1.0
        self.ready = False
        self.backlog: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.drivers: dict[TransactionId, Driver] = {}
        self.slots: list[Slot] = []
        self.crash_rate = world.crash_rate
        self.created = id_floor(log.register.identity.created_ms)
        self.newest = self.created
        self.horizon = self.created
        self.seen_horizon_at = 0.0
        self.latest_clock_ms = 0
        self._beats = 0
        self._marks: list[Mark] = []
        self._marking = False

    def __repr__(self) -> str:
        return f"P{self.place}.{self.member[-3:]}"

    def has(self, resource: Resource) -> bool:
        """Its settings name this participant."""
        return resource.name != self.lacks

    def reaches(self, server: Any, operation: Callable[[Any], Any]) -> bool:
        """It has the participant, and its log is not broken."""
        if server is self.log:
            return not self.log_broken
        if getattr(server, "name", None) != self.lacks or self.lacks is None:
            return True
        self.world.count(f"S46 a process without the participant is asked to {operation.__name__}")
        return False

    # Clocks.

    def monotonic(self) -> float:
        return self.world.now * self.world.tempo[self.place] + 7.0 * self.place

    def wall_ms(self) -> int:
        world = self.world
        return world.epoch_ms + int((world.now + world.skew[self.place]) * 1000)

    # Life.

    def start(self) -> None:
        """Join, so that the horizon waits for this clock, then learn where the horizon stands."""
        self.beat()
        self.later(0.0, self._learn_horizon)

    def _learn_horizon(self) -> None:
        self.world.network.call(
            self, self.log, self.log.read, self.created, self._horizon_learnt, None
        )

    def _horizon_learnt(self, _: None, reading: Reading | None) -> None:
        if reading is None:
            self.later(0.1, self._learn_horizon)
            return
        self.learn(reading.horizon)
        self.ready = True

    def learn(self, horizon: TransactionId) -> None:
        self.horizon = horizon
        self.seen_horizon_at = self.world.now

    def later(self, delay: float, call: Callable[..., None], *arguments: Any) -> None:
        """A timer of this process: it dies with it, and waits while it is paused."""
        self.world.at(delay, self.run, call, arguments)

    def run(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if not self.alive:
            return
        if self.paused:
            self.backlog.append((call, arguments))
            return
        call(*arguments)

    def deliver(self, done: Callable[[Any, Any], None], context: Any, answer: Any) -> None:
        """The answer to a call arrives; the effect is over, and the process may crash here too."""
        if not self.alive:
            return
        if self.paused:
            self.backlog.append((self.deliver, (done, context, answer)))
            return
        if self.crash_rate and self.world.random() < self.crash_rate:
            self.crash()
            return
        done(context, answer)

    def crash(self) -> None:
        if not self.alive:
            return
        self.world.note_crash(self)
        self.alive = False
        self.backlog.clear()
        for slot in self.slots:
            if slot.state == 0:
                self.disconnect(slot, 0.3 * self.world.random())
        self.world.died(self)

    def disconnect(self, slot: Slot, after: float = 0.05) -> None:
        """The session ends; the server notices after all that was sent on it before."""
        now = self.world.now
        due = now if slot.session_due == NEVER else max(now, slot.session_due)
        self.world.at(due - now + after, slot.resource.disconnect, slot)

    def was_awake_since(self, begun_at: float) -> bool:
        """It lived, ran and was seen to live by all others from then until now."""
        world = self.world
        awake = self.alive and not self.paused and self.resumed_at < begun_at
        return awake and not world.options.on("members-wrong") and not world.members_linger

    def pause(self, seconds: float) -> None:
        if not self.alive or self.paused or self.world.healed:
            return
        self.world.count("a coordinator is paused")
        if self.world.trace is not None:
            self.world.note(f"{self} is paused for {seconds:.2f} s")
        self.paused = True
        # Who then goes on, a key's caller for instance, still waits and works for its own time.
        quiet_at = self.world.now + seconds + 3 * DEADLINE
        self.world.quiet_at = max(self.world.quiet_at, quiet_at)
        self.world.at(seconds, self.resume)

    def resume(self) -> None:
        if not self.paused:
            return
        self.paused = False
        self.resumed_at = self.world.now
        if self.world.trace is not None:
            self.world.note(f"{self} goes on")
        if any(driver.core.phase is Phase.COMMIT_PROPOSED for driver in self.drivers.values()):
            self.world.count("S07 a coordinator wakes with all votes in hand")
        backlog, self.backlog = self.backlog, []
        while backlog and self.alive and not self.paused:
            call, arguments = backlog.pop(0)
            call(*arguments)
        self.backlog = backlog + self.backlog

    # Transactions.

    def begin(self, seconds: float, claims: tuple[Claim, ...] = (), **more: bool) -> Driver | None:
        """Draw an id and start driving; None when the clock is too far behind the horizon."""
        transaction = self.world.draw_id(self)
        if self._is_near_horizon(transaction):
            self.world.count("S43 a slow clock refuses to begin")
            return None
        self.newest = max(self.newest, transaction)
        self.world.begun(transaction, self)
        return self.drive(transaction, seconds, claims, **more)

    def drive(
        self,
        transaction: TransactionId,
        seconds: float,
        claims: tuple[Claim, ...] = (),
        **more: bool,
    ) -> Driver:
        core = self.world.parts.transaction(transaction, claims=claims, **more)
        driver = self.world.parts.driver(self, core, self.monotonic() + seconds)
        self.drivers[transaction] = driver
        return driver

    def _is_near_horizon(self, transaction: TransactionId) -> bool:
        margin_ms = int(RETENTION * 500)
        if id_time_ms(transaction) < self.latest_clock_ms - margin_ms:
            return True
        moved = self.horizon > self.created
        return id_time_ms(transaction) < id_time_ms(self.horizon) + (margin_ms if moved else 0)

    def recover(self, case: Case) -> Driver:
        """A driver for a transaction found by the sweep, to be told to abort."""
        core = self.world.parts.transaction.in_doubt(case.transaction, case.branches)
        driver = self.world.parts.driver(self, core, 0.0, True)
        self.drivers[case.transaction] = driver
        return driver

    def ended(self, driver: Driver) -> None:
        if self.drivers.get(driver.core.id) is driver:
            del self.drivers[driver.core.id]

    # Background work.

    def beat(self) -> None:
        self.world.members[self.log.id][self.member] = (self._beat(), self, self.world.now)
        self.later(BEAT_INTERVAL, self.beat)

    def _beat(self) -> Beat:
        self._beats += 1
        in_flight: list[InFlight] = []
        if self.drivers:
            now = self.monotonic()
            for driver in list(self.drivers.values()):
                if now - driver.born < PUBLISHED_AFTER or driver.core.phase is Phase.ONE_PHASE:
                    continue
                if driver.core.private and not driver.core.decided:
                    driver.post(Published())
                left = max(driver.deadline - now, 0.0)
                in_flight.append(InFlight(driver.core.id, left, driver.core.phase.value))
        clock_ms = self.wall_ms()
        self.latest_clock_ms = max(self.latest_clock_ms, clock_ms)
        return Beat(clock_ms, self._beats, in_flight)

    def mark(self, mark: Mark) -> None:
        """A finished mark: batched and lazy."""
        self._marks.append(mark)
        if not self._marking:
            self._marking = True
            self.later(MARKS_INTERVAL, self._marks_due)

    def _marks_due(self) -> None:
        self._marking = False
        self.write_marks()

    def write_marks(self) -> None:
        marks, self._marks = self._marks, []
        if not marks:
            return
        world = self.world
        if world.marks_lost and world.random() < world.marks_lost:
            world.count("finished marks are lost")
            return
        world.network.call(self, self.log, self.log.finish, marks, self._marked, marks)

    def _marked(self, marks: list[Mark], answer: bool | None) -> None:
        if answer is None:
            for mark in marks:
                self.mark(mark)


def alive(process: Process) -> dict[MemberId, Beat]:
    """What the members port answers in this process; with faults it is late, or plainly wrong."""
    world = process.world
    now = world.now
    found: dict[MemberId, Beat] = {}
    for member, (beat, owner, beaten_at) in world.members[process.log.id].items():
        if world.members_linger:
            if now - beaten_at > world.members_linger:
                continue  # a store of heartbeats forgets the dead late, and the paused too
        elif not owner.alive:
            continue
        if world.members_wrong and owner is not process and world.random() < world.members_wrong:
            world.count("a living member looks dead")
            continue
        found[member] = beat
    return found
