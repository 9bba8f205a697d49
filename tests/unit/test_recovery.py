"""The sweep's rounds over the real engine: what they end, leave alone, quarantine and forget."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence

import pytest

from coordinator.engine import Engine, draw_member_id, now_ms
from coordinator.errors import LogUnavailable
from coordinator.log.base import (
    LogIdentity,
    Mark,
    Proposal,
    Reading,
    Record,
    RecordUnreadable,
    Resource,
    every_record,
)
from coordinator.log.memory import MemoryLog
from coordinator.log.register import Register
from coordinator.members.base import Beat, InFlight
from coordinator.model import (
    ABORT,
    FINISHED,
    Branch,
    BranchId,
    Decision,
    Ending,
    EndingKind,
    LogId,
    MemberId,
    TransactionId,
    Verdict,
    Xid,
    id_floor,
)
from coordinator.recovery import Recovery, read_one
from tests.unit.scripted import Bench, Scripted, engine_with

DEAD = MemberId("d" * 16)
OTHER = MemberId("e" * 16)
_numbers = itertools.count()


def drawn(ago_ms: int = -10) -> TransactionId:
    """An id a little above a new log's horizon, unless it is to be older."""
    return id_floor(now_ms() - ago_ms)


def leave_prepared(
    bench: Bench, participant: Scripted, transaction: TransactionId, member: MemberId = DEAD
) -> Branch:
    """What a coordinator that is gone, or slow, left in a participant."""
    number = BranchId(f"{next(_numbers):016x}")
    xid = Xid(bench.engine.identity.id, member, transaction, number)
    branch = Branch(xid, participant.name)
    participant.prepared[str(xid)] = branch
    return branch


async def record(bench: Bench, transaction: TransactionId, *branches: Branch) -> None:
    decision = Decision(Verdict.COMMIT, branches)
    await bench.log.propose(Proposal(transaction, decision))


async def settle(bench: Bench, participant: Scripted, transaction: TransactionId) -> Record | None:
    return (await bench.log.read(transaction)).record


async def test_what_a_dead_member_left_undecided_is_aborted_at_first_sight() -> None:
    a, b = Scripted("a"), Scripted("b")
    async with engine_with(a, b) as bench:
        transaction = drawn()
        leave_prepared(bench, a, transaction)
        leave_prepared(bench, b, transaction)
        round_ = await Recovery(bench.engine, {}).round()
        assert (round_.aborted, round_.committed, round_.clean) == (1, 0, True)
        assert not a.prepared and not b.prepared
        standing = await settle(bench, a, transaction)
        assert standing is not None and standing.decision == ABORT


async def test_a_recorded_commit_is_finished_and_its_unnamed_branch_rolled_back() -> None:
    a, b = Scripted("a"), Scripted("b")
    async with engine_with(a, b) as bench:
        transaction = drawn()
        named = leave_prepared(bench, a, transaction)
        leave_prepared(bench, b, transaction)
        await record(bench, transaction, named)
        round_ = await Recovery(bench.engine, {}).round()
        assert (round_.committed, round_.clean) == (1, True)
        assert a.calls == ["recover", "commit"] and b.calls == ["recover", "rollback"]


async def test_a_branch_of_a_living_member_waits_for_its_published_deadline() -> None:
    a = Scripted("a")
    async with engine_with(a) as bench:
        transaction = drawn()
        leave_prepared(bench, a, transaction, OTHER)
        flights = [InFlight(transaction, 0.05, "preparing")]
        bench.other_member_beats(OTHER, Beat(now_ms(), 1, flights))
        recovery = Recovery(bench.engine, {})
        for _ in range(3):
            round_ = await recovery.round()
            assert round_.in_doubt == {transaction} and not round_.cases
        async with asyncio.timeout(5):
            while a.prepared:
                await recovery.round()
        assert a.calls[-1] == "rollback"


async def test_an_orphan_of_a_member_that_beats_without_it_is_ended() -> None:
    a = Scripted("a")
    async with engine_with(a) as bench:
        leave_prepared(bench, a, drawn(), OTHER)
        bench.other_member_beats(OTHER, Beat(now_ms(), 1))
        recovery = Recovery(bench.engine, {})
        for count in (1, 2, 3):
            bench.other_member_beats(OTHER, Beat(now_ms(), count))
            assert not (await recovery.round()).cases
        bench.other_member_beats(OTHER, Beat(now_ms(), 4))
        assert (await recovery.round()).aborted == 1


async def test_what_this_process_drives_is_left_alone() -> None:
    a = Scripted("a")
    gate = a.hold("commit")
    async with engine_with(a) as bench:
        async with bench.scope(timeout=0.02) as transaction:
            await transaction.enlist(a)
        recovery = Recovery(bench.engine, {})
        for _ in range(3):
            assert not (await recovery.round()).cases
        gate.set()


