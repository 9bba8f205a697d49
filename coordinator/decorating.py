"""`@coordinator.transactional`: a function whose every call is a transaction, or part of one.

It looks once, at the definition, whether it decorates a coroutine function. An ordinary function
runs in a synchronous transaction; if it turns out to return an awaitable or a generator, its work
has not happened yet, and the transaction aborts instead of committing before the body ran.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, get_type_hints

import msgspec

from coordinator.context import enter, leave, refuse_on_a_running_loop
from coordinator.engine import Engine
from coordinator.errors import (
    AlreadyDecided,
    ConfigurationError,
    HeuristicOutcome,
    OutcomeUnknown,
    TransactionAborted,
)
from coordinator.keys import check_key, decode_result, encode_result
from coordinator.propagation import Place, Propagation, place_of
from coordinator.scope import BlockingScope, Home, Options, Scope

F = TypeVar("F", bound=Callable[..., Any])

RETRYABLE_SQLSTATES = ("40001", "40P01")
PAUSE_SECONDS_FIRST = 0.05
PAUSE_SECONDS_MOST = 2.0
ATTEMPTS_MOST = 100


class How(msgspec.Struct, frozen=True, kw_only=True):
    """What the decorator was given; `timeout` in seconds."""

    timeout: float
    propagation: Propagation = Propagation.REQUIRED
    attempts: int = 1
    key: Callable[..., str] | None = None
    record_result: bool = False

    def validate(self) -> How:
        """Return self; raises `ConfigurationError` naming the argument that cannot work."""
        attempts = self.attempts
        if not isinstance(attempts, int) or not 1 <= attempts <= ATTEMPTS_MOST:
            raise ConfigurationError(f"attempts is {attempts!r}: give 1 to {ATTEMPTS_MOST}")
        if self.key is not None and not callable(self.key):
            raise ConfigurationError(
                f"idempotency_key is {self.key!r}: give a function that gets the call's arguments "
                "and returns the key"
            )
        if self.record_result and self.key is None:
            raise ConfigurationError("record_result keeps a result under a key: give a key too")
        return self


def decorate(function: F, how: How, engine: Callable[[], Engine], home: Home) -> F:
    """The function as a transactional one, of the same kind and signature."""
    if isinstance(function, staticmethod | classmethod):
        inner = decorate(function.__func__, how, engine, home)
        return type(function)(inner)
    _refuse_what_has_no_body(function)
    body = _Body(function, how)
    if _is_coroutine_function(function):
        return _asynchronous(function, body, engine)
    return _synchronous(function, body, home)


def _asynchronous(function: F, body: _Body, engine: Callable[[], Engine]) -> F:
    async def once(options: Options, args: Any, kwargs: Any) -> Any:
        scope = Scope(engine, options)
        try:
            transaction = await scope.__aenter__()
        except AlreadyDecided as decided:
            return body.first_result(decided)
        try:
            result = await function(*args, **kwargs)
            if options.key is not None and body.how.record_result:
                transaction.attach(encode_result(result, body.name))
        except BaseException as error:
            await scope.__aexit__(type(error), error, error.__traceback__)
            raise
        await scope.__aexit__(None, None, None)
        return result

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        place = place_of(body.how.propagation, body.name)
        if place is Place.WITHOUT:
            with _outside():
                return await function(*args, **kwargs)
        options = body.options(args, kwargs)
        attempts = body.how.attempts if place is Place.BEGINS else 1
        for number in range(1, attempts):
            try:
                return await once(options, args, kwargs)
            except Exception as error:
                if not another_attempt_may_help(error):
                    raise
            await asyncio.sleep(pause_before(number))
        return await once(options, args, kwargs)

    return wrapper  # type: ignore[return-value]


def _synchronous(function: F, body: _Body, home: Home) -> F:
    def call(args: Any, kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        body.refuse_unfinished(result)
        return result

    def once(options: Options, args: Any, kwargs: Any) -> Any:
        scope = BlockingScope(home, options)
        try:
            transaction = scope.__enter__()
        except AlreadyDecided as decided:
            return body.first_result(decided)
        try:
            result = call(args, kwargs)
            if options.key is not None and body.how.record_result:
                transaction.attach(encode_result(result, body.name))
        except BaseException as error:
            scope.__exit__(type(error), error, error.__traceback__)
            raise
        scope.__exit__(None, None, None)
        return result

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        place = place_of(body.how.propagation, body.name)
        if place is Place.WITHOUT:
            with _outside():
                return call(args, kwargs)
        refuse_on_a_running_loop(
            f"{body.name} is an ordinary function, whose transaction", hint=body.hint
        )
        options = body.options(args, kwargs)
        attempts = body.how.attempts if place is Place.BEGINS else 1
        for number in range(1, attempts):
            try:
                return once(options, args, kwargs)
            except Exception as error:
                if not another_attempt_may_help(error):
                    raise
            time.sleep(pause_before(number))
        return once(options, args, kwargs)

    return wrapper  # type: ignore[return-value]


class _Body:
    """A decorated function with what its calls have in common."""

    def __init__(self, function: Callable[..., Any], how: How) -> None:
        self.name = f"{getattr(function, '__qualname__', repr(function))}()"
        self.how = how
        self._function = function

    @property
    def hint(self) -> str:
        return f"write `async def`, or make what decorates {self.name} a coroutine function"

    def options(self, args: Any, kwargs: Any) -> Options:
        how = self.how
        key = None if how.key is None else check_key(how.key(*args, **kwargs))
        return Options(timeout=how.timeout, propagation=how.propagation, key=key, what=self.name)

    def first_result(self, decided: AlreadyDecided) -> Any:
        """What the key's commit recorded; raises `decided` if that was nothing."""
        if not self.how.record_result or not decided.attachment:
            raise decided
        return decode_result(decided.attachment, self._result_type(), self.name)

    def _result_type(self) -> Any:
        function = inspect.unwrap(self._function)
        hints = get_type_hints(function)
        return hints.get("return", Any)

    def refuse_unfinished(self, result: object) -> None:
        """Raise `ConfigurationError` if the body has not run yet although its call returned."""
        if inspect.iscoroutine(result) or inspect.isgenerator(result):
            result.close()
        elif not (inspect.isawaitable(result) or inspect.isasyncgen(result)):
            return
        raise ConfigurationError(
            f"{self.name} returned {type(result).__name__}, so its work had not happened yet when "
            f"its transaction was to commit: {self.hint}"
        )


