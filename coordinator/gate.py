"""How many transactions are let into the databases at once.

More at once than keep this process busy only wait for each other, with their locks and connections
held. By Little's law so many are enough as the time of a statement is longer than the processor's
time that this process spends on one, and twice as many where times vary (the gain of TCP BBR): 8 do
for a database next door, some 100 for one that is 20 ms away. A queue of our own making must not
ask for more of itself. So the time that counts is the least that was seen lately, as in TCP Vegas
and Netflix's concurrency-limits, and while this process is busy the limit does not rise.

Nobody who was let in ever waits here again, and no more are inside than the smallest pool has
connections: transactions that cross pools in different orders cannot wait for each other. One that
is begun inside another one uses the token of the outer and asks for none.

A body that waits for something else keeps its connections but, after a while, not its place: the
place is *lent*. When the body works again it counts again, at once, since it may hold row locks
that others wait for; until somebody leaves there is then one more than the limit.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

PATIENCE_LEAST = 0.005
PATIENCE_MOST = 0.5
PATIENCE_STATEMENTS = 4
"""A place is lent after the time of so many statements, within these bounds in seconds."""

WINDOW_STATEMENTS = 1000
"""After so many statements their number, the least of their times and our work count anew."""

HEADROOM = 2
BUSY_SHARE = 0.75
"""Of the time between two such looks: a process that works for longer needs no more at once."""

_MEAN_OVER = 64
_HOLDERS_SHOWN = 5

_T = TypeVar("_T")


class Line(Generic[_T]):
    """Who waits, first come first served, each until a time of its own.

    `undo` takes back what was given to one that was cancelled in the moment of being served.
    """

    def __init__(self, undo: Callable[[_T], None]) -> None:
        self._undo = undo
        self._turns: dict[asyncio.Future[None], _T] = {}

    def __bool__(self) -> bool:
        return bool(self._turns)

    async def wait(self, item: _T, until: float, refusal: Callable[[], str]) -> None:
        """Return once `serve` returned `item`; `TimeoutError(refusal())` at `until`.

        `until` is in seconds of the loop's clock. Whatever is raised, the item is not served.
        """
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._turns[turn] = item
        alarm = loop.call_at(until, self._refuse, turn, refusal)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._undo(item)
            raise
        finally:
            alarm.cancel()
            self._turns.pop(turn, None)

    def serve(self) -> _T | None:
        """End the wait of the first and return its item; None when nobody waits."""
        while self._turns:
            turn = next(iter(self._turns))
            item = self._turns.pop(turn)
            if not turn.done():
                turn.set_result(None)
                return item
        return None

    def refuse_all(self, reason: str) -> None:
        """End every wait with `TimeoutError(reason)`."""
        for turn in list(self._turns):
            self._refuse(turn, lambda: reason)

    def _refuse(self, turn: asyncio.Future[None], refusal: Callable[[], str]) -> None:
        if not turn.done():
            turn.set_exception(TimeoutError(refusal()))


class Token:
    """A transaction's right to be in the databases, from before its first connection to its end.

    The owner says `busy()` before and `idle()` after each statement, in pairs that may overlap, and
    from any thread; everything else happens on the gate's event loop.
    """

    __slots__ = ("_gate", "_lent", "_running", "_since", "entered", "name")

    def __init__(self, gate: Gate, name: str) -> None:
        self.name = name
        self.entered = 0.0
        """When it was let in, in seconds of the loop's clock."""
        self._gate = gate
        self._lent = False
        self._running = 0
        self._since = 0.0

    def busy(self) -> None:
        """A statement begins. Never waits: a place that was lent is simply taken again."""
        if not self._running:
            self._since = self._gate.clock()
            if self._lent:
                self._gate._lend(self, False)
        self._running += 1

    def idle(self) -> None:
        """A statement has ended, however it did."""
        self._running -= 1
        if not self._running:
            now = self._gate.clock()
            self._gate._measured(now - self._since)
            self._since = now

    def leave(self) -> None:
        """The transaction has ended everywhere: let the next one in. Harmless when repeated."""
        self._gate._leave(self)


