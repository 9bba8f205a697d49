"""The socket that stays registered: what goes over it, and what is left of it afterwards."""

from __future__ import annotations

import asyncio
import gc
import os
import time
import weakref
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection, generators

from coordinator.errors import TransactionError
from coordinator.model import FINISHED
from participants.conformance import binding, trial
from participants.postgres import PostgreSQL, channel, psycopg_private
from participants.postgres.connection import ServerConnection
from participants.postgres.embedded import EmbeddedServer
from tests.support.bank import GIVE, TAKE, Bank
from tests.support.branches import UPDATE, until, vote_after, working
from tests.support.holding import Holding
from tests.support.postgres import query, sessions
from tests.support.prompt import assert_at_rest

MEGABYTE = 1_000_000


@pytest.fixture
async def session(database: str) -> AsyncIterator[ServerConnection]:
    session = await ServerConnection.open(database)
    yield session
    session.close()


def registered() -> int:
    """How many sockets the running loop watches."""
    loop: Any = asyncio.get_running_loop()
    return len(loop._selector.get_map())


def timers() -> int:
    loop: Any = asyncio.get_running_loop()
    return len(loop._scheduled)


# What a lease sends and reads.


async def test_what_the_socket_does_not_take_at_once(accounts: PostgreSQL) -> None:
    async with working(accounts) as (transaction, connection):
        for size in (MEGABYTE, 24 * MEGABYTE, 1):
            cursor = await connection.execute("SELECT length(%s), %s", ("x" * size, "y" * size))
            row = await cursor.fetchone()
            assert row is not None and (row[0], len(row[1])) == (size, size)
    assert await accounts.rollback(transaction.branch) == FINISHED


async def test_copy_both_ways(accounts: PostgreSQL) -> None:
    lines = 100_000
    async with working(accounts) as (transaction, connection):
        await connection.execute("CREATE TABLE heap (n int, filler text)")
        async with connection.cursor().copy("COPY heap FROM STDIN") as copy:
            for number in range(0, lines, 1000):
                await copy.write("".join(f"{number + i}\t{'f' * 80}\n" for i in range(1000)))
        read = 0
        async with connection.cursor().copy("COPY heap TO STDOUT") as copy:
            async for block in copy:
                read += bytes(block).count(b"\n")
        assert read == lines
        with pytest.raises(psycopg.errors.InvalidTextRepresentation):
            async with (
                connection.transaction(),
                connection.cursor().copy("COPY heap (n) FROM STDIN") as copy,
            ):
                for _ in range(600):
                    await copy.write("no number\n" * 100)
        cursor = await connection.execute("SELECT count(*) FROM heap")
        assert await cursor.fetchone() == (lines,)
    assert await accounts.rollback(transaction.branch) == FINISHED


async def test_two_tasks_write_to_one_copy(accounts: PostgreSQL) -> None:
    """Not in any order, but neither waits for ever because the other waited after it."""
    block = ("z" * 99 + "\n") * 1000
    async with working(accounts) as (transaction, connection):
        await connection.execute("CREATE TABLE heap (filler text)")
        async with asyncio.timeout(30), connection.cursor().copy("COPY heap FROM STDIN") as copy:
            await asyncio.gather(*(copy.write(block) for _ in range(200)))
        cursor = await connection.execute("SELECT count(*), max(length(filler)) FROM heap")
        assert await cursor.fetchone() == (200_000, 99)
    assert await accounts.rollback(transaction.branch) == FINISHED


async def test_a_pipeline_that_is_longer_than_any_buffer(accounts: PostgreSQL) -> None:
    filler = "p" * 20_000
    async with working(accounts) as (transaction, connection):
        async with connection.pipeline():
            cursors = [
                await connection.execute("SELECT %s::int, %s", (n, filler)) for n in range(1500)
            ]
        rows = [await cursor.fetchone() for cursor in cursors]
        assert [row and (row[0], len(row[1])) for row in rows] == [
            (n, len(filler)) for n in range(1500)
        ]
    assert await accounts.rollback(transaction.branch) == FINISHED


