"""A process that uses a log in a file, to be raced, stopped and killed by the tests.

    python -m tests.crash.sqlite_process MODE PATH [ARGUMENT ...]

It prints a line for everything that a test waits for, and goes on when it is sent one.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from coordinator.errors import ConfigurationError, LogUnavailable
from coordinator.log.base import Answer, Attempt, LogIdentity, Proposal, Stands
from coordinator.log.sqlite import SQLiteLog, writer
from coordinator.log.sqlite.lock import FileLock
from coordinator.log.sqlite.store import Store
from coordinator.model import (
    ABORT,
    Branch,
    BranchId,
    Claim,
    Decision,
    LogId,
    MemberId,
    TransactionId,
    Verdict,
    Xid,
    id_floor,
)

MEMBER = MemberId("00000000000000aa")


def transaction_id(identity: LogIdentity, number: int) -> TransactionId:
    """The same ids in every process."""
    floor = id_floor(identity.created_ms + number // 1000)
    return TransactionId(f"{floor[:-12]}{number:012x}")


def commit(log: LogId, transaction: TransactionId, participant: str) -> Decision:
    branch = Branch(Xid(log, MEMBER, transaction, BranchId("0" * 16)), participant)
    return Decision(Verdict.COMMIT, (branch,))


def shown(decision: Decision) -> str:
    """A decision in one word: who is named by a commit, or abort."""
    return decision.branches[0].participant if decision.branches else "abort"


def say(*words: object) -> None:
    print(*words, flush=True)


def decision_of(answer: Answer) -> Decision:
    if not isinstance(answer, Stands):
        raise TypeError(answer)
    return answer.record.decision


async def race(path: Path, name: str, count: str) -> None:
    """Propose for all ids in an order of one's own, half of them commit, half abort."""
    log = SQLiteLog(path)
    identity = await log.open()
    say("ready")
    sys.stdin.readline()
    numbers = list(range(int(count)))
    draw = random.Random(name)
    draw.shuffle(numbers)

    async def propose() -> None:
        while numbers:
            number = numbers.pop()
            transaction = transaction_id(identity, number)
            aborts = draw.random() < 0.5
            decision = ABORT if aborts else commit(identity.id, transaction, name)
            answer = await log.propose(Proposal(transaction, decision))
            say(number, shown(decision_of(answer)), isinstance(answer, Stands) and answer.ours)

    await asyncio.gather(*(propose() for _ in range(8)))
    await log.close()


def key(number: int) -> Claim:
    """The same keys in every process."""
    return Claim("key", f"order {number}")


async def race_for_names(path: Path, name: str, count: str) -> None:
    """Name an attempt of one's own under all keys, in an order of one's own."""
    log = SQLiteLog(path)
    identity = await log.open()
    say("ready")
    sys.stdin.readline()
    numbers = list(range(int(count)))
    random.Random(name).shuffle(numbers)

    async def take() -> None:
        while numbers:
            number = numbers.pop()
            # The time of an attempt tells whose it is.
            attempt = Attempt(transaction_id(identity, number), ord(name), MEMBER)
            stands = (await log.name_attempt(key(number), attempt, None)).attempt
            assert stands is not None
            say(number, chr(stands.timeout_ms), stands == attempt)

    await asyncio.gather(*(take() for _ in range(8)))
    await log.close()


async def endless(path: Path, first: str) -> None:
    """Propose commits for ever, telling of each answer; to be killed."""
    log = SQLiteLog(path)
    identity = await log.open()
    numbers = iter(range(int(first), 1 << 40))

    async def propose() -> None:
        for number in numbers:
            transaction = transaction_id(identity, number)
            decision = commit(identity.id, transaction, "endless")
            say(number, shown(decision_of(await log.propose(Proposal(transaction, decision)))))

    await asyncio.gather(*(propose() for _ in range(4)))


