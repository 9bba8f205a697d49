"""A synchronous body that runs on after its deadline: no thread can be stopped from outside.

Its transaction is over by then. What it still calls must not commit by itself, since the caller is
told that nothing was done.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from coordinator import Coordinator, TransactionAborted, TransactionError
from coordinator.context import current
from participants.memory import Memory

SECONDS_MAX = 10.0


@pytest.fixture
def stock() -> Memory:
    return Memory("stock")


@pytest.fixture
def shop(stock: Memory) -> Iterator[Coordinator]:
    coordinator = Coordinator("memory:", cluster="shop", participants=[stock])
    yield coordinator
    coordinator.blocking.close()


def outlive_the_deadline() -> None:
    """Return when the transaction that runs here has been rolled back, behind its body's back."""
    transaction = current()
    assert transaction is not None
    give_up = time.monotonic() + SECONDS_MAX
    while not transaction.has_ended:
        assert time.monotonic() < give_up
        time.sleep(0.005)


def in_a_function(shop: Coordinator, body: Callable[[], None]) -> None:
    shop.transactional(timeout=0.1)(body)()


def in_a_block(shop: Coordinator, body: Callable[[], None]) -> None:
    with shop.blocking.transaction(timeout=0.1):
        body()


def in_a_transaction_of_its_own(shop: Coordinator, body: Callable[[], None]) -> None:
    with shop.blocking.transaction():
        shop.transactional(timeout=0.1, propagation="requires_new")(body)()


OUTLIVING = [in_a_function, in_a_block, in_a_transaction_of_its_own]


@pytest.mark.parametrize("propagation", ["required", "mandatory", "supports"])
@pytest.mark.parametrize("outliving", OUTLIVING)
def test_what_it_calls_can_neither_join_nor_commit_by_itself(
    shop: Coordinator,
    stock: Memory,
    outliving: Callable[[Coordinator, Callable[[], None]], None],
    propagation: str,
) -> None:
    refusals: list[TransactionError] = []

    @shop.transactional(propagation=propagation)
    def second() -> None:
        stock.blocking.put("second", 1)

    def body() -> None:
        stock.blocking.put("first", 1)
        outlive_the_deadline()
        with pytest.raises(TransactionError, match="is ending") as refused:
            second()
        refusals.append(refused.value)
        with pytest.raises(TransactionError):
            stock.blocking.put("third", 1)

    with pytest.raises(TransactionAborted, match=r"deadline of 0\.1 s"):
        outliving(shop, body)
    assert refusals and stock.committed == {}


def test_the_refusal_is_not_what_the_caller_hears(shop: Coordinator, stock: Memory) -> None:
    second = shop.transactional(lambda: stock.blocking.put("second", 1))

    def body() -> None:
        outlive_the_deadline()
        second()

    with pytest.raises(TransactionAborted, match="deadline") as aborted:
        in_a_function(shop, body)
    assert aborted.value.retryable and stock.committed == {}


def test_another_attempt_begins_anew(shop: Coordinator, stock: Memory) -> None:
    tries: list[int] = []

    @shop.transactional
    def second(number: int) -> None:
        stock.blocking.put("second", number)

    @shop.transactional(timeout=0.1, attempts=2)
    def body() -> None:
        tries.append(len(tries))
        if len(tries) == 1:
            outlive_the_deadline()
        second(len(tries))

    body()
    assert tries == [0, 1] and stock.committed == {"second": 2}


def test_what_asks_to_be_independent_is(shop: Coordinator, stock: Memory) -> None:
    @shop.transactional(propagation="requires_new")
    def note() -> None:
        stock.blocking.put("note", 1)

    @shop.transactional(propagation="not_supported")
    def outside() -> None:
        with shop.blocking.transaction():
            stock.blocking.put("outside", 1)

    def body() -> None:
        stock.blocking.put("first", 1)
        outlive_the_deadline()
        note()
        outside()

    with pytest.raises(TransactionAborted, match="deadline"):
        in_a_function(shop, body)
    assert stock.committed == {"note": 1, "outside": 1}


def test_a_thread_that_outlives_the_body_is_on_its_own(shop: Coordinator, stock: Memory) -> None:
    """Its transaction has returned to its caller: what it does now is nobody's part."""
    left = threading.Event()
    write = shop.transactional(lambda: stock.blocking.put("later", 1))

    def stray() -> None:
        assert left.wait(SECONDS_MAX)
        write()

    with shop.blocking.transaction():
        thread = threading.Thread(target=contextvars.copy_context().run, args=(stray,))
        thread.start()
    left.set()
    thread.join()
    assert stock.committed == {"later": 1}