@pytest.mark.parametrize("seconds", [0, 0.1])
async def test_waiting_for_notifications_ends_in_time(accounts: PostgreSQL, seconds: float) -> None:
    async with working(accounts) as (transaction, connection):
        await connection.execute("LISTEN news")
        began = time.monotonic()
        async with asyncio.timeout(10):
            assert [each async for each in connection.notifies(timeout=seconds)] == []
        assert seconds <= time.monotonic() - began + 0.01
        cursor = await connection.execute("SELECT 1")
        assert await cursor.fetchone() == (1,)
    assert await accounts.rollback(transaction.branch) == FINISHED


@pytest.mark.parametrize("statement", ["SELECT pg_sleep(60)", "SELECT repeat('x', 200000000)"])
async def test_cancelled_in_the_middle_it_goes_on(accounts: PostgreSQL, statement: str) -> None:
    async with working(accounts) as (transaction, connection):
        for _ in range(2):
            with pytest.raises(TimeoutError):
                async with connection.transaction(), asyncio.timeout(0.02):
                    await connection.execute(statement.encode())
        cursor = await connection.execute("SELECT 1")
        assert await cursor.fetchone() == (1,)
    assert await accounts.rollback(transaction.branch) == FINISHED
    assert_at_rest(accounts)


async def test_another_loop_is_refused_instead_of_waiting_for_ever(accounts: PostgreSQL) -> None:
    async def elsewhere(connection: AsyncConnection[Any]) -> None:
        await connection.execute("SELECT 1")

    async with working(accounts) as (transaction, connection):
        with pytest.raises(psycopg.InterfaceError, match="another event loop"):
            async with asyncio.timeout(10):
                await asyncio.to_thread(asyncio.run, elsewhere(connection))
    assert await accounts.rollback(transaction.branch) == FINISHED


# Time.


async def test_each_exchange_has_its_own_time_and_all_have_one_timer(database: str) -> None:
    times = [0.5, 0.1, 0.4, 0.2, 30.0, 0.3]
    opened = [await ServerConnection.open(database) for _ in times]
    before, began = timers(), time.monotonic()
    ended: list[float] = []

    async def ask(session: ServerConnection, seconds: float) -> None:
        reply = await session.ask(b"SELECT pg_sleep(0.7)", seconds)
        assert reply.connected == (seconds > 1) and session.is_connected == (seconds > 1)
        assert time.monotonic() - began >= min(seconds, 0.7) - 0.01
        ended.append(seconds)

    asking = [
        asyncio.create_task(ask(each, seconds)) for each, seconds in zip(opened, times, strict=True)
    ]
    await asyncio.sleep(0)
    assert timers() <= before + 3  # some were earlier than the one that was set
    await asyncio.gather(*asking)
    assert ended == sorted(times)
    for each in opened:
        each.close()


async def test_given_up_it_stands_where_it_stood(session: ServerConnection) -> None:
    session.pgconn.send_query(b"SELECT 7, pg_sleep(0.3)")
    exchange = generators.execute(session.pgconn)
    with pytest.raises(psycopg_private.WaitTimeout):
        await session.channel.run(exchange, 0.05)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await session.channel.run(exchange)
    (result,) = await session.channel.run(exchange, 10.0)
    assert result.get_value(0, 0) == b"7"


async def test_the_time_of_one_exchange_does_not_end_the_next(session: ServerConnection) -> None:
    assert (await session.ask(b"SELECT 1", 0.2)).succeeded
    session.pgconn.send_query(b"SELECT pg_sleep(0.4)")
    async with asyncio.timeout(10):
        (result,) = await session.channel.run(generators.execute(session.pgconn))
    assert result.status == psycopg.pq.ExecStatus.TUPLES_OK


async def test_thousands_of_exchanges_leave_no_timer_behind(database: str) -> None:
    opened = [await ServerConnection.open(database) for _ in range(8)]
    before = timers()

    async def ask(session: ServerConnection) -> None:
        for _ in range(150):
            assert (await session.ask(b"SELECT 1", 15.0)).rows == (("1",),)
            assert timers() <= before + 2

    await asyncio.gather(*map(ask, opened))
    for each in opened:
        each.close()


async def test_answers_that_are_there_already_let_others_run(
    accounts: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "BUSY_SECONDS_MAX", 0.0)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with working(accounts) as (transaction, connection):
        await connection.execute("CREATE TABLE heap (n int)")
        beside = asyncio.create_task(other())
        async with connection.cursor().copy("COPY heap FROM STDIN") as copy:
            await copy.write("1\n")
            before = turns
            for _ in range(20):
                await copy.write("1\n")
            assert turns >= before + 20
        beside.cancel()
    assert await accounts.rollback(transaction.branch) == FINISHED


