"""The loop that an expert writes by hand, without a log: what the databases allow.

Bare psycopg on connections that are open already; BEGIN, UPDATE and PREPARE TRANSACTION run in both
databases in parallel, then both COMMIT PREPARED do. A crash loses money: that is what it leaves
out. `at_once` bounds how many transfers are let into the databases at a time, since fewer at once
are faster than many; None is no bound.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from psycopg import AsyncConnection

from coordinator.commands.bench.workload import MOVE

Connection = AsyncConnection[Any]


class HandWritten:
    def __init__(self, at_once: int | None) -> None:
        self._at_once = at_once
        self._numbers = itertools.count()
        self._prefix = secrets.token_hex(8)

    async def open(self, urls: Sequence[str], clients: int) -> None:
        size = min(clients, self._at_once or clients)
        self._gate = asyncio.Semaphore(size)
        self._stack = AsyncExitStack()
        self._idle = [await self._connect(urls) for _ in range(size)]

    async def transfer(self, source: int, target: int) -> None:
        async with self._gate:
            first, second = pair = self._idle.pop()
            name = f"hand:{self._prefix}:{next(self._numbers)}"
            await asyncio.gather(
                _prepare(first, name, -1, source), _prepare(second, name, 1, target)
            )
            await asyncio.gather(_commit(first, name), _commit(second, name))
            self._idle.append(pair)

    async def close(self) -> None:
        await self._stack.aclose()

    async def _connect(self, urls: Sequence[str]) -> tuple[Connection, Connection]:
        first, second = [
            await self._stack.enter_async_context(
                await AsyncConnection.connect(url, autocommit=True)
            )
            for url in urls
        ]
        return first, second


async def _prepare(connection: Connection, name: str, amount: int, account: int) -> None:
    await connection.execute("BEGIN")
    await connection.execute(MOVE, (amount, account))
    await connection.execute(f"PREPARE TRANSACTION '{name}'".encode())


async def _commit(connection: Connection, name: str) -> None:
    await connection.execute(f"COMMIT PREPARED '{name}'".encode())