class Gate:
    """Lets transactions in, first come first served, on the event loop it was made on.

    `limit` are let in at once on a database that is near, more on one that is far. `most` is the
    size of the smallest pool, which bounds them all, those whose place is lent as well. It may be
    set anew at any time. `work_clock` tells the processor's time of this process, in seconds.
    """

    def __init__(
        self, limit: int = 8, *, most: int, work_clock: Callable[[], float] = time.process_time
    ) -> None:
        loop = asyncio.get_running_loop()
        self.most = most
        self.clock = loop.time
        self._call_at = loop.call_at
        self._least = limit
        self._wanted = limit
        self._holders: dict[Token, None] = {}
        self._counted = 0
        self._lock = threading.Lock()  # threads say busy and idle for themselves
        self._line: Line[Token] = Line(undo=self._leave)
        self._timer: asyncio.TimerHandle | None = None
        self._mean = 0.0
        self._least_seconds = 0.0
        self._window_least = math.inf
        self._window = 0
        self._work_clock = work_clock
        self._work_began = work_clock()
        self._window_began = self.clock()
        self._work_seconds = math.inf

    @property
    def limit(self) -> int:
        """How many are let in just now, without those whose place is lent."""
        return max(1, min(max(self._least, self._wanted), self.most))

    @property
    def patience(self) -> float:
        """After how many seconds without a statement a place is lent, if others wait."""
        return min(max(PATIENCE_LEAST, PATIENCE_STATEMENTS * self._mean), PATIENCE_MOST)

    def holders(self) -> list[tuple[str, float]]:
        """Who is inside and for how many seconds, oldest first."""
        now = self.clock()
        return [(token.name, now - token.entered) for token in self._holders]

    def try_enter(self, name: str) -> Token | None:
        """A token if there is room that nobody waits for; never waits itself."""
        self._admit()
        if not self._has_room:
            return None
        token = Token(self, name)
        self._let_in(token)
        return token

    async def enter(self, name: str, until: float) -> Token:
        """A token, when it is this one's turn; without suspending if there is room.

        `until` is in seconds of the loop's clock: then `TimeoutError` is raised, naming who is
        inside. Nothing is held in that case, so that trying again later is safe.
        """
        token = self.try_enter(name)
        if token is not None:
            return token
        token = Token(self, name)
        began = self.clock()
        if self._timer is None:
            self._timer = self._call_at(began, self._look)
        await self._line.wait(token, until, lambda: self._refusal(began))
        return token

    @property
    def _has_room(self) -> bool:
        return self._counted < self.limit and len(self._holders) < max(1, self.most)

    def _let_in(self, token: Token) -> None:
        token.entered = token._since = self.clock()
        self._holders[token] = None
        self._count(1)

    def _admit(self) -> None:
        while self._has_room and (token := self._line.serve()) is not None:
            self._let_in(token)

    def _leave(self, token: Token) -> None:
        if token not in self._holders:
            return
        del self._holders[token]
        self._lend(token, False)
        self._count(-1)
        self._admit()

    def _lend(self, token: Token, lent: bool) -> None:
        with self._lock:
            if token._lent is not lent:
                token._lent = lent
                self._counted += -1 if lent else 1

    def _count(self, by: int) -> None:
        with self._lock:
            self._counted += by

    def _look(self) -> None:
        """While somebody waits: lend the places of bodies that do not work, and look again."""
        self._timer = None
        now = self.clock()
        self._admit()
        for token in sorted(self._holders, key=lambda token: token._since):
            if not self._line:
                break
            if not token._lent and not token._running and now - token._since >= self.patience:
                self._lend(token, True)
                self._admit()
        if self._line:
            self._timer = self._call_at(now + self.patience, self._look)

    def _measured(self, seconds: float) -> None:
        self._mean += (seconds - self._mean) / _MEAN_OVER
        self._window_least = min(self._window_least, seconds)
        self._window += 1
        if self._window == WINDOW_STATEMENTS:
            self._end_window()
        elif seconds < self._least_seconds:
            self._least_seconds = seconds
            self._wanted = min(self._wanted, self._enough)

    def _end_window(self) -> None:
        now, work_now = self.clock(), self._work_clock()
        worked = work_now - self._work_began
        self._work_seconds = max(worked / self._window, 1e-6)
        self._least_seconds = self._window_least
        busy = worked > BUSY_SHARE * (now - self._window_began)
        self._wanted = min(self._wanted, self._enough) if busy else self._enough
        self._window_began, self._work_began = now, work_now
        self._window, self._window_least = 0, math.inf

    @property
    def _enough(self) -> int:
        return math.ceil(HEADROOM * self._least_seconds / self._work_seconds)

    def _refusal(self, began: float) -> str:
        return (
            f"no turn at the databases within {self.clock() - began:.3g} s: "
            f"{self.limit} transactions are let in at once, and inside are "
            f"{describe(self.holders())}"
        )


def describe(holders: Sequence[tuple[str, float]]) -> str:
    """The first of them, with the seconds they have held, for a message to people."""
    shown = ", ".join(f"{name} for {age:.3g} s" for name, age in holders[:_HOLDERS_SHOWN])
    more = len(holders) - _HOLDERS_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown or "nobody"
