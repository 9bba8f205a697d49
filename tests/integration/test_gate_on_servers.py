"""The gate with real pools: crossing and nesting never deadlock, idle bodies starve nobody."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from coordinator import Coordinator, Settings, TransactionAborted
from participants.postgres import PostgreSQL
from tests.support.postgres import query

Shop = Callable[..., AbstractAsyncContextManager[tuple[Coordinator, PostgreSQL, PostgreSQL]]]


@pytest.fixture
def shop(database: str, second_database: str) -> Shop:
    @asynccontextmanager
    async def opened(
        pool_size: int, active_most: int = 8
    ) -> AsyncIterator[tuple[Coordinator, PostgreSQL, PostgreSQL]]:
        accounts = PostgreSQL("accounts", database, pool_size=pool_size)
        ledger = PostgreSQL("ledger", second_database, pool_size=pool_size)
        coordinator = Coordinator(
            "memory:",
            cluster="gate",
            participants=[accounts, ledger],
            settings=Settings(active_most=active_most),
        )
        async with coordinator:
            yield coordinator, accounts, ledger

    return opened


async def note(participant: PostgreSQL, text: str) -> None:
    connection = await participant.connection()
    await connection.execute("INSERT INTO entry (note) VALUES (%s)", (text,))


def notes(url: str) -> int:
    return int(str(query(url, "SELECT count(*) FROM entry")[0][0]))


async def test_transactions_that_cross_two_pools_do_not_wait_for_each_other(
    shop: Shop, database: str, second_database: str
) -> None:
    async with shop(pool_size=4) as (coordinator, accounts, ledger):

        @coordinator.transactional(timeout=20)
        async def write(number: int) -> None:
            first, second = (accounts, ledger) if number % 2 else (ledger, accounts)
            await note(first, f"{number}")
            await asyncio.sleep(0)
            await note(second, f"{number}")

        await asyncio.gather(*(write(number) for number in range(48)))
    assert notes(database) == notes(second_database) == 48


async def test_nesting_inside_every_place_does_not_deadlock(shop: Shop, database: str) -> None:
    async with shop(pool_size=3, active_most=3) as (coordinator, accounts, _):
        inside = asyncio.Barrier(3)

        @coordinator.transactional(timeout=20)
        async def outer(number: int) -> None:
            await note(accounts, f"outer {number}")
            await inside.wait()  # now every connection of the pool is held by an outer one
            await inner(number)

        @coordinator.transactional(propagation="requires_new", timeout=20)
        async def inner(number: int) -> None:
            await note(accounts, f"inner {number}")

        await asyncio.gather(*(outer(number) for number in range(3)))
    assert notes(database) == 6


async def test_a_body_that_waits_for_something_else_starves_nobody(
    shop: Shop, database: str
) -> None:
    async with shop(pool_size=4, active_most=1) as (coordinator, accounts, _):
        came = asyncio.Event()

        @coordinator.transactional(timeout=20)
        async def waits() -> None:
            await note(accounts, "waits")
            await came.wait()
            await note(accounts, "goes on")

        @coordinator.transactional(timeout=20)
        async def comes() -> None:
            await note(accounts, "comes")
            came.set()

        await asyncio.gather(waits(), comes())
    assert notes(database) == 3


async def test_a_wait_ends_at_the_deadline_and_names_the_holders(shop: Shop) -> None:
    async with shop(pool_size=1) as (opened, accounts, _), opened.transaction() as holder:
        await note(accounts, "holds")

        async def late() -> None:
            async with opened.transaction(timeout=0.2):
                await note(accounts, "late")

        begun = asyncio.get_running_loop().create_task(late(), context=contextvars.Context())
        with pytest.raises(TransactionAborted, match=f"inside are {holder.id}") as raised:
            await begun
    assert raised.value.retryable
