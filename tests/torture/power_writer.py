"""A process that decides as fast as it can, until it is killed.

    python -m tests.torture.power_writer LOG ACKNOWLEDGED SYNCHRONOUS FIRST NAME

Several proposers share the log. What each was answered goes to the file ACKNOWLEDGED, which is on
another file system: a line an answer, with the monotonic time at which it was there. Two such
processes with the same FIRST propose different decisions under the same ids.
SYNCHRONOUS is FULL, as it has to be, or the control's planted bug.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import apsw

from coordinator.errors import LogUnavailable
from coordinator.log.base import Attempt, LogIdentity, Proposal
from coordinator.log.sqlite import SQLiteLog, file
from coordinator.model import ABORT, Claim
from tests.crash.sqlite_process import MEMBER, commit, decision_of, shown, transaction_id

PROPOSERS = 16
NEAR = 64
"""How far the order of two processes may differ: so both meet most ids at about the same time."""


def plant(synchronous: str) -> None:
    """Open files with less durability than they need."""
    open_file = file.open_file

    def without_durability(path: Path) -> tuple[apsw.Connection, LogIdentity]:
        connection, identity = open_file(path)
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        return connection, identity

    vars(file)["open_file"] = without_durability


def numbers(first: int, draw: random.Random) -> Iterator[int]:
    """All numbers from the first on, nearly in order."""
    while True:
        near = list(range(first, first + NEAR))
        draw.shuffle(near)
        yield from near
        first += NEAR


def note(answers: int, what: str) -> None:
    os.write(answers, f"{time.monotonic():.6f} {what}\n".encode())


async def propose(
    log: SQLiteLog, identity: LogIdentity, left: Iterator[int], name: str, answers: int
) -> None:
    draw = random.Random(f"{name} {os.getpid()}")
    for number in left:
        transaction = transaction_id(identity, number)
        claim = Claim("key", f"order {number}")
        if draw.random() < 0.2:
            state = await log.name_attempt(claim, Attempt(transaction, 1, MEMBER), None)
            if state.attempt is not None:
                note(answers, f"name {claim.key} {state.attempt.transaction}")
        aborts = draw.random() < 0.5
        decision = ABORT if aborts else commit(identity.id, transaction, name)
        claims = (claim,) if draw.random() < 0.2 else ()
        proposal = Proposal(transaction, decision, claims, attachment=b"x" * draw.randrange(2000))
        told = shown(decision_of(await log.propose(proposal)))
        note(answers, f"decision {transaction} {told}")


async def main(path: str, answers_path: str, synchronous: str, first: str, name: str) -> None:
    if synchronous != "FULL":
        plant(synchronous)
    answers = os.open(answers_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log = SQLiteLog(path)
    identity = await log.open()
    left = numbers(int(first), random.Random(name))
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(PROPOSERS):
                group.create_task(propose(log, identity, left, name, answers))
    except* LogUnavailable as errors:
        note(answers, f"unavailable {errors.exceptions[0]}")
    await asyncio.Event().wait()  # with its files open, as a process that was cut has them


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it dies with its parent
    asyncio.run(main(*sys.argv[1:]))
