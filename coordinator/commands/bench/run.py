"""Interleaved rounds of all cases, and the medians of what they gave.

Rounds are interleaved, and the order of the cases turns with them, so that whatever the machine
does meanwhile falls on all of them. Ratios are against the best loop by hand of the same run with
the same number of clients, the baseline.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence

import msgspec
from rich import box
from rich.table import Table

from coordinator.commands.bench.handwritten import HandWritten
from coordinator.commands.bench.syncpoint import Syncpoint
from coordinator.commands.bench.workload import Case, Measurement, measure
from coordinator.commands.output import messages, print_json, progress_bar, results
from coordinator.commands.servers import server_version, two_servers
from coordinator.errors import ConfigurationError

AT_ONCE = 8
CLIENTS_MAX = 256

BY_HAND = "by-hand-unbounded"
BY_HAND_BOUNDED = f"by-hand-{AT_ONCE}-at-once"
SYNCPOINT = "syncpoint-sqlite"

CASES: dict[str, Callable[[], Case]] = {
    BY_HAND: lambda: HandWritten(None),
    BY_HAND_BOUNDED: lambda: HandWritten(AT_ONCE),
    SYNCPOINT: lambda: Syncpoint(AT_ONCE),
}


class Result(msgspec.Struct, frozen=True):
    """Medians over the rounds; the lowest and highest round show the spread."""

    case: str
    clients: int
    per_second: float
    p50_ms: float
    p99_ms: float
    per_second_lowest: float
    per_second_highest: float
    ratio: float
    baseline: str
    rounds: int


def parse_clients(text: str) -> list[int]:
    """The numbers in `1,8,32`, without repeats; `ConfigurationError` for anything else."""
    try:
        numbers = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise ConfigurationError(f"--clients {text}: write numbers, such as 1,8,32") from error
    if not all(1 <= number <= CLIENTS_MAX for number in numbers):
        raise ConfigurationError(f"--clients {text}: each is 1 to {CLIENTS_MAX}")
    return numbers


def run(*, clients: Sequence[int], rounds: int, seconds: float, as_json: bool) -> int:
    """Measure on two servers started for it, and tell what came out."""
    slots = 2 * max(clients) + 16
    with two_servers(slots, {"max_connections": str(slots + 16)}) as servers:
        urls = [server.create_database("bench") for server in servers]
        machine = _machine(server_version(urls[0]))
        if not as_json:
            results().print(machine)
        measured = _measure_all(urls, clients, rounds, seconds)
    found = [result for number in clients for result in _summarise(measured, number)]
    if as_json:
        for result in found:
            print_json({**msgspec.to_builtins(result), "machine": machine})
    else:
        results().print(_table(found))
    return 0


Measured = dict[tuple[str, int], list[Measurement]]


def _measure_all(
    urls: Sequence[str], clients: Sequence[int], rounds: int, seconds: float
) -> Measured:
    plan = [
        (name, number)
        for round_number in range(rounds)
        for number in clients
        for name in _turned(_cases(number), round_number)
    ]
    measured: Measured = {}
    with progress_bar(messages()) as bar:
        task = bar.add_task("measuring", total=len(plan))
        for name, number in plan:
            bar.update(task, description=f"{name}, {number} clients")
            measurement = measure(CASES[name](), urls, number, seconds)
            measured.setdefault((name, number), []).append(measurement)
            bar.advance(task)
    return measured


def _cases(clients: int) -> list[str]:
    """With so few clients the bound bounds nothing, and both loops by hand are the same."""
    return [name for name in CASES if name != BY_HAND_BOUNDED or clients > AT_ONCE]


def _turned(names: list[str], by: int) -> list[str]:
    places = by % len(names)
    return names[places:] + names[:places]


def _summarise(measured: Measured, clients: int) -> list[Result]:
    rates = {
        name: [measurement.per_second for measurement in measured[name, clients]]
        for name in _cases(clients)
    }
    by_hand = [name for name in rates if name != SYNCPOINT]
    baseline = max(by_hand, key=lambda name: statistics.median(rates[name]))
    return [
        Result(
            case=name,
            clients=clients,
            per_second=round(statistics.median(rates[name]), 1),
            p50_ms=round(statistics.median(m.p50_ms for m in measured[name, clients]), 3),
            p99_ms=round(statistics.median(m.p99_ms for m in measured[name, clients]), 3),
            per_second_lowest=round(min(rates[name]), 1),
            per_second_highest=round(max(rates[name]), 1),
            ratio=round(statistics.median(rates[name]) / statistics.median(rates[baseline]), 3),
            baseline=baseline,
            rounds=len(rates[name]),
        )
        for name in rates
    ]


def _machine(postgresql: str) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{cores} cores, {platform.system()} {platform.machine()}, "
        f"{platform.python_implementation()} {platform.python_version()}, PostgreSQL {postgresql}"
    )


def _table(found: Sequence[Result]) -> Table:
    table = Table(box=box.SIMPLE, caption="ratio: of the fastest loop by hand with as many clients")
    table.add_column("clients", justify="right")
    table.add_column("case", no_wrap=True)
    for heading in ("per second", "lowest - highest", "p50 ms", "p99 ms", "ratio"):
        table.add_column(heading, justify="right")
    previous = found[0].clients
    for result in found:
        if result.clients != previous:
            table.add_section()
        previous = result.clients
        table.add_row(
            str(result.clients),
            result.case,
            f"{result.per_second:,.0f}",
            f"{result.per_second_lowest:,.0f} - {result.per_second_highest:,.0f}",
            f"{result.p50_ms:.1f}",
            f"{result.p99_ms:.1f}",
            f"{result.ratio:.2f}",
        )
    return table
