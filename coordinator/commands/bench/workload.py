"""The work that is measured: money moves between two tables, and no two clients share a row.

Deterministic: a client's sequence of accounts follows from its number. A measurement ends only when
its last transfer has, and nothing counts unless all the money is still there.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec
import psycopg

from coordinator.errors import TransactionError

ACCOUNTS = 4096
BALANCE = 1000
WARM_UP_SHARE = 0.2

MOVE = "UPDATE account SET balance = balance + %s WHERE id = %s"


class Case(Protocol):
    """One way to make a transfer; opened and closed on one event loop."""

    async def open(self, urls: Sequence[str], clients: int) -> None:
        """Connect to both databases with all that will be needed."""

    async def transfer(self, source: int, target: int) -> None:
        """Move one coin from an account of the first database to one of the second."""

    async def close(self) -> None:
        """Let go of everything."""


class Measurement(msgspec.Struct, frozen=True):
    """One case with one number of clients in one round."""

    per_second: float
    p50_ms: float
    p99_ms: float


def measure(case: Case, urls: Sequence[str], clients: int, seconds: float) -> Measurement:
    """Clean tables, a warm-up, then `seconds` of transfers; raises `TransactionError` if money
    was lost or a branch was left in doubt."""
    for url in urls:
        _clean(url)
    measurement = asyncio.run(_measure(case, urls, clients, seconds))
    _check(urls)
    return measurement


async def _measure(case: Case, urls: Sequence[str], clients: int, seconds: float) -> Measurement:
    await case.open(urls, clients)
    try:
        await _load(case, clients, seconds * WARM_UP_SHARE)
        gc.collect()
        elapsed, latencies = await _load(case, clients, seconds)
    finally:
        await case.close()
    in_order = sorted(latencies)
    return Measurement(
        per_second=len(in_order) / elapsed,
        p50_ms=statistics.median(in_order) * 1000,
        p99_ms=in_order[min(len(in_order) * 99 // 100, len(in_order) - 1)] * 1000,
    )


async def _load(case: Case, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Every client makes one transfer after the other; returns the seconds and all latencies."""
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    began = loop.time()
    until = began + seconds

    async def client(number: int) -> None:
        accounts = _accounts(number, clients)
        now = loop.time()
        while now < until:
            await case.transfer(next(accounts), next(accounts))
            latencies.append(loop.time() - now)
            now = loop.time()

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(client(number))
    return loop.time() - began, latencies


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


def _check(urls: Sequence[str]) -> None:
    total = in_doubt = 0
    for url in urls:
        with psycopg.connect(url) as connection:
            row = connection.execute(
                "SELECT sum(balance), (SELECT count(*) FROM pg_prepared_xacts) FROM account"
            ).fetchone()
            assert row is not None
            total, in_doubt = total + int(row[0]), in_doubt + int(row[1])
    if total != len(urls) * ACCOUNTS * BALANCE or in_doubt:
        raise TransactionError(
            f"after the measurement {in_doubt} branches are in doubt and {total} coins are there "
            f"instead of {len(urls) * ACCOUNTS * BALANCE}: its numbers mean nothing"
        )
