"""Whether a log that has long been in use costs anything: throughput and memory.

Three logs, each used by processes of their own: a new one, one full of finished transactions that
are kept, and one full of those that are older than the retention, so that the sweep forgets some of
them while it is measured.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from coordinator.commands.bench.old_log import CHUNKS, fill
from coordinator.commands.bench.one_process import Order, measure_apart
from coordinator.commands.bench.results import (
    Result,
    median_memory,
    more_memory,
    ratio,
    ratio_of_p50,
    summarise,
)
from coordinator.commands.bench.steps import Step, turned
from coordinator.commands.bench.workload import Databases, Measurement
from coordinator.config import Settings

CLIENTS = 32
SECONDS_TIMES = 2
"""A measurement is so many times as long as others, so that forgetting falls into it."""

EMPTY, KEPT, FORGETTING = CASES = ("growth-empty", "growth-kept", "growth-forgetting")

_DAY_SECONDS = 86_400.0


class Growth:
    """The files are kept in `folder`; the old ones have `finished` transactions."""

    def __init__(
        self, databases: Databases, rounds: int, seconds: float, finished: int, folder: Path
    ) -> None:
        self._databases = databases
        self._rounds = rounds
        self._seconds = SECONDS_TIMES * seconds
        self._folder = folder
        self._finished = finished
        self._filling = fill(folder / KEPT, finished)
        self._measured: dict[str, list[Measurement]] = {name: [] for name in CASES}

    def steps(self) -> Iterator[Step]:
        """Filling a log in some steps, then one measurement each."""
        label = f"filling a log with {self._finished:,} transactions"
        for _ in range(CHUNKS):
            yield Step(label, self._fill)
        yield Step(label, self._copy)
        for round_number in range(self._rounds):
            for name in turned(CASES, round_number):
                yield Step(name, partial(self._do, name, round_number))

    def results(self) -> list[Result]:
        """Of all that has been measured so far."""
        return [self._compare(name, rounds) for name, rounds in self._measured.items() if rounds]

    def _fill(self) -> None:
        next(self._filling)

    def _copy(self) -> None:
        self._filling.close()
        shutil.copyfile(self._folder / KEPT, self._folder / FORGETTING)

    def _do(self, name: str, round_number: int) -> None:
        # The old ones gain and lose some thousands of a million; a new one is new each time.
        file = f"{name}-{round_number}" if name == EMPTY else name
        retention = Settings().retention if name == FORGETTING else _DAY_SECONDS
        order = Order(self._databases, CLIENTS, self._seconds, str(self._folder / file), retention)
        self._measured[name].append(measure_apart(order))

    def _compare(self, name: str, rounds: list[Measurement]) -> Result:
        result = summarise(name, CLIENTS, rounds)
        result = replace(result, memory_mb=median_memory(rounds))
        empty = self._measured[EMPTY]
        if name == EMPTY or not empty:
            return result
        return replace(
            result,
            baseline=EMPTY,
            ratio_to_baseline=ratio(rounds, empty),
            p50_to_baseline=ratio_of_p50(rounds, empty),
            memory_more_mb=more_memory(rounds, empty),
        )
