"""`coordinator.blocking`: the same verbs for synchronous callers.

There is one engine, on one event loop. Where the coordinator is open on a loop of another thread,
an application's for instance, that loop is used; else the first use opens it on a loop in a thread
of its own, and the end of the process closes it. So Flask, Django and scripts need no hook.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from coordinator.bridge import LoopThread, run_on
from coordinator.context import refuse_on_a_running_loop
from coordinator.engine import Engine
from coordinator.errors import ConfigurationError, TransactionError
from coordinator.model import Status
from coordinator.recovery import Round
from coordinator.scope import BlockingScope

if TYPE_CHECKING:
    from coordinator.coordinator import Coordinator

_T = TypeVar("_T")
F = TypeVar("F", bound=Callable[..., Any])


class BlockingCoordinator:
    """A coordinator's verbs for threads; made by `Coordinator`. Every thread may use it at once.

    Every verb raises `TransactionError` on a thread whose event loop runs, which it would stop.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._lock = threading.Lock()
        self._own: LoopThread | None = None
        self._process = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"{self._coordinator!r}.blocking"

    # Opening and closing.

    def __enter__(self) -> BlockingCoordinator:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def open(self) -> None:
        """Open now what the first use would open; see `Coordinator.open` for what it raises."""
        refuse_on_a_running_loop("coordinator.blocking.open()")
        with self._lock:
            self._closed = False
            if self._was_forked:
                self._own = None
            self._open_own()

    def close(self) -> None:
        """Let running second phases end and release everything. Harmless when closed.

        A coordinator that an event loop of somebody else has opened stays open there.
        """
        refuse_on_a_running_loop("coordinator.blocking.close()")
        with self._lock:
            self._closed = True
            own, self._own = (None if self._was_forked else self._own), None
            if own is None:
                return
            atexit.unregister(self.close)
            try:
                own.run(self._coordinator.close())
            finally:
                own.stop()

    def _loop(self) -> asyncio.AbstractEventLoop:
        """The loop on which the coordinator is open; opens it when it is not open at all."""
        open_on = self._coordinator.loop
        if open_on is not None:
            return open_on
        with self._lock:
            if self._closed:
                raise TransactionError(
                    "the coordinator was closed: open it again with coordinator.blocking.open()"
                )
            if self._was_forked:
                raise TransactionError(
                    "the coordinator was opened before a fork: the child process must open its "
                    "own, with coordinator.blocking.open()"
                )
            if self._coordinator.loop is None:
                self._open_own()
            own = self._own
        assert own is not None
        return own.loop

    @property
    def _was_forked(self) -> bool:
        return self._own is not None and self._process != os.getpid()

    def _open_own(self) -> None:
        if self._coordinator.loop is not None:
            return
        own = LoopThread("syncpoint")
        try:
            own.run(self._coordinator.open())
        except BaseException:
            own.stop()
            raise
        self._own, self._process = own, os.getpid()
        atexit.register(self.close)

    # The port `Home` of a synchronous scope.

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on the coordinator's loop and wait for it."""
        try:
            loop = self._loop()
        except BaseException:
            coroutine.close()
            raise
        return run_on(loop, coroutine)

    def engine(self) -> Engine:
        return self._coordinator.engine()

    # The verbs.

    def transaction(
        self,
        *,
        timeout: float | None = None,
        key: str | None = None,
        propagation: str = "required",
    ) -> BlockingScope:
        """`with coordinator.blocking.transaction() as txn:`; see `Coordinator.transaction`.

        At the deadline the body's connections are cut, since a thread cannot be cancelled.
        """
        return BlockingScope(self, self._coordinator.options(timeout, key, propagation))

    @overload
    def transactional(self, function: F, /) -> F: ...

    @overload
    def transactional(
        self,
        function: None = None,
        /,
        *,
        timeout: float | None = None,
        propagation: str = "required",
        attempts: int = 1,
        idempotency_key: Callable[..., str] | None = None,
        record_result: bool = False,
    ) -> Callable[[F], F]: ...

    def transactional(self, function: Any = None, /, **how: Any) -> Any:
        """As `Coordinator.transactional`, which knows an ordinary function by itself.

        Raises `ConfigurationError` for a coroutine function.
        """
        decorate = self._coordinator.transactional(**how)

        def checked(each: F) -> F:
            if asyncio.iscoroutinefunction(each):
                raise ConfigurationError(
                    f"{each.__qualname__} is a coroutine function: use @coordinator.transactional"
                )
            return decorate(each)

        return checked if function is None else checked(function)

    def status(self, transaction: str) -> Status:
        """What the log says of an id; see `Coordinator.status`."""
        return self._ask("status()", lambda: self._coordinator.status(transaction))

    def abort(self, transaction: str) -> Status:
        """Propose abort and answer what stands; see `Coordinator.abort`."""
        return self._ask("abort()", lambda: self._coordinator.abort(transaction))

    def recover(
        self, progress: Callable[[int, int], None] | None = None, *, dry_run: bool = False
    ) -> Round:
        """One round of the sweep, now; see `Coordinator.recover`."""
        return self._ask("recover()", lambda: self._coordinator.recover(progress, dry_run=dry_run))

    def _ask(self, verb: str, call: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        refuse_on_a_running_loop(f"coordinator.blocking.{verb}")
        return self.run(call())
