"""A record that cannot be read parks its own transaction only; a damaged file is told with the fix.

Each check is run with each kind of damage, and has to find the mistakes that are planted for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import apsw
import pytest

from coordinator import Coordinator, Settings, recovery
from coordinator.commands.list_transactions import State, look_once
from coordinator.errors import ConfigurationError, LogUnavailable
from coordinator.log.base import Mark, Proposal, Record, RecordUnreadable, Unreadable
from coordinator.log.sqlite import SQLiteLog
from coordinator.model import ABORT, Branch, BranchId, Decision, TransactionId, Verdict, Xid
from participants.memory import Memory, MemoryStore
from tests.conformance.log_suite import KEY, MEMBER, OTHER_KEY, Place, stands
from tests.integration.log_files import above_all, ask, edit, make, with_log
from tests.integration.planted_damage_bugs import BUGS, Bug

COMMITS, ABORTS = 3, 3

DAMAGES = {
    "one changed bit": "decision = changed(decision, 30)",
    "one changed bit of its verdict": "decision = changed(decision, 4)",
    "cut off": "decision = substr(decision, 1, 8)",
    "nothing left": "decision = x''",
    "zeroes": "decision = zeroblob(length(decision))",
    "the bytes of another record": "decision = (SELECT decision FROM record ORDER BY id LIMIT 1)",
    "open branches of another": "unmarked = x'00112233445566778899aabbccddeeff'",
    "half an open branch": "unmarked = x'00112233'",
    "an answer that it cannot have": "answer = 'commit'",
}


class Sound(NamedTuple):
    """A log with commits and aborts, as bytes."""

    ids: list[TransactionId]
    content: bytes


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    path = tmp_path_factory.mktemp("sound") / "log.db"
    ids = make(path, COMMITS, ABORTS)
    return Sound(ids, path.read_bytes())


class Damaged:
    """A log with a commit and an abort that cannot be read, among others that can."""

    def __init__(self, path: Path, sound: Sound, damage: str) -> None:
        self.path, self.ids = path, sound.ids
        path.write_bytes(sound.content)
        self.commit, self.abort = self.ids[1], self.ids[COMMITS]
        self.bad = {self.commit, self.abort}
        connection = apsw.Connection(str(path))
        connection.create_scalar_function("changed", changed)
        for each in self.bad:
            connection.execute(f"UPDATE record SET {damage} WHERE id = ?", (packed(each),))
        connection.close()
        self.bytes = self.stored()

    def stored(self) -> list[object]:
        return [
            ask(self.path, f"SELECT hex(decision) FROM record WHERE id = x'{packed(each).hex()}'")
            for each in sorted(self.bad)
        ]


def packed(transaction: TransactionId) -> bytes:
    return bytes.fromhex(transaction.replace("-", ""))


def changed(data: bytes, place: int) -> bytes:
    place %= len(data)
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


Check = Callable[[Damaged, Place, SQLiteLog], Awaitable[None]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


@check
async def it_is_never_decided_again(damaged: Damaged, place: Place, log: SQLiteLog) -> None:
    for horizon in (None, await above_all(log)):
        if horizon is not None:
            await log.raise_horizon(horizon)
        for each in damaged.bad:
            commit = place.commit(each, "orders")
            for proposal in (
                Proposal(each, ABORT),
                Proposal(each, commit),
                Proposal(each, commit, (OTHER_KEY,)),
                Proposal(each, commit, (KEY,)),
            ):
                with pytest.raises(RecordUnreadable, match=each):
                    await log.propose(proposal)
    assert (await log.read_key(OTHER_KEY)).holder is None
    for each in set(damaged.ids) - damaged.bad:
        assert not stands(await log.propose(Proposal(each, ABORT))).ours


@check
async def reading_it_is_an_error_and_not_absence(
    damaged: Damaged, place: Place, log: SQLiteLog
) -> None:
    for each in damaged.ids:
        if each in damaged.bad:
            with pytest.raises(RecordUnreadable, match=each):
                await log.read(each)
        else:
            assert (await log.read(each)).record is not None


@check
async def scans_show_it_and_all_others(damaged: Damaged, place: Place, log: SQLiteLog) -> None:
    page = await log.scan(None, 100, unfinished_only=False)
    assert [each.transaction for each in page.records] == damaged.ids
    unreadable = [each for each in page.records if isinstance(each, Unreadable)]
    assert {each.transaction for each in unreadable} == damaged.bad
    assert all(each.transaction in each.why for each in unreadable)
    unfinished = (await log.scan(None, 100)).records
    assert [each.transaction for each in unfinished] == damaged.ids[:COMMITS]


@check
async def it_is_never_deleted_and_holds_up_no_other(
    damaged: Damaged, place: Place, log: SQLiteLog
) -> None:
    records = (await log.scan(None, 100)).records
    marks = [
        Mark(each.transaction, branch.id)
        for each in records
        if isinstance(each, Record)
        for branch in each.decision.branches
    ]
    await log.finish(marks)
    horizon = await above_all(log)
    assert await log.raise_horizon(horizon) == horizon, "it holds up no horizon"
    readable = len(damaged.ids) - len(damaged.bad)
    forgotten = [await log.forget(1, claims_before_ms=1 << 46) for _ in range(readable + 1)]
    assert sum(forgotten) == readable, "the damaged abort is among the oldest"
    page = await log.scan(None, 100)
    assert {each.transaction for each in page.records} == damaged.bad, "it is shown from now on"
    await log.register("billing", "system 9", 1)


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_record_that_cannot_be_read(tmp_path: Path, sound: Sound, damage: str) -> None:
    for name, function in CHECKS.items():
        damaged = Damaged(tmp_path / f"{name}.db", sound, DAMAGES[damage])
        with_log(damaged.path, lambda place, log: function(damaged, place, log))  # noqa: B023
        assert damaged.stored() == damaged.bytes, "nothing was written over it"


@pytest.mark.parametrize("bug", list(BUGS))
def test_the_checks_find_a_log_where(
    tmp_path: Path, sound: Sound, bug: Bug, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"marks_of_strangers_count": "open branches of another"}
    damage = DAMAGES[wrong.get(bug.__name__, "one changed bit")]
    damaged = Damaged(tmp_path / "log.db", sound, damage)
    function = CHECKS[BUGS[bug]]
    bug(monkeypatch)
    with pytest.raises((AssertionError, LogUnavailable, pytest.fail.Exception)):
        with_log(damaged.path, lambda place, log: function(damaged, place, log))


class Left:
    """What a dead service left prepared: decided commits, and a branch that outlived its abort."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = MemoryStore()
        self.ids: list[TransactionId] = []

    def coordinator(self) -> Coordinator:
        return Coordinator(
            f"sqlite:///{self.path}",
            cluster="shop",
            participants=[Memory("orders", self.store)],
            settings=Settings(timeout=0.01, timeout_max=0.01, retention=0.05),
        )

    async def leave(self) -> None:
        coordinator = self.coordinator()
        await coordinator.open(sweep=False)
        engine = coordinator.engine()
        for number in range(4):
            transaction = engine.draw()
            xid = Xid(engine.identity.id, MEMBER, transaction, BranchId(f"{number:016x}"))
            self.store.prepared[xid.branch] = (xid, {f"order {number}": number})
            commit = Decision(Verdict.COMMIT, (Branch(xid, "orders", b"\x01"),))
            await engine.log.propose(Proposal(transaction, ABORT if number == 3 else commit))
            self.ids.append(transaction)
        await coordinator.close()

    def damage(self, *which: int) -> set[TransactionId]:
        bad = {self.ids[number] for number in which}
        for each in bad:
            where = f"id = x'{packed(each).hex()}'"
            edit(self.path, f"UPDATE record SET decision = x'01ff' WHERE {where}")
        return bad