# While it idles.


async def test_a_session_that_the_server_ends_in_the_pool_is_replaced(
    database: str, second_database: str
) -> None:
    bank = Bank((database, second_database))
    async with bank.coordinator:
        await _transfer(bank)
        assert bank.accounts._open is not None
        idle = bank.accounts._open.pool._idle
        await until(lambda: any(each.channel._is_attached for each in idle))
        query(
            database,
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE application_name = 'syncpoint' AND datname = current_database()",
        )
        # A dead socket is not watched for ever.
        await until(lambda: not any(each.channel._is_attached for each in idle))
        await _transfer(bank)
        assert bank.balances() == (98, 102)


async def _transfer(bank: Bank) -> None:
    async with bank.coordinator.transaction():
        await (await bank.accounts.connection()).execute(TAKE)
        await (await bank.ledger.connection()).execute(GIVE)


async def test_what_a_server_says_unasked_is_heard_by_the_next_exchange(database: str) -> None:
    async def listen(connection: AsyncConnection[Any]) -> None:
        await connection.execute("LISTEN storm")

    at_rest = registered()
    participant = PostgreSQL("accounts", database, pool_size=1, configure=listen)
    await participant.open(binding())
    try:
        for _ in range(3):
            branch, _ = await vote_after(participant, UPDATE)
            assert await participant.rollback(branch) == FINISHED
            query(database, "SELECT pg_notify('storm', n::text) FROM generate_series(1, 2000) n")
            await until(lambda: registered() == at_rest)  # the loop does not spin over it
        assert sessions(database) == 1
    finally:
        await participant.close()


# The end.


async def test_who_waits_hears_when_the_session_is_closed(session: ServerConnection) -> None:
    asking = asyncio.create_task(session.ask(b"SELECT pg_sleep(60)"))
    await asyncio.sleep(0)
    session.close()
    async with asyncio.timeout(5):
        reply = await asking
    assert not reply.connected and not session.is_connected and not session.is_clean


async def test_an_answer_that_nobody_waits_for_any_more_costs_the_session(
    session: ServerConnection,
) -> None:
    asking = asyncio.create_task(session.ask(b"SELECT pg_sleep(60)"))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert not session.is_connected and not session.is_clean


async def test_closing_ends_a_begin_that_is_never_answered(
    database: str, postgres_server: EmbeddedServer
) -> None:
    async with Holding(postgres_server.port) as proxy:
        participant = PostgreSQL("accounts", proxy.url(database))
        await participant.open(binding())
        assert participant._open is not None
        async with trial(participant._open.binding):
            proxy.hold(b"BEGIN")
            asking = asyncio.create_task(_connection(participant))
            await asyncio.wait_for(proxy.held.wait(), 10)
            await participant.close()
            async with asyncio.timeout(5):
                with pytest.raises((TransactionError, psycopg.Error)):
                    await asking
        proxy.deliver.set()
    assert registered() <= 1  # what the loop has for itself


async def _connection(participant: PostgreSQL) -> AsyncConnection[Any]:
    return await participant.connection()


def test_opened_and_closed_it_leaves_nothing(database: str, second_database: str) -> None:
    """No descriptor, no socket that a loop watches, no loop that is remembered."""
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def use(bank: Bank, *, close: bool) -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        before = registered()
        await bank.coordinator.open()
        await asyncio.gather(*(_transfer(bank) for _ in range(3)))
        with pytest.raises(ZeroDivisionError):
            async with bank.coordinator.transaction():
                await (await bank.accounts.connection()).execute(TAKE)
                raise ZeroDivisionError
        if close:
            await bank.coordinator.close()
            assert registered() == before

    asyncio.run(use(Bank((database, second_database)), close=True))
    gc.collect()
    descriptors = os.listdir("/proc/self/fd")
    for _ in range(3):
        asyncio.run(use(Bank((database, second_database)), close=True))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    bank = Bank((database, second_database))
    asyncio.run(use(bank, close=False))  # and what it left is none of the next loop's
    asyncio.run(use(bank, close=True))
    gc.collect()
    assert sum(loop() is not None for loop in loops) <= 1, "closed loops are kept"
