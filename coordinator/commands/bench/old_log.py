"""A log that has long been in use: filled with finished transactions, quickly.

Its rows are what `propose` and `finish` leave, written through the log's own codec; a test compares
them byte by byte. They are between one and two hours old: with the default retention all of them
wait to be forgotten, with one of a day all are kept.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from itertools import pairwise
from pathlib import Path

import apsw

from coordinator.codec import pack_transaction
from coordinator.commands.bench.records import Commits
from coordinator.log.base import Proposal
from coordinator.log.sqlite import SQLiteLog
from coordinator.log.sqlite.store import insertion
from coordinator.model import LogId, TransactionId, id_floor

CHUNKS = 20

_OLDEST_MS = 2 * 3_600_000
_SPREAD_MS = 3_600_000


def fill(path: Path, finished: int) -> Generator[int, None, None]:
    """Make the file with so many finished transactions, in `CHUNKS` steps; yields what is there.

    Nobody else may have the file open, and it may be opened as a log only after the last step.
    """
    log = asyncio.run(_create(path))
    oldest_ms = int(time.time() * 1000) - _OLDEST_MS
    commits = Commits(log)
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        # Everything is fsynced at the end, when the last connection closes.
        connection.pragma("synchronous", "OFF")
        connection.execute(
            "UPDATE log SET created_ms = ?, horizon = ?",
            (oldest_ms, pack_transaction(id_floor(oldest_ms))),
        )
        edges = [finished * place // CHUNKS for place in range(CHUNKS + 1)]
        for begin, end in pairwise(edges):
            with connection:
                connection.executemany(
                    "INSERT INTO record (id, decision, unmarked, answer, unfinished) "
                    "VALUES (?, ?, x'', NULL, 0)",
                    (
                        _row(commits, log, _id(oldest_ms + _SPREAD_MS * number // finished, number))
                        for number in range(begin, end)
                    ),
                )
            yield end
    finally:
        connection.close()


async def _create(path: Path) -> LogId:
    log = SQLiteLog(path)
    try:
        return (await log.open()).id
    finally:
        await log.close()


def _id(unix_ms: int, number: int) -> TransactionId:
    """As if drawn then; no two are the same."""
    return TransactionId(f"{id_floor(unix_ms)[:-12]}{number:012x}")


def _row(commits: Commits, log: LogId, transaction: TransactionId) -> tuple[bytes, bytes]:
    new = insertion(Proposal(transaction, commits.of(transaction)), log)
    return new.id, new.decision
