"""Where a process of the crash tests meets its fate: seams around effects, statements and the log.

They are installed in a process that was forked for one case, and never taken out again.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
from collections.abc import Callable
from typing import Any, NoReturn
from urllib.parse import urlsplit

import psycopg

from coordinator import failpoint
from coordinator.errors import LogUnavailable
from coordinator.log.base import Answer, Proposal
from coordinator.log.sqlite import SQLiteLog, writer
from coordinator.log.sqlite.store import Store
from coordinator.model import Branch, Ending, TransactionId
from participants.postgres import PostgreSQL
from participants.postgres.connection import ServerConnection
from participants.postgres.replies import Reply

ON_THE_WIRE = {
    "PREPARE": b"PREPARE TRANSACTION",
    "EXAMINE": b"syncpoint.branch', true",
    "COMMIT PREPARED": b"COMMIT PREPARED",
    "ROLLBACK PREPARED": b"ROLLBACK PREPARED",
    "COMMIT": b"COMMIT\0",
    "ROLLBACK": b"ROLLBACK\0",
    "FATE": b"pg_xact_status",
}
"""The statements of the protocol by what only their messages hold, and earlier ones of a message do
not count: a branch that has certainly written is examined and prepared in one."""


class Wire:
    """The process's end of its socket to the test: lines of words, both ways."""

    def __init__(self, connection: socket.socket) -> None:
        self.descriptor = connection.fileno()
        self._connection = connection
        self._lines = connection.makefile("r")

    def say(self, *words: object) -> None:
        self._connection.sendall((" ".join(map(str, words)) + "\n").encode())

    def wait(self) -> None:
        """Until the test says a word."""
        self._lines.readline()


class Fate:
    """What happens at the n-th time that a point is reached; once."""

    def __init__(self, point: str, occurrence: int, kind: str, wire: Wire) -> None:
        self.point = point
        self._left = occurrence
        self.kind = kind
        self.wire = wire
        self.is_over = False

    def reach(self, point: str) -> None:
        """Be killed there, or wait there until told to go on."""
        if self.is_due(point):
            self.meet()

    def is_due(self, point: str) -> bool:
        if point != self.point:
            return False
        self._left -= 1
        return self._left == 0

    def meet(self) -> None:
        self.wire.say("reached")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self.wire.wait()
        self.is_over = True


def install(fate: Fate, urls: dict[str, str]) -> None:
    """Set the seam that the fate's point is at. `urls` are the databases by participant."""
    point = fate.point
    effect, _, when = point.partition(":")
    if " " in effect:
        _around_statements(fate, urls)
    elif when in ("written", "durable"):
        _inside_the_log(fate, effect, when)
    elif when:
        failpoint.install(fate.reach)
    else:
        _around_the_log(fate, effect)


def roll_back_by_hand_then(fate: Fate, url: str) -> None:
    """Somebody ends the branch in that database by hand when the commit stands."""

    def handler(point: str) -> None:
        if point == "decide:after":
            with psycopg.connect(url, autocommit=True) as connection:
                ((gid,),) = connection.execute(
                    "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
                ).fetchall()
                connection.execute(f"ROLLBACK PREPARED '{gid}'".encode())
        fate.reach(point)

    failpoint.install(handler)


def hold_decisions_and_commits() -> set[TransactionId]:
    """Every other decision is never sent; the other half is recorded, and no commit is sent.

    Returns those that wait for ever, filled as they come.
    """
    propose = SQLiteLog.propose
    waiting: set[TransactionId] = set()
    count = itertools.count()

    async def hold(transaction: TransactionId) -> NoReturn:
        waiting.add(transaction)
        await asyncio.Event().wait()
        raise AssertionError

    async def every_other(self: SQLiteLog, proposal: Proposal) -> Answer:
        if next(count) % 2:
            await hold(proposal.transaction)
        return await propose(self, proposal)

    async def never(self: PostgreSQL, branch: Branch) -> Ending:
        return await hold(branch.xid.transaction)

    SQLiteLog.propose = every_other  # type: ignore[method-assign]
    PostgreSQL.commit = never  # type: ignore[method-assign]
    PostgreSQL.commit_at_once = lambda self, branch: None  # type: ignore[method-assign]
    return waiting


def _around_statements(fate: Fate, urls: dict[str, str]) -> None:
    send = ServerConnection.send
    names = {urlsplit(url).path.lstrip("/"): participant for participant, url in urls.items()}

    def watched(
        self: ServerConnection,
        statement: bytes,
        answered: Callable[[Reply], None],
        seconds: float,
    ) -> None:
        where = f"{names[self.greeting.database]} {_verb(statement)}"
        if fate.is_due(f"{where}:sent"):
            self.pgconn.send_query(statement)
            self.pgconn.flush()
            fate.meet()

        def then(reply: Reply) -> None:
            fate.reach(f"{where}:answered")
            answered(reply)

        send(self, statement, then, seconds)

    ServerConnection.send = watched  # type: ignore[method-assign]


def _verb(statement: bytes) -> str:
    """What a statement is, or the last of several in one message."""
    message = statement + b"\0"
    found = [verb for verb, part in ON_THE_WIRE.items() if part in message]
    return found[0] if found else ""


def _inside_the_log(fate: Fate, effect: str, when: str) -> None:
    """Between a write and its COMMIT, or between that and the answer."""
    name = {"decide": "propose", "forget": "finish"}[effect]
    write, at_once, deliver = getattr(Store, name), Store.record_at_once, writer.deliver
    wrote = False

    def written(self: Store, work: Any) -> Any:
        nonlocal wrote
        outcome = write(self, work)
        wrote = True
        fate.reach(f"{effect}:written")
        return outcome

    def written_at_once(self: Store, proposals: Any) -> bool:
        """One statement is its own transaction: it is split here, to stop before its COMMIT."""
        nonlocal wrote
        self._connection.execute("BEGIN IMMEDIATE")
        done = at_once(self, proposals)
        if done:
            wrote = True
            fate.reach(f"{effect}:written")
        self._connection.execute("COMMIT" if done else "ROLLBACK")
        return done

    def durable(*outcomes: Any) -> None:
        if wrote:
            fate.reach(f"{effect}:durable")
        deliver(*outcomes)

    setattr(Store, name, written)
    if effect == "decide":
        Store.record_at_once = written_at_once  # type: ignore[method-assign]
    if when == "durable":
        vars(writer)["deliver"] = durable


def _around_the_log(fate: Fate, effect: str) -> None:
    """The log fails once, after it has written (`lose`) or before."""
    name = {"decide": "propose", "forget": "finish"}[effect]
    write: Callable[..., Any] = getattr(SQLiteLog, name)

    async def failing(self: SQLiteLog, work: Any) -> Any:
        if not fate.is_due(effect):
            return await write(self, work)
        if fate.kind == "lose":
            await write(self, work)
        fate.wire.say("reached")
        fate.is_over = True
        return _unavailable()

    setattr(SQLiteLog, name, failing)


def _unavailable() -> NoReturn:
    raise LogUnavailable("the log did not answer: so the test wants it")
