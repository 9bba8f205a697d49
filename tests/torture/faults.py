"""The kinds of faults. Each does one thing to the stage and undoes it before it returns.

`seconds` is how long it may last. Waiting is cut short when the run heals. A fault returns what it
did, for the file of faults; what it cannot do just now (the server is down already) it says.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import psycopg

from tests.torture.network import OnRequest, Rule
from tests.torture.stage import Slot, Stage, processes_of
from tests.torture.values import DATABASES

REQUESTS = (b"PREPARE TRANSACTION", b"COMMIT PREPARED", b"ROLLBACK PREPARED", b"COMMIT")
EXHAUSTING_MAX = 1000


class Scene:
    """What a fault gets: the stage, dice of its own, and how long it may last in seconds."""

    def __init__(
        self, stage: Stage, draw: random.Random, seconds: float, healing: asyncio.Event
    ) -> None:
        self.stage = stage
        self.draw = draw
        self.seconds = seconds
        self.healing = healing

    async def wait(self, seconds: float | None = None, event: asyncio.Event | None = None) -> bool:
        """Wait, but no longer than until the healing; True if the event came first."""
        waits = [asyncio.ensure_future((event or self.healing).wait())]
        if event is not None:
            waits.append(asyncio.ensure_future(self.healing.wait()))
        seconds = self.seconds if seconds is None else seconds
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()
        return event is not None and event.is_set()

    def server(self) -> int:
        return self.draw.randrange(len(DATABASES))

    def slot(self) -> Slot:
        return self.draw.choice(self.stage.slots)

    async def session(self, server: int, **options: Any) -> psycopg.AsyncConnection[Any]:
        """A session of a stranger, past the network. Raises `psycopg.Error`."""
        return await psycopg.AsyncConnection.connect(
            self.stage.direct(server), autocommit=True, connect_timeout=5, **options
        )


Kind = Callable[[Scene], Awaitable[str]]
KINDS: dict[str, Kind] = {}


def kind(name: str) -> Callable[[Kind], Kind]:
    def add(do: Kind) -> Kind:
        KINDS[name] = do
        return do

    return add


# Client processes.


@kind("kill client")
async def kill_client(scene: Scene) -> str:
    slot = scene.slot()
    async with slot.lock:
        return slot.name if slot.signal(signal.SIGKILL) else "it had just gone"


@kind("kill clients together")
async def kill_clients(scene: Scene) -> str:
    """A machine full of workers goes down, the log's file stays."""
    count = max(1, len(scene.stage.slots) // 2)
    slots = sorted(scene.draw.sample(scene.stage.slots, count), key=lambda slot: slot.number)
    async with AsyncExitStack() as stack:
        for slot in slots:
            await stack.enter_async_context(slot.lock)
        return ", ".join(slot.name for slot in slots if slot.signal(signal.SIGKILL))


@kind("stop client")
async def stop_client(scene: Scene) -> str:
    """As a deployment does: SIGTERM, and it ends in order."""
    slot = scene.slot()
    async with slot.lock:
        return slot.name if slot.signal(signal.SIGTERM) else "it had just gone"


@kind("pause client")
async def pause_client(scene: Scene) -> str:
    slot = scene.slot()
    async with slot.lock:
        name = slot.name
        if not slot.signal(signal.SIGSTOP):
            return "it had just gone"
        try:
            await scene.wait()
        finally:
            slot.signal(signal.SIGCONT)
        return name


# Servers.


async def _down(scene: Scene, how: str) -> str:
    number = scene.server()
    server = scene.stage.servers[number]
    async with scene.stage.server_locks[number]:
        try:
            await asyncio.to_thread(server.kill if how == "kill" else lambda: server.stop(how))
            await scene.wait(scene.seconds / 3)
        finally:
            await asyncio.to_thread(server.start)
    return f"{DATABASES[number]}, {how}"


@kind("kill server")
async def kill_server(scene: Scene) -> str:
    return await _down(scene, "kill")


@kind("restart server")
async def restart_server(scene: Scene) -> str:
    return await _down(scene, scene.draw.choice(("fast", "immediate")))


@kind("pause server")
async def pause_server(scene: Scene) -> str:
    """Postmaster and backends stand still, in the middle of whatever they do."""
    number = scene.server()
    async with scene.stage.server_locks[number]:
        postmaster = scene.stage.servers[number].process_id
        assert postmaster is not None
        stopped = processes_of(postmaster)
        try:
            _signal_all(stopped, signal.SIGSTOP)
            await scene.wait(scene.seconds / 2)
        finally:
            _signal_all(stopped, signal.SIGCONT)
    return f"{DATABASES[number]}, {len(stopped)} processes"


def _signal_all(processes: list[int], number: signal.Signals) -> None:
    for each in processes:
        with suppress(ProcessLookupError):
            os.kill(each, number)


@kind("terminate backends")
async def terminate_backends(scene: Scene) -> str:
    number = scene.server()
    share = scene.draw.choice((0.1, 0.5, 1.0))
    async with await scene.session(number) as session:
        cursor = await session.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE "
            "application_name = 'syncpoint' AND random() <= %s",
            (share,),
        )
        (count,) = await cursor.fetchone() or (0,)
    return f"{DATABASES[number]}, {count} sessions"


