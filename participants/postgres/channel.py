"""The socket of one session on the event loop, registered once for all its exchanges.

psycopg's own wait registers the socket and a timer for every answer and takes both away again,
which costs the processor more than the exchange itself (docs/performance.md). Here the socket stays
registered as long as the loop alone uses the session, and one timer serves all sessions of a loop.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Any, TypeVar

import psycopg
from psycopg import waiting
from psycopg.abc import PQGen
from psycopg.pq.abc import PGconn

from participants.postgres import psycopg_private

_T = TypeVar("_T")
_WAIT_R = waiting.Wait.R
_READY_R = waiting.Ready.R
_READY_W = waiting.Ready.W
_NOBODYS = Context()
BUSY_SECONDS_MAX = 0.05
"""How long answers that are there already may keep the loop from everybody else."""


Done = Callable[[Any, BaseException | None], None]
"""Takes what an exchange returned, or what it raised."""


class Channel:
    """Runs exchanges over one session, one at a time, on the loop of the first of them.

    `detach` before anybody else waits for the socket, in a thread for instance, or closes it. Each
    exchange goes on in the context of who began it, and no context outlives its exchange.
    """

    __slots__ = (
        "_alarm",
        "_context",
        "_done",
        "_exchange",
        "_is_attached",
        "_line",
        "_loop",
        "_socket",
        "pgconn",
    )

    def __init__(self, pgconn: PGconn) -> None:
        self.pgconn = pgconn
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_attached = False
        self._socket = -1
        self._exchange: PQGen[Any] | None = None
        self._done: Done | None = None
        self._context = _NOBODYS
        self._alarm: _Alarm | None = None
        self._line: list[asyncio.Future[None]] = []

    async def run(self, exchange: PQGen[_T], seconds: float | None = None) -> _T:
        """Run an exchange, begun or not, to its end, for so many seconds at most.

        Raises what it raises, and `WaitTimeout` when the time is up. After that, and after a
        cancellation, it stands where it stood and may be run again. Waits for its turn, since
        several tasks may write to one COPY.
        """
        while self._exchange is not None:
            turn = asyncio.get_running_loop().create_future()
            self._line.append(turn)
            await turn
        try:
            wants = self._begin(exchange)
        except StopIteration as ended:
            await _let_others_run()
            result: _T = ended.value
            return result
        answer: asyncio.Future[_T] = asyncio.get_running_loop().create_future()

        def done(value: Any, error: BaseException | None) -> None:
            if answer.done():
                return
            if error is None:
                answer.set_result(value)
            else:
                answer.set_exception(error)

        self._await(exchange, wants, done, seconds)
        try:
            return await answer
        finally:
            if self._done is done:
                self._leave_off()

    def send(self, exchange: PQGen[Any], done: Done, seconds: float) -> None:
        """Begin an exchange, and have `done` called at its end or after so many seconds.

        It is called once, whatever happens, and never within this call. Nothing else may run here
        until then.
        """
        try:
            self._await(exchange, self._begin(exchange), done, seconds)
        except StopIteration as ended:
            asyncio.get_running_loop().call_soon(done, ended.value, None)
        except Exception as error:
            asyncio.get_running_loop().call_soon(done, None, error)

    def detach(self) -> None:
        """Leave the socket alone until the next exchange. Harmless when repeated.

        Whoever waits for an answer hears, soon, that there will be none.
        """
        done, loop, context = self._done, self._loop, self._context
        self._leave_off()
        if loop is None or loop.is_closed():
            return
        if self._is_attached:
            self._is_attached = False
            loop.remove_reader(self._socket)
            loop.remove_writer(self._socket)
        if done is not None:
            error = psycopg.OperationalError("the connection was given up")
            loop.call_soon(done, None, error, context=context)

    def give_up(self) -> None:
        """The time of the exchange that runs is up."""
        self._context.run(self._end, None, psycopg_private.WaitTimeout("no answer in time"))

    def _begin(self, exchange: PQGen[Any]) -> int:
        """Go on until it waits for the server; what can be written is, without asking the loop."""
        wants: int = next(exchange)
        while wants != _WAIT_R and _is_writable(self.pgconn.socket):
            wants = exchange.send(_READY_W)
        return wants

    def _await(self, exchange: PQGen[Any], wants: int, done: Done, seconds: float | None) -> None:
        loop, alarm = self._attached()
        self._exchange, self._done, self._context = exchange, done, copy_context()
        if seconds is not None:
            alarm.set(self, loop.time() + seconds)
        if wants != _WAIT_R:
            Context().run(loop.add_writer, self._socket, self._writable)

    def _leave_off(self) -> None:
        if self._exchange is not None and self._alarm is not None:
            self._alarm.clear(self)
        self._exchange = self._done = None
        self._context = _NOBODYS
        while self._line:
            turn = self._line.pop(0)
            if not turn.done():
                turn.set_result(None)

    def _end(self, value: Any, error: BaseException | None) -> None:
        done = self._done
        self._leave_off()
        if done is not None:
            done(value, error)

    def _attached(self) -> tuple[asyncio.AbstractEventLoop, _Alarm]:
        running = asyncio.get_running_loop()
        loop, alarm = self._loop, self._alarm
        if loop is None or alarm is None:
            loop, alarm = self._loop, self._alarm = running, _alarm_of(running)
        if loop is not running:
            raise psycopg.InterfaceError("the connection belongs to another event loop")
        if not self._is_attached:
            self._socket = self.pgconn.socket
            try:
                Context().run(loop.add_reader, self._socket, self._readable)
            except OSError as error:
                raise psycopg.OperationalError("connection socket closed") from error
            self._is_attached = True
        return loop, alarm

    def _readable(self) -> None:
        if self._exchange is None:
            # A notice that nobody asked for, or the end of the session: the next exchange sees it.
            self.detach()
        else:
            self._context.run(self._go_on, self._exchange, _READY_R)

    def _writable(self) -> None:
        """Large statements, COPY and pipelines have more to send than the socket takes at once."""
        assert self._loop is not None
        self._loop.remove_writer(self._socket)
        if self._exchange is not None:
            self._context.run(self._go_on, self._exchange, _READY_W)

    def _go_on(self, exchange: PQGen[Any], ready: Any) -> None:
        try:
            wants = exchange.send(ready)
        except StopIteration as ended:
            self._end(ended.value, None)
        except BaseException as error:
            self._end(None, error)
        else:
            if wants != _WAIT_R:
                assert self._loop is not None
                Context().run(self._loop.add_writer, self._socket, self._writable)


class _Alarm:
    """Tells channels when their time is up, by one timer for all of a loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._call_at = loop.call_at
        self._now = loop.time
        self._until: dict[Channel, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def set(self, channel: Channel, until: float) -> None:
        self._until[channel] = until
        if self._timer is None or until < self._timer.when():
            self._arm(until)

    def clear(self, channel: Channel) -> None:
        """The timer stays: it finds nobody, or those who came after."""
        self._until.pop(channel, None)

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._call_at(when, self._ring, context=Context())

    def _ring(self) -> None:
        self._timer = None
        now = self._now()
        late = [channel for channel, until in self._until.items() if until <= now]
        for channel in late:
            self.clear(channel)
        if self._until:
            self._arm(min(self._until.values()))
        for channel in late:
            channel.give_up()


_alarms: dict[asyncio.AbstractEventLoop, _Alarm] = {}
_last_pause = 0.0


def _alarm_of(loop: asyncio.AbstractEventLoop) -> _Alarm:
    alarm = _alarms.get(loop)
    if alarm is None:
        for each in list(_alarms):
            if each.is_closed():
                _alarms.pop(each, None)
        alarm = _alarms[loop] = _Alarm(loop)
    return alarm


def _is_writable(socket: int) -> bool:
    poll = select.poll()
    poll.register(socket, select.POLLOUT)
    return bool(poll.poll(0))


async def _let_others_run() -> None:
    """Suspend once in a while: a stream of answers that are there already never does by itself."""
    global _last_pause
    now = asyncio.get_running_loop().time()
    if now - _last_pause >= BUSY_SECONDS_MAX:
        _last_pause = now
        await asyncio.sleep(0)
