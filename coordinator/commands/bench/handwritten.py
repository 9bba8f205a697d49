"""What an expert writes by hand, without a log, on bare psycopg: what the databases allow.

`TwoPhase` is the loop that Syncpoint is measured against: BEGIN, UPDATE and PREPARE TRANSACTION run
in both databases in parallel, then both COMMIT PREPARED do. A crash loses money: that is what it
leaves out. `BestEffort` leaves out the vote as well, and `OneDatabase` the second database.

Connections are open already, and one is held from the first statement to the last. `at_once` bounds
how many transfers are let into the databases at a time, since fewer at once are faster than many;
None is no bound.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from psycopg import AsyncConnection

from coordinator.commands.bench.workload import MOVE, Case

Connection = AsyncConnection[Any]


class _ByHand(Case):
    def __init__(self, at_once: int | None) -> None:
        self._at_once = at_once

    async def open(self, urls: Sequence[str], clients: int) -> None:
        size = min(clients, self._at_once or clients)
        self._gate = asyncio.Semaphore(size)
        self._stack = AsyncExitStack()
        self._idle = [[await self._connect(url) for url in urls] for _ in range(size)]

    async def transfer(self, source: int, target: int) -> None:
        async with self._gate:
            connections = self._idle.pop()
            await self._move(connections, source, target)
            self._idle.append(connections)

    async def close(self) -> None:
        await self._stack.aclose()

    async def _move(self, connections: list[Connection], source: int, target: int) -> None:
        raise NotImplementedError

    async def _connect(self, url: str) -> Connection:
        return await self._stack.enter_async_context(
            await AsyncConnection.connect(url, autocommit=True)
        )


class TwoPhase(_ByHand):
    """Prepares in parallel, then commits in parallel."""

    def __init__(self, at_once: int | None) -> None:
        super().__init__(at_once)
        self._numbers = itertools.count()
        self._prefix = secrets.token_hex(8)

    async def _move(self, connections: list[Connection], source: int, target: int) -> None:
        first, second = connections
        name = f"hand:{self._prefix}:{next(self._numbers)}"
        prepare = f"PREPARE TRANSACTION '{name}'".encode()
        commit = f"COMMIT PREPARED '{name}'".encode()
        await asyncio.gather(_work(first, -1, source, prepare), _work(second, 1, target, prepare))
        await asyncio.gather(first.execute(commit), second.execute(commit))


class BestEffort(_ByHand):
    """Plain COMMIT in both in parallel: a failure between them is half a transfer."""

    async def _move(self, connections: list[Connection], source: int, target: int) -> None:
        first, second = connections
        await asyncio.gather(_work(first, -1, source), _work(second, 1, target))
        await asyncio.gather(first.execute(b"COMMIT"), second.execute(b"COMMIT"))


class OneDatabase(_ByHand):
    """A plain transaction in the first database, which holds both accounts."""

    crosses = False

    async def open(self, urls: Sequence[str], clients: int) -> None:
        await super().open(urls[:1], clients)

    async def _move(self, connections: list[Connection], source: int, target: int) -> None:
        (only,) = connections
        await _work(only, -1, source)
        await only.execute(MOVE, (1, target))
        await only.execute(b"COMMIT")


async def _work(
    connection: Connection, amount: int, account: int, then: bytes | None = None
) -> None:
    await connection.execute(b"BEGIN")
    await connection.execute(MOVE, (amount, account))
    if then is not None:
        await connection.execute(then)