@kind("no prepared slots")
async def no_prepared_slots(scene: Scene) -> str:
    """Somebody else's transactions fill max_prepared_transactions."""
    number = scene.server()
    prepared: list[str] = []
    async with scene.stage.server_locks[number], await scene.session(number) as session:
        try:
            with suppress(psycopg.errors.OutOfMemory):  # there are no more
                for count in range(EXHAUSTING_MAX):
                    await session.execute("BEGIN")
                    await session.execute("INSERT INTO planted VALUES ('exhausting')")
                    gid = f"exhausting {number} {count}"
                    await session.execute(f"PREPARE TRANSACTION '{gid}'".encode())
                    prepared.append(gid)
            await scene.wait(scene.seconds / 4)
        finally:
            for gid in prepared:
                await session.execute(f"ROLLBACK PREPARED '{gid}'".encode())
    return f"{DATABASES[number]}, {len(prepared)} slots"


@kind("locked table")
async def locked_table(scene: Scene) -> str:
    number = scene.server()
    async with await scene.session(number) as session:
        await session.execute("SET lock_timeout = '2s'")
        try:
            async with session.transaction():
                await session.execute("LOCK TABLE account IN SHARE ROW EXCLUSIVE MODE")
                await scene.wait(scene.seconds / 3)
        except psycopg.errors.LockNotAvailable:
            return f"{DATABASES[number]}: a branch in doubt held a row"
    return DATABASES[number]


# The network.


@kind("reset connections")
async def reset_connections(scene: Scene) -> str:
    number = scene.server()
    links = list(scene.stage.networks[number].links)
    chosen = [link for link in links if scene.draw.random() < 0.5]
    for link in chosen:
        link.cut()
    return f"{DATABASES[number]}, {len(chosen)} connections"


@kind("requests vanish")
async def requests_vanish(scene: Scene) -> str:
    return await _one_way(scene, "loses_requests")


@kind("answers vanish")
async def answers_vanish(scene: Scene) -> str:
    return await _one_way(scene, "loses_answers")


async def _one_way(scene: Scene, which: str) -> str:
    number = scene.server()
    network = scene.stage.networks[number]
    try:
        setattr(network, which, True)
        await scene.wait(scene.seconds / 2)
    finally:
        setattr(network, which, False)
        network.cut_broken()
    return DATABASES[number]


async def _on_request(scene: Scene, what: OnRequest) -> str:
    """A few requests of one kind meet it, one after another."""
    number = scene.server()
    network = scene.stage.networks[number]
    part = scene.draw.choice(REQUESTS)
    met = 0
    for _ in range(scene.draw.randint(1, 4)):
        rule = Rule(part, what, late=scene.draw.uniform(0.1, scene.seconds / 3))
        network.rules.append(rule)
        try:
            met += await scene.wait(2.0, rule.fired)
        finally:
            if rule in network.rules:
                network.rules.remove(rule)
    return f"{DATABASES[number]}, {met} of {part.decode()}"


@kind("lose request")
async def lose_request(scene: Scene) -> str:
    return await _on_request(scene, OnRequest.LOSE_REQUEST)


@kind("lose answer")
async def lose_answer(scene: Scene) -> str:
    return await _on_request(scene, OnRequest.LOSE_ANSWER)


@kind("deliver late")
async def deliver_late(scene: Scene) -> str:
    return await _on_request(scene, OnRequest.DELIVER_LATE)


# The log, and people.


@asynccontextmanager
async def log_held(stage: Stage) -> AsyncIterator[None]:
    """Keep the lock of the log, so that nobody can write."""
    path = stage.log_path.with_name(stage.log_path.name + ".lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        await asyncio.to_thread(fcntl.flock, descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@kind("hold the log")
async def hold_the_log(scene: Scene) -> str:
    """A process that was stopped inside its write keeps the log's lock for a while."""
    async with log_held(scene.stage):
        await scene.wait(scene.seconds / 2.5)
    return "its lock"


@kind("recover beside")
async def recover_beside(scene: Scene) -> str:
    """A person runs `syncpoint recover` in the middle of it."""
    code, _ = await scene.stage.command("recover", "--json")
    return f"exit {code}"
