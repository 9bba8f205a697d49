"""What the benchmark counts of a log, and the old log that it makes, against the real thing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import apsw
import pytest
from uuid_utils import uuid7

from coordinator import Coordinator
from coordinator.commands.bench.counting import LogUse, LogWatch
from coordinator.commands.bench.old_log import CHUNKS, fill
from coordinator.commands.bench.records import Commits
from coordinator.config import Settings
from coordinator.log.base import PAGE, Attempt, Mark, Proposal, every_record
from coordinator.log.sqlite import SQLiteLog
from coordinator.model import Claim, MemberId, TransactionId, id_floor, id_time_ms

BASE = apsw.vfs_names()[0]


class CountingFile(apsw.VFSFile):
    synced = 0

    def xSync(self, flags: int) -> None:
        CountingFile.synced += 1
        super().xSync(flags)


class CountingFiles(apsw.VFS):
    """SQLite's own way to its files, that counts every fsync of them."""

    def __init__(self) -> None:
        super().__init__("counting", BASE, makedefault=True)

    def xOpen(self, name: apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        return CountingFile(BASE, name, flags)


@pytest.fixture
def real_fsyncs() -> Iterator[None]:
    """Every database opened in this test is counted."""
    files = CountingFiles()
    CountingFile.synced = 0
    yield
    files.unregister()


def drawn() -> TransactionId:
    return TransactionId(str(uuid7()))


async def test_fsyncs_are_those_that_sqlite_makes(tmp_path: Path, real_fsyncs: None) -> None:
    log = SQLiteLog(tmp_path / "log.db")
    commits = Commits((await log.open()).id)
    watch = LogWatch(log)
    before, synced = watch.use(), CountingFile.synced
    page = bytes(150_000)
    for number in range(1, 61):
        # Large, so that the write-ahead log begins anew some times; and many share a write.
        ids = [drawn() for _ in range(1 + number % 8)]
        proposals = [Proposal(each, commits.of(each), attachment=page) for each in ids]
        await asyncio.gather(*(log.propose(proposal) for proposal in proposals))
    used, synced = watch.use().since(before), CountingFile.synced - synced
    await log.close()
    assert used.checkpoints >= 6, "not enough was written for this test to show anything"
    assert used.decisions > 2 * used.writes
    assert abs(used.fsyncs - synced) <= 3  # one checkpoint's may lie across the end


async def test_lazy_writes_are_counted_apart_and_others_are_not(tmp_path: Path) -> None:
    log = SQLiteLog(tmp_path / "log.db")
    commits = Commits((await log.open()).id)
    await log.propose(Proposal(first := drawn(), commits.of(first)))
    watch = LogWatch(log)
    before = watch.use()
    for _ in range(3):
        transaction = drawn()
        decision = commits.of(transaction)
        await log.propose(Proposal(transaction, decision))
        await log.finish([Mark(transaction, branch.id) for branch in decision.branches])
    honest = watch.use().since(before)
    assert honest == LogUse(decisions=3, writes=6, lazy_calls=3, lazy_ended=3, checkpoints=0)
    assert (honest.decision_writes, honest.fsyncs) == (3, 6)
    # A second write that the transaction waits for: it cannot pass for a lazy one.
    attempt = Attempt(drawn(), 1000, MemberId("a" * 16))
    await log.name_attempt(Claim("key", "order"), attempt, None)
    assert watch.use().since(before).decision_writes == 4
    await log.close()


def test_shared_writes_count_once() -> None:
    crowded = LogUse(decisions=640, writes=20, lazy_calls=1, lazy_ended=1, checkpoints=1)
    assert crowded.decision_writes == 20
    assert crowded.fsyncs == 23


def test_a_lazy_write_across_the_beginning_or_the_end_is_not_taken_for_another() -> None:
    # One was under way at the beginning and one at the end; both wrote in between.
    begin = LogUse(decisions=10, writes=12, lazy_calls=3, lazy_ended=2, checkpoints=0)
    end = LogUse(decisions=20, writes=24, lazy_calls=4, lazy_ended=3, checkpoints=0)
    assert end.since(begin).decision_writes == 10


def rows(path: Path) -> list[tuple[object, ...]]:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return list(connection.execute("SELECT * FROM record ORDER BY id"))
    finally:
        connection.close()


async def test_an_old_log_has_the_rows_that_propose_and_finish_leave(tmp_path: Path) -> None:
    made, real = tmp_path / "made.db", tmp_path / "real.db"
    assert list(await asyncio.to_thread(lambda: list(fill(made, 50))))[-1] == 50
    before = rows(made)
    log = SQLiteLog(made)
    identity = await log.open()
    records = [each async for each in every_record(log, unfinished_only=False)]
    unfinished = [each async for each in every_record(log)]
    await log.close()
    assert len(records) == 50 and unfinished == []
    ages = [identity.created_ms - id_time_ms(each.transaction) for each in records]
    assert all(younger <= older for older, younger in pairwise(ages)) and max(ages) <= 0
    # The same decisions, proposed and finished in another log that takes the first one's place.
    log = SQLiteLog(real)
    await log.open()
    await log.close()
    _take_place_of(real, str(identity.id), identity.created_ms)
    log = SQLiteLog(real)
    await log.open()
    for record in records:
        await log.propose(Proposal(record.transaction, record.decision))
        marks = [Mark(record.transaction, branch.id) for branch in record.decision.branches]
        await log.finish(marks)
    await log.close()
    assert rows(real) == before


def _take_place_of(path: Path, log: str, created_ms: int) -> None:
    connection = apsw.Connection(str(path))
    horizon = bytes.fromhex(id_floor(created_ms).replace("-", ""))
    connection.execute(
        "UPDATE log SET id = ?, created_ms = ?, horizon = ?", (log, created_ms, horizon)
    )
    connection.close()


@pytest.mark.parametrize(("retention", "forgotten"), [(900.0, PAGE + CHUNKS), (86_400.0, 0)])
async def test_the_sweep_forgets_of_an_old_log_what_is_older_than_the_retention(
    retention: float, forgotten: int, tmp_path: Path
) -> None:
    path = tmp_path / "log.db"
    count = PAGE + CHUNKS
    await asyncio.to_thread(lambda: list(fill(path, count)))
    settings = Settings(retention=retention)
    coordinator = Coordinator(f"sqlite:///{path}", cluster="old", settings=settings)
    await coordinator.open(sweep=False)
    coordinator.engine().draw()  # as the first transaction does: the horizon stays below the newest
    await coordinator.recover()
    await coordinator.close()
    assert len(rows(path)) == count - forgotten