def another_attempt_may_help(error: BaseException) -> bool:
    """Whether running the whole function again may succeed: never when the outcome is unknown."""
    if isinstance(error, OutcomeUnknown | HeuristicOutcome | AlreadyDecided):
        return False
    if isinstance(error, TransactionAborted) and error.retryable:
        return True
    return any(getattr(each, "sqlstate", None) in RETRYABLE_SQLSTATES for each in _causes(error))


def pause_before(attempt: int) -> float:
    """Seconds to wait before another attempt, with full jitter (AWS, "Exponential Backoff")."""
    most: float = min(PAUSE_SECONDS_FIRST * 2**attempt, PAUSE_SECONDS_MOST)
    return random.uniform(0.0, most)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        left += [each.__cause__, each.__context__]
        original = getattr(each, "orig", None)  # SQLAlchemy keeps the driver's error there
        left.append(original if isinstance(original, BaseException) else None)
        if isinstance(each, BaseExceptionGroup):
            left += each.exceptions


def _is_coroutine_function(function: Callable[..., Any]) -> bool:
    if inspect.iscoroutinefunction(function):
        return True
    return inspect.iscoroutinefunction(type(function).__call__)


def _refuse_what_has_no_body(function: object) -> None:
    name = getattr(function, "__qualname__", repr(function))
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(
            f"{name} is a generator function, whose body runs while its caller takes values: "
            "decorate the function that consumes it"
        )
    if inspect.isclass(function):
        raise ConfigurationError(f"{name} is a class: decorate its methods")
    if not callable(function):
        raise ConfigurationError(f"{name} cannot be called: decorate a function")


@contextmanager
def _outside() -> Iterator[None]:
    token = enter(None)
    try:
        yield
    finally:
        leave(token)