@pytest.fixture
async def left(tmp_path: Path) -> Left:
    left = Left(tmp_path / "log.db")
    await left.leave()
    return left


async def test_recovery_and_lists_go_on_around_it(left: Left) -> None:
    bad = left.damage(1, 3)
    coordinator = left.coordinator()
    await coordinator.open(sweep=False)
    try:
        for _ in range(2):
            report = await coordinator.recover()
            assert report.unreadable.keys() == bad and not report.clean
        assert left.store.committed == {"order 0": 0, "order 2": 2}
        still = {xid.transaction for xid, _ in left.store.prepared.values()}
        assert still == bad, "nobody knows how they were decided"
        for each in bad:
            for call in (coordinator.status(each), coordinator.abort(each)):
                with pytest.raises(LogUnavailable, match=each):
                    await call
        async with coordinator.transaction(timeout=0.01):
            pass
    finally:
        await coordinator.close()
    picture = await look_once(left.coordinator(), True)
    states = {view.transaction: (view.state, view.phase) for view in picture.views}
    assert {states[each] for each in bad} == {(State.NEEDS_PERSON, "unreadable")}
    assert {states[each][0] for each in set(left.ids) - bad} == {State.FINISHED}


def test_a_damaged_file_is_told_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    make(path)
    sound = path.read_bytes()
    for broken in (
        b"\xff" * 100 + sound[100:],  # no header
        sound[:4096] + b"\xff" * 4096 + sound[8192:],  # a page of nonsense
        sound[:-4096],  # cut off
    ):
        path.write_bytes(broken)
        with pytest.raises(ConfigurationError) as caught:
            with_log(path, lambda place, log: log.open())
        told = str(caught.value)
        assert str(path) in told and "syncpoint log restore FILE --force" in told
        assert "\n" not in told and path.read_bytes() == broken
    path.write_bytes(sound)
    edit(path, "UPDATE log SET horizon = x'00'")
    with pytest.raises(ConfigurationError, match=r"horizon cannot be read.*log restore"):
        with_log(path, lambda place, log: log.open())


