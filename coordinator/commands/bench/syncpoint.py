"""The same transfer with Syncpoint, its decision log in an SQLite file: what a crash cannot break.

As in the loop by hand, both databases work in parallel.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from msgspec.structs import replace

from coordinator import Coordinator
from coordinator.commands.bench.counting import LogUse, LogWatch
from coordinator.commands.bench.workload import MOVE, Case
from coordinator.config import Settings
from coordinator.log.sqlite import SQLiteLog
from participants.postgres import PostgreSQL


class Syncpoint(Case):
    """With the settings that a user gets, or with `at_once` connections to each database for
    transactions and as many of them let in, to compare with a loop by hand of the same bound.

    The log is `log`, else a new file; `retention` in seconds tells how long it keeps records.
    """

    def __init__(
        self,
        at_once: int | None = None,
        *,
        log: Path | None = None,
        retention: float | None = None,
    ) -> None:
        self._at_once = at_once
        self._log = log
        self._retention = retention

    async def open(self, urls: Sequence[str], clients: int) -> None:
        self._stack = ExitStack()
        log = self._log
        if log is None:
            folder = tempfile.TemporaryDirectory(prefix="syncpoint-bench-")
            log = Path(self._stack.enter_context(folder)) / "syncpoint.db"
        settings = Settings()
        if self._at_once is not None:
            settings = replace(settings, active_most=self._at_once)
        if self._retention is not None:
            settings = replace(settings, retention=self._retention)
        first, second = [
            PostgreSQL(name, url)
            if self._at_once is None
            else PostgreSQL(name, url, pool_size=self._at_once)
            for name, url in zip(("accounts", "ledger"), urls, strict=True)
        ]
        self._coordinator = coordinator = Coordinator(
            f"sqlite:///{log}", cluster="bench", participants=[first, second], settings=settings
        )

        @coordinator.transactional
        async def transfer(source: int, target: int) -> None:
            await asyncio.gather(_move(first, -1, source), _move(second, 1, target))

        self._transfer = transfer
        await coordinator.open()
        opened = coordinator.engine().log
        assert isinstance(opened, SQLiteLog)
        self._watch = LogWatch(opened)

    async def transfer(self, source: int, target: int) -> None:
        await self._transfer(source, target)

    def log_use(self) -> LogUse:
        return self._watch.use()

    async def close(self) -> None:
        await self._coordinator.close()
        self._stack.close()


async def _move(database: PostgreSQL, amount: int, account: int) -> None:
    connection = await database.connection()
    await connection.execute(MOVE, (amount, account))
