"""Taking a connection away from a thread that uses it: at the end, at the deadline, on a signal."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import psycopg
import pytest

from coordinator.errors import TransactionAborted, TransactionError
from tests.support.bank import GIVE, SLOW, TAKE, Bank, blocking_bank, running, wait_until
from tests.support.postgres import query


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


def test_a_running_statement_votes_no_and_never_pollutes(bank: Bank) -> None:
    def stray() -> None:
        bank.accounts.blocking.connection().execute(SLOW.encode())

    with ThreadPoolExecutor(2) as threads:
        began = time.monotonic()
        with (
            pytest.raises(TransactionAborted, match="still running"),
            bank.coordinator.blocking.transaction(),
        ):
            transfer(bank)
            running_one = in_thread(threads, stray)
            wait_until(lambda: running(bank.direct[0], "pg_sleep"))
            waiting_one = in_thread(threads, lambda: transfer(bank))
        assert time.monotonic() - began < 10
        for each in (running_one, waiting_one):
            assert isinstance(each.exception(10), TransactionError)
    wait_until(lambda: not running(bank.direct[0], "pg_sleep"))  # it was cancelled on the server
    assert bank.balances() == (100, 100) and bank.nothing_is_prepared()
    for _ in range(3):
        bank.coordinator.transactional(transfer)(bank)
    assert bank.balances() == (97, 103)


@pytest.mark.parametrize("kind", ["copy", "stream", "pipeline"])
def test_what_is_half_done_at_the_end_votes_no(bank: Bank, kind: str) -> None:
    entered, leave = threading.Event(), threading.Event()

    def half() -> None:
        connection = bank.accounts.blocking.connection()
        if kind == "copy":
            with connection.cursor().copy("COPY entry (note) FROM STDIN") as copy:
                copy.write("x\n")
                entered.set()
                leave.wait()
        elif kind == "stream":
            for _ in connection.cursor().stream("SELECT generate_series(1, 10000)"):
                entered.set()
                leave.wait()
        else:
            with connection.pipeline():
                connection.execute("UPDATE account SET balance = 0")
                entered.set()
                leave.wait()

    with ThreadPoolExecutor(1) as threads:
        with (
            pytest.raises(TransactionAborted, match="still running"),
            bank.coordinator.blocking.transaction(),
        ):
            transfer(bank)
            task = in_thread(threads, half)
            assert entered.wait(10)
        leave.set()
        assert isinstance(task.exception(10), Exception)
    assert bank.balances() == (100, 100) and bank.nothing_is_prepared()
    bank.coordinator.transactional(transfer)(bank)
    assert bank.balances() == (99, 101)


def test_at_the_deadline_the_body_loses_its_connection(bank: Bank) -> None:
    seen: list[Exception] = []

    @bank.coordinator.transactional(timeout=0.5)
    def slow() -> None:
        transfer(bank)
        try:
            bank.accounts.blocking.connection().execute(SLOW.encode())
        except TransactionError as error:
            seen.append(error)
            raise

    began = time.monotonic()
    with pytest.raises(TransactionAborted, match=r"deadline of 0\.5 s"):
        slow()
    assert time.monotonic() - began < 5
    assert "cannot be used any more" in str(seen[0])
    wait_until(lambda: not running(bank.direct[0], "pg_sleep"))
    assert bank.balances() == (100, 100) and bank.nothing_is_prepared()


def test_a_signal_in_a_statement_stops_it_and_aborts(bank: Bank) -> None:
    """As Ctrl-C does: the exception of the handler comes in the middle of the wait."""

    class Interrupted(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    def send() -> None:
        wait_until(lambda: running(bank.direct[0], "pg_sleep"))
        os.kill(os.getpid(), signal.SIGUSR1)

    former = signal.signal(signal.SIGUSR1, interrupt)
    sender = threading.Thread(target=send)
    try:
        with pytest.raises(Interrupted), bank.coordinator.blocking.transaction():
            transfer(bank)
            connection = bank.accounts.blocking.connection()
            process = connection.info.backend_pid
            sender.start()
            connection.execute(SLOW.encode())
    finally:
        signal.signal(signal.SIGUSR1, former)
        sender.join()
    assert not running(bank.direct[0], "pg_sleep")
    assert bank.balances() == (100, 100)
    with bank.coordinator.blocking.transaction():
        transfer(bank)
        # It was stopped politely: the session itself is as good as before.
        assert bank.accounts.blocking.connection().info.backend_pid == process
    assert bank.balances() == (99, 101)


@pytest.mark.parametrize("breaks", [False, True], ids=["connected", "broken"])
def test_the_session_is_closed_by_the_thread_that_is_in_it(bank: Bank, breaks: bool) -> None:
    """libpq's object is freed when it is closed: never while another thread is inside."""
    entered, leave = threading.Event(), threading.Event()

    def statement(connection: psycopg.Connection[Any]) -> Iterator[int]:
        if breaks:
            process = connection.pgconn.backend_pid
            query(bank.direct[0], f"SELECT pg_terminate_backend({process}, 5000)")
            with pytest.raises(psycopg.OperationalError):
                while True:
                    connection.pgconn.consume_input()
            assert connection.pgconn.status == psycopg.pq.ConnStatus.BAD
        entered.set()
        leave.wait()
        assert connection.pgconn.db  # what is freed tells nothing any more
        return
        yield 0

    def stray(connection: psycopg.Connection[Any]) -> None:
        connection.wait(statement(connection))  # type: ignore[arg-type]

    with ThreadPoolExecutor(1) as threads:
        with (
            pytest.raises(TransactionAborted, match=r"still running|lost"),
            bank.coordinator.blocking.transaction(),
        ):
            transfer(bank)
            connection = bank.accounts.blocking.connection()
            task = in_thread(threads, stray, connection)
            assert entered.wait(10)
        leave.set()
        assert task.exception(10) is None
        with pytest.raises(psycopg.OperationalError, match="closed"):
            _ = connection.pgconn.db
    bank.coordinator.transactional(transfer)(bank)
    assert bank.balances() == (99, 101)
