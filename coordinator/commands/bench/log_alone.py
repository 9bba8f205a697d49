"""The decision log without databases: how many decisions a second it records, durably.

Each proposer proposes one commit of two branches after the other, and waits for its answer.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from uuid_utils import uuid7

from coordinator.commands.bench.cases import LOG
from coordinator.commands.bench.counting import LogWatch
from coordinator.commands.bench.records import Commits
from coordinator.commands.bench.results import Result, summarise
from coordinator.commands.bench.steps import Step, turned
from coordinator.commands.bench.workload import Call, Measurement, warm_and_measure
from coordinator.errors import TransactionError
from coordinator.log.base import Proposal, Stands
from coordinator.log.sqlite import SQLiteLog
from coordinator.model import TransactionId

PROPOSERS = (1, 16, 64)


class LogAlone:
    """Every measurement has a log of its own, in a new file in `folder`."""

    def __init__(self, rounds: int, seconds: float, folder: Path) -> None:
        self._folder = folder
        self._rounds = rounds
        self._seconds = seconds
        self._measured: dict[int, list[Measurement]] = {number: [] for number in PROPOSERS}

    def steps(self) -> Iterator[Step]:
        """One measurement each."""
        for round_number in range(self._rounds):
            for number in turned(PROPOSERS, round_number):
                yield Step(f"the log alone, {number} proposers", partial(self._do, number))

    def results(self) -> list[Result]:
        """Of all that has been measured so far; `clients` are the proposers."""
        return [
            summarise(LOG, number, rounds) for number, rounds in self._measured.items() if rounds
        ]

    def _do(self, proposers: int) -> None:
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            measurement = asyncio.run(propose(Path(name) / "log.db", proposers, self._seconds))
        self._measured[proposers].append(measurement)


async def propose(path: Path, proposers: int, seconds: float) -> Measurement:
    """On a new log; raises `TransactionError` unless every proposal came to stand."""
    log = SQLiteLog(path)
    identity = await log.open()
    try:
        commits = Commits(identity.id)

        async def call() -> None:
            transaction = TransactionId(str(uuid7()))
            answer = await log.propose(Proposal(transaction, commits.of(transaction)))
            if not (isinstance(answer, Stands) and answer.ours):
                raise TransactionError(f"the log answered {answer} to a new proposal")

        def calls_of(number: int) -> Call:
            return call

        return await warm_and_measure(calls_of, proposers, seconds, LogWatch(log).use)
    finally:
        await log.close()
