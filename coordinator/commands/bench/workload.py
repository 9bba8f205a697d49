"""The work that is measured: money moves between two tables, and no two clients share a row.

Deterministic: a client's sequence of accounts follows from its number. A measurement ends only when
its last transfer has, and nothing counts unless all the money is there, where it must be.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Protocol

import msgspec
import psycopg

from coordinator.commands.bench.counting import LogUse, resident_peak_mb, servers_cpu_seconds
from coordinator.errors import TransactionError

ACCOUNTS = 4096
BALANCE = 1000
WARM_UP_SHARE = 0.2

MOVE = "UPDATE account SET balance = balance + %s WHERE id = %s"

Call = Callable[[], Awaitable[object]]


class Databases(msgspec.Struct, frozen=True):
    """Where the work is done: a url of each database, and the first process of each server."""

    urls: tuple[str, ...]
    processes: tuple[int, ...] = ()


class Case(Protocol):
    """One way to make a transfer; opened and closed on one event loop."""

    crosses: bool = True
    """A transfer moves its coin from the first database to the second."""

    async def open(self, urls: Sequence[str], clients: int) -> None:
        """Connect to both databases with all that will be needed."""

    async def transfer(self, source: int, target: int) -> None:
        """Move one coin from an account to another."""

    def log_use(self) -> LogUse | None:
        """The use of its decision log until now, if it has one."""
        return None

    async def close(self) -> None:
        """Let go of everything."""


class Measurement(msgspec.Struct, frozen=True):
    """One case with one number of clients in one round; what is not a rate or a time is counted
    for each transaction, or for each decision of the log alone."""

    per_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    servers_cpu_ms: float | None = None
    log_writes: float | None = None
    """Write transactions that callers waited for; see `LogUse.decision_writes`."""
    lazy_writes: float | None = None
    fsyncs: float | None = None
    memory_mb: float | None = None
    """The process's peak."""


def measure(case: Case, databases: Databases, clients: int, seconds: float) -> Measurement:
    """Clean tables, a warm-up, then `seconds` of transfers; raises `TransactionError` if one
    failed, if money was lost, or if a branch was left in doubt."""
    for url in databases.urls:
        _clean(url)
    measurement, transfers = asyncio.run(_measure(case, databases, clients, seconds))
    _check(databases.urls, transfers if case.crosses else 0)
    return measurement


async def _measure(
    case: Case, databases: Databases, clients: int, seconds: float
) -> tuple[Measurement, int]:
    transfers = 0

    def calls_of(number: int) -> Call:
        accounts = _accounts(number, clients)

        async def call() -> None:
            nonlocal transfers
            await case.transfer(next(accounts), next(accounts))
            transfers += 1

        return call

    await case.open(databases.urls, clients)
    try:
        measurement = await warm_and_measure(
            calls_of, clients, seconds, case.log_use, databases.processes
        )
    finally:
        await case.close()
    return measurement, transfers


async def warm_and_measure(
    calls_of: Callable[[int], Call],
    clients: int,
    seconds: float,
    log_use: Callable[[], LogUse | None],
    processes: Sequence[int] = (),
) -> Measurement:
    """A warm-up, then `seconds` in which every client makes one call after the other."""
    await _load(calls_of, clients, seconds * WARM_UP_SHARE)
    gc.collect()
    use, servers, cpu = log_use(), servers_cpu_seconds(processes), time.process_time()
    elapsed, latencies = await _load(calls_of, clients, seconds)
    cpu = time.process_time() - cpu
    servers_after, use_after = servers_cpu_seconds(processes), log_use()
    latencies.sort()
    count = len(latencies)
    used = None if use is None or use_after is None else use_after.since(use)
    return Measurement(
        per_second=count / elapsed,
        p50_ms=statistics.median(latencies) * 1000,
        p99_ms=latencies[min(count * 99 // 100, count - 1)] * 1000,
        cpu_ms=cpu / count * 1000,
        servers_cpu_ms=(
            None
            if servers is None or servers_after is None
            else (servers_after - servers) / count * 1000
        ),
        log_writes=None if used is None else used.decision_writes / count,
        lazy_writes=None if used is None else (used.writes - used.decision_writes) / count,
        fsyncs=None if used is None else used.fsyncs / count,
        memory_mb=resident_peak_mb(),
    )


async def _load(
    calls_of: Callable[[int], Call], clients: int, seconds: float
) -> tuple[float, list[float]]:
    """Returns the seconds that it took in the end, and the latency of every call in seconds."""
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    began = loop.time()
    until = began + seconds

    async def client(number: int) -> None:
        call = calls_of(number)
        now = loop.time()
        while now < until:
            await call()
            latencies.append(loop.time() - now)
            now = loop.time()

    tasks = [loop.create_task(client(number)) for number in range(clients)]
    try:
        # Not a TaskGroup: after Ctrl-C, a client that then fails must not take its place.
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        elapsed = loop.time() - began
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for error in (task.exception() for task in ended):
        if error is not None:
            raise TransactionError(
                f"a client failed, so that nothing can be told: {type(error).__name__}: {error}"
            ) from error
    return elapsed, latencies


def _accounts(client: int, clients: int) -> Iterator[int]:
    """The accounts of one client, which no other client touches."""
    numbers = random.Random(client)
    own = range(1 + client, ACCOUNTS + 1, clients)
    while True:
        yield numbers.choice(own)


def _clean(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS account")
        connection.execute("CREATE TABLE account (id integer PRIMARY KEY, balance bigint NOT NULL)")
        connection.execute(
            "INSERT INTO account SELECT id, %s FROM generate_series(1, %s) AS id",
            (BALANCE, ACCOUNTS),
        )
        connection.execute("VACUUM ANALYZE account")
        connection.execute("CHECKPOINT")


def _check(urls: Sequence[str], moved: int) -> None:
    """Each of `moved` transfers has taken one coin from the first database to the second."""
    found: list[int] = []
    in_doubt = 0
    for url in urls:
        with psycopg.connect(url) as connection:
            row = connection.execute(
                "SELECT sum(balance), (SELECT count(*) FROM pg_prepared_xacts) FROM account"
            ).fetchone()
            assert row is not None
            found.append(int(row[0]))
            in_doubt += int(row[1])
    expected = [ACCOUNTS * BALANCE - moved, ACCOUNTS * BALANCE + moved]
    if found != expected or in_doubt:
        raise TransactionError(
            f"after {moved} coins were moved, the two databases hold {found} instead of "
            f"{expected}, and {in_doubt} branches are in doubt: the numbers mean nothing"
        )
