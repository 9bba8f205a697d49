"""Where a transaction begins and ends around a body of code, on an event loop or in a thread.

The rules of api.md section 1 live here and in `GlobalTransaction`: returning commits, an exception
aborts and is raised unchanged, a nested body joins and dooms what it joined when it raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Token
from types import TracebackType
from typing import Any, Protocol, TypeVar

import msgspec

from coordinator import keys
from coordinator.context import enter, leave, refuse_on_a_running_loop, running
from coordinator.engine import Engine
from coordinator.errors import TransactionError
from coordinator.propagation import Place, Propagation, joined, place_of
from coordinator.transactional import GlobalTransaction, doomed_by

_T = TypeVar("_T")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How a body is to run: `timeout` in seconds, `key` None or an idempotency key."""

    timeout: float
    propagation: Propagation = Propagation.REQUIRED
    key: str | None = None
    what: str = "the block"
    """How messages name the body."""


class Scope:
    """`async with coordinator.transaction() as txn`: begins or joins, then ends what it began."""

    def __init__(self, engine: Callable[[], Engine], options: Options) -> None:
        self._engine = engine
        self._options = options
        self._transaction: GlobalTransaction | None = None
        self._token: Token[GlobalTransaction | None] | None = None
        self._timer: asyncio.Timeout | None = None

    async def __aenter__(self) -> GlobalTransaction:
        options = self._options
        place = place_of(options.propagation, options.what)
        outer = running()
        if outer is not None:
            outer.refuse_unless_of(options.what, blocking=False)
        engine = self._engine()
        if place is Place.JOINS:
            keys.refuse_to_join(options.key)
            self._transaction = joined(engine)
            return self._transaction
        transaction = await begin(engine, options, outer=outer, blocking=False)
        self._transaction = transaction
        self._token = enter(transaction)
        self._timer = asyncio.timeout_at(transaction.deadline)
        await self._timer.__aenter__()
        return transaction

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        transaction = _entered(self._transaction)
        if self._token is None or self._timer is None:  # joined: the outer scope ends it
            if error is not None:
                transaction.doom(doomed_by(error, transaction))
            return
        flushed: BaseException | None = None
        if error is None and not transaction.is_doomed:
            try:
                await transaction.hooks.run_before_commit()
            except BaseException as raised:
                error = flushed = raised
        leave(self._token)
        try:
            await self._timer.__aexit__(type(error) if error else None, error, None)
        except TimeoutError:
            transaction.expired = True
        try:
            await transaction.conclude(error)
        finally:
            await transaction.hooks.run_after_end(transaction.outcome)
        if flushed is not None:
            raise flushed


class Home(Protocol):
    """What a synchronous scope needs of the coordinator: its loop, its engine on that loop."""

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on the coordinator's loop and wait; opens the coordinator if need be."""

    def engine(self) -> Engine:
        """The engine; called on the loop."""


class BlockingScope:
    """`with coordinator.blocking.transaction() as txn`: the same for a thread without a loop."""

    def __init__(self, home: Home, options: Options) -> None:
        self._home = home
        self._options = options
        self._transaction: GlobalTransaction | None = None
        self._token: Token[GlobalTransaction | None] | None = None

    def __enter__(self) -> GlobalTransaction:
        options = self._options
        refuse_on_a_running_loop(options.what)
        place = place_of(options.propagation, options.what)
        outer = running()
        if outer is not None:
            outer.refuse_unless_of(options.what, blocking=True)
        if place is Place.JOINS:
            keys.refuse_to_join(options.key)
            self._transaction = joined(self._home.engine())
            return self._transaction
        transaction = self._transaction = self._home.run(self._begin(outer))
        self._token = enter(transaction)
        return transaction

    async def _begin(self, outer: GlobalTransaction | None) -> GlobalTransaction:
        engine = self._home.engine()
        transaction = await begin(engine, self._options, outer=outer, blocking=True)
        transaction.expire_at_the_deadline()
        return transaction

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        transaction = _entered(self._transaction)
        if self._token is None:
            if error is not None:
                transaction.doom(doomed_by(error, transaction))
            return
        flushed: BaseException | None = None
        if error is None and not transaction.is_doomed:
            try:
                transaction.hooks.run_before_commit_blocking()
            except BaseException as raised:
                error = flushed = raised
        leave(self._token)
        try:
            transaction.run(transaction.conclude(error))
        except KeyboardInterrupt as interrupted:
            transaction.note_outcome(interrupted)
            raise
        finally:
            transaction.hooks.run_after_end_blocking(transaction.outcome)
        if flushed is not None:
            raise flushed


async def begin(
    engine: Engine, options: Options, *, outer: GlobalTransaction | None, blocking: bool
) -> GlobalTransaction:
    """Begin on the engine's loop; under a key only when it is this call's turn."""
    if options.key is None:
        driver = engine.begin(options.timeout)
    else:
        driver = await keys.begin_under(engine, options.key, options.timeout)
    return GlobalTransaction(engine, driver, options.timeout, blocking=blocking, outer=outer)


def _entered(transaction: GlobalTransaction | None) -> GlobalTransaction:
    if transaction is None:
        raise TransactionError("the transaction was never entered")
    return transaction
