"""Connections of psycopg that were made elsewhere: theirs before and after, ours in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection, IsolationLevel
from psycopg.conninfo import make_conninfo

from coordinator.errors import ConfigurationError, TransactionAborted, TransactionError
from participants.postgres.embedded import EmbeddedServer
from tests.support.bank import GIVE, SLOW, TAKE, Bank, blocking_bank, running, wait_until
from tests.support.postgres import new_database, query
from tests.support.proxy import Fault, Proxy


@pytest.fixture
async def bank(database: str, second_database: str) -> AsyncIterator[Bank]:
    bank = Bank((database, second_database))
    async with bank.coordinator:
        yield bank


@asynccontextmanager
async def made_elsewhere(url: str, **options: Any) -> AsyncIterator[AsyncConnection[Any]]:
    connection = await AsyncConnection.connect(url, **options)
    try:
        yield connection
    finally:
        await connection.close()


async def give(bank: Bank) -> None:
    await (await bank.ledger.connection()).execute(GIVE.encode())


@pytest.mark.parametrize("autocommit", [False, True])
async def test_it_takes_part_and_is_its_owners_again(bank: Bank, autocommit: bool) -> None:
    async with made_elsewhere(bank.direct[0], autocommit=autocommit) as mine:
        for _ in range(2):
            async with bank.coordinator.transaction():
                await bank.accounts.enlist(mine)
                await bank.accounts.enlist(mine)
                await mine.execute(TAKE.encode())
                await give(bank)
        assert bank.balances() == (98, 102) and bank.nothing_is_prepared()
        assert mine.autocommit is autocommit
        await mine.execute(TAKE.encode())
        assert bank.balances() == ((97 if autocommit else 98), 102)
        await mine.rollback()
        await mine.set_autocommit(not autocommit)


async def test_an_exception_rolls_it_back_and_leaves_it_usable(bank: Bank) -> None:
    async with made_elsewhere(bank.direct[0]) as mine:
        with pytest.raises(ZeroDivisionError):
            async with bank.coordinator.transaction():
                await bank.accounts.enlist(mine)
                await mine.execute(TAKE.encode())
                await give(bank)
                raise ZeroDivisionError
        assert bank.balances() == (100, 100)
        await mine.execute(TAKE.encode())
        await mine.commit()
        assert bank.balances() == (99, 100)


async def test_verbs_raise_while_it_takes_part(bank: Bank) -> None:
    async with made_elsewhere(bank.direct[0]) as mine:
        async with bank.coordinator.transaction():
            await bank.accounts.enlist(mine)
            for verb in (
                mine.commit,
                mine.rollback,
                mine.close,
                lambda: mine.set_autocommit(True),
                lambda: mine.tpc_begin("x"),
                mine.tpc_prepare,
                mine.tpc_commit,
                mine.tpc_rollback,
            ):
                with pytest.raises(TransactionError, match="is not possible"):
                    await verb()
            with pytest.raises(TransactionError, match="returning from the transactional"):
                async with mine:
                    await mine.execute(TAKE.encode())
            with pytest.raises(ZeroDivisionError):
                async with mine.transaction():
                    await mine.execute(TAKE.encode())
                    raise ZeroDivisionError
            await give(bank)
        assert bank.balances() == (99, 101)
        await mine.commit()
        assert not {"commit", "rollback", "wait"} & vars(mine).keys()


async def test_the_connection_of_the_participant_is_its_other_face(bank: Bank) -> None:
    async with made_elsewhere(bank.direct[0]) as mine:
        async with bank.coordinator.transaction():
            await bank.accounts.enlist(mine)
            lease = await bank.accounts.connection()
            assert lease.info.backend_pid == mine.info.backend_pid
            numbers = [
                await cursor.fetchone()
                for cursor in await asyncio.gather(
                    *((mine if n % 2 else lease).execute("SELECT %s::int", (n,)) for n in range(16))
                )
            ]
            assert numbers == [(n,) for n in range(16)]
            await lease.execute(TAKE.encode())
            await give(bank)
        assert bank.balances() == (99, 101)
        with pytest.raises(TransactionError, match="cannot be used any more"):
            await lease.execute("SELECT 1")
        await mine.execute("SELECT 1")


async def test_its_notices_and_its_isolation_level_are_its_own(bank: Bank) -> None:
    heard: list[str | None] = []
    raise_notice = "DO $$ BEGIN RAISE NOTICE 'heard'; END $$"
    async with made_elsewhere(bank.direct[0]) as mine:
        mine.add_notice_handler(lambda notice: heard.append(notice.message_primary))
        await mine.set_isolation_level(IsolationLevel.SERIALIZABLE)
        async with bank.coordinator.transaction():
            await bank.accounts.enlist(mine)
            await mine.execute(raise_notice.encode())
            cursor = await mine.execute("SHOW transaction_isolation")
            assert await cursor.fetchone() == ("serializable",)
            await (await bank.accounts.connection()).execute(raise_notice.encode())
        await mine.execute(raise_notice.encode())
        assert heard == ["heard"] * 3


async def test_what_cannot_take_part_is_refused_with_the_fix(
    bank: Bank, postgres_server: EmbeddedServer
) -> None:
    async def refused(connection: Any, error: type[Exception], match: str) -> None:
        async with bank.coordinator.transaction():
            with pytest.raises(error, match=match):
                await bank.accounts.enlist(connection)
            await (await bank.accounts.connection()).execute("SELECT 1")  # no harm was done

    async with made_elsewhere(bank.direct[0]) as mine:
        await mine.execute("SELECT 1")
        await refused(mine, TransactionError, "a session with an open transaction.*Commit it")
        await mine.rollback()
        running_one = asyncio.create_task(mine.execute("SELECT pg_sleep(0.5)"))
        await asyncio.sleep(0)
        await refused(mine, TransactionError, "a statement is running on it")
        await running_one
        await mine.rollback()
        async with mine.pipeline():
            await refused(mine, TransactionError, "pipeline")
        await mine.rollback()
        async with bank.coordinator.transaction():
            await bank.accounts.enlist(mine)  # nothing above has spoilt it
    await refused(mine, TransactionError, "closed or broken")
    async with made_elsewhere(bank.direct[1]) as other_cluster:
        await refused(other_cluster, ConfigurationError, "of its own database")
        await other_cluster.execute("SELECT 1")
    async with made_elsewhere(new_database(postgres_server)) as other_database:
        await refused(other_database, ConfigurationError, "of its own database")
    with psycopg.connect(bank.direct[0]) as synchronous:
        await refused(synchronous, ConfigurationError, r"blocking\.enlist")
    await refused("postgresql://", ConfigurationError, "what can be enlisted")


async def test_another_role_is_refused_since_nobody_could_end_its_branch(bank: Bank) -> None:
    query(bank.direct[0], "DROP ROLE IF EXISTS guest")
    query(bank.direct[0], "CREATE ROLE guest LOGIN PASSWORD 'secret'")
    try:
        theirs = make_conninfo(bank.direct[0], user="guest", password="secret")
        async with made_elsewhere(theirs) as other, bank.coordinator.transaction():
            with pytest.raises(ConfigurationError, match="role 'guest'"):
                await bank.accounts.enlist(other)
    finally:
        query(bank.direct[0], "DROP ROLE guest")


async def test_one_branch_a_database(bank: Bank) -> None:
    async with made_elsewhere(bank.direct[0]) as mine, made_elsewhere(bank.direct[0]) as other:
        async with bank.coordinator.transaction():
            lease = await bank.accounts.connection()
            with pytest.raises(TransactionError, match="enlist before the first use"):
                await bank.accounts.enlist(mine)
            with pytest.raises(TransactionError, match="just use it"):
                await bank.accounts.enlist(lease)
        async with bank.coordinator.transaction():
            await bank.accounts.enlist(mine)
            with pytest.raises(TransactionError, match="can have only one"):
                await bank.accounts.enlist(other)
            async with bank.coordinator.transaction(propagation="requires_new"):
                with pytest.raises(TransactionError, match="takes part in a transaction already"):
                    await bank.accounts.enlist(mine)
        await other.execute("SELECT 1")


async def test_concurrent_enlisting_gives_one_branch(bank: Bank) -> None:
    async with made_elsewhere(bank.direct[0]) as mine:
        async with bank.coordinator.transaction():
            outcomes = await asyncio.gather(
                *(bank.accounts.enlist(mine) for _ in range(4)), return_exceptions=True
            )
            assert None in outcomes
            await mine.execute(TAKE.encode())
            await give(bank)
        assert bank.balances() == (99, 101)


async def test_a_statement_still_running_at_the_end_costs_it(bank: Bank) -> None:
    async with made_elsewhere(bank.direct[0]) as mine:
        with pytest.raises(TransactionAborted, match="still running"):
            async with bank.coordinator.transaction():
                await bank.accounts.enlist(mine)
                await give(bank)
                stray = asyncio.create_task(mine.execute(SLOW.encode()))
                while not running(bank.direct[0], "pg_sleep"):
                    await asyncio.sleep(0.01)
        with pytest.raises(TransactionError):
            await stray
        assert mine.closed and bank.balances() == (100, 100)
        with pytest.raises(psycopg.OperationalError):
            await mine.execute("SELECT 1")


async def test_a_raw_commit_votes_no(bank: Bank) -> None:
    async with made_elsewhere(bank.direct[0]) as mine:
        with pytest.raises(TransactionAborted, match="sent as text"):
            async with bank.coordinator.transaction():
                await bank.accounts.enlist(mine)
                await mine.execute("SELECT 1")
                await mine.execute("COMMIT")
                await mine.execute(TAKE.encode())
                await give(bank)
        assert bank.balances() == (100, 100)
        await mine.execute("SELECT 1")


async def test_one_that_is_lost_aborts_and_stays_closed(
    database: str, second_database: str, postgres_server: EmbeddedServer
) -> None:
    bank = Bank((database, second_database))
    async with (
        Proxy(postgres_server.port) as proxy,
        bank.coordinator,
        made_elsewhere(proxy.url(database)) as mine,
    ):
        proxy.on(b"PREPARE TRANSACTION", Fault.LOSE_ANSWER)
        with pytest.raises(TransactionAborted):
            async with bank.coordinator.transaction():
                await bank.accounts.enlist(mine)
                await mine.execute(TAKE.encode())
                await give(bank)
        assert proxy.fired == [Fault.LOSE_ANSWER]
        assert mine.closed
        assert bank.balances() == (100, 100)
        while not bank.nothing_is_prepared():
            await asyncio.sleep(0.01)


def test_a_synchronous_one_takes_part_in_a_thread(database: str, second_database: str) -> None:
    with (
        blocking_bank((database, second_database)) as bank,
        psycopg.connect(database) as mine,
    ):
        heard: list[str | None] = []
        mine.add_notice_handler(lambda notice: heard.append(notice.message_primary))
        for _ in range(2):
            with bank.coordinator.blocking.transaction():
                bank.accounts.blocking.enlist(mine)
                bank.accounts.blocking.enlist(mine)
                mine.execute(TAKE.encode())
                mine.execute("DO $$ BEGIN RAISE NOTICE 'heard'; END $$")
                for verb in (mine.commit, mine.rollback, mine.close):
                    with pytest.raises(TransactionError, match="is not possible"):
                        verb()
                with pytest.raises(TransactionError, match="connection of your own"):
                    mine.autocommit = True
                lease = bank.accounts.blocking.connection()
                assert lease.info.backend_pid == mine.info.backend_pid
                bank.ledger.blocking.connection().execute(GIVE.encode())
        assert bank.balances() == (98, 102) and heard == ["heard"] * 2
        mine.execute(TAKE.encode())
        mine.rollback()
        assert bank.balances() == (98, 102)


def test_a_synchronous_one_that_cannot_take_part(database: str, second_database: str) -> None:
    with (
        blocking_bank((database, second_database)) as bank,
        psycopg.connect(database) as mine,
        bank.coordinator.blocking.transaction(),
    ):
        asynchronous = AsyncConnection(mine.pgconn)
        with pytest.raises(ConfigurationError, match=r"await participant\.enlist"):
            bank.accounts.blocking.enlist(asynchronous)
        mine.execute("SELECT 1")
        with pytest.raises(TransactionError, match="a session with an open transaction"):
            bank.accounts.blocking.enlist(mine)
        mine.rollback()
        with mine.lock, pytest.raises(TransactionError, match="a statement is running on it"):
            bank.accounts.blocking.enlist(mine)


def test_a_synchronous_one_is_taken_from_a_thread_that_still_uses_it(
    database: str, second_database: str
) -> None:
    with (
        blocking_bank((database, second_database)) as bank,
        psycopg.connect(database) as mine,
        ThreadPoolExecutor(1) as threads,
    ):
        with (
            pytest.raises(TransactionAborted, match="still running"),
            bank.coordinator.blocking.transaction(),
        ):
            bank.accounts.blocking.enlist(mine)
            bank.ledger.blocking.connection().execute(GIVE.encode())
            stray = threads.submit(copy_context().run, mine.execute, SLOW.encode())
            wait_until(lambda: running(database, "pg_sleep"))
        assert isinstance(stray.exception(10), TransactionError)
        assert mine.closed and bank.balances() == (100, 100)
