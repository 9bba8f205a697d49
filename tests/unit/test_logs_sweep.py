"""What is logged of idempotency keys, of the sweep, and of opening and closing."""

from __future__ import annotations

import asyncio
import logging

import pytest

from coordinator import AlreadyDecided
from coordinator.engine import now_ms
from coordinator.log.base import Attempt, LogIdentity, Proposal, Reading, RecordUnreadable
from coordinator.log.memory import MemoryLog
from coordinator.log.register import Register
from coordinator.members.local import LocalMembers
from coordinator.model import (
    ABORT,
    Branch,
    BranchId,
    Claim,
    LogId,
    MemberId,
    TransactionId,
    Xid,
    id_floor,
)
from coordinator.recovery import Recovery
from tests.support.told import Records
from tests.support.witness import WitnessedShop
from tests.unit.scripted import Scripted, engine_with

DEAD = MemberId("d" * 16)
FIRST = BranchId("1" * 16)


@pytest.fixture
def shop() -> WitnessedShop:
    return WitnessedShop()


async def test_attempts_under_a_key(shop: WitnessedShop, records: Records) -> None:
    async with shop.coordinator:
        engine = shop.coordinator.engine()
        dead = engine.draw()
        attempt = Attempt(dead, 60_000, DEAD)
        await engine.log.name_attempt(Claim("key", "order-1"), attempt, None)
        async with shop.coordinator.transaction(key="order-1") as transaction:
            shop.id = transaction.id
            await shop.stock.put("sold", 1)
        with pytest.raises(AlreadyDecided):
            async with shop.coordinator.transaction(key="order-1"):
                pass
    assert records.whats(dead) == ["awaited", "superseded"]
    assert records.whats(shop.id)[0] == "attempt" and records.whats(shop.id)[-1] == "repeated"
    assert {records.one(w).key for w in ("attempt", "awaited", "superseded", "repeated")} == {
        "order-1"
    }
    assert records.one("begun", shop.id).key == "order-1"
    heard = ("committed", None)
    assert records.told(shop.id) == shop.truth(["commit"], [("commit", True)], "committed", heard)


async def test_what_the_sweep_leaves_for_a_person(records: Records) -> None:
    a = Scripted("a")
    hour_ago = now_ms() - 3_600_000
    log = MemoryLog(Register(LogIdentity(LogId("c" * 16), hour_ago)))
    async with engine_with(a, log=log) as bench:
        old, done = id_floor(hour_ago + 1_000), id_floor(hour_ago + 2_000)
        await log.propose(Proposal(done, ABORT))
        bench.engine.newest = bench.engine.draw()
        recovery = Recovery(bench.engine, {})
        await recovery.round()
        xid = Xid(bench.engine.identity.id, DEAD, old, FIRST)
        a.prepared[str(xid)] = Branch(xid, "a")
        await recovery.round()
    assert records.one("horizon").horizon == bench.engine.horizon
    assert records.one("forgotten").count == 1
    assert records.whats(old) == ["seen", "driven", "proposed", "refused", "quarantined"]
    quarantined = records.one("quarantined")
    assert (quarantined.participant, quarantined.branch) == ("a", "1" * 16)
    assert quarantined.levelno == logging.ERROR


async def test_what_the_sweep_cannot_do_is_said_once(records: Records) -> None:
    a = Scripted("a")
    async with engine_with(a) as bench:
        xid = Xid(bench.engine.identity.id, DEAD, bench.engine.draw(), FIRST)
        a.prepared[str(xid)] = Branch(xid, "a")
        a.failures["rollback"] = 3
        recovery = Recovery(bench.engine, {})
        for _ in range(4):
            await recovery.round()
        a.failures["recover"] = 2
        await recovery.round()
        await recovery.round()
    complaint, of_participant = (e for e in records.all if getattr(e, "what", "") == "complaint")
    assert vars(complaint)["transaction"] == xid.transaction
    assert "a does not answer rollback" in vars(complaint)["reason"]
    assert vars(of_participant)["participant"] == "a"
    assert complaint.levelno == of_participant.levelno == logging.WARNING
    assert records.whats(xid.transaction).count("seen") == 1
    assert records.whats(xid.transaction).count("driven") == 4
    assert records.whats(xid.transaction)[-1] == "recovered"


async def test_a_record_that_cannot_be_read(records: Records) -> None:
    class Damaged(MemoryLog):
        damaged = TransactionId("")

        async def read(self, transaction: TransactionId) -> Reading:
            if transaction == self.damaged:
                raise RecordUnreadable("a record stands that cannot be read")
            return await super().read(transaction)

    a, log = Scripted("a"), Damaged()
    async with engine_with(a, log=log) as bench:
        engine = bench.engine
        xid = Xid(engine.identity.id, DEAD, engine.draw(), FIRST)
        log.damaged = xid.transaction
        a.prepared[str(xid)] = Branch(xid, "a")
        recovery = Recovery(engine, {})
        await recovery.round()
    complaint = records.one("complaint")
    assert complaint.transaction == xid.transaction and "cannot be read" in complaint.reason


async def test_a_sweep_that_fails(records: Records) -> None:
    a, b = Scripted("a"), Scripted("b")
    async with engine_with(a, b) as bench:
        engine = bench.engine
        xid = Xid(engine.identity.id, DEAD, engine.draw(), FIRST)
        a.prepared[str(xid)] = Branch(xid, "a")
        b.prepared[str(xid)] = Branch(xid, "b")  # a copy of a's database
        recovery = Recovery(engine, {})
        await recovery.round()
        assert "cannot be driven" in records.one("complaint").reason
        assert records.one("complaint").transaction == xid.transaction
        records.all.clear()
        engine.members = None  # type: ignore[assignment]
        sweep = asyncio.create_task(recovery.run())
        while not records.all:
            await asyncio.sleep(0)
        engine.members = LocalMembers({})
        engine.log = Silent()
        while len(records.all) < 2:
            await asyncio.sleep(0.001)
        sweep.cancel()
        engine.log = bench.log
    assert records.one("sweep-failed").levelno == logging.ERROR
    assert records.one("sweep-failed").exc_info is not None
    assert records.one("complaint").getMessage().startswith("the log: ")


class Silent(MemoryLog):
    """It was never opened, so it does not answer."""
