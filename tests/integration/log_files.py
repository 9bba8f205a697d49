"""Files of logs, made and looked into, and processes that are killed at every step of a work."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import apsw

from coordinator.log.base import LogIdentity, Proposal, Record, Unreadable
from coordinator.log.sqlite import SQLiteLog
from coordinator.model import ABORT, TransactionId, id_floor
from tests.conformance.log_suite import KEY, Place

_Result = TypeVar("_Result")

READS = re.compile(r'SELECT|pragma "\w+"$|pragma "(quick|integrity)_check"')
AUDITED = frozenset({"os.link", "os.rename", "os.remove", "os.mkdir", "os.chmod"})


def edit(path: Path, *statements: str) -> None:
    """Change a log's file behind its back; no log has it open."""
    connection = apsw.Connection(str(path))
    for statement in statements:
        connection.execute(statement)
    connection.close()


def ask(path: Path, question: str) -> Any:
    """The answer of SQLite itself, without a log."""
    connection = apsw.Connection(str(path))
    try:
        return connection.execute(question).get
    finally:
        connection.close()


def with_log(path: Path, use: Callable[[Place, Any], Awaitable[_Result]]) -> _Result:
    """Open the log, use it, and close it."""

    async def run() -> _Result:
        place = Place(lambda: SQLiteLog(path))
        try:
            return await use(place, await place.open())
        finally:
            await place.close()

    return asyncio.run(run())


def identity_of(path: Path) -> LogIdentity:
    async def tell(place: Place, log: SQLiteLog) -> LogIdentity:
        return await log.open()

    return with_log(path, tell)


def make(path: Path, commits: int = 3, aborts: int = 1) -> list[TransactionId]:
    """A log with unfinished commits, the last of which has a claim, and aborts after them."""

    async def fill(place: Place, log: SQLiteLog) -> list[TransactionId]:
        ids = [place.draw() for _ in range(commits + aborts)]
        decisions = [place.commit(each, "orders", "stock") for each in ids[:commits]]
        decisions += [ABORT] * aborts
        proposals = [
            Proposal(each, decision, (KEY,) if number == commits - 1 else (), b"result")
            for number, (each, decision) in enumerate(zip(ids, decisions, strict=True))
        ]
        await asyncio.gather(*(log.propose(each) for each in proposals))
        return ids

    return with_log(path, fill)


def records_of(path: Path) -> tuple[Record | Unreadable, ...]:
    async def scan(place: Place, log: SQLiteLog) -> tuple[Record | Unreadable, ...]:
        return (await log.scan(None, 10_000, unfinished_only=False)).records

    return with_log(path, scan)


def horizon_of(path: Path) -> TransactionId:
    async def read(place: Place, log: SQLiteLog) -> TransactionId:
        return (await log.read(id_floor(0))).horizon

    return with_log(path, read)


async def above_all(log: SQLiteLog) -> TransactionId:
    """An id later than all that `make` draws."""
    return id_floor((await log.open()).created_ms + 60_000)


def start_child(work: Callable[[], object]) -> int:
    """Run in a forked process, which is told by its number. Nothing of SQLite is open here."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def end_of(child: int) -> int:
    """Wait for it: 0 when it came to its end, 1 when it raised, -9 when it was killed."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def in_child(work: Callable[[], object], kill_before: int) -> int:
    """Run in a child that is killed before one of its steps, and wait for it.

    A step is what may change something: names of files, and SQL that does not only read.
    """

    def killed() -> None:
        _kill_before(kill_before)
        work()

    return end_of(start_child(killed))


def _kill_before(step: int) -> None:
    left = step

    def count() -> bool:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return True

    def traced(cursor: object, statement: str, bindings: object) -> bool:
        return READS.match(statement) is not None or count()

    sys.addaudithook(lambda event, arguments: count() if event in AUDITED else None)
    apsw.connection_hooks.append(lambda connection: setattr(connection, "exec_trace", traced))


def kill_at_every_step(
    prepare: Callable[[], Callable[[], object]], check: Callable[[], None]
) -> int:
    """Prepare, run what `prepare` returns, killed before each of its steps in turn, and check.

    Returns how many steps there were; the last run was not killed.
    """
    step = 0
    while in_child(prepare(), step) != 0:
        check()
        step += 1
    check()
    return step
