"""What is logged of opening, closing and the work in the background."""

from __future__ import annotations

import asyncio
import logging

import msgspec
import pytest

from coordinator import ConfigurationError, Coordinator, TransactionAborted
from coordinator.errors import LogUnavailable
from coordinator.log.memory import MemoryLog
from coordinator.members.base import Beat
from coordinator.participant import Binding
from participants.memory import Memory
from tests.support.told import Records
from tests.support.witness import WitnessedShop
from tests.unit.scripted import QUICK, Scripted, engine_with, until


async def test_opening_and_closing(records: Records) -> None:
    shop = WitnessedShop()
    async with shop.coordinator:
        engine = shop.coordinator.engine()
        driver = engine.begin(5.0)
    opened, closed = records.one("opened"), records.one("closed")
    assert opened.member == closed.member == engine.member
    assert opened.cluster == closed.cluster == "testing"
    assert opened.log == engine.identity.id
    assert opened.levelno == closed.levelno == logging.INFO
    assert records.one("abort-requested").reason == "the coordinator is closing"
    assert records.told(driver.core.id).outcome == "aborted"


async def test_a_participant_that_can_neither_be_opened_nor_closed(records: Records) -> None:
    class Stubborn(Memory):
        async def open(self, binding: Binding) -> str:
            if self.name == "shut":
                raise ConfigurationError("it cannot be reached")
            return await super().open(binding)

        async def close(self) -> None:
            raise OSError("it cannot be closed")

    both = Stubborn("shut"), Stubborn("ajar")
    coordinator = Coordinator("memory:", cluster="shop", participants=both)
    await coordinator.open(sweep=False, tolerate_unreachable=True)
    await coordinator.close()
    left_out, failed = records.one("left-out"), records.one("closing-failed")
    assert (left_out.participant, left_out.levelno) == ("shut", logging.INFO)
    assert "it cannot be reached" in left_out.getMessage()
    assert (failed.participant, failed.levelno) == ("ajar", logging.ERROR)
    assert failed.exc_info is not None


def test_a_loop_that_ended_without_closing(records: Records) -> None:
    coordinator = Coordinator("memory:", cluster="shop")
    asyncio.run(coordinator.open(sweep=False))

    async def again() -> None:
        async with coordinator:
            pass

    asyncio.run(again())
    ended = records.one("loop-ended")
    assert (ended.cluster, ended.levelno) == ("shop", logging.WARNING)


async def test_a_log_that_takes_no_marks_and_members_that_take_no_beat(records: Records) -> None:
    class NoMarks(MemoryLog):
        async def finish(self, marks: object) -> None:
            raise LogUnavailable("no marks now")

    async def beat(_: Beat) -> None:
        raise LogUnavailable("no beat now")

    a = Scripted("a")
    async with engine_with(a, log=NoMarks()) as bench:
        async with bench.scope() as transaction:
            assert transaction.id
            await transaction.enlist(a)
        bench.engine.members.beat = beat  # type: ignore[method-assign]
        await until(lambda: {"no-beat", "marks-late"} <= {vars(e)["what"] for e in records.all})
        assert records.all[-1].levelno == logging.WARNING
        assert {vars(e).get("error") for e in records.all} >= {"no beat now", "no marks now"}
        records.all.clear()
    late = records.one("marks-late")
    assert "closing without" in late.getMessage() and late.error == "no marks now"
    assert late.levelno == logging.WARNING


async def test_closing_while_a_branch_does_not_end(records: Records) -> None:
    a = Scripted("a")
    a.hold("commit")
    settings = msgspec.structs.replace(QUICK, drain_timeout=0.02)
    async with engine_with(a, settings=settings) as bench, bench.scope(0.02) as transaction:
        name = transaction.id
        await transaction.enlist(a)
    assert records.one("draining").count == 1
    left = records.one("left")
    assert (left.transaction, left.levelno) == (name, logging.WARNING)


async def test_who_is_not_let_in_in_time(records: Records) -> None:
    settings = msgspec.structs.replace(QUICK, active_most=1)
    async with engine_with(Scripted("a"), settings=settings) as bench:
        inside, over = asyncio.Event(), asyncio.Event()
        ids: list[str] = []

        async def hold() -> None:
            async with bench.scope() as transaction:
                await transaction.admit()
                assert transaction.token is not None
                transaction.token.busy()  # the place of one that waits would be lent
                inside.set()
                await over.wait()
                transaction.token.idle()

        async def wait() -> None:
            await inside.wait()
            async with bench.scope(timeout=0.1) as transaction:
                ids.append(transaction.id)
                await transaction.admit()

        holder = asyncio.create_task(hold())
        with pytest.raises(TransactionAborted):
            await asyncio.create_task(wait())
        over.set()
        await holder
    refused = records.one("not-admitted")
    assert [refused.transaction] == ids
    assert "no turn" in refused.reason and refused.reason in refused.getMessage()
