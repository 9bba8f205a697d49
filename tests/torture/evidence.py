"""Collects what a run has left, and reads it again from its folder."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psycopg

from coordinator.errors import LogUnavailable
from coordinator.log.base import Record, Unreadable, every_record
from coordinator.log.sqlite import SQLiteLog
from coordinator.model import id_floor
from participants.postgres.statements import Token
from tests.torture.history import read_folder
from tests.torture.stage import Stage
from tests.torture.values import (
    DATABASES,
    Evidence,
    Exit,
    Fault,
    Found,
    Marker,
    Named,
    Options,
    Recorded,
)

SCAN_PAUSE_SECONDS = 2.0
XID_MASK = 0xFFFFFFFF
"""A row holds the lower half of its writer's number."""


class Observer:
    """Reads the whole log every few seconds, as another process of the service could.

    Records are forgotten a while after their transactions have ended; what it has seen it keeps.
    """

    def __init__(self, stage: Stage) -> None:
        self._log = SQLiteLog(stage.log_path)
        self._seen: dict[tuple[str, str, tuple[Named, ...]], Recorded] = {}
        self._task: asyncio.Task[None] | None = None
        self.identity = ""
        self.last_scan = 0.0
        self.longest_gap = 0.0

    async def start(self) -> None:
        self.identity = (await self._log.open()).id
        self._task = asyncio.get_running_loop().create_task(self._keep_looking())

    async def stop(self) -> None:
        """The last look is taken now."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._look()

    async def close(self) -> None:
        await self._log.close()

    @property
    def records(self) -> tuple[Recorded, ...]:
        return tuple(self._seen.values())

    async def horizon(self) -> str:
        return (await self._log.read(id_floor(0))).horizon

    async def incidents(self) -> tuple[str, ...]:
        found = await self._log.incidents()
        return tuple(f"{each.gid} of {each.participant}: {each.evidence}" for each in found)

    async def _keep_looking(self) -> None:
        while True:
            with suppress(LogUnavailable):  # its lock was held for long: nobody else wrote either
                await self._look()
            await asyncio.sleep(SCAN_PAUSE_SECONDS)

    async def _look(self) -> None:
        began = time.monotonic()
        found = [record async for record in every_record(self._log, unfinished_only=False)]
        scan = (began, time.monotonic())
        for record in found:
            self._note(record, scan)
        if self.last_scan:
            self.longest_gap = max(self.longest_gap, began - self.last_scan)
        self.last_scan = began

    def _note(self, record: Record | Unreadable, scan: tuple[float, float]) -> None:
        if isinstance(record, Unreadable):
            key = (str(record.transaction), "unreadable", ())
        else:
            branches = tuple(
                Named(branch.participant, _number(branch.token))
                for branch in record.decision.branches
            )
            key = (str(record.transaction), str(record.decision.verdict), branches)
        known = self._seen.get(key)
        first = scan if known is None else known.first
        self._seen[key] = Recorded(*key, first=first, last=scan)


def _number(token: bytes) -> int:
    read = Token.decode(token)
    return -1 if read is None else read.xid8 & XID_MASK


async def collect(stage: Stage, observer: Observer, **counted: Any) -> None:
    """Write down what is there now; nobody works any more. `counted` are further fields of it."""
    markers: list[Marker] = []
    balances: dict[str, dict[int, int]] = {}
    prepared: list[str] = []
    for number, name in enumerate(DATABASES):
        async with await psycopg.AsyncConnection.connect(stage.direct(number)) as session:
            rows = await session.execute(
                "SELECT op, change, account, amount, xmin::text::bigint, transaction, key "
                "FROM marker ORDER BY place"
            )
            markers += [Marker(name, *row) for row in await rows.fetchall()]
            rows = await session.execute("SELECT id, balance FROM account")
            balances[name] = {int(row[0]): int(row[1]) for row in await rows.fetchall()}
            rows = await session.execute("SELECT gid FROM pg_prepared_xacts")
            prepared += [str(row[0]) for row in await rows.fetchall()]
    found = Found(
        log=observer.identity,
        planted=tuple(stage.planted),
        balances=balances,
        markers=tuple(markers),
        prepared=tuple(prepared),
        records=observer.records,
        last_scan=observer.last_scan,
        horizon=await observer.horizon(),
        longest_gap=observer.longest_gap,
        incidents=await observer.incidents(),
        **counted,
    )
    (stage.folder / "found.json").write_bytes(msgspec.json.encode(found))
    (stage.folder / "exits.json").write_bytes(msgspec.json.encode(stage.exits))


def recovered_by_sweeps(folder: Path) -> int:
    """How many transactions the client processes ended for others, by what they logged."""
    wanted = re.compile(rb": recovered: ")
    return sum(len(wanted.findall(path.read_bytes())) for path in folder.glob("*.log"))


def load(folder: Path) -> Evidence:
    """Everything that the checker needs, from the folder of a run."""
    faults = folder / "faults.jsonl"
    lines = faults.read_bytes().splitlines() if faults.exists() else []
    return Evidence(
        options=msgspec.json.decode((folder / "options.json").read_bytes(), type=Options),
        histories=read_folder(folder / "history"),
        exits=msgspec.json.decode((folder / "exits.json").read_bytes(), type=tuple[Exit, ...]),
        faults=tuple(msgspec.json.decode(line, type=Fault) for line in lines),
        found=msgspec.json.decode((folder / "found.json").read_bytes(), type=Found),
    )
