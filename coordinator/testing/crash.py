"""`crash_at`: a coordinator stops dead at a named point, inside one process.

What is the same as with `kill -9`: nothing more is sent, to participants or to the log; marks that
were not written are lost; connections break; the member is gone; whoever waits never hears. What is
different: the code of the test lives on, and gets `Crashed` where it waited.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import Future
from types import TracebackType
from typing import Any, NoReturn

from coordinator import failpoint
from coordinator.bridge import run_on
from coordinator.context import refuse_on_a_running_loop
from coordinator.coordinator import Coordinator
from coordinator.driver import _EFFECTS, Driver
from coordinator.engine import Engine
from coordinator.errors import ConfigurationError

POINTS = tuple(
    f"{effect}:{when}"
    for effect in (*(effect for effect, _ in _EFFECTS.values()), "forget")
    for when in ("before", "after")
)
"""Every point at which a coordinator can crash: before and after each effect."""

PATIENCE_SECONDS = 5.0
"""How long the end of the block waits for a point that has not been reached yet."""


class Crashed(BaseException):
    """The coordinator was ended by `crash_at`, which also catches this: let it pass."""


def crash_at(coordinator: Coordinator, point: str, *, occurrence: int = 1) -> Crash:
    """Have the coordinator stop dead when it reaches `point` for the `occurrence`-th time.

    `async with crash_at(...)`, or `with` for synchronous functions. The block ends there, or waits
    at its end for what goes on in the background. Afterwards the coordinator is closed; open it
    again, or another one on the same log, for the restart. Raises `AssertionError` if the point was
    not reached, `ConfigurationError` for one that is not in `POINTS`.
    """
    if point not in POINTS:
        raise ConfigurationError(f"there is no point {point!r}: there are {', '.join(POINTS)}")
    return Crash(coordinator, point, occurrence)


class Crash:
    """What `crash_at` returns; `happened` tells whether the coordinator is gone already."""

    def __init__(self, coordinator: Coordinator, point: str, occurrence: int) -> None:
        self._coordinator = coordinator
        self._point = point
        self._occurrence = occurrence
        self._reached: Counter[str] = Counter()
        self._burial: asyncio.Task[None] | None = None
        self._buried: Future[None] = Future()

    @property
    def happened(self) -> bool:
        return self._burial is not None

    async def __aenter__(self) -> Crash:
        failpoint.install(self._reach)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        try:
            if self.happened or error is None:
                async with asyncio.timeout(self._patience):
                    await asyncio.wrap_future(self._buried)
        except TimeoutError:
            raise self._not_reached() from None
        finally:
            failpoint.install(None)
        if self.happened:
            await self._coordinator.close()
        return _is_crash(error)

    def __enter__(self) -> Crash:
        refuse_on_a_running_loop("`with crash_at()`", hint="use `async with`")
        failpoint.install(self._reach)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        try:
            if self.happened or error is None:
                self._buried.result(self._patience)
        except TimeoutError:
            raise self._not_reached() from None
        finally:
            failpoint.install(None)
        if self.happened:
            loop = self._coordinator.loop
            self._coordinator.blocking.close()
            if self._coordinator.loop is not None and loop is not None:
                run_on(loop, self._coordinator.close())  # an application's loop had it open
        return _is_crash(error)

    @property
    def _patience(self) -> float | None:
        return None if self.happened else PATIENCE_SECONDS

    def _not_reached(self) -> AssertionError:
        reached = ", ".join(f"{point} {n}x" for point, n in self._reached.items()) or "none"
        return AssertionError(
            f"{self._point} was not reached {self._occurrence}x in the block; reached were: "
            f"{reached}"
        )

    def _reach(self, point: str) -> None:
        engine = self._coordinator._engine
        if engine is None or self.happened:
            return
        if failpoint.owner not in (engine, *engine.drivers.values()):
            return  # another coordinator of this process
        doomed = self._tasks(engine)
        self._reached[point] += 1
        if point == self._point and self._reached[point] == self._occurrence:
            _stop_dead(engine)
            self._burial = asyncio.get_running_loop().create_task(self._bury(engine, doomed))
            raise asyncio.CancelledError

    def _tasks(self, engine: Engine) -> set[asyncio.Task[Any]]:
        tasks = {task for driver in engine.drivers.values() for task in driver._tasks}
        tasks.update(engine._background)
        if self._coordinator._sweep is not None:
            tasks.add(self._coordinator._sweep)
        return tasks

    async def _bury(self, engine: Engine, doomed: set[asyncio.Task[Any]]) -> None:
        """What the operating system does for a dead process: its sockets and locks go."""
        for task in doomed:
            task.cancel()
        await asyncio.gather(*doomed, return_exceptions=True)
        await engine.members.leave()
        await self._coordinator._release()
        self._buried.set_result(None)


def _stop_dead(engine: Engine) -> None:
    """From here on nothing that has the engine gets through to anybody."""

    def gone(*args: object, **kwargs: object) -> NoReturn:
        raise Crashed("the coordinator was ended by the test")

    async def nothing() -> None:
        """It cannot end its work in an orderly way any more."""

    for driver in list(engine.drivers.values()):
        driver.post = gone  # type: ignore[method-assign]
        driver.abandon()
        _wake(driver)
    for waiter in engine.gate._line._turns:
        _fail(waiter)
    engine.drivers.clear()
    engine.draw = gone  # type: ignore[method-assign]
    engine.stop = nothing  # type: ignore[method-assign]
    engine.log = engine.participants = _Gone(gone)  # type: ignore[assignment]


def _wake(driver: Driver) -> None:
    for waiter in driver._decided_waiters + driver._ended_waiters:
        _fail(waiter)


def _fail(waiter: asyncio.Future[Any]) -> None:
    if not waiter.done():
        waiter.set_exception(Crashed("the coordinator was ended by the test"))


class _Gone:
    """Stands where the log and the participants were."""

    def __init__(self, gone: Any) -> None:
        self._gone = gone

    def __getattr__(self, name: str) -> NoReturn:
        self._gone()
        raise AssertionError


def _is_crash(error: BaseException | None) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.split(Crashed)[1] is None
    return isinstance(error, Crashed)
