"""`@coordinator.transactional`: kinds of functions, repeated attempts, mistakes named at once."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from coordinator import (
    ConfigurationError,
    Coordinator,
    OutcomeUnknown,
    TransactionAborted,
    TransactionId,
    decorating,
)
from coordinator.context import current
from coordinator.decorating import another_attempt_may_help, pause_before
from participants.memory import Memory


@pytest.fixture
def stock() -> Memory:
    return Memory("stock")


@pytest.fixture
async def shop(stock: Memory) -> AsyncIterator[Coordinator]:
    async with Coordinator("memory:", cluster="shop", participants=[stock]) as coordinator:
        yield coordinator


class SerializationFailure(Exception):
    sqlstate = "40001"


class Wrapped(Exception):
    """As SQLAlchemy's DBAPIError: the driver's error is in `orig`."""

    def __init__(self, orig: Exception) -> None:
        super().__init__("wrapped")
        self.orig = orig


def caused_by(cause: Exception) -> Exception:
    try:
        raise ValueError("outer") from cause
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    ("error", "helps"),
    [
        (TransactionAborted("no", retryable=True), True),
        (TransactionAborted("no"), False),
        (SerializationFailure(), True),
        (caused_by(SerializationFailure()), True),
        (Wrapped(SerializationFailure()), True),
        (caused_by(Wrapped(SerializationFailure())), True),
        (ExceptionGroup("tasks", [KeyError(), SerializationFailure()]), True),
        (ValueError(), False),
    ],
)
def test_which_errors_another_attempt_may_help(error: Exception, helps: bool) -> None:
    assert another_attempt_may_help(error) is helps


def test_an_unknown_outcome_is_never_tried_again() -> None:
    unknown = OutcomeUnknown("lost", transaction_id=TransactionId("0" * 36))
    unknown.__cause__ = SerializationFailure()
    assert not another_attempt_may_help(unknown)


def test_the_pause_grows_up_to_its_bound_and_has_full_jitter() -> None:
    pauses = [[pause_before(attempt) for _ in range(200)] for attempt in (1, 3, 50)]
    assert max(pauses[0]) <= 0.1 < max(pauses[1]) <= 0.4 < max(pauses[2]) <= 2.0
    assert min(pauses[2]) < 0.2


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decorating, "pause_before", lambda attempt: 0.0)


def failing(times: int) -> Callable[[], None]:
    left = [times]

    def fail() -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise SerializationFailure("try again")

    return fail


@pytest.mark.usefixtures("no_pause")
async def test_the_whole_function_runs_again_in_a_transaction_of_its_own(
    shop: Coordinator, stock: Memory
) -> None:
    seen, fail = [], failing(2)

    @shop.transactional(attempts=3)
    async def write() -> str:
        seen.append(current())
        await stock.put(f"try {len(seen)}", 1)
        fail()
        return "done"

    assert await write() == "done"
    assert len(set(map(id, seen))) == 3
    assert stock.committed == {"try 3": 1}


@pytest.mark.usefixtures("no_pause")
async def test_the_last_attempt_raises_as_it_is(shop: Coordinator) -> None:
    calls = []

    @shop.transactional(attempts=2)
    async def write() -> None:
        calls.append(1)
        raise SerializationFailure("always")

    with pytest.raises(SerializationFailure, match="always"):
        await write()
    assert len(calls) == 2


@pytest.mark.usefixtures("no_pause")
async def test_attempts_are_one_unless_asked_for_and_ignored_when_joining(
    shop: Coordinator,
) -> None:
    calls = []

    async def write() -> None:
        calls.append(1)
        raise SerializationFailure("once")

    with pytest.raises(SerializationFailure):
        await shop.transactional(write)()
    assert len(calls) == 1
    with pytest.raises(SerializationFailure):
        async with shop.transaction():
            await shop.transactional(attempts=5)(write)()
    assert len(calls) == 2


# What can be decorated.


class Service:
    def __init__(self, stock: Memory) -> None:
        self.stock = stock


async def test_methods_static_methods_class_methods_and_callable_objects(
    shop: Coordinator, stock: Memory
) -> None:
    class Writer(Service):
        @shop.transactional
        async def method(self, key: str) -> str:
            await self.stock.put(key, current() is not None)
            return key

        @shop.transactional(timeout=5)
        @staticmethod
        async def static(key: str) -> str:
            await stock.put(key, current() is not None)
            return key

        @classmethod
        @shop.transactional
        async def of_class(cls, key: str) -> str:
            await stock.put(key, current() is not None)
            return cls.__name__ + key

    class Called:
        async def __call__(self, key: str) -> str:
            await stock.put(key, current() is not None)
            return key

    writer = Writer(stock)
    assert await writer.method("a") == "a"
    assert await Writer.static("b") == await writer.static("b") == "b"
    assert await Writer.of_class("c") == "Writerc"
    assert await shop.transactional(Called())("d") == "d"
    assert await shop.transactional(functools.partial(writer.method, "e"))() == "e"
    assert stock.committed == dict.fromkeys("abcde", True)
    assert Writer.method.__name__ == "method" and Writer.method.__doc__ is None


def generator() -> Iterator[int]:
    yield 1


async def asynchronous_generator() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (generator, "generator"),
        (asynchronous_generator, "generator"),
        (Service, "class"),
        (7, "cannot be called"),
    ],
)
async def test_what_has_no_body_of_its_own_is_refused(
    shop: Coordinator, function: Any, says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        shop.transactional(function)


def plain(function: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    """A decorator that hides what it decorates, as many do."""

    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def test_a_wrapper_that_returns_an_awaitable_aborts_instead_of_committing_early() -> None:
    ran = []

    async def write() -> None:
        ran.append(1)

    shop = Coordinator("memory:", cluster="shop")
    with shop.blocking, pytest.raises(ConfigurationError, match="async def"):
        shop.transactional(plain(write))()
    assert not ran


@pytest.mark.parametrize("make", [generator, asynchronous_generator])
def test_a_function_that_returns_a_generator_aborts(make: Callable[[], object]) -> None:
    shop = Coordinator("memory:", cluster="shop")
    with shop.blocking, pytest.raises(ConfigurationError, match="returned"):
        shop.transactional(lambda: make())()


async def test_an_ordinary_function_on_the_loop_is_refused_at_once(shop: Coordinator) -> None:
    ran = []
    with pytest.raises(ConfigurationError, match=r"ordinary function.*async def"):
        shop.transactional(lambda: ran.append(1))()
    assert not ran


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"attempts": 0}, "attempts is 0"),
        ({"attempts": True + 1.5}, "attempts"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": 1e9}, "timeout_max"),
        ({"idempotency_key": "order"}, "idempotency_key is 'order'"),
        ({"record_result": True}, "give a key"),
        ({"propagation": "sometimes"}, "sometimes"),
    ],
)
async def test_wrong_arguments_are_named(shop: Coordinator, how: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        shop.transactional(**how)
