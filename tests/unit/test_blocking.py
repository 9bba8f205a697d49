"""The synchronous face: the same rules in threads, and the mistakes that only threads can make."""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from coordinator import (
    AlreadyDecided,
    ConfigurationError,
    Coordinator,
    Status,
    TransactionAborted,
    TransactionError,
)
from coordinator.context import current
from participants.memory import Memory


@pytest.fixture
def stock() -> Memory:
    return Memory("stock")


@pytest.fixture
def shop(stock: Memory) -> Iterator[Coordinator]:
    coordinator = Coordinator("memory:", cluster="shop", participants=[stock])
    yield coordinator
    coordinator.blocking.close()


def test_the_first_use_opens_and_a_plain_function_commits(shop: Coordinator, stock: Memory) -> None:
    @shop.transactional(timeout=5)
    def transfer(amount: int) -> int:
        stock.blocking.put("a", -amount)
        stock.blocking.put("b", amount)
        assert stock.committed == {}
        return amount

    assert transfer(3) == 3
    assert stock.committed == {"a": -3, "b": 3}
    assert shop.blocking.status(ended_id(shop)) is Status.COMMITTED


def ended_id(shop: Coordinator) -> str:
    with shop.blocking.transaction() as transaction:
        return transaction.id


def test_an_exception_aborts_and_is_raised_unchanged(shop: Coordinator, stock: Memory) -> None:
    error = LookupError("mine")
    with pytest.raises(LookupError) as raised, shop.blocking.transaction():
        stock.blocking.put("a", 1)
        raise error
    assert raised.value is error
    assert stock.committed == {}


def test_nesting_joins_and_dooms(shop: Coordinator, stock: Memory) -> None:
    @shop.transactional
    def inner() -> None:
        stock.blocking.put("inner", 1)
        raise LookupError("inner failed")

    with (
        pytest.raises(TransactionAborted, match="inner failed"),
        shop.blocking.transaction() as outer,
    ):
        assert current() is outer
        with pytest.raises(LookupError):
            inner()
    assert stock.committed == {}
    with shop.blocking.transaction():
        stock.blocking.put("outer", 1)
        with shop.blocking.transaction(propagation="requires_new"):
            stock.blocking.put("new", 1)
        assert stock.committed == {"new": 1}
    assert stock.committed == {"new": 1, "outer": 1}


def test_threads_run_transactions_of_their_own(shop: Coordinator, stock: Memory) -> None:
    @shop.transactional
    def write(number: int) -> None:
        stock.blocking.put(f"key {number}", number)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(40)))
    assert len(stock.committed) == 40


def test_a_thread_with_the_callers_context_joins(shop: Coordinator, stock: Memory) -> None:
    with shop.blocking.transaction():
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(stock.blocking.put, "a", 1))
        thread.start()
        thread.join()
        assert stock.committed == {}
    assert stock.committed == {"a": 1}


def test_the_deadline_aborts_a_body_that_does_not_return(shop: Coordinator, stock: Memory) -> None:
    late = shop.blocking.transaction(timeout=0.1)
    with pytest.raises(TransactionAborted, match=r"deadline of 0\.1 s") as raised, late as running:
        stock.blocking.put("a", 1)
        while not running.expired:
            time.sleep(0.005)
    assert raised.value.retryable
    assert stock.committed == {}


def test_a_key_commits_once(shop: Coordinator, stock: Memory) -> None:
    @shop.transactional(idempotency_key=lambda order: order, record_result=True)
    def place(order: str) -> int:
        stock.blocking.put(order, 1)
        return len(stock.committed)

    assert place("a") == place("a") == 0
    with pytest.raises(AlreadyDecided), shop.blocking.transaction(key="a"):
        pass


def test_hooks_run_in_the_thread_of_the_body(shop: Coordinator) -> None:
    ran: list[object] = []
    with shop.blocking.transaction() as transaction:
        transaction.before_commit(lambda: ran.append(threading.get_ident()))
        transaction.after_end(lambda outcome: ran.append(str(outcome)))
    assert ran == [threading.get_ident(), "committed"]


# The two faces.


async def test_the_loop_of_an_open_coordinator_serves_its_threads(
    shop: Coordinator, stock: Memory
) -> None:
    @shop.transactional
    def write() -> None:
        stock.blocking.put("a", 1)

    async with shop:
        await asyncio.to_thread(write)
        assert shop.loop is asyncio.get_running_loop()
    assert stock.committed == {"a": 1}


