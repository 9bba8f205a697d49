"""The sweep, round by round, in the order of effects of `coordinator.recovery`.

members.alive, incidents, the participants' scans, the records, judge, drive; after a refusal a
second look and quarantine; then the clear marks, the horizon, forgetting. Between any two of them
the process may crash, be paused or sleep, and other sweepers work at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from coordinator.events import AbortRequested
from coordinator.log.base import Incident, Page, Record, Unreadable
from coordinator.log.base import Resource as KnownResource
from coordinator.members.base import Beat
from coordinator.model import Branch, MemberId, TransactionId
from coordinator.protocol import Phase
from coordinator.sweep import Case
from tests.simulation.drivers import Driver
from tests.simulation.faults import (
    ABSENCE_LIMIT,
    HOUSEKEEPING,
    RETENTION,
    SWEEP_INTERVAL,
    TIMEOUT_MAX,
)
from tests.simulation.processes import Process, alive
from tests.simulation.resources import Resource

if TYPE_CHECKING:
    from tests.simulation.world import World

MANY = 6
"""Many for a world of some twenty transactions."""

ABORT_FOUND = AbortRequested("found by recovery")


class Sweeper:
    """Sweeps for one process."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.world: World = process.world
        self.log = process.log
        self.watch = self.world.parts.watch(TIMEOUT_MAX)
        self.kept_house = float("-inf")
        self.rounds = 0
        self._round = 0
        self._reset()

    def _reset(self) -> None:
        self.alive: Mapping[MemberId, Beat] = {}
        self.quarantined: frozenset[str] = frozenset()
        self.began_ms = 0
        self.found: dict[str, list[Branch]] = {}
        self.records: dict[TransactionId, Record] = {}
        self.unreadable: set[TransactionId] = set()
        self.waiting = 0

    def start(self) -> None:
        self.process.later(SWEEP_INTERVAL * self.world.random(), self.begin_round)

    def _rest(self) -> None:
        """The round is over, or failed; the next one tries again."""
        self._round += 1
        self.process.later(SWEEP_INTERVAL * (0.8 + 0.4 * self.world.random()), self.begin_round)

    def _step(self, following: Callable[..., None], *arguments: Any) -> None:
        """Go on, or first sleep for as long as this world's sleepy sweepers do."""
        world = self.world
        if world.sleepy and world.random() < world.sleepy:
            world.count("a sweeper sleeps in the middle of its round")
            sleep = world.sleep_most * world.random()
            world.quiet_at = max(world.quiet_at, world.now + sleep)
            self.process.later(sleep, following, *arguments)
            return
        following(*arguments)

    def _ask(
        self, operation: Callable[[Any], Any], request: Any, done: Callable[[Any, Any], None]
    ) -> None:
        self.world.network.call(self.process, self.log, operation, request, done, self._round)

    # Observing.

    def begin_round(self) -> None:
        self._reset()
        self.process.write_marks()
        self.alive = alive(self.process)
        self._ask(self.log.incidents, None, self._incidents_read)

    def _incidents_read(self, _: int, incidents: Sequence[Incident] | None) -> None:
        if incidents is None:
            self._rest()
            return
        self.quarantined = frozenset(incident.gid for incident in incidents)
        self.began_ms = self.process.wall_ms()
        resources = [each for each in self.world.resources if self.process.has(each)]
        self.waiting = len(resources)
        for resource in resources:
            self.world.network.call(
                self.process, resource, resource.recover, self.log, self._scanned, resource
            )

    def _scanned(self, resource: Resource, branches: list[Branch] | None) -> None:
        if branches is None:
            self.world.count("a sweep cannot reach a resource")
        else:
            self.found[resource.name] = branches
        self.waiting -= 1
        if self.waiting == 0:
            self._step(self._read_records)

    def _read_records(self) -> None:
        self._ask(self.log.scan, None, self._records_read)

    def _records_read(self, _: int, page: Page | None) -> None:
        if page is None:
            self._rest()
            return
        for record in page.records:
            self.sort(record)
        missing = {
            branch.xid.transaction: None
            for branch in self._seen()
            if branch.xid.transaction not in self.records
            and branch.xid.transaction not in self.unreadable
            and branch.xid.transaction not in self.process.drivers
        }
        if not missing:
            self._step(self._judge)
            return
        self._ask(self.log.read_many, list(missing), self._missing_read)

    def _missing_read(self, _: int, found: Sequence[Record | Unreadable | None] | None) -> None:
        if found is None:
            self._rest()
            return
        for record in found:
            if record is not None:
                self.sort(record)
        self._step(self._judge)

    def sort(self, record: Record | Unreadable) -> None:
        """A record that cannot be read parks its own transaction only."""
        if isinstance(record, Unreadable):
            self.unreadable.add(record.transaction)
        else:
            self.records[record.transaction] = record

    def _seen(self) -> list[Branch]:
        """What was found and does not wait for a person."""
        return [
            branch
            for branches in self.found.values()
            for branch in branches
            if not self.quarantined or str(branch.xid) not in self.quarantined
        ]

    # Acting.

    def _judge(self) -> None:
        seen = self._seen()
        in_sight = self._in_sight(seen)
        parked = [
            transaction
            for transaction, record in self.records.items()
            if transaction not in in_sight and self._is_parked(record)
        ]
        cases = self.watch.judge(
            now=self.process.monotonic(),
            alive=self.alive,
            seen=seen,
            records=self.records,
            driven_here=[*self.process.drivers, *self.unreadable, *parked],
        )
        if len(cases) >= MANY:
            self.world.count("S47 a sweep finds many in doubt at once")
        self.waiting = 1 + len(cases)
        for case in cases:
            self._drive(case)
        self._case_done()

    def _in_sight(self, seen: list[Branch]) -> set[TransactionId]:
        return {branch.xid.transaction for branch in seen}

    def _is_parked(self, record: Record) -> bool:
        if not self.quarantined:
            return False
        left = [b for b in record.decision.branches if b.id not in record.ended]
        return bool(left) and all(str(branch.xid) in self.quarantined for branch in left)

    def _drive(self, case: Case) -> None:
        process = self.process
        if case.transaction in process.drivers:
            self._case_done()
            return
        if self.world.trace is not None:
            self.world.note(f"{process} recovers {case.transaction}: {len(case.branches)} seen")
        self.world.count_recovery(process, case)
        driver = process.recover(case)
        driver.watcher = lambda: self._look(driver, case)
        driver.post(ABORT_FOUND)

    def _look(self, driver: Driver, case: Case) -> None:
        if not driver.over:
            return
        driver.watcher = None
        self.process.ended(driver)
        if driver.core.phase is Phase.UNKNOWN and case.branches:
            self._step(self._look_again, driver, list(case.branches))
        else:
            self._case_done()

    def _look_again(self, driver: Driver, branches: list[Branch]) -> None:
        """The log has forgotten the id: quarantine only what is still there at a second look."""
        if not branches:
            self._case_done()
            return
        resource = self.world.slots[branches[0].xid.branch].resource
        self.world.network.call(
            self.process,
            resource,
            resource.recover,
            self.log,
            self._seen_again,
            (driver, branches),
        )

    def _seen_again(self, context: tuple[Driver, list[Branch]], found: list[Branch] | None) -> None:
        driver, branches = context
        branch = branches.pop(0)
        if found is None or all(each.id != branch.id for each in found):
            self._look_again(driver, branches)
            return
        slot = self.world.slots[branch.xid.branch]
        why = "prepared, but the log has forgotten transactions of that age"
        incident = Incident(str(branch.xid), branch.participant, None, why, self.process.wall_ms())
        self.world.network.call(
            self.process,
            self.log,
            self.log.report,
            (incident, slot, driver.refused_at),
            self._reported,
            context,
        )

    def _reported(self, context: tuple[Driver, list[Branch]], _: bool | None) -> None:
        self._look_again(*context)

    def _case_done(self) -> None:
        self.waiting -= 1
        if self.waiting == 0:
            self._step(self._keep_house)

    # Forgetting.

    def _keep_house(self) -> None:
        self.rounds += 1
        now = self.process.monotonic()
        if now - self.kept_house < HOUSEKEEPING:
            self._rest()
            return
        self.kept_house = now
        marks = []
        for name, branches in self.found.items():
            clear = self.world.parts.clear_mark(
                scan_began_ms=self.began_ms,
                retention_ms=int(RETENTION * 1000),
                alive=self.alive,
                seen=self._unquarantined(branches),
                records=self.records,
            )
            marks.append((name, clear, self.began_ms))
        self._ask(self.log.swept, marks, self._swept)

    def _unquarantined(self, branches: list[Branch]) -> list[Branch]:
        if not self.quarantined:
            return branches
        return [branch for branch in branches if str(branch.xid) not in self.quarantined]

    def _swept(self, _: int, answer: bool | None) -> None:
        if answer is None:
            self._rest()
            return
        self._step(self._read_resources)

    def _read_resources(self) -> None:
        self.alive = alive(self.process)
        self._ask(self.log.resources, None, self._resources_read)

    def _resources_read(self, _: int, resources: Sequence[KnownResource] | None) -> None:
        if resources is None:
            self._rest()
            return
        candidate = self.world.parts.horizon_candidate(
            retention_ms=int(RETENTION * 1000),
            absence_limit_ms=int(ABSENCE_LIMIT * 1000),
            now_ms=self.began_ms,
            alive=self.alive,
            newest_seen=max([self.process.newest, *self.records]),
            resources=resources,
        )
        self._step(self._raise_horizon, candidate)

    def _raise_horizon(self, candidate: TransactionId) -> None:
        self._ask(self.log.raise_horizon, candidate, self._horizon_raised)

    def _horizon_raised(self, _: int, horizon: TransactionId | None) -> None:
        if horizon is None:
            self._rest()
            return
        self.process.learn(horizon)
        self._step(self._forget)

    def _forget(self) -> None:
        self._ask(self.log.forget, self.began_ms, self._forgotten)

    def _forgotten(self, _: int, answer: tuple[int] | None) -> None:
        self._rest()