async def once(path: Path, number: str, *how: str) -> None:
    """Propose one commit.

    `hold`: stop inside the transaction until a line comes. `drop`: before that, drop SQLite's own
    locks, as any library does that opens and closes a file of the database. `unguarded`: without
    the lock of our own. `die before` or `die after` the commit of the log's transaction. `forked`:
    with a child, forked before, that outlives this process.
    """
    log = SQLiteLog(path)
    identity = await log.open()
    # With a write-ahead log that is not empty, the next write appends to it and asks no lock again.
    await log.propose(Proposal(transaction_id(identity, 1_000), ABORT))
    if "unguarded" in how:
        FileLock.acquire = lambda self, timeout_seconds: None  # type: ignore[method-assign]
        FileLock.release = lambda self: None  # type: ignore[method-assign]
    if "forked" in how and os.fork() == 0:
        sys.stdin.read()
        os._exit(0)
    propose = Store.propose

    def interrupted(self: Store, new: object) -> object:
        outcome = propose(self, new)  # type: ignore[arg-type]
        if "drop" in how:
            os.close(os.open(f"{path}-shm", os.O_RDONLY))
        if "hold" in how:
            say("holding")
            sys.stdin.readline()
        if "before" in how:
            os.kill(os.getpid(), signal.SIGKILL)
        return outcome

    Store.propose = interrupted  # type: ignore[method-assign, assignment]
    # One statement is a transaction of its own, which nothing here can get into.
    Store.record_at_once = lambda self, proposals: False  # type: ignore[method-assign]
    if "after" in how:
        vars(writer)["deliver"] = lambda *answers: os.kill(os.getpid(), signal.SIGKILL)
    say("ready")
    transaction = transaction_id(identity, int(number))
    decision = commit(identity.id, transaction, "once")
    answer = await log.propose(Proposal(transaction, decision))
    say(shown(decision_of(answer)), isinstance(answer, Stands) and answer.ours)
    await log.close()


async def full_disk(path: Path) -> None:
    """Let the disk be full at opening and later, and have space again."""

    def limit_files_to(size: int) -> None:
        # The limit is on the size of each file; reaching it is what a full disk looks like.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    limit_files_to(0)
    try:
        await SQLiteLog(path).open()
    except ConfigurationError as error:
        say(error)
    limit_files_to(resource.RLIM_INFINITY)
    log = SQLiteLog(path)
    identity = await log.open()

    async def propose(number: int) -> Answer:
        transaction = transaction_id(identity, number)
        decision = commit(identity.id, transaction, "full")
        return await log.propose(Proposal(transaction, decision, attachment=b"x" * 50_000))

    say(shown(decision_of(await propose(0))))
    limit_files_to(os.stat(f"{path}-wal").st_size + 10_000)
    for _ in range(2):
        try:
            await propose(1)
        except LogUnavailable as error:
            say(error)
    say(shown(decision_of(await log.propose(Proposal(transaction_id(identity, 0), ABORT)))))
    limit_files_to(resource.RLIM_INFINITY)
    answer = await propose(1)
    say(shown(decision_of(answer)), isinstance(answer, Stands) and answer.ours)
    await log.close()


def fork(path: Path) -> None:
    """A copy of an open log in a child says so; one of the child's own works; the parent's too.

    What each of them was answered stands, also what the child wrote after the parent had closed.
    """
    log = SQLiteLog(path)
    loop = asyncio.new_event_loop()
    identity = loop.run_until_complete(log.open())
    from_child, to_child = os.pipe(), os.pipe()

    async def propose(log: SQLiteLog, number: int) -> str:
        proposal = Proposal(transaction_id(identity, number), ABORT)
        return shown(decision_of(await log.propose(proposal)))

    async def in_the_child() -> None:
        try:
            await propose(log, 1)
        except ConfigurationError as error:
            say(error)
        own = SQLiteLog(path)
        say("same log", await own.open() == identity)
        say("child", await propose(own, 2))
        os.write(from_child[1], b"x")
        os.read(to_child[0], 1)
        say("child", await propose(own, 4))
        await own.close()

    child = os.fork()
    if child == 0:
        asyncio.run(in_the_child())
        return  # and the interpreter ends in order, with the parent's objects in its memory
    os.read(from_child[0], 1)
    say("parent", loop.run_until_complete(propose(log, 3)))
    loop.run_until_complete(log.close())
    os.write(to_child[1], b"x")
    _, status = os.waitpid(child, 0)
    say("status", status)
    loop.run_until_complete(log.open())
    readings = [loop.run_until_complete(log.read(transaction_id(identity, n))) for n in (2, 3, 4)]
    say("stand", [reading.record is not None for reading in readings])
    loop.run_until_complete(log.close())
    loop.close()


MODES: dict[str, Callable[..., object]] = {
    "race": race,
    "names": race_for_names,
    "endless": endless,
    "once": once,
    "full": full_disk,
    "fork": fork,
}

if __name__ == "__main__":
    mode, path, *arguments = sys.argv[1:]
    running = MODES[mode](Path(path), *arguments)
    if asyncio.iscoroutine(running):
        asyncio.run(running)