def test_a_file_that_is_damaged_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    make(path, commits=300)

    async def use(place: Place, log: SQLiteLog) -> None:
        edit(path, "DELETE FROM incident")  # so that no page is kept in memory any more
        with path.open("r+b") as opened:
            opened.seek(4096)
            while opened.tell() < path.stat().st_size:
                opened.write(b"\xff" * 4096)
        for _ in range(2):
            with pytest.raises(LogUnavailable) as caught:
                await log.scan(None, 1_000)
            told = str(caught.value)
            assert str(path) in told and "restart this process" in told and "\n" not in told
            assert "syncpoint log restore FILE" in told
        with pytest.raises(LogUnavailable, match="restart this process"):
            await log.propose(Proposal(place.draw(), ABORT))

    with_log(path, use)
    with pytest.raises(ConfigurationError, match="restart this process"):
        with_log(path, lambda place, log: log.open())


async def test_the_horizon_passes_it(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record stands below the horizon too, so nothing can be decided anew."""
    monkeypatch.setattr(recovery, "HOUSEKEEPING_SECONDS", 0.0)
    bad = left.damage(1, 3)
    coordinator = left.coordinator()
    await coordinator.open(sweep=False)
    try:
        log = coordinator.engine().log
        standing = set(left.ids)
        async with asyncio.timeout(20):
            while standing != bad:
                coordinator.engine().draw()
                await coordinator.recover()
                page = await log.scan(None, 10, unfinished_only=False)
                standing = {each.transaction for each in page.records}
        assert (await log.read(left.ids[0])).horizon > min(bad)
        assert {xid.transaction for xid, _ in left.store.prepared.values()} == bad
        assert await log.incidents() == (), "it is parked and not quarantined"
    finally:
        await coordinator.close()
