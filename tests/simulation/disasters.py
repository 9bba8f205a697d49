"""What goes wrong with a whole server: a promotion, a backup, a full disk, a log that is lost.

Each is a fault of one world, drawn like the others. Where it undoes what a resource or the log had
promised, the checker is told so: then an outcome may be heuristic, but it is never silent.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from coordinator.model import id_floor
from tests.simulation.checkers import ABORTED, COMMITTED, PREPARED, WORKING
from tests.simulation.faults import RETENTION
from tests.simulation.logserver import LogServer
from tests.simulation.resources import Resource

if TYPE_CHECKING:
    from tests.simulation.processes import Process
    from tests.simulation.world import World


def _resource(world: World, which: float) -> Resource:
    return world.resources[int(which * len(world.resources))]


def _log(world: World, which: float) -> LogServer:
    return world.logs[int(which * len(world.logs))]


def _window(
    world: World,
    target: Any,
    attribute: str,
    seconds: float,
    after: Callable[[], None] | None = None,
) -> None:
    """A condition of a server, for a while."""
    setattr(target, attribute, True)
    world.note(f"{getattr(target, 'name', target)}: {attribute.replace('_', ' ')}")
    world.at(seconds, _window_ends, target, attribute, after)


def _window_ends(target: Any, attribute: str, after: Callable[[], None] | None) -> None:
    setattr(target, attribute, False)
    if after is not None:
        after()


# Resources.


def sync_stalls(world: World, which: float, amount: float) -> None:
    """The synchronous standby is away: PREPARE waits for it, its branch prepared and busy."""
    resource = _resource(world, which)
    release = partial(resource.release_held, canceled=amount < 0.5)
    _window(world, resource, "stalled", 0.3 + 3.0 * amount, release)


def resource_full(world: World, which: float, amount: float) -> None:
    _window(world, _resource(world, which), "full", 0.3 + 3.0 * amount)


def locked_out(world: World, which: float, amount: float) -> None:
    """The role's password was changed: sessions go on, new connections are refused."""
    _window(world, _resource(world, which), "locked_out", 0.3 + 3.0 * amount)


def promote(world: World, which: float, amount: float) -> None:
    """An asynchronous standby takes over, a moment behind its primary."""
    _go_back(world, _resource(world, which), 1.5 * amount, "a standby is promoted")


def restore_resource(world: World, which: float, amount: float) -> None:
    """A backup of the database is restored."""
    age = 0.5 + 1.5 * RETENTION * amount
    _go_back(world, _resource(world, which), age, "a database is restored from a backup")


def _go_back(world: World, resource: Resource, age: float, what: str) -> None:
    """Everything that the resource did in the last `age` seconds has never happened."""
    then = world.now - age
    world.note(f"{resource.name}: {what}, {age:.2f} s behind")
    world.count(what)
    resource.timeline += 1
    resource.release_held(canceled=True)
    for slot in resource.slots.values():
        if slot.state == WORKING:
            resource.disconnect(slot)
        elif slot.state == PREPARED and slot.prepared_at > then:
            resource.lose(slot)
        elif slot.state in (COMMITTED, ABORTED) and slot.ended_at > then:
            if 0.0 <= slot.prepared_at <= then:
                resource.bring_back(slot)
            elif slot.state == COMMITTED and slot.writes:
                resource.lose(slot)


# Logs.


def log_full(world: World, which: float, amount: float) -> None:
    """Nothing can be written, all can be read."""
    _window(world, _log(world, which), "full", 0.2 + 2.0 * amount)


def log_breaks(world: World, which: float, amount: float) -> None:
    """An fsync fails for one process: its last write may stand, and it can use the log no more."""
    process = world.processes[int(which * len(world.processes))]
    if process.alive:
        process.disk_fails = True
        world.note(f"{process}: the next write to its log fails")


def log_restored(world: World, which: float, amount: float) -> None:
    """A backup of the log is restored while nobody uses it; its horizon rises to the present."""
    log = _log(world, which)
    if log.lost or log.down:
        return
    backup = copied(log)
    world.at(RETENTION * amount, _stop_for_restore, world, log, backup)


def copied(log: LogServer) -> Any:
    register = copy.copy(log.register)
    for name, held in vars(register).items():
        if isinstance(held, dict):
            setattr(register, name, dict(held))
    return register


def _stop_for_restore(world: World, log: LogServer, backup: Any) -> None:
    if world.healed or log.lost or log.down:
        return
    log.down = True
    for process in world.processes:
        if process.log is log:
            process.crash()
    world.at(0.05, _restore, world, log, backup)


def _restore(world: World, log: LogServer, backup: Any) -> None:
    """As `syncpoint log restore` does it: the horizon is raised before anything is served."""
    log.down = False
    now_ms = world.epoch_ms + int((world.now + world.fastest) * 1000)
    world.note(f"{log} is restored from a backup")
    known, log.register = log.register, backup
    world.parts.restore(log.register, id_floor(now_ms + 1))
    world.checker.restored(log, known._records, backup._records)
    for incident in known.incidents():
        backup.report(incident)
    world.count("S17 a log is restored from a backup")


def log_wiped(world: World, which: float, amount: float) -> None:
    """The log's file is gone; a new one, of another id, is begun in its place."""
    number = int(which * len(world.logs))
    log = world.logs[number]
    if log.lost or log.down:
        return
    log.down = log.lost = True
    new = world.parts.log(world, len(world.every_log) + 1)
    world.logs[number] = new
    world.every_log.append(new)
    world.members[new.id] = {}
    for resource in world.resources:
        new.register.register(resource.name, resource.name, world.epoch_ms)
    world.note(f"{log} is gone, {new} takes its place")
    world.checker.wiped(log)
    if any(slot.log is log for each in world.resources for slot in each.prepared.values()):
        world.count("S18 a log is lost while branches of it are prepared")
    for process in world.processes:
        if process.log is log:
            process.crash()


def poison(world: World, which: float, amount: float) -> None:
    """A record can be read no more: of the unfinished ones, else whichever."""
    log = _log(world, which)
    records = sorted(log.register._records.values(), key=lambda record: record.transaction)
    records = [record for record in records if not record.finished] or records
    if records:
        transaction = records[int(amount * len(records))].transaction
        log.poisoned.add(transaction)
        world.note(f"{log}: the record of {transaction} is damaged")


# Processes.


def crash_all(world: World, which: float, amount: float) -> None:
    for process in world.processes:
        process.crash()


def lacks(world: World, process: Process) -> str | None:
    """The name of a resource that this incarnation's settings have lost, if any."""
    if world.healed or not world.options.on("participant-removed") or world.random() > 0.4:
        return None
    name: str = _resource(world, world.random()).name
    return name


DISASTERS: tuple[tuple[str, int, Callable[[World, float, float], None]], ...] = (
    ("sync-stall", 2, sync_stalls),
    ("resource-full", 2, resource_full),
    ("locked-out", 2, locked_out),
    ("promotion", 4, promote),
    ("resource-restored", 2, restore_resource),
    ("log-full", 2, log_full),
    ("log-breaks", 2, log_breaks),
    ("log-restored", 2, log_restored),
    ("log-wiped", 1, log_wiped),
    ("poison", 2, poison),
    ("crash-all", 2, crash_all),
)
"""Kind of fault, how many of it a world has at most, and what it does."""
