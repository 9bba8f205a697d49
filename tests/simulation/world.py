"""One world: real protocol code, simulated everything else, one seed, one thread, one queue.

First a safety phase with faults, of random length; then everything heals, whoever was down comes
back, and all that was begun must end. The same options give the same history, event by event.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from random import Random
from typing import Any, NamedTuple

from coordinator.log.base import Incident, Reading
from coordinator.log.register import Register
from coordinator.members.base import Beat
from coordinator.model import (
    BranchId,
    MemberId,
    Outcome,
    Status,
    TransactionId,
    Verdict,
    id_floor,
    id_time_ms,
)
from coordinator.protocol import Phase, Transaction
from coordinator.sweep import Case, Watch, clear_mark, horizon_candidate
from tests.simulation import clients, crossed, keys, services
from tests.simulation.checkers import COMMITTED, PREPARED, WORKING, Checker, Truth, Violation
from tests.simulation.disasters import DISASTERS
from tests.simulation.drivers import Driver
from tests.simulation.faults import RETENTION, Options
from tests.simulation.logserver import LogServer
from tests.simulation.network import Network
from tests.simulation.processes import Process
from tests.simulation.resources import NO_LIMIT, LastResource, Resource, Slot
from tests.simulation.sweeper import Sweeper

SKEW_MOST = 4.0


def read_status(world: World, truth: Truth, reading: Reading) -> Status:
    """What `Coordinator.status` makes of a linearizable read."""
    if reading.record is None:
        return Status.FORGOTTEN if truth.id < reading.horizon else Status.UNDECIDED
    verdict = reading.record.answer or reading.record.decision.verdict
    if verdict is Verdict.DELEGATED:
        return Status.UNDECIDED
    return Status.COMMITTED if verdict is Verdict.COMMIT else Status.ABORTED


class Parts(NamedTuple):
    """What a world is built of; a planted bug puts something else in one of the places."""

    transaction: Any = Transaction
    register: Any = Register
    watch: Any = Watch
    clear_mark: Any = clear_mark
    horizon_candidate: Any = horizon_candidate
    driver: Any = Driver
    teller: Any = clients.Teller
    caller: Any = keys.Caller
    remote: Any = services.RemoteClient
    sweeper: Any = Sweeper
    process: Any = Process
    resource: Any = Resource
    log: Any = LogServer
    restore: Any = Register.raise_horizon
    status: Any = read_status


REAL = Parts()


class World:
    """Everything that exists between one seed and its verdict."""

    def __init__(
        self, options: Options, parts: Parts = REAL, trace: list[str] | None = None
    ) -> None:
        self.options = options
        self.parts = parts
        self.trace = trace
        self.queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.sequence = 0
        self.now = 0.0
        self.epoch_ms = 1_760_000_000_000
        self.log_age_ms = 0 if options.fresh_log else 60_000
        self.random = Random(f"events {options.seed} {options.salt}").random
        self.counts: dict[str, int] = {}
        self.outcomes: dict[str, int] = {}
        self.checker = Checker()
        self.slots: dict[BranchId, Slot] = {}
        self.healed = False
        self.quiet_at = 0.0
        self.early_horizon_used = False
        self._numbers = 0
        self._read_rates(options)
        self.network = Network(self, options)
        self.logs: list[LogServer] = [
            parts.log(self, n + 1) for n in range(2 if options.on("two-logs") else 1)
        ]
        self.every_log = list(self.logs)
        self.resources = [parts.resource(self, f"db{n}") for n in range(options.resources)]
        if options.on("few-slots"):
            for resource in self.resources:
                resource.slots_most = 1 + int(2.0 * options.rates["few-slots"])
        self.last_resource = LastResource(self, "topic")
        for log in self.logs:
            for resource in self.resources:
                log.register.register(resource.name, resource.name, self.epoch_ms)
        self.members: dict[str, dict[MemberId, tuple[Beat, Process, float]]] = {
            log.id: {} for log in self.logs
        }
        self.processes: list[Process] = []
        self.sweepers: list[Sweeper] = []

    def _read_rates(self, options: Options) -> None:
        self.crash_rate = options.rate("crash", 0.0005, 0.01)
        self.crash_at_decision = options.rate("crash-at-decision", 0.02, 0.3)
        self.pause_at_decision = options.rate("pause-at-decision", 0.02, 0.25)
        self.pause_most = 2.4 * RETENTION
        self.late_prepare = options.rate("late-prepare", 0.02, 0.25)
        self.late_prepare_most = 2.0 * RETENTION * options.rate("late-prepare", 0.1, 1.0)
        self.sleepy = options.rate("sleepy-sweep", 0.01, 0.2)
        self.sleep_most = options.rate("sleepy-sweep", 1.0, 2.0 * RETENTION)
        self.marks_lost = options.rate("marks-lost", 0.1, 0.9)
        self.members_wrong = options.rate("members-wrong", 0.02, 0.5)
        self.members_linger = options.members_linger
        draw = Random(f"clocks {options.seed}").random
        places = range(options.processes)
        amount = options.rate("clocks", 0.2, 1.0)
        # In some worlds a clock is off by more than the retention: as an hour is in real life.
        self.jump_most = SKEW_MOST if options.rates.get("clocks", 0.0) < 0.8 else 3.0 * RETENTION
        self.skew = [SKEW_MOST * amount * (2.0 * draw() - 1.0) for _ in places]
        self.fastest = max(self.skew)
        self.tempo = [1.0 + 0.3 * amount * (2.0 * draw() - 1.0) for _ in places]

    # Time.

    def at(self, delay: float, call: Callable[..., None], *arguments: Any) -> None:
        self.sequence += 1
        heappush(self.queue, (self.now + delay, self.sequence, call, arguments))

    def run_until(self, end: float) -> None:
        queue = self.queue
        while queue and queue[0][0] <= end:
            self.now, _, call, arguments = heappop(queue)
            call(*arguments)
        self.now = end

    # What happened: counters for coverage, and lines for people when a failure is replayed.

    def count(self, what: str, by: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + by

    def note(self, line: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now:9.4f}  {line}")

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    # Transactions.

    def draw_id(self, process: Process) -> TransactionId:
        digits = f"{process.wall_ms():012x}"
        number = self.number()
        return TransactionId(f"{digits[:8]}-{digits[8:]}-7{number % 4096:03x}-8000-{number:012x}")

    def begun(self, transaction: TransactionId, process: Process) -> None:
        self.checker.truths[transaction] = Truth(transaction, process.log)

    def started(self, truth: Truth, plan: clients.Plan) -> None:
        self.count(f"shape: {plan.shape}")
        if self.trace is not None:
            self.note(f"{plan} begins as {truth.id}")
        for delay in plan.polls:
            self.at(delay, self.poll, truth)

    def poll(self, truth: Truth) -> None:
        """Somebody reads the status, linearizably."""
        log: LogServer = truth.log  # type: ignore[assignment]
        reading = log.register.read(truth.id)
        self.checker.status_read(truth, self.parts.status(self, truth, reading))

    def tell(self, truth: Truth, outcome: Outcome, heuristic: bool) -> None:
        told = "heuristic" if heuristic else outcome.value
        self.outcomes[told] = self.outcomes.get(told, 0) + 1
        if self.trace is not None:
            self.note(f"the client of {truth.id} is told {told}")
        self.checker.told(truth, outcome, heuristic=heuristic)

    def quarantined(self, slot: Slot, refused_at: float) -> None:
        self.count("a branch is quarantined")
        if slot.came_back:
            self.count("S30 a branch of a restored database is quarantined")
        elif slot.truth.restored:
            self.count("S17 a branch that a restored log does not know is quarantined")
        self.checker.quarantined(slot, refused_at, self._need(slot))

    def _need(self, slot: Slot) -> str:
        """Why the world made a quarantine necessary; empty when nothing did.

        A branch that was prepared within its deadline is seen by every sweep before the horizon can
        reach it. So it takes a PREPARE that came later than half the retention after its
        transaction's birth, by the fastest clock that there was, or somebody who raised the horizon
        by hand.
        """
        if self.early_horizon_used:
            return "the horizon was raised early"
        if slot.came_back:
            return "the resource went back to a time when it was prepared"
        if slot.truth.restored:
            return "the log was restored from a backup"
        if self.jump_most > RETENTION:
            return "clocks were off by more than the retention"
        if slot.attended:
            return ""  # its own coordinator lived, knew that the PREPARE was out, and said so
        drawn = (id_time_ms(slot.truth.id) - self.epoch_ms) / 1000
        if slot.prepared_at + self.fastest - drawn >= RETENTION / 2:
            return "prepared later than half the retention after its transaction began"
        return ""

    def count_recovery(self, process: Process, case: Case) -> None:
        transaction = case.transaction
        for other in self.processes:
            if other is not process and other.alive and transaction in other.drivers:
                self.count("S08 two coordinators drive one transaction")
        truth = self.checker.truths.get(transaction)
        if truth is None or case.record is not None:
            return
        owners = {slot.process.alive for slot in truth.slots}
        if owners == {False}:
            self.count("S02 recovery finds what a dead coordinator left undecided")

    def note_crash(self, process: Process) -> None:
        """Classify a crash by how far the transactions of the process had come."""
        if self.trace is not None:
            self.note(f"{process} crashes")
        for driver in process.drivers.values():
            truth = self.checker.truths.get(driver.core.id)
            if driver.once or truth is None:
                continue
            states = [slot.state for slot in truth.slots if slot.writes]
            if driver.core.phase is Phase.ACTIVE:
                self.count("S01 a crash before any PREPARE")
            elif truth.outcome is Verdict.COMMIT and COMMITTED not in states:
                self.count("S04 a crash between the decision and the second phase")
            elif truth.outcome is Verdict.COMMIT and PREPARED in states:
                self.count("S05 a crash in the middle of the second phase")
            elif truth.outcome is Verdict.COMMIT:
                self.count("S06 a crash after the second phase, before the answer")
            elif PREPARED in states and WORKING in states:
                self.count("S02 a crash between two PREPAREs")
            elif driver.core.phase is Phase.COMMIT_PROPOSED:
                self.count("S03 a crash with all votes in hand")

    # Processes.

    def log_of(self, place: int) -> LogServer:
        return self.logs[place % len(self.logs)]

    def boot(self, place: int) -> Process:
        process = self.parts.process(self, place, self.log_of(place))
        if self.healed:
            process.crash_rate = 0.0
        if place < len(self.processes):
            self.processes[place] = process
        else:
            self.processes.append(process)
        if self.trace is not None:
            self.note(f"{process} starts on {process.log}")
        process.start()
        absent = self.options.on("absent-sweeper") and place % 2 == 0
        if self.healed or not absent:
            sweeper = self.parts.sweeper(process)
            self.sweepers.append(sweeper)
            sweeper.start()
        return process

    def died(self, process: Process) -> None:
        self.at(0.1 + 1.5 * self.random() ** 2, self._reboot, process)

    def _reboot(self, dead: Process) -> None:
        if self.processes[dead.place] is dead:
            self.boot(dead.place)

    def some_process(self, place: int) -> Process | None:
        """A coordinator that answers a client now, looked for from a place on."""
        for offset in range(len(self.processes)):
            process = self.processes[(place + offset) % len(self.processes)]
            if process.alive and process.ready and not process.paused:
                return process
        return None

    def key_process(self, first: int, place: int) -> Process | None:
        """A coordinator on the log of the key's first caller."""
        found = [
            each
            for each in self.processes
            if each.log is self.log_of(first) and each.alive and each.ready and not each.paused
        ]
        return found[place % len(found)] if found else None

    def other_process(self, process: Process) -> Process | None:
        found = [
            each
            for each in self.processes
            if each.log is process.log and each.alive and each.ready and each is not process
        ]
        if not found:
            return process if process.alive else None
        return found[int(self.random() * len(found))]

    # The two phases.

    def run(self) -> None:
        """The whole history. Raises `Violation` at the moment an invariant breaks."""
        options = self.options
        draw = Random(f"plans {options.seed}")
        for place in range(options.processes):
            self.boot(place)
        self.run_until(0.3)
        for number in range(options.transactions):
            plan = clients.Plan(number, draw, options)
            if options.only is None or number in options.only:
                self.at(plan.start, clients.make(self, plan).start)
        if options.on("deadlock"):
            for client in crossed.pairs(self, Random(f"deadlocks {options.seed}")):
                if options.only is None or client.plan.number in options.only:
                    self.at(client.plan.start, client.start)
        self._schedule_faults(Random(f"faults {options.seed}"))
        self.run_until(0.3 + options.safety)
        self._heal()
        self._require_an_end()

    def _schedule_faults(self, draw: Random) -> None:
        options, safety = self.options, self.options.safety
        for kind, most, fault in (
            ("resource-down", 3, self._resource_down),
            ("resource-restart", 4, self._resource_restart),
            ("log-down", 2, self._log_down),
            ("pause", 2, self._pause),
            ("crash", 2, self._crash),
            ("clocks", 2, self._clock_jump),
            ("early-horizon", 3, self._early_horizon),
            ("person", 3, self._person),
            *((kind, most, partial(fault, self)) for kind, most, fault in DISASTERS),
        ):
            times = [(draw.random(), draw.random(), draw.random()) for _ in range(most)]
            for number, (at, which, amount) in enumerate(times):
                if options.on(kind) and number <= options.rates[kind] * most:
                    # A backup is restored late, when much has been forgotten since it was taken.
                    when = at**0.25 if kind == "resource-restored" else at
                    self.at(when * safety, fault, which, amount)

    def _resource_down(self, which: float, amount: float) -> None:
        resource = self.resources[int(which * len(self.resources))]
        resource.down = True
        self.count("a resource is unreachable")
        self.note(f"{resource.name} is unreachable")
        self.at(0.2 + 2.4 * RETENTION * amount**2, self._up, resource)

    def _up(self, server: Resource | LogServer) -> None:
        server.down = False

    def _resource_restart(self, which: float, amount: float) -> None:
        resource = self.resources[int(which * len(self.resources))]
        self.count("a resource restarts")
        self.note(f"{resource.name} restarts")
        resource.restart()

    def _log_down(self, which: float, amount: float) -> None:
        log = self.logs[int(which * len(self.logs))]
        log.down = True
        self.count("S12 the log is unavailable")
        self.note(f"{log} is unavailable")
        self.at(0.2 + 2.0 * amount, self._up, log)

    def _pause(self, which: float, amount: float) -> None:
        self.processes[int(which * len(self.processes))].pause(0.1 + self.pause_most * amount)

    def _crash(self, which: float, amount: float) -> None:
        self.processes[int(which * len(self.processes))].crash()

    def _clock_jump(self, which: float, amount: float) -> None:
        place = int(which * len(self.skew))
        before, self.skew[place] = self.skew[place], self.jump_most * (2.0 * amount - 1.0)
        jump = abs(self.skew[place] - before)
        if self.processes[place].alive and jump > RETENTION / 2:
            self.count("S43 the clock of a living coordinator jumps")
            if jump > RETENTION:
                self.count("S43 it jumps by more than the retention")
        self.fastest = max(self.fastest, *self.skew)

    def _early_horizon(self, which: float, amount: float) -> None:
        """Somebody raises the horizon by hand, past what lives: agreement must not mind."""
        log = self.logs[int(which * len(self.logs))]
        to = id_floor(self.epoch_ms + int((self.now + 1.0 - 3.0 * amount * amount) * 1000))
        self.early_horizon_used = True
        self.count("the horizon is raised early")
        self.note(f"the horizon of {log} is raised to {to}")
        log.register.raise_horizon(to)

    def _person(self, which: float, amount: float) -> None:
        self.resources[int(which * len(self.resources))].person_rolls_back()

    def _heal(self) -> None:
        """No more faults; who is down comes back, who sleeps wakes in its own time."""
        self.note("everything heals")
        self.healed = True
        self.crash_rate = self.crash_at_decision = self.pause_at_decision = 0.0
        self.late_prepare = self.sleepy = self.marks_lost = self.members_wrong = 0.0
        self.network.heal()
        for server in (*self.resources, *self.logs):
            server.down = server.full = False
        for resource in self.resources:
            resource.locked_out = resource.stalled = False
            resource.slots_most = NO_LIMIT
            resource.release_held(canceled=False)
        for process in self.processes:
            process.crash_rate = 0.0
            process.disk_fails, process.lacks = False, None
        self.skew = [0.0 for _ in self.skew]
        self.run_until(max(self.now, self.quiet_at))
        if self.options.restart_all:
            for process in self.processes:
                process.crash()
        absent = self.options.on("absent-sweeper")
        for process in self.processes:
            if absent and process.alive and process.place % 2 == 0:
                self.parts.sweeper(process).start()

    def _require_an_end(self) -> None:
        from tests.simulation.ending import require_an_end

        require_an_end(self)


__all__ = ["REAL", "Incident", "Parts", "Violation", "World"]
