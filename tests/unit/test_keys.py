"""Idempotency keys: one key commits once, repeats are told so, failures free the key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from coordinator import (
    AlreadyDecided,
    ConfigurationError,
    Coordinator,
    Outcome,
    Status,
    TransactionAborted,
    TransactionError,
)
from coordinator.engine import Engine
from coordinator.keys import SPACE
from coordinator.log.base import Attempt, Proposal
from coordinator.model import ABORT, Claim, MemberId
from participants.memory import Memory


@pytest.fixture
def stock() -> Memory:
    return Memory("stock")


@pytest.fixture
async def shop(stock: Memory) -> AsyncIterator[Coordinator]:
    async with Coordinator("memory:", cluster="shop", participants=[stock]) as coordinator:
        yield coordinator


@dataclass
class Receipt:
    number: int
    lines: list[str]


def by_order(order: str, *_: object) -> str:
    return order


async def test_a_repeat_is_told_the_id_and_the_outcome(shop: Coordinator, stock: Memory) -> None:
    ids = []

    @shop.transactional(idempotency_key=by_order)
    async def place(order: str) -> None:
        ids.append(order)
        await stock.put(order, len(ids))

    await place("a")
    with pytest.raises(AlreadyDecided, match="'a' is committed") as raised:
        await place("a")
    assert raised.value.key == "a" and raised.value.outcome is Outcome.COMMITTED
    assert await shop.status(raised.value.transaction_id) is Status.COMMITTED
    await place("b")
    assert ids == ["a", "b"] and stock.committed == {"a": 1, "b": 2}


async def test_a_repeat_returns_the_first_result(shop: Coordinator, stock: Memory) -> None:
    @shop.transactional(idempotency_key=by_order, record_result=True)
    async def place(order: str, number: int) -> Receipt:
        await stock.put(order, number)
        return Receipt(number, ["é", '"\n'])

    first = await place("a", 7)
    assert await place("a", 8) == first == Receipt(7, ["é", '"\n'])
    assert stock.committed == {"a": 7}


async def test_no_result_is_a_result_too(shop: Coordinator) -> None:
    calls = []

    @shop.transactional(idempotency_key=by_order, record_result=True)
    async def place(order: str) -> None:
        calls.append(order)

    assert await place("a") is None
    assert await place("a") is None
    assert calls == ["a"]


async def test_a_key_that_committed_without_a_result_has_none_to_return(shop: Coordinator) -> None:
    async with shop.transaction(key="a"):
        pass

    @shop.transactional(idempotency_key=by_order, record_result=True)
    async def place(order: str) -> int:
        return 1

    with pytest.raises(AlreadyDecided):
        await place("a")


async def test_a_result_that_cannot_be_recorded_aborts(shop: Coordinator, stock: Memory) -> None:
    @shop.transactional(idempotency_key=by_order, record_result=True)
    async def place(order: str, result: Any) -> Any:
        await stock.put(order, 1)
        return result

    for result, says in ((object(), "cannot be recorded"), ("x" * 70_000, "at most")):
        with pytest.raises(TransactionError, match=says):
            await place("a", result)
    assert stock.committed == {}
    assert await place("a", [1, "two"]) == [1, "two"], "the failures had freed the key"


async def test_after_an_abort_the_next_call_runs_anew(shop: Coordinator, stock: Memory) -> None:
    with pytest.raises(ZeroDivisionError):
        async with shop.transaction(key="a") as transaction:
            await stock.put("a", 1)
            raise ZeroDivisionError
    assert await shop.status(transaction.id) is Status.ABORTED
    async with shop.transaction(key="a"):
        await stock.put("a", 2)
    assert stock.committed == {"a": 2}


@pytest.mark.parametrize("fails", [False, True])
async def test_a_second_caller_waits_for_the_first(
    shop: Coordinator, stock: Memory, fails: bool
) -> None:
    inside, go = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with shop.transaction(key="a"):
            await stock.put("first", 1)
            inside.set()
            await go.wait()
            if fails:
                raise LookupError

    async def second() -> None:
        async with shop.transaction(key="a"):
            await stock.put("second", 1)

    one = asyncio.create_task(first())
    await inside.wait()
    two = asyncio.create_task(second())
    done, _ = await asyncio.wait({two}, timeout=0.1)
    assert not done
    go.set()
    outcomes = await asyncio.gather(one, two, return_exceptions=True)
    if fails:
        assert isinstance(outcomes[0], LookupError) and outcomes[1] is None
        assert stock.committed == {"second": 1}
    else:
        assert outcomes[0] is None and isinstance(outcomes[1], AlreadyDecided)
        assert stock.committed == {"first": 1}


async def test_many_callers_of_one_key_commit_once(shop: Coordinator, stock: Memory) -> None:
    calls = []

    @shop.transactional(idempotency_key=by_order, record_result=True)
    async def place(order: str) -> int:
        calls.append(order)
        await stock.put(order, len(calls))
        await asyncio.sleep(0)
        return len(calls)

    assert set(await asyncio.gather(*(place("a") for _ in range(20)))) == {1}
    assert calls == ["a"]


async def test_a_caller_whose_time_is_up_is_told_who_has_the_key(shop: Coordinator) -> None:
    async with shop.transaction(key="a", timeout=20) as transaction:
        with pytest.raises(TransactionAborted, match=f"'a' is in use by {''}") as raised:
            async with shop.transaction(key="a", timeout=0.05, propagation="requires_new"):
                pytest.fail("two attempts under one key")
        assert raised.value.retryable and transaction.id in str(raised.value)


def engine_of(shop: Coordinator) -> Engine:
    return shop.engine()


async def test_an_attempt_whose_owner_vanished_is_aborted_when_its_time_is_over(
    shop: Coordinator, stock: Memory
) -> None:
    engine = engine_of(shop)
    lost = engine.draw()
    await engine.log.name_attempt(Claim(SPACE, "a"), Attempt(lost, 100, engine.member), None)
    async with shop.transaction(key="a"):
        await stock.put("a", 1)
    assert stock.committed == {"a": 1}
    assert await shop.status(lost) is Status.ABORTED


async def test_an_attempt_whose_owner_is_dead_is_aborted_at_once(
    shop: Coordinator, stock: Memory
) -> None:
    engine = engine_of(shop)
    lost, dead = engine.draw(), MemberId("d" * 16)
    await engine.log.name_attempt(Claim(SPACE, "a"), Attempt(lost, 3_600_000, dead), None)
    async with shop.transaction(key="a", timeout=1):
        await stock.put("a", 1)
    assert stock.committed == {"a": 1}
    assert await shop.status(lost) is Status.ABORTED


async def test_a_former_attempt_below_the_horizon_is_judged_by_the_claim(
    shop: Coordinator, stock: Memory
) -> None:
    engine = engine_of(shop)
    lost = engine.draw()
    await engine.log.name_attempt(Claim(SPACE, "a"), Attempt(lost, 60_000, engine.member), None)
    await engine.log.raise_horizon(engine.draw())
    async with shop.transaction(key="a"):
        await stock.put("a", 1)
    assert stock.committed == {"a": 1}


async def test_who_took_over_cannot_be_overtaken_by_the_former_attempt(
    shop: Coordinator, stock: Memory
) -> None:
    """The former one slept; its abort stands recorded before the next one began."""
    engine = engine_of(shop)
    with pytest.raises(TransactionAborted):
        async with shop.transaction(key="a", timeout=20) as former:
            await stock.put("former", 1)
            await engine.log.propose(Proposal(former.id, ABORT))
            async with shop.transaction(key="a", propagation="requires_new"):
                await stock.put("next", 1)
    assert stock.committed == {"next": 1}


async def test_a_key_needs_a_transaction_of_its_own(shop: Coordinator) -> None:
    async with shop.transaction():
        with pytest.raises(TransactionError, match="requires_new"):
            async with shop.transaction(key="a"):
                pass


@pytest.mark.parametrize("key", ["o'neill", 'a"b', "a\nb\0c", "ключ", "x" * 512, " "])
async def test_any_text_is_a_key(shop: Coordinator, key: str) -> None:
    async with shop.transaction(key=key):
        pass
    with pytest.raises(AlreadyDecided):
        async with shop.transaction(key=key):
            pass


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (17, "text, not int"),
        (b"a", "text, not bytes"),
        ("", "1 to 512 bytes"),
        ("x" * 513, "this one 513"),
        ("\ud800", "is no text"),
    ],
)
async def test_what_is_no_key_is_refused_before_anything_begins(
    shop: Coordinator, key: Any, says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        shop.transaction(key=key)

    @shop.transactional(idempotency_key=lambda: key)
    async def place() -> None:
        pytest.fail("it began")

    with pytest.raises(ConfigurationError, match=says):
        await place()
