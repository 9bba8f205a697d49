"""A base backup taken while a branch was in doubt, and restored after the commit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from coordinator.engine import now_ms
from coordinator.model import TransactionId, id_floor
from participants.postgres.embedded import EmbeddedServer
from tests.support.copies import UNSAFE_BUT_QUICK, BaseBackup, once_at
from tests.support.lasting_bank import LastingBank
from tests.support.postgres import DATABASE, clean_database, gids, query


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(UNSAFE_BUT_QUICK) as server:
        yield server


class Restored:
    """The bank before the loss, and the one whose `accounts` are those of the backup."""

    def __init__(self, before: LastingBank, after: LastingBank, transaction: TransactionId) -> None:
        self.before = before
        self.after = after
        self.transaction = transaction


@pytest.fixture
async def restored(
    tmp_path: Path, server: EmbeddedServer, database: str
) -> AsyncIterator[Restored]:
    """A transfer has committed in both, then `accounts` fell back to a moment before phase two."""
    bank = LastingBank(tmp_path, clean_database(server), database)
    backup = BaseBackup(server)
    try:
        async with bank.coordinator:
            with once_at("commit:before", backup.take):
                transaction = await bank.transfer()
        assert bank.balances() == (70, 130) and bank.in_doubt() == []
        backup.start()
        after = LastingBank(tmp_path, backup.url(DATABASE), database)
        assert after.balances() == (100, 130)
        assert gids(after.urls[0]) == after.in_doubt() != []
        yield Restored(bank, after, transaction)
    finally:
        backup.close()


async def test_while_its_record_stands_a_restored_branch_is_committed(restored: Restored) -> None:
    bank = restored.after
    async with bank.coordinator as coordinator:
        async with asyncio.timeout(20):  # its own sweep may be at it just now
            while not (report := await coordinator.recover()).clean:
                await asyncio.sleep(0.05)
        assert report.quarantined == 0
        assert await bank.incidents() == []
    assert bank.balances() == (70, 130) and bank.in_doubt() == []


async def test_below_the_horizon_a_restored_branch_is_shown_and_left_alone(
    restored: Restored,
) -> None:
    async with restored.before.coordinator as coordinator:
        log = coordinator.engine().log
        await log.raise_horizon(id_floor(now_ms()))
        while await log.forget(1000, claims_before_ms=0):
            pass
        assert (await log.read(restored.transaction)).record is None
    bank = restored.after
    (gid,) = bank.in_doubt()
    async with bank.coordinator as coordinator:
        report = await coordinator.recover()
        assert len(report.incidents) == 1
        (incident,) = await bank.incidents()
        assert (incident.gid, incident.participant, incident.kind) == (gid, "accounts", None)
        assert "a restored backup" in incident.evidence
        for _ in range(3):
            assert len((await coordinator.recover()).incidents) == 1
    assert bank.in_doubt() == [gid] and bank.balances() == (100, 130)
    query(bank.urls[0], f"COMMIT PREPARED '{gid}'")  # a person has compared both sides
    assert bank.balances() == (70, 130)
