"""Requests that a participant sends without a task, and what becomes of their driver."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from coordinator.errors import TransactionAborted
from coordinator.model import FINISHED, Branch, Vote, VoteKind, Xid
from coordinator.participant import Send
from tests.unit.scripted import PREPARED, QUICK, Bench, Scripted, SlowLog, engine_with, until

NO = Vote(VoteKind.ABORTED, reason="a says no")


class PromptScripted(Scripted):
    """Sends at once what is named in `at_once`; the test answers by calling `answers`."""

    def __init__(self, name: str, *at_once: str) -> None:
        super().__init__(name)
        self.at_once = at_once
        self.answers: dict[str, Callable[[object], None]] = {}

    def _send(self, verb: str) -> Send | None:
        if verb not in self.at_once:
            return None

        def send(answered: Callable[[object], None]) -> None:
            self.calls.append(f"{verb} at once")
            self.answers[verb] = answered

        return send

    def prepare_at_once(self, xid: Xid) -> Send | None:
        return self._send("prepare")

    def commit_at_once(self, branch: Branch) -> Send | None:
        return self._send("commit")


async def run(bench: Bench, *participants: Scripted) -> None:
    async with bench.scope() as transaction:
        for each in participants:
            await transaction.enlist(each)


async def test_votes_and_commits_without_a_task() -> None:
    a, b = PromptScripted("a", "prepare", "commit"), PromptScripted("b", "prepare", "commit")
    async with engine_with(a, b) as bench:
        running = asyncio.create_task(run(bench, a, b))
        for verb, answer in (("prepare", PREPARED), ("commit", FINISHED)):
            await until(lambda verb=verb: verb in a.answers and verb in b.answers)
            (driver,) = bench.engine.drivers.values()
            await until(lambda driver=driver: not driver._tasks)
            assert driver._sent == 2
            for each in (a, b):
                each.answers[verb](answer)
        await running
        assert a.calls == b.calls == ["prepare at once", "commit at once"]
        assert not bench.engine.drivers


async def test_what_cannot_go_at_once_goes_as_ever() -> None:
    a, b = PromptScripted("a"), PromptScripted("b", "prepare")
    async with engine_with(a, b) as bench:
        running = asyncio.create_task(run(bench, a, b))
        await until(lambda: "prepare" in b.answers)
        b.answers["prepare"](PREPARED)
        await running
        assert a.calls == ["prepare", "commit"] and b.calls == ["prepare at once", "commit"]


async def test_a_commit_that_is_to_be_looked_into_is_sent_again() -> None:
    a, b = PromptScripted("a", "commit"), Scripted("b")
    async with engine_with(a, b) as bench:
        running = asyncio.create_task(run(bench, a, b))
        await until(lambda: "commit" in a.answers)
        a.answers["commit"](None)
        await running
        assert a.calls == ["prepare", "commit at once", "commit"]


@pytest.mark.parametrize("late", [PREPARED, NO, ConnectionError("no answer")])
async def test_an_answer_after_the_rollback(
    monkeypatch: pytest.MonkeyPatch, late: Vote | Exception
) -> None:
    """The rollback does not wait for it for ever, and the driver goes only when it has come."""
    monkeypatch.setattr("coordinator.driver.PREPARE_GRACE_SECONDS", 0.01)
    a, b = Scripted("a", NO), PromptScripted("b", "prepare")
    async with engine_with(a, b) as bench:
        with pytest.raises(TransactionAborted, match="a says no"):
            await run(bench, a, b)
        assert b.calls == ["prepare at once", "rollback"]
        (driver,) = bench.engine.drivers.values()
        assert driver.over
        b.answers["prepare"](late)
        await until(lambda: not bench.engine.drivers)
        again = ["rollback"] if late is PREPARED else []  # it stands on the server now
        assert b.calls == ["prepare at once", "rollback", *again]


async def test_an_answer_while_the_rollback_waits_for_it() -> None:
    a, b = Scripted("a", NO), PromptScripted("b", "prepare")
    async with engine_with(a, b) as bench:
        running = asyncio.create_task(run(bench, a, b))
        await until(lambda: "prepare" in b.answers and "rollback" in a.calls)
        assert "rollback" not in b.calls
        b.answers["prepare"](PREPARED)
        with pytest.raises(TransactionAborted, match="a says no"):
            await running
        await until(lambda: not bench.engine.drivers)
        assert b.calls[:2] == ["prepare at once", "rollback"]


async def test_a_late_votes_rollback_is_not_cancelled_by_the_one_that_waits_for_its_prepare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may take longer than what is left of the time for which the first one waits."""
    monkeypatch.setattr("coordinator.driver.PREPARE_GRACE_SECONDS", 0.05)
    a, b = Scripted("a", NO), Scripted("b")
    prepare, rollback = b.hold("prepare"), b.hold("rollback")
    async with engine_with(a, b) as bench:
        running = asyncio.create_task(run(bench, a, b))
        await until(lambda: "rollback" in a.calls and "prepare" in b.calls)
        prepare.set()
        await until(lambda: "rollback" in b.calls)
        await asyncio.sleep(0.1)  # longer than the time for which the prepare is waited for
        rollback.set()
        async with asyncio.timeout(QUICK.timeout / 2):
            with pytest.raises(TransactionAborted, match="a says no"):
                await running
        await until(lambda: not bench.engine.drivers)
        assert not b.prepared


async def test_an_answer_after_the_engine_has_stopped_changes_nothing() -> None:
    """Others may have ended its branches by then."""
    a, b, log = PromptScripted("a", "prepare"), Scripted("b"), SlowLog()
    async with engine_with(a, b, log=log, settings=replace(QUICK, drain_timeout=0.01)) as bench:
        running = asyncio.create_task(run(bench, a, b))
        await until(lambda: "prepare" in a.answers and b.prepared)
        await bench.engine.stop()
        a.answers["prepare"](PREPARED)
        await asyncio.sleep(0)
        assert log.proposals == [] and "commit" not in a.calls + b.calls
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