async def test_the_synchronous_face_on_a_running_loop_raises_at_once(
    shop: Coordinator, stock: Memory
) -> None:
    async with shop:
        for call in (
            lambda: shop.blocking.transaction().__enter__(),
            lambda: shop.blocking.status("0199c82c-be12-7003-8000-000000000003"),
            shop.blocking.open,
            shop.blocking.close,
            lambda: stock.blocking.put("a", 1),
        ):
            with pytest.raises(ConfigurationError, match="event loop"):
                call()


async def test_the_synchronous_face_inside_an_asynchronous_transaction_raises(
    shop: Coordinator, stock: Memory
) -> None:
    def begin() -> None:
        with shop.blocking.transaction():
            pytest.fail("it began")

    async with shop, shop.transaction():
        for call in (begin, lambda: stock.blocking.put("a", 1)):
            with pytest.raises(TransactionError, match="asynchronous"):
                await asyncio.to_thread(call)
        assert await asyncio.to_thread(shop.transactional(propagation="not_supported")(lambda: 7))


def test_the_asynchronous_face_inside_a_synchronous_transaction_raises(
    shop: Coordinator, stock: Memory
) -> None:
    async def begin() -> None:
        async with shop.transaction():
            pytest.fail("it began")

    with shop.blocking.transaction():
        for call in (begin, lambda: stock.put("a", 1)):
            with pytest.raises(TransactionError, match="synchronous"):
                asyncio.run(call())


def test_a_coroutine_function_is_refused_by_the_synchronous_decorator(shop: Coordinator) -> None:
    async def write() -> None: ...

    with pytest.raises(ConfigurationError, match="coroutine function"):
        shop.blocking.transactional(write)
    with pytest.raises(ConfigurationError, match="coroutine function"):
        shop.blocking.transactional(timeout=1)(write)


# Opening and closing.


def test_closed_it_says_so_and_can_be_opened_again(shop: Coordinator, stock: Memory) -> None:
    with shop.blocking:
        pass
    shop.blocking.close()
    with pytest.raises(TransactionError, match="closed"), shop.blocking.transaction():
        pass
    with shop.blocking, shop.blocking.transaction():
        stock.blocking.put("a", 1)
    assert stock.committed == {"a": 1}


def test_a_failed_opening_is_told_to_each_caller_and_leaves_no_thread(stock: Memory) -> None:
    before = threading.active_count()
    shop = Coordinator("sqlite:////nowhere/at/all.db", cluster="shop", participants=[stock])
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="nowhere"), shop.blocking.transaction():
            pass
    assert threading.active_count() == before


def test_threads_that_come_at_once_open_it_once(shop: Coordinator, stock: Memory) -> None:
    barrier = threading.Barrier(6)

    def write(number: int) -> None:
        barrier.wait()
        with shop.blocking.transaction():
            stock.blocking.put(str(number), 1)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(write, range(6)))
    assert len(stock.committed) == 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forking is what is tested")
def test_a_forked_child_is_told_to_open_its_own_and_can() -> None:
    program = """
import os, warnings
warnings.simplefilter("ignore")
from coordinator import Coordinator, TransactionError
from participants.memory import Memory
stock = Memory("stock")
shop = Coordinator("memory:", cluster="shop", participants=[stock])
write = shop.transactional(lambda: stock.blocking.put("a", os.getpid()))
write()
child = os.fork()
if child == 0:
    try:
        write()
    except TransactionError as error:
        assert "fork" in str(error), error
        shop.blocking.open()
        write()
        os._exit(0 if stock.committed == {"a": os.getpid()} else 1)
    os._exit(2)
assert os.waitpid(child, 0)[1] == 0
write()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_at_the_end_of_the_process_it_closes_by_itself() -> None:
    program = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
from coordinator import Coordinator
from participants.memory import Memory
stock = Memory("stock")
shop = Coordinator("memory:", cluster="shop", participants=[stock])
shop.transactional(lambda: stock.blocking.put("a", 1))()
real = stock.close
async def close():
    await real()
    print("closed")
stock.close = close
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "closed\n")
    assert "Traceback" not in done.stderr
