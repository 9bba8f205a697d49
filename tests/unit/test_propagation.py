"""How transactional functions relate to the transaction that they are called in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from coordinator import ConfigurationError, Coordinator, TransactionAborted, TransactionError
from coordinator.context import current
from participants.memory import Memory


@pytest.fixture
def stock() -> Memory:
    return Memory("stock")


@pytest.fixture
async def shop(stock: Memory) -> AsyncIterator[Coordinator]:
    async with Coordinator("memory:", cluster="shop", participants=[stock]) as coordinator:
        yield coordinator


def inner(
    shop: Coordinator, stock: Memory, propagation: str, *, fails: bool = False
) -> Callable[[], Awaitable[object]]:
    @shop.transactional(propagation=propagation)
    async def write() -> object:
        transaction = current()
        if transaction is not None:
            await stock.put("inner", 1)
        if fails:
            raise LookupError("inner failed")
        return transaction

    return write


@pytest.mark.parametrize(
    ("propagation", "inside", "outside"),
    [
        ("required", "joins", "begins"),
        ("requires_new", "begins", "begins"),
        ("mandatory", "joins", "raises"),
        ("supports", "joins", "without"),
        ("not_supported", "without", "without"),
        ("never", "raises", "without"),
    ],
)
async def test_each_kind_inside_and_outside(
    shop: Coordinator, stock: Memory, propagation: str, inside: str, outside: str
) -> None:
    write = inner(shop, stock, propagation)

    async def seen() -> str:
        outer = current()
        try:
            found = await write()
        except TransactionError as error:
            return "raises" if f"write() has the propagation '{propagation}'" in str(error) else ""
        assert current() is outer
        if found is None:
            return "without"
        return "joins" if found is outer else "begins"

    assert await seen() == outside
    async with shop.transaction():
        assert await seen() == inside


async def test_a_new_one_commits_although_the_outer_one_aborts(
    shop: Coordinator, stock: Memory
) -> None:
    write = inner(shop, stock, "requires_new")
    with pytest.raises(ZeroDivisionError):
        async with shop.transaction():
            await stock.put("outer", 1)
            await write()
            assert stock.committed == {"inner": 1}
            raise ZeroDivisionError
    assert stock.committed == {"inner": 1}


async def test_a_new_one_that_fails_leaves_the_outer_one_alone(
    shop: Coordinator, stock: Memory
) -> None:
    write = inner(shop, stock, "requires_new", fails=True)
    async with shop.transaction():
        await stock.put("outer", 1)
        with pytest.raises(LookupError):
            await write()
    assert stock.committed == {"outer": 1}


@pytest.mark.parametrize("propagation", ["required", "mandatory", "supports"])
async def test_one_that_joined_and_failed_dooms_the_outer_one_although_it_is_swallowed(
    shop: Coordinator, stock: Memory, propagation: str
) -> None:
    write = inner(shop, stock, propagation, fails=True)
    with pytest.raises(TransactionAborted, match="inner failed") as raised:
        async with shop.transaction():
            with pytest.raises(LookupError):
                await write()
    assert isinstance(raised.value.__cause__, LookupError)
    assert stock.committed == {}


async def test_tasks_and_threads_carry_the_transaction(shop: Coordinator, stock: Memory) -> None:
    async def put(key: str) -> None:
        await stock.put(key, current() is not None)

    async with shop.transaction() as transaction:
        await asyncio.gather(put("a"), put("b"))
        async with asyncio.TaskGroup() as group:
            group.create_task(put("c"))
        assert await asyncio.to_thread(current) is transaction
    assert stock.committed == {"a": True, "b": True, "c": True}


async def test_a_stray_task_can_neither_join_an_ending_one_nor_replace_it(
    shop: Coordinator, stock: Memory
) -> None:
    write = inner(shop, stock, "required")
    go, left = asyncio.Event(), []

    async def stray() -> None:
        await go.wait()
        left.append(await write())

    async with shop.transaction() as transaction:
        task = asyncio.create_task(stray())
        await asyncio.sleep(0)
    go.set()
    await task
    assert left != [transaction], "it had ended, so that the task began one of its own"


async def test_an_unknown_kind_and_a_block_that_cannot_run_without_are_refused(
    shop: Coordinator,
) -> None:
    with pytest.raises(ConfigurationError, match=r"'maybe'.*requires_new"):
        shop.transactional(propagation="maybe")
    for kind in ("supports", "not_supported", "never"):
        with pytest.raises(ConfigurationError, match=kind):
            shop.transaction(propagation=kind)


async def test_two_coordinators_cannot_share_a_transaction(shop: Coordinator) -> None:
    other = Coordinator("memory:", cluster="other")
    async with other, shop.transaction():
        with pytest.raises(ConfigurationError, match="another coordinator"):
            async with other.transaction():
                pass
        async with other.transaction(propagation="requires_new") as transaction:
            assert current() is transaction
