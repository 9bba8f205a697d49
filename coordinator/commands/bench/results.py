"""Medians over the rounds, with their spread and how they compare.

A ratio is the median of the rounds' own ratios, since what is compared ran within the same moments;
what a machine does in other moments falls out.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import msgspec

from coordinator.commands.bench.workload import Measurement

Rounds = Sequence[Measurement]


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """One case with one number of clients; the lowest and highest round show the spread."""

    case: str
    clients: int
    per_second: float
    p50_ms: float
    p99_ms: float
    rounds: int
    per_second_lowest: float
    per_second_highest: float
    cpu_ms: float
    servers_cpu_ms: float | None = None
    log_writes: float | None = None
    lazy_writes: float | None = None
    fsyncs: float | None = None
    memory_mb: float | None = None
    baseline: str | None = None
    """The case that the next three compare with."""
    ratio_to_baseline: float | None = None
    p50_to_baseline: float | None = None
    memory_more_mb: float | None = None
    ratio_to_unbounded: float | None = None


def summarise(case: str, clients: int, rounds: Rounds) -> Result:
    """The medians alone."""
    rates = [each.per_second for each in rounds]
    return Result(
        case=case,
        clients=clients,
        per_second=round(statistics.median(rates), 1),
        p50_ms=round(statistics.median(each.p50_ms for each in rounds), 3),
        p99_ms=round(statistics.median(each.p99_ms for each in rounds), 3),
        rounds=len(rounds),
        per_second_lowest=round(min(rates), 1),
        per_second_highest=round(max(rates), 1),
        cpu_ms=round(statistics.median(each.cpu_ms for each in rounds), 4),
        servers_cpu_ms=_median([each.servers_cpu_ms for each in rounds]),
        log_writes=_median([each.log_writes for each in rounds]),
        lazy_writes=_median([each.lazy_writes for each in rounds]),
        fsyncs=_median([each.fsyncs for each in rounds]),
    )


def best(names: Sequence[str], measured: Mapping[str, Rounds]) -> str | None:
    """The case with the highest median rate among those that were measured."""
    there = [name for name in names if measured.get(name)]
    return max(
        there,
        key=lambda name: statistics.median(m.per_second for m in measured[name]),
        default=None,
    )


def ratio(of: Rounds, to: Rounds) -> float | None:
    """Of the rates, round by round."""
    return _ratio([each.per_second for each in of], [each.per_second for each in to])


def ratio_of_p50(of: Rounds, to: Rounds) -> float | None:
    """Of the median latencies, round by round."""
    return _ratio([each.p50_ms for each in of], [each.p50_ms for each in to])


def median_memory(rounds: Rounds) -> float | None:
    """In MB; only of measurements in processes of their own it says something."""
    return _median([each.memory_mb for each in rounds], digits=1)


def more_memory(of: Rounds, than: Rounds) -> float | None:
    """The difference of the medians, in MB."""
    here, there = median_memory(of), median_memory(than)
    return None if here is None or there is None else round(here - there, 1)


def _ratio(of: Sequence[float], to: Sequence[float]) -> float | None:
    # After an interruption one may have been measured once more than the other.
    return _median([a / b for a, b in zip(of, to, strict=False)], digits=3)


def _median(values: Sequence[float | None], digits: int = 4) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), digits) if known else None
