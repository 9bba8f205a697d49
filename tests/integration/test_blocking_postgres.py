"""The synchronous face on real servers: leases in threads, which the loop's thread ends."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from coordinator.errors import TransactionAborted, TransactionError
from participants.postgres import PostgreSQL
from participants.postgres.blocking import BlockingPostgreSQL
from tests.support.bank import GIVE, TAKE, Bank, blocking_bank
from tests.support.postgres import query

COUNT = "SELECT count(*) FROM account"


@pytest.fixture
def bank(database: str, second_database: str) -> Iterator[Bank]:
    with blocking_bank((database, second_database), pool_size=2) as bank:
        yield bank


def transfer(bank: Bank) -> None:
    bank.accounts.blocking.connection().execute(TAKE.encode())
    bank.ledger.blocking.connection().execute(GIVE.encode())


def in_thread(threads: ThreadPoolExecutor, call: Any, *args: Any) -> Future[Any]:
    """As `asyncio.to_thread`, which carries the transaction along."""
    return threads.submit(copy_context().run, call, *args)


def test_it_is_a_psycopg_connection_and_one_for_the_transaction(bank: Bank) -> None:
    with bank.coordinator.blocking.transaction():
        connection = bank.accounts.blocking.connection()
        assert isinstance(connection, psycopg.Connection)
        with bank.accounts.blocking.connection() as same:
            assert same is connection
            same.execute(TAKE.encode())
        with connection:
            pass
        assert bank.balances() == (100, 100)
        with pytest.raises(ZeroDivisionError), connection.transaction():
            connection.execute(TAKE.encode())
            raise ZeroDivisionError
        with connection.transaction(), connection.pipeline(), connection.transaction():
            connection.execute("SELECT 1")
        bank.ledger.blocking.connection().execute(GIVE.encode())
    assert bank.balances() == (99, 101) and bank.nothing_is_prepared()


def test_an_exception_rolls_both_back_and_is_raised_unchanged(bank: Bank) -> None:
    @bank.coordinator.transactional
    def failing() -> None:
        transfer(bank)
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        failing()
    assert bank.balances() == (100, 100) and bank.nothing_is_prepared()


def test_verbs_raise_and_say_what_to_do(bank: Bank) -> None:
    with bank.coordinator.blocking.transaction():
        connection = bank.accounts.blocking.connection()
        for verb, part in [
            (connection.commit, "returning from the transactional function"),
            (connection.rollback, "raise an exception"),
            (connection.close, "given back"),
            (lambda: connection.set_autocommit(True), "connection of your own"),
            (lambda: setattr(connection, "autocommit", True), "connection of your own"),
            (lambda: connection.tpc_begin("x"), "two-phase commit"),
            (connection.tpc_prepare, "two-phase commit"),
            (connection.tpc_commit, "two-phase commit"),
            (connection.tpc_rollback, "two-phase commit"),
        ]:
            with pytest.raises(TransactionError, match=part):
                verb()
        transfer(bank)
    assert bank.balances() == (99, 101)


def test_both_faces_have_the_same_verbs() -> None:
    verbs = {name for name in dir(BlockingPostgreSQL) if not name.startswith("_")}
    assert verbs == {"connection", "session", "enlist"}
    assert verbs < {name for name in dir(PostgreSQL) if not name.startswith("_")}


def test_the_wrong_face_is_refused_at_once(bank: Bank) -> None:
    def needs_a_loop() -> None:
        asyncio.run(ask())

    async def ask() -> None:
        with pytest.raises(TransactionError, match="begun by a synchronous function"):
            await bank.accounts.connection()
        with pytest.raises(TransactionError, match="would stop the event loop"):
            bank.accounts.blocking.connection()

    async def asynchronous() -> None:
        async with bank.coordinator.transaction():
            await asyncio.to_thread(ask_in_a_thread)

    def ask_in_a_thread() -> None:
        with pytest.raises(TransactionError, match="begun by an asynchronous function"):
            bank.accounts.blocking.connection()

    with bank.coordinator.blocking.transaction():
        needs_a_loop()
    bank.coordinator.blocking.run(asynchronous())
    with pytest.raises(TransactionError, match="outside a transaction"):
        bank.accounts.blocking.connection()


def test_threads_of_one_transaction_share_a_branch_and_take_turns(bank: Bank) -> None:
    def count(number: int) -> tuple[int, Any]:
        connection = bank.accounts.blocking.connection()
        row = connection.execute("SELECT %s::int", (number,)).fetchone()
        assert row is not None
        return row[0], connection

    with ThreadPoolExecutor(8) as threads, bank.coordinator.blocking.transaction():
        results = [each.result() for each in [in_thread(threads, count, n) for n in range(32)]]
        assert [number for number, _ in results] == list(range(32))
        assert len({id(connection) for _, connection in results}) == 1
        transfer(bank)
    assert bank.balances() == (99, 101)


def test_a_dead_lease_and_its_cursors_are_refused(bank: Bank) -> None:
    with bank.coordinator.blocking.transaction():
        connection = bank.accounts.blocking.connection()
        cursor = connection.cursor()
        cursor.execute(COUNT)
        named = connection.cursor("named")
        named.execute(COUNT)
    assert connection.closed
    named._closed = True  # psycopg would warn that it was not closed in time

    def copy() -> None:
        with cursor.copy("COPY account FROM STDIN"):
            pass

    def pipeline() -> None:
        with connection.pipeline():
            connection.execute("SELECT 1")

    def savepoint() -> None:
        with connection.transaction():
            pass

    for use in (
        lambda: connection.execute("SELECT 1"),
        lambda: cursor.execute("SELECT 1"),
        lambda: cursor.executemany("SELECT %s", [(1,)]),
        copy,
        pipeline,
        savepoint,
        connection.cancel,
        connection.cancel_safe,
        lambda: connection.set_read_only(True),
    ):
        with pytest.raises(TransactionError, match="cannot be used any more"):
            use()


def test_a_dead_lease_cannot_touch_the_next_borrower(bank: Bank) -> None:
    with bank.coordinator.blocking.transaction():
        old = bank.accounts.blocking.connection()
        old.execute("SELECT 1")
    with bank.coordinator.blocking.transaction():
        new = bank.accounts.blocking.connection()
        assert new.pgconn is old.pgconn  # the same session, in truth
        with pytest.raises(TransactionError):
            old.execute("UPDATE account SET balance = 0")
        transfer(bank)
    assert bank.balances() == (99, 101)


def test_a_full_pool_names_the_holders_at_the_deadline(database: str, second_database: str) -> None:
    with blocking_bank((database, second_database), pool_size=1) as bank:
        release = threading.Event()

        def hold() -> str:
            with bank.coordinator.blocking.transaction() as transaction:
                bank.accounts.blocking.connection().execute("SELECT 1")
                held.set()
                assert release.wait(10)
                return transaction.id

        held = threading.Event()
        with ThreadPoolExecutor(1) as threads:
            holder = threads.submit(hold)
            assert held.wait(10)
            with (
                pytest.raises(TransactionAborted) as caught,
                bank.coordinator.blocking.transaction(timeout=0.2),
            ):
                transfer(bank)
            release.set()
            said = f"{caught.value} {caught.value.__cause__}"
            assert holder.result(10) in said and caught.value.retryable
        bank.coordinator.transactional(transfer)(bank)
        assert bank.balances() == (99, 101)


def test_factories_of_the_other_face_reach_the_lease(database: str, second_database: str) -> None:
    async def configure(connection: psycopg.AsyncConnection[Any]) -> None:
        connection.row_factory = dict_row
        connection.cursor_factory = psycopg.AsyncClientCursor
        connection.prepare_threshold = 0

    with (
        blocking_bank((database, second_database), configure=configure) as bank,
        bank.coordinator.blocking.transaction(),
    ):
        connection = bank.accounts.blocking.connection()
        cursor = connection.execute("SELECT id FROM account WHERE id = %s", ("bob",))
        assert isinstance(cursor, psycopg.ClientCursor)
        assert cursor.fetchall() == [{"id": "bob"}]
        assert connection.prepare_threshold == 0


def test_prepared_statements_outlive_leases(bank: Bank) -> None:
    for _ in range(3):
        with bank.coordinator.blocking.transaction():
            connection = bank.accounts.blocking.connection()
            connection.execute("SELECT id FROM account WHERE id = %s", ("bob",), prepare=True)
            prepared = connection.execute(
                "SELECT name FROM pg_prepared_statements WHERE statement LIKE 'SELECT id FROM%'"
            )
            assert len(prepared.fetchall()) == 1


def test_a_lease_that_is_forgotten_neither_warns_nor_closes_nor_leaks(bank: Bank) -> None:
    bank.coordinator.transactional(transfer)(bank)
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            bank.coordinator.transactional(transfer)(bank)
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
    assert query(bank.direct[0], COUNT) == [(2,)]


def test_work_nested_in_a_full_pool_does_not_wait_for_itself(
    database: str, second_database: str
) -> None:
    with blocking_bank((database, second_database), pool_size=1) as bank:

        @bank.coordinator.transactional(propagation="requires_new")
        def inner(depth: int) -> None:
            bank.ledger.blocking.connection().execute(GIVE.encode())
            if depth:
                bank.accounts.blocking.connection()
                inner_of_ledger(depth - 1)

        @bank.coordinator.transactional(propagation="requires_new")
        def inner_of_ledger(depth: int) -> None:
            bank.accounts.blocking.connection().execute("SELECT 1")
            bank.ledger.blocking.connection().execute("SELECT 1")

        @bank.coordinator.transactional(timeout=10)
        def outer() -> None:
            bank.accounts.blocking.connection().execute(TAKE.encode())
            inner(1)
            bank.ledger.blocking.connection().execute("SELECT 1")

        outer()
        assert bank.balances() == (99, 101)
        opened = bank.accounts._open
        assert opened is not None
        assert not opened.pool._beyond and len(opened.pool._idle) <= 1