async def test_one_dead_participant_holds_up_nobody_else() -> None:
    a, b = Scripted("a"), Scripted("b")
    b.failures["recover"] = b.failures["commit"] = 1000
    async with engine_with(a, b) as bench:
        first, second = drawn(-20), drawn(-30)
        both = leave_prepared(bench, a, first), leave_prepared(bench, b, first)
        await record(bench, first, *both)
        leave_prepared(bench, a, second)
        round_ = await Recovery(bench.engine, {}).round()
        assert not a.prepared and b.prepared
        assert list(round_.unreachable) == ["b"] and not round_.clean
        assert round_.in_doubt == {first}
        await bench.engine.write_marks()
        standing = await settle(bench, a, first)
        assert standing is not None and standing.ended == {both[0].id} and not standing.finished


async def test_a_participant_that_is_not_here_leaves_its_commit_to_others() -> None:
    a = Scripted("a")
    async with engine_with(a) as bench:
        transaction = drawn()
        xid = Xid(bench.engine.identity.id, DEAD, transaction, BranchId("b" * 16))
        await record(bench, transaction, leave_prepared(bench, a, transaction), Branch(xid, "gone"))
        round_ = await Recovery(bench.engine, {}).round()
        assert not a.prepared
        assert round_.in_doubt == {transaction}


async def test_a_branch_below_the_horizon_is_quarantined_and_shown_once() -> None:
    a = Scripted("a")
    log = MemoryLog(Register(LogIdentity(LogId("c" * 16), now_ms())))
    async with engine_with(a, log=log) as bench:
        branch = leave_prepared(bench, a, drawn(ago_ms=60_000))
        recovery = Recovery(bench.engine, {})
        first = await recovery.round()
        assert first.quarantined == 1
        second = await recovery.round()
        assert (second.quarantined, second.cases) == (0, [])
        assert [i.gid for i in first.incidents] == [i.gid for i in second.incidents]
        assert list(a.prepared.values()) == [branch] and "rollback" not in a.calls
        assert [i.gid for i in await bench.log.incidents()] == [str(branch.xid)]


async def test_a_refused_branch_that_is_gone_at_the_second_look_is_no_incident() -> None:
    class Vanishing(Scripted):
        async def recover(self) -> list[Branch]:
            found = list(await super().recover())
            self.prepared.clear()
            return found

    a = Vanishing("a")
    log = MemoryLog(Register(LogIdentity(LogId("c" * 16), now_ms())))
    async with engine_with(a, log=log) as bench:
        leave_prepared(bench, a, drawn(ago_ms=60_000))
        round_ = await Recovery(bench.engine, {}).round()
        assert (round_.quarantined, round_.incidents) == (0, [])


async def test_a_heuristic_branch_waits_for_a_person_and_keeps_its_record() -> None:
    a = Scripted("a")
    a.endings["commit"] = Ending(EndingKind.HEURISTIC_ROLLBACK, "a person rolled it back")
    async with engine_with(a) as bench:
        transaction = drawn()
        branch = leave_prepared(bench, a, transaction)
        await record(bench, transaction, branch)
        recovery = Recovery(bench.engine, {})
        await recovery.round()
        again = await recovery.round()
        assert again.cases == []
        assert [(i.participant, i.kind, i.evidence) for i in again.incidents] == [
            ("a", EndingKind.HEURISTIC_ROLLBACK, "a person rolled it back")
        ]
        a.endings["commit"] = FINISHED
        assert await bench.log.acknowledge(str(branch.xid))
        standing = await settle(bench, a, transaction)
        assert standing is not None and standing.finished


async def test_a_dry_run_tells_and_changes_nothing() -> None:
    a = Scripted("a")
    async with engine_with(a) as bench:
        transaction = drawn()
        leave_prepared(bench, a, transaction)
        round_ = await Recovery(bench.engine, {}).round(dry_run=True)
        assert [case.transaction for case in round_.cases] == [transaction]
        assert a.calls == ["recover"]
        assert await settle(bench, a, transaction) is None


async def test_a_silent_log_presumes_nothing() -> None:
    class Silent(MemoryLog):
        async def scan(self, *_: object, **__: object) -> object:  # type: ignore[override]
            raise LogUnavailable("no answer")

    a = Scripted("a")
    async with engine_with(a, log=Silent()) as bench:
        leave_prepared(bench, a, drawn())
        with pytest.raises(LogUnavailable):
            await Recovery(bench.engine, {}).round()
        assert a.prepared


