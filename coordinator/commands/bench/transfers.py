"""The transfers: every case with every number of clients, in interleaved rounds.

The order of the cases turns from round to round, so that whatever one leaves to the next, and
whatever the machine does meanwhile, falls on all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial

from msgspec.structs import replace

from coordinator.commands.bench.cases import CASES, UNBOUNDED, baselines, cases_for
from coordinator.commands.bench.results import Result, best, ratio, ratio_of_p50, summarise
from coordinator.commands.bench.steps import Step, turned
from coordinator.commands.bench.workload import Databases, Measurement, measure


class Transfers:
    def __init__(
        self,
        databases: Databases,
        clients: Sequence[int],
        rounds: int,
        seconds: float,
        only: Collection[str],
    ) -> None:
        self._databases = databases
        self._rounds = rounds
        self._seconds = seconds
        self._cases = {number: cases_for(number, only) for number in clients}
        self._measured: dict[int, dict[str, list[Measurement]]] = {
            number: {name: [] for name in names} for number, names in self._cases.items()
        }

    def steps(self) -> Iterator[Step]:
        """One measurement each."""
        for round_number in range(self._rounds):
            for number, names in self._cases.items():
                for name in turned(names, round_number):
                    yield Step(f"{name}, {number} clients", partial(self._do, number, name))

    def results(self) -> list[Result]:
        """Of all that has been measured so far."""
        return [
            result for number in self._cases for result in _compare(number, self._measured[number])
        ]

    def _do(self, clients: int, name: str) -> None:
        measurement = measure(CASES[name](), self._databases, clients, self._seconds)
        self._measured[clients][name].append(measurement)


def _compare(clients: int, measured: dict[str, list[Measurement]]) -> Iterator[Result]:
    baseline = best(baselines(clients), measured)
    unbounded = measured.get(UNBOUNDED)
    for name, rounds in measured.items():
        if not rounds:
            continue
        result = summarise(name, clients, rounds)
        if baseline is not None:
            result = replace(
                result,
                baseline=baseline,
                ratio_to_baseline=ratio(rounds, measured[baseline]),
                p50_to_baseline=ratio_of_p50(rounds, measured[baseline]),
            )
        if unbounded:
            result = replace(result, ratio_to_unbounded=ratio(rounds, unbounded))
        yield result
