"""The same transfer with Syncpoint, its decision log in an SQLite file: what a crash cannot break.

As in the loop by hand, both databases work in parallel.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence

from coordinator import Coordinator
from coordinator.commands.bench.workload import MOVE
from participants.postgres import PostgreSQL


class Syncpoint:
    """`at_once` is the size of the pool of each database."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once

    async def open(self, urls: Sequence[str], clients: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="syncpoint-bench-")
        first, second = [
            PostgreSQL(name, url, pool_size=self._at_once)
            for name, url in zip(("accounts", "ledger"), urls, strict=True)
        ]
        self._coordinator = coordinator = Coordinator(
            f"sqlite:///{self._folder.name}/syncpoint.db",
            cluster="bench",
            participants=[first, second],
        )

        @coordinator.transactional
        async def transfer(source: int, target: int) -> None:
            await asyncio.gather(_move(first, -1, source), _move(second, 1, target))

        self._transfer = transfer
        await coordinator.open()

    async def transfer(self, source: int, target: int) -> None:
        await self._transfer(source, target)

    async def close(self) -> None:
        await self._coordinator.close()
        self._folder.cleanup()


async def _move(database: PostgreSQL, amount: int, account: int) -> None:
    connection = await database.connection()
    await connection.execute(MOVE, (amount, account))