class Damaged(MemoryLog):
    """Some of its records cannot be read, though they stand; with `silent` it does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.damaged: set[TransactionId] = set()
        self.silent = False

    async def read(self, transaction: TransactionId) -> Reading:
        if self.silent:
            raise LogUnavailable("no answer")
        if transaction in self.damaged:
            raise RecordUnreadable("a record stands that cannot be read")
        return await super().read(transaction)

    async def resources(self) -> Sequence[Resource]:
        if self.silent:
            raise LogUnavailable("no answer")
        return await super().resources()


async def test_a_finished_record_that_cannot_be_read_parks_its_own_transaction_only() -> None:
    """A scan of the unfinished does not show it; the branch that it is about does."""
    a = Scripted("a")
    log = Damaged()
    async with engine_with(a, log=log) as bench:
        damaged, sound = drawn(-20), drawn(-30)
        left = leave_prepared(bench, a, damaged)
        leave_prepared(bench, a, sound)
        log.damaged = {damaged}
        for _ in range(2):
            round_ = await Recovery(bench.engine, {}).round()
            assert list(round_.unreadable) == [damaged] and not round_.clean
            assert list(a.prepared.values()) == [left]
        standing = await settle(bench, a, sound)
        assert standing is not None and standing.decision == ABORT
        log.silent = True
        with pytest.raises(LogUnavailable, match="no answer"):
            await read_one(log, sound)
        log.silent = False


async def test_finished_records_below_the_horizon_are_forgotten_and_unfinished_kept() -> None:
    a = Scripted("a")
    hour_ago = now_ms() - 3_600_000
    log = MemoryLog(Register(LogIdentity(LogId("c" * 16), hour_ago)))
    async with engine_with(a, log=log) as bench:
        old, older = id_floor(hour_ago + 2000), id_floor(hour_ago + 1000)
        gone = Branch(Xid(bench.engine.identity.id, DEAD, older, BranchId("1" * 16)), "elsewhere")
        done = Branch(Xid(bench.engine.identity.id, DEAD, old, BranchId("2" * 16)), "a")
        await record(bench, older, gone)
        await record(bench, old, done)
        await bench.log.finish([Mark(old, done.id)])
        bench.engine.newest = drawn()
        await Recovery(bench.engine, {}).round()
        assert await settle(bench, a, older) is not None
        reading = await bench.log.read(old)
        assert reading.record is None and old < reading.horizon
        assert bench.engine.horizon == reading.horizon


async def test_a_round_forgets_more_than_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a log that serves more than a page of transactions between two rounds grows for ever."""
    monkeypatch.setattr("coordinator.recovery.PAGE", 3)
    a = Scripted("a")
    hour_ago = now_ms() - 3_600_000
    log = MemoryLog(Register(LogIdentity(LogId("c" * 16), hour_ago)))
    async with engine_with(a, log=log) as bench:
        old = [id_floor(hour_ago + 1000 + number) for number in range(10)]
        for number, each in enumerate(old):
            xid = Xid(bench.engine.identity.id, DEAD, each, BranchId(f"{number:016x}"))
            await record(bench, each, Branch(xid, "a"))
            await bench.log.finish([Mark(each, xid.branch)])
        bench.engine.newest = drawn()
        await Recovery(bench.engine, {}).round()
        assert [await settle(bench, a, each) for each in old] == [None] * len(old)


async def test_who_would_draw_an_id_near_the_horizon_refuses_to_begin() -> None:
    async with engine_with() as bench:
        engine: Engine = bench.engine
        engine.horizon = id_floor(now_ms() + 5_000)
        with pytest.raises(LogUnavailable, match="clocks is wrong"):
            engine.begin(1.0)
        assert not engine.drivers


async def test_thousands_left_behind_are_ended_in_pages() -> None:
    a = Scripted("a")
    async with engine_with(a) as bench:
        started = now_ms()
        for number in range(2_500):
            transaction = id_floor(started + number)
            branch = leave_prepared(bench, a, transaction)
            await record(bench, transaction, branch)
        told: list[tuple[int, int]] = []
        round_ = await Recovery(bench.engine, {}).round(lambda done, of: told.append((done, of)))
        assert round_.committed == 2_500 and not a.prepared
        assert told[-1] == (2_500, 2_500)


async def test_a_case_that_cannot_be_driven_stops_no_other() -> None:
    a, b = Scripted("a"), Scripted("b")
    async with engine_with(a, b) as bench:
        cloned, sound = drawn(-20), drawn(-30)
        branch = leave_prepared(bench, a, cloned)
        b.prepared["a copy of a's database"] = Branch(branch.xid, "b")
        leave_prepared(bench, a, sound)
        round_ = await Recovery(bench.engine, {}).round()
        assert round_.aborted == 1 and round_.in_doubt == {cloned}


def test_member_ids_differ() -> None:
    assert draw_member_id() != draw_member_id()


async def test_a_clock_that_was_set_back_begins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our beats said before may have let the horizon rise beyond the ids of now."""
    async with engine_with(Scripted("a")) as bench:
        engine = bench.engine
        ahead_ms = int(time.time() * 1000) + int(engine.settings.retention * 1000)
        with monkeypatch.context() as patched:
            patched.setattr("coordinator.engine.now_ms", lambda: ahead_ms)
            engine._beat()
        with pytest.raises(LogUnavailable, match="has said"):
            engine.draw()
        assert not engine.drivers


async def test_every_record_is_read_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.log.base.PAGE", 2)
    async with engine_with(Scripted("a")) as bench:
        ids = [bench.engine.draw() for _ in range(5)]
        for each in reversed(ids):
            await bench.log.propose(Proposal(each, ABORT))
        read = [each.transaction async for each in every_record(bench.log, unfinished_only=False)]
        assert read == sorted(ids)
        assert [each async for each in every_record(bench.log)] == []
