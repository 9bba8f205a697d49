"""A transfer between two real databases with something disturbing in it, on every face.

What happens is written as steps, which are taken in the same way by an asynchronous connection or
session, by a synchronous one, and by connections that were made elsewhere and enlisted.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

import psycopg
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from coordinator.bridge import LoopThread
from coordinator.errors import OutcomeUnknown, TransactionError
from participants.postgres import PostgreSQL
from tests.support.bank import GIVE, TAKE, Bank, wait_until
from tests.support.proxy import Fault, Proxy

FACES = ("connection", "session", "enlisted", "blocking", "blocking session", "blocking enlisted")
COMMITTED, ABORTED, UNKNOWN = "committed", "aborted", "unknown"
TIMEOUT = 15.0


class Step(NamedTuple):
    """`do` it in the database of that number: 0 for accounts, 1 for the ledger."""

    do: str
    where: int
    what: str = ""


def transfer() -> list[Step]:
    return [Step("execute", 0, TAKE), Step("execute", 1, GIVE)]


class Disturbed:
    """A bank whose two databases are reached through proxies, which run in a thread of their own.

    `told` is what the caller was told by the last `run`, and `error` with which exception.
    """

    def __init__(self, direct: tuple[str, str], ports: tuple[int, int]) -> None:
        self._thread = LoopThread("proxies")
        self.proxies = tuple(self._thread.run(_open(port)) for port in ports)
        self._through = tuple(
            proxy.url(url) for proxy, url in zip(self.proxies, direct, strict=True)
        )
        self.bank = Bank(direct, self._through)
        self.told = ""
        self.error: Exception | None = None
        self._held: list[Any] = []
        self._cursor: Any = SimpleNamespace()

    def close(self) -> None:
        for proxy in self.proxies:
            self._thread.run(proxy.__aexit__(None, None, None))
        self._thread.stop()

    def on(self, where: int, request: bytes, fault: Fault) -> None:
        self.proxies[where].on(request, fault)

    def run(self, face: str, steps: Sequence[Step]) -> None:
        """Take the steps in one transaction and note what the caller is told of it."""
        self.told, self.error = COMMITTED, None
        try:
            if face.startswith("blocking"):
                self._run_blocking(face, steps)
            else:
                asyncio.run(self._run_async(face, steps))
        finally:
            self._held.clear()
            self._cursor._closed = True  # psycopg would warn that it was not closed in time

    def _run_blocking(self, face: str, steps: Sequence[Step]) -> None:
        blocking = self.bank.coordinator.blocking
        try:
            blocking.open()
            with (
                self._told(),
                self._made_elsewhere(face) as mine,
                blocking.transaction(timeout=TIMEOUT),
            ):
                used = [
                    self._use_blocking(face, participant, own)
                    for participant, own in zip(self._participants, mine, strict=True)
                ]
                for step in steps:
                    _not_awaited(self._take(step, used[step.where]))
            wait_until(self.bank.nothing_is_prepared)
        finally:
            blocking.close()

    async def _run_async(self, face: str, steps: Sequence[Step]) -> None:
        async with self.bank.coordinator:
            connections = [
                await psycopg.AsyncConnection.connect(url) if face == "enlisted" else None
                for url in self._through
            ]
            with self._told():
                async with self.bank.coordinator.transaction(timeout=TIMEOUT):
                    used = [
                        await self._use(face, participant, own)
                        for participant, own in zip(self._participants, connections, strict=True)
                    ]
                    for step in steps:
                        taken = self._take(step, used[step.where])
                        if inspect.isawaitable(taken):
                            await taken
            await asyncio.to_thread(wait_until, self.bank.nothing_is_prepared)
            for own in connections:
                if own is not None:
                    await own.close()

    @property
    def _participants(self) -> tuple[PostgreSQL, PostgreSQL]:
        return self.bank.accounts, self.bank.ledger

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OutcomeUnknown as error:
            self.told, self.error = UNKNOWN, error
        except Exception as error:
            self.told, self.error = ABORTED, error

    @contextmanager
    def _made_elsewhere(self, face: str) -> Iterator[list[Any]]:
        made = [
            psycopg.connect(url) if face == "blocking enlisted" else None for url in self._through
        ]
        try:
            yield made
        finally:
            for each in made:
                if each is not None:
                    each.close()

    async def _use(self, face: str, participant: PostgreSQL, own: Any) -> Any:
        if face == "session":
            return await participant.session()
        if own is not None:
            await participant.enlist(own)
            return own
        return await participant.connection()

    def _use_blocking(self, face: str, participant: PostgreSQL, own: Any) -> Any:
        if face == "blocking session":
            return participant.blocking.session()
        if own is not None:
            participant.blocking.enlist(own)
            return own
        return participant.blocking.connection()

    def _take(self, step: Step, used: Any) -> Awaitable[object] | object:
        """One step on a connection or session of either kind; awaitable on an asynchronous one."""
        is_psycopg = isinstance(used, psycopg.BaseConnection)
        match step.do:
            case "execute":
                return used.execute(step.what.encode() if is_psycopg else text(step.what))
            case "fail":
                return _expecting((psycopg.Error, DBAPIError), used, step, is_psycopg)
            case "verb":
                return _expecting((TransactionError,), used, step, is_psycopg)
            case "cut":
                self._thread.run(_cut(self.proxies[step.where]))
                return None
        return self._leave_open(step, used)

    def _leave_open(self, step: Step, used: Any) -> Awaitable[object] | object:
        if step.what == "cursor":
            self._cursor = used.cursor("left_open")
            return self._cursor.execute("SELECT generate_series(1, 1000)")
        opened: Any = {
            "copy": lambda: used.cursor().copy("COPY entry (note) FROM STDIN"),
            "pipeline": used.pipeline,
            "stream": lambda: used.cursor().stream("SELECT generate_series(1, 10000)"),
        }[step.what]()
        self._held.append(opened)
        if step.what == "stream":
            return opened.__anext__() if hasattr(opened, "__anext__") else next(opened)
        return opened.__aenter__() if hasattr(opened, "__aenter__") else opened.__enter__()


def _expecting(
    errors: tuple[type[Exception], ...], used: Any, step: Step, is_psycopg: bool
) -> Awaitable[object] | object:
    """A call that fails, and whose error the user swallows."""

    def call() -> Any:
        if step.do == "verb":
            return getattr(used, step.what)()
        return used.execute(step.what.encode() if is_psycopg else text(step.what))

    async def swallow(pending: Awaitable[object]) -> None:
        with suppress(*errors):
            await pending
            raise AssertionError(f"{step} did not fail")

    with suppress(*errors):
        pending = call()
        if inspect.isawaitable(pending):
            return swallow(pending)
        raise AssertionError(f"{step} did not fail")
    return None


def _not_awaited(result: object) -> None:
    assert not inspect.isawaitable(result)


async def _open(port: int) -> Proxy:
    return await Proxy(port).__aenter__()


async def _cut(proxy: Proxy) -> None:
    proxy.cut()
