"""A bounded set of server connections, opened when needed and reused last in, first out.

It has no workers and no timers: who waits is woken in turn by who releases, a wait ends at the
caller's deadline, and a connection that is not clean is closed instead of being reused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from coordinator.gate import Line
from participants.postgres.connection import ServerConnection

CLOSED = "the pool is closed"

Open = Callable[[], Awaitable[ServerConnection]]


class Pool:
    """At most `size` connections at a time, on one event loop, and those for nested work."""

    login_role = b"RESET ROLE"

    def __init__(self, open_connection: Open, size: int) -> None:
        self.size = size
        self._open_connection = open_connection
        self._idle: list[ServerConnection] = []
        self._slots = size
        self._beyond: set[ServerConnection] = set()
        self._line: Line[str] = Line(undo=lambda _: self._give_slot())
        self._closed = False

    async def acquire(self, until: float, *, nested: bool = False) -> ServerConnection:
        """An idle connection, which may turn out to be dead, or a new one.

        Raises `TimeoutError` when none was free `until` then, in seconds of the loop's clock, and
        what opening one raises. A `nested` one never waits for others, who may wait for its caller:
        if need be it is one beyond the size, and closed when it is released.
        """
        if nested and self._must_queue and not self._closed:
            async with asyncio.timeout_at(until):
                connection = await self._open_connection()
            self._beyond.add(connection)
            return connection
        await self._take_slot(until)
        if self._idle:
            return self._idle.pop()
        try:
            async with asyncio.timeout_at(until):
                return await self._open_connection()
        except BaseException:
            self._give_slot()
            raise

    @property
    def has_idle(self) -> bool:
        """`acquire_idle` would return one this very moment."""
        return bool(self._idle) and not self._must_queue

    def acquire_idle(self) -> ServerConnection | None:
        """An idle connection if there is one this very moment; never waits, never opens."""
        if not self.has_idle:
            return None
        self._slots -= 1
        return self._idle.pop()

    def adopt(self, connection: ServerConnection) -> None:
        """Take in an idle connection that was opened elsewhere."""
        self._idle.append(connection)

    async def replace(self, dead: ServerConnection) -> ServerConnection:
        """A new connection in the place of a dead one; all idle ones are as old and are closed.

        Raises what opening one raises; `dead` is then still to be released.
        """
        dead.close()
        self._close_idle()
        fresh = await self._open_connection()
        if dead in self._beyond:
            self._beyond.remove(dead)
            self._beyond.add(fresh)
        return fresh

    def release(self, connection: ServerConnection) -> None:
        """Give it back: it is kept if it is clean, else closed.

        When it was found dead the idle ones, which are as old, are closed as well.
        """
        if connection.found_dead:
            self._close_idle()
        if connection in self._beyond:
            self._beyond.remove(connection)
            connection.close()
            return
        if connection.is_clean and not self._closed:
            self._idle.append(connection)
        else:
            connection.close()
        self._give_slot()

    def close(self) -> None:
        """Close the idle ones now, the others as they are released; who waits is refused."""
        self._closed = True
        self._close_idle()
        self._line.refuse_all(CLOSED)

    @property
    def _must_queue(self) -> bool:
        return not self._slots or bool(self._line)

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _take_slot(self, until: float) -> None:
        if self._closed:
            raise TimeoutError(CLOSED)
        if self._must_queue:
            await self._line.wait("a slot", until, lambda: "no connection came free")
        else:
            self._slots -= 1

    def _give_slot(self) -> None:
        if self._line.serve() is None:
            self._slots += 1
