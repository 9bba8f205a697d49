"""The switches of `coordinator.testing` strike where they should, and `rolled_back` rolls back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import cast

import pytest

from coordinator import ConfigurationError, OutcomeUnknown, Status, TransactionAborted
from coordinator.model import FINISHED, Branch, Ending
from coordinator.participant import Participant
from coordinator.testing import (
    Fault,
    Memory,
    MemoryStore,
    assert_atomic,
    assert_atomic_blocking,
    lose_answer,
    refuse,
    rolled_back,
    rolled_back_blocking,
    unreachable,
)
from coordinator.testing import coordinator as make_coordinator
from tests.unit.shop import Shop


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop()
    yield shop
    shop.coordinator.blocking.close()


# Switches.


@pytest.mark.parametrize(
    ("verb", "sold"), [("prepare", False), ("commit", True), ("propose", True), ("finish", True)]
)
async def test_a_lost_answer_changes_nothing_about_atomicity(
    shop: Shop, verb: str, sold: bool
) -> None:
    async with shop.coordinator:
        target = shop.coordinator if verb in ("propose", "finish") else shop.ledger
        with lose_answer(target, verb) as fault:
            with suppress(TransactionAborted):
                await shop.sell()
            await assert_atomic(shop.coordinator)
        assert (fault.struck, shop.sold) == (1, sold)
        await shop.sell()
    assert shop.sold


async def test_a_lost_answer_of_a_rollback_is_asked_for_again(shop: Shop) -> None:
    async with shop.coordinator:
        with (
            refuse(shop.stock),
            lose_answer(shop.ledger, "rollback", times=3) as fault,
            pytest.raises(TransactionAborted, match="refused by the test"),
        ):
            await shop.sell()
        assert fault.struck == 3
        await assert_atomic(shop.coordinator)
    assert not shop.sold


async def test_a_lost_answer_of_one_phase_is_an_unknown_outcome(shop: Shop) -> None:
    async with shop.coordinator:
        with lose_answer(shop.stock, "commit_one_phase"), pytest.raises(OutcomeUnknown):
            async with shop.coordinator.transaction():
                await shop.stock.put("sold", 1)
    assert shop.stock.committed == {"sold": 1}


async def test_a_refusal_is_told_to_the_caller_and_ends_the_branch(shop: Shop) -> None:
    async with shop.coordinator:
        with refuse(shop.ledger, "the disk is full", retryable=True):
            with pytest.raises(TransactionAborted, match="the disk is full") as raised:
                await shop.sell()
            await shop.sell()  # only the first time
        assert raised.value.retryable
        with refuse(shop.stock, "no more"), pytest.raises(TransactionAborted, match="no more"):
            async with shop.coordinator.transaction():
                await shop.stock.put("one phase", 1)
        await assert_atomic(shop.coordinator)
    assert shop.sold


async def test_an_unreachable_participant_aborts_and_is_recovered(shop: Shop) -> None:
    async with shop.coordinator:
        with unreachable(shop.ledger) as fault, pytest.raises(TransactionAborted):
            await shop.sell(timeout=0.1)
        assert fault.struck > 1
        await assert_atomic(shop.coordinator)
    assert not shop.sold


async def test_an_unreachable_log_leaves_the_outcome_unknown_and_then_it_is_found(
    shop: Shop,
) -> None:
    async with shop.coordinator as coordinator:
        with unreachable(coordinator), pytest.raises(OutcomeUnknown) as raised:
            await shop.sell(timeout=0.1)
        await assert_atomic(coordinator)
        status = await coordinator.status(raised.value.transaction_id)
    assert shop.sold is (status is Status.COMMITTED)


def test_switches_work_for_the_synchronous_face(shop: Shop) -> None:
    with lose_answer(shop.ledger, "commit") as fault:
        shop.sell_blocking()
    assert (fault.struck, shop.sold) == (1, True)
    with lose_answer(shop.coordinator, "propose") as fault:
        shop.sell_blocking()
    assert fault.struck == 1
    assert_atomic_blocking(shop.coordinator)


async def test_a_switch_leaves_the_participant_as_it_was(shop: Shop) -> None:
    before = dict(vars(shop.ledger))
    async with shop.coordinator:
        with lose_answer(shop.ledger, "commit"), lose_answer(shop.ledger, "commit", times=2) as two:
            await shop.sell()
        assert two.struck == 2
    assert vars(shop.ledger).keys() == before.keys()


@pytest.mark.parametrize(
    "switch",
    [lambda shop: lose_answer(shop.ledger, "commit"), lambda shop: refuse(shop.ledger)],
)
async def test_a_switch_that_is_never_reached_fails_the_test(
    shop: Shop, switch: Callable[[Shop], AbstractContextManager[Fault]]
) -> None:
    async with shop.coordinator:
        with pytest.raises(AssertionError, match="nothing was tested"), switch(shop):
            pass
        with pytest.raises(LookupError), switch(shop):
            raise LookupError("the test's own reason to fail is not hidden")


async def test_a_switch_for_what_is_not_there_is_refused_at_once(shop: Shop) -> None:
    for verb in ("ask", "put", "comit"):
        with pytest.raises(ConfigurationError, match=verb), lose_answer(shop.ledger, verb):
            pass
    async with shop.coordinator as coordinator:
        with (
            pytest.raises(ConfigurationError, match="name_attempt"),
            lose_answer(coordinator, "prepare"),
        ):
            pass


class Slotted:
    """Nothing can stand in front of its methods."""

    __slots__ = ()
    name = "slotted"

    async def commit(self, branch: Branch) -> Ending:
        return FINISHED


def test_a_participant_with_slots_is_told_why_it_cannot_have_switches() -> None:
    slotted = cast(Participant, Slotted())
    with pytest.raises(ConfigurationError, match="__slots__"), lose_answer(slotted, "commit"):
        pass


# Rollback.


async def test_a_test_is_rolled_back_and_its_functions_join(shop: Shop) -> None:
    async with shop.coordinator:
        async with rolled_back(shop.coordinator) as transaction:
            await shop.sell()
            assert await shop.stock.get("sold") == 1
            async with shop.coordinator.transaction(propagation="requires_new"):
                await shop.ledger.put("kept", 1)
        assert str(transaction.outcome) == "aborted"
        await assert_atomic(shop.coordinator)
    assert shop.stock.committed == {}
    assert shop.ledger.committed == {"kept": 1}


async def test_an_exception_of_the_test_leaves_the_block_unchanged(shop: Shop) -> None:
    error = AssertionError("mine")
    async with shop.coordinator:
        with pytest.raises(AssertionError) as raised:
            async with rolled_back(shop.coordinator):
                await shop.sell()
                raise error
        assert raised.value is error
        async with rolled_back(shop.coordinator):
            with pytest.raises(LookupError):
                async with shop.coordinator.transaction():
                    raise LookupError("a joined function may fail in a test")
        with pytest.raises(TransactionAborted, match="deadline"):
            async with rolled_back(shop.coordinator, timeout=0.05):
                await asyncio.sleep(60)
    assert not shop.sold


def test_the_synchronous_face_is_rolled_back_in_its_thread(shop: Shop) -> None:
    with rolled_back_blocking(shop.coordinator):
        shop.sell_blocking()
        with ThreadPoolExecutor(1) as threads:  # another thread, another transaction
            assert threads.submit(lambda: dict(shop.stock.committed)).result() == {}
    assert not shop.sold
    shop.sell_blocking()
    assert shop.sold
    assert_atomic_blocking(shop.coordinator)


async def test_memory_stores_are_shared_like_databases() -> None:
    store = MemoryStore()
    first, second = Memory("stock", store), Memory("stock", store)
    async with make_coordinator(first) as coordinator, coordinator.transaction():
        await first.put("a", 1)
    assert second.committed == {"a": 1}
